"""[rows, d] features in the caller's storage, read in blocks; they may be mapped files larger than memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from copy import copy
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._columns import Rows, read_features

__all__ = ["FeatureRows", "row_slices", "row_squares", "to_float32", "unit_rows"]

_Float = TypeVar("_Float", bound=np.floating)
SLICE_BYTES = 64 << 20  # float64 bytes per slice of `row_slices`
_BLOCK_BYTES = 2**25  # float32 bytes per block: large enough to hide call overhead, small against a gallery


class FeatureRows:
    """[n, d] features, or a selection of their rows, with a name for error messages.

    Attributes:
        name: name of the features in error messages.
        rows: tensor, array or mapped file that was given.
        at: [n] int64, indices of the selected rows; None for all rows.

    Raises:
        TypeError, ValueError: `rows` are not features, as in `read_features`.
    """

    def __init__(self, name: str, rows: Rows) -> None:
        self.name = name
        self.rows: Tensor | NDArray[Any] = read_features(name, rows)
        self.at: NDArray[np.int64] | None = None
        self._hashes: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.at is None else len(self.at)

    def __repr__(self) -> str:
        return f"FeatureRows({self.name!r}, [{len(self)}, {self.width}] {self.dtype})"

    @property
    def width(self) -> int:
        return int(self.rows.shape[1])

    @property
    def dtype(self) -> str:
        """Name of the dtype, such as "float32", the same for tensors and arrays."""
        dtype = self.rows.dtype
        return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else str(dtype.name)

    @property
    def on_cpu(self) -> bool:
        return not isinstance(self.rows, Tensor) or self.rows.device.type == "cpu"

    def renamed(self, name: str) -> FeatureRows:
        out = copy(self)
        out.name = name
        return out

    def columns(self, stop: int, start: int = 0) -> FeatureRows:
        """Returns columns [start, stop); returns self if these are all columns."""
        if not start and stop >= self.width:
            return self
        out = copy(self)
        out.rows, out._hashes = self.rows[:, start:stop], None
        return out

    def take(self, at: NDArray[np.int64]) -> FeatureRows:
        """Selects rows by index; data are read lazily."""
        out = copy(self)
        out.at = at if self.at is None else self.at[at]
        out._hashes = None if self._hashes is None else self._hashes[at]
        return out

    def gather(self, at: NDArray[np.int64]) -> NDArray[Any]:
        """Returns rows on the host in their own dtype, or in float32 for bfloat16, which NumPy lacks; maybe a view."""
        taken = self.take(at)
        source = taken._source(0, len(at))
        if isinstance(source, Tensor):
            source = source.detach().resolve_neg().cpu()
            return (source.float() if source.dtype == torch.bfloat16 else source).numpy()
        return source.astype(np.float32) if source.dtype.name == "bfloat16" else np.asarray(source)

    def unit(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the rows at these indices, L2-normalised, as [n, d] float64.

        Raises:
            ValueError: a row holds nan or inf; the message names it.
        """
        rows = self.gather(at).astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(np.abs(rows).max(axis=1)))
        if len(bad):
            raise self._not_finite(0, int(at[bad[0]]), rows[bad[0]])
        return unit_rows(rows)

    def block(self, begin: int, end: int) -> NDArray[np.float32]:
        """Returns rows [begin, end) as dense float32; a view if the rows have this layout and dtype already.

        Raises:
            ValueError: a row holds nan, inf or a number beyond float32's range; the message names it.
        """
        source = self._source(begin, end)
        block = to_float32(source)
        with np.errstate(over="ignore", invalid="ignore"):
            suspects = np.flatnonzero(~np.isfinite(row_squares(block)))  # the square of a finite row may overflow too
        for row in suspects:
            if not np.isfinite(block[row]).all():
                raise self._not_finite(begin, int(row), source[int(row)])
        return block

    def block_tensor(self, begin: int, end: int) -> Tensor:
        """Returns `block` as a tensor on the rows' device; read-only arrays are copied, as torch has no such flag."""
        if not self.on_cpu:
            source = self._source(begin, end)
            assert isinstance(source, Tensor)
            on_device = source.detach().float()
            bad = (~on_device.isfinite()).any(1).nonzero()
            if len(bad):
                raise self._not_finite(begin, int(bad[0]), source[int(bad[0])])
            return on_device
        block = self.block(begin, end)
        return torch.from_numpy(block if block.flags.writeable else block.copy())

    def whole(self) -> Tensor:
        """Returns all rows as `block_tensor` does."""
        out = self.block_tensor(0, len(self))
        self.release()
        return out

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yields (first row, block) in order, `rows` rows per block, or 32 MiB per block for None."""
        rows = rows or max(1, _BLOCK_BYTES // (4 * self.width))
        for begin in range(0, len(self), rows):
            yield begin, self.block(begin, min(len(self), begin + rows))
        self.release()

    def hashes(self) -> NDArray[np.int64]:
        """Returns a hash of each row's float32 bits, [n] int64; 0 for a row of zeros.

        Hashes are comparable within one process.  They are computed on the first call, which reads all rows.

        Raises:
            ValueError: a row holds nan, inf or a number beyond float32's range, or all numbers of a float64 row
                underflow float32.
        """
        if self._hashes is None:
            hashes = np.zeros(len(self), dtype=np.int64)
            for begin, block in self.blocks():
                some = block.any(axis=1)
                if self.dtype == "float64" and not some.all():
                    self._check_not_lost(begin, np.flatnonzero(~some))
                for row in np.flatnonzero(some):
                    hashes[begin + row] = hash(block[row].tobytes())
            self._hashes = hashes
        return self._hashes

    @property
    def zero_rows(self) -> int:
        """Number of rows of zeros; such a row has no direction, so its cosine to every vector is 0."""
        return int((self.hashes() == 0).sum())

    def tensor(self) -> Tensor:
        """Returns all rows in their own dtype: the caller's tensor, or a copy of the caller's array."""
        source = self._source(0, len(self))
        if isinstance(source, Tensor):
            return source
        if source.dtype.name == "bfloat16":
            return torch.from_numpy(np.array(source).view(np.int16)).view(torch.bfloat16)
        tensor = torch.from_numpy(np.array(source, dtype=source.dtype.newbyteorder("="), order="C"))
        self.release()
        return tensor

    def release(self) -> None:
        """Unmaps the resident pages of a read-only mapped file; they stay in the system's page cache.

        Otherwise a pass over T versions would end with all their bytes in this process's resident set.
        """
        root: object = self.rows
        while isinstance(root, np.ndarray):
            if isinstance(root, np.memmap) and root.mode != "r":
                return  # dropping pages of a private mapping would lose its changes
            root = root.base
        if isinstance(root, mmap.mmap) and hasattr(root, "madvise"):
            root.madvise(mmap.MADV_DONTNEED)

    def _source(self, begin: int, end: int) -> Tensor | NDArray[Any]:
        if self.at is None:
            return self.rows[begin:end]
        at = self.at[begin:end]
        if len(at) and np.array_equal(at, np.arange(at[0], at[0] + len(at))):  # contiguous rows are a view
            return self.rows[at[0] : at[0] + len(at)]
        return self.rows[torch.tensor(at, device=self.rows.device)] if isinstance(self.rows, Tensor) else self.rows[at]

    def _not_finite(self, begin: int, row: int, source: Any) -> ValueError:
        finite = bool(source.isfinite().all()) if isinstance(source, Tensor) else bool(np.isfinite(source).all())
        what = "a number past float32's range: scale its features down" if finite else "nan or inf"
        return ValueError(f"{self.name} row {self._given(begin + row)} holds {what}")

    def _check_not_lost(self, begin: int, empty: NDArray[np.int64]) -> None:
        source = self.take(begin + empty)._source(0, len(empty))
        lost = np.flatnonzero(np.asarray(source.any(1)))
        if len(lost):
            row = self._given(begin + int(empty[lost[0]]))
            raise ValueError(
                f"{self.name} row {row} has only numbers below float32's range: multiply the features by a constant"
            )

    def _given(self, row: int) -> int:
        """Index of a row in the array that was given."""
        return row if self.at is None else int(self.at[row])


def to_float32(rows: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """Returns rows as dense float32 on the host, as a view where possible; numbers beyond its range become inf."""
    if isinstance(rows, Tensor):
        numbers: NDArray[np.float32] = rows.detach().resolve_neg().float().cpu().contiguous().numpy()
        return numbers
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows, dtype=np.float32)


def row_slices(count: int, width: int) -> Iterator[slice]:
    """Yields slices of at least one row and at most SLICE_BYTES bytes in float64."""
    step = max(1, SLICE_BYTES // (8 * width))
    for begin in range(0, count, step):
        yield slice(begin, min(count, begin + step))


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Returns finite rows, L2-normalised in float64; a zero row stays zero."""
    unit = rows.astype(np.float64)
    # scale by the largest number first: squares of float64 may overflow
    largest = np.abs(unit).max(axis=1)
    unit /= np.where(largest > 0, largest, 1)[:, None]
    norm = np.sqrt(np.einsum("ij,ij->i", unit, unit))
    unit /= np.where(norm > 0, norm, 1)[:, None]
    return unit


def row_squares(rows: NDArray[_Float]) -> NDArray[_Float]:
    """Returns the squared L2 norm of each row, [n] in the rows' dtype; np.vecdot would need NumPy 2."""
    squares: NDArray[_Float] = np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0]
    return squares
