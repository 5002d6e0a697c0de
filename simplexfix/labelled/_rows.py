"""[rows, d] features as callers have them, read in blocks: they may be mapped files larger than memory."""

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
SLICE_BYTES = 64 << 20  # of float64, of `row_slices`
_BLOCK_BYTES = 2**25  # of float32: past L2, so that calls cost nothing, and far below what a gallery takes


class FeatureRows:
    """[n, d] features under the name that the caller knows them by.

    Attributes:
        name: for messages.
        rows: as given: a tensor, an array or a mapped file.
        at: [n] int64, which of these rows count; None: all of them.

    Raises:
        TypeError, ValueError: as `read_features`.
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
        """Its name, which tensors and arrays share."""
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
        """Columns [start, stop), the leading ones as a rule; itself where these are all."""
        if not start and stop >= self.width:
            return self
        out = copy(self)
        out.rows, out._hashes = self.rows[:, start:stop], None
        return out

    def take(self, at: NDArray[np.int64]) -> FeatureRows:
        """These rows, which are read when they are asked for."""
        out = copy(self)
        out.at = at if self.at is None else self.at[at]
        out._hashes = None if self._hashes is None else self._hashes[at]
        return out

    def gather(self, at: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of these rows in their own dtype, on the host; float32 for bfloat16, which NumPy lacks."""
        taken = self.take(at)
        source = taken._source(0, len(at))
        if isinstance(source, Tensor):
            source = source.detach().resolve_neg().cpu()
            return (source.float() if source.dtype == torch.bfloat16 else source).numpy()
        return source.astype(np.float32) if source.dtype.name == "bfloat16" else np.asarray(source)

    def unit(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n, d] these rows, L2-normalised in float64 from their own dtype.

        Raises:
            ValueError: a row holds nan or inf, by its number.
        """
        rows = self.gather(at).astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(np.abs(rows).max(axis=1)))
        if len(bad):
            raise self._not_finite(0, int(at[bad[0]]), rows[bad[0]])
        return unit_rows(rows)

    def block(self, begin: int, end: int) -> NDArray[np.float32]:
        """Rows [begin, end) as dense float32; a view of the caller's numbers where they are that already.

        Raises:
            ValueError: a row holds nan or inf, or a number past float32's range, by its number.
        """
        source = self._source(begin, end)
        block = to_float32(source)
        with np.errstate(over="ignore", invalid="ignore"):
            suspects = np.flatnonzero(~np.isfinite(row_squares(block)))  # a finite row's may overflow too
        for row in suspects:
            if not np.isfinite(block[row]).all():
                raise self._not_finite(begin, int(row), source[int(row)])
        return block

    def block_tensor(self, begin: int, end: int) -> Tensor:
        """The same as a tensor, on the device of the rows; a copy of what is read-only, which torch does not know."""
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
        """All rows as `block_tensor` gives them."""
        out = self.block_tensor(0, len(self))
        self.release()
        return out

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, block) one after the other; `rows` at a time, or as many as make 32 MiB."""
        rows = rows or max(1, _BLOCK_BYTES // (4 * self.width))
        for begin in range(0, len(self), rows):
            yield begin, self.block(begin, min(len(self), begin + rows))
        self.release()

    def hashes(self) -> NDArray[np.int64]:
        """[n] of each row's float32 numbers, the same for the same bits within a process; 0 of a row that is all zero.

        Reads all rows once, and never again.

        Raises:
            ValueError: as `block`; a row of float64 whose numbers are all below float32's range.
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
        """How many rows are all zero: they have no direction, and find what comes first."""
        return int((self.hashes() == 0).sum())

    def tensor(self) -> Tensor:
        """All rows in their own dtype: the caller's tensor, or a copy of an array (torch has no read-only tensors)."""
        source = self._source(0, len(self))
        if isinstance(source, Tensor):
            return source
        if source.dtype.name == "bfloat16":
            return torch.from_numpy(np.array(source).view(np.int16)).view(torch.bfloat16)
        tensor = torch.from_numpy(np.array(source, dtype=source.dtype.newbyteorder("="), order="C"))
        self.release()
        return tensor

    def release(self) -> None:
        """Takes a read-only mapped file's pages out of this process; they stay in the system's cache.

        Without it a pass over T versions ends with all of their bytes counted as this process's memory.
        """
        root: object = self.rows
        while isinstance(root, np.ndarray):
            if isinstance(root, np.memmap) and root.mode != "r":
                return  # a private mapping's changes would be lost with its pages
            root = root.base
        if isinstance(root, mmap.mmap) and hasattr(root, "madvise"):
            root.madvise(mmap.MADV_DONTNEED)

    def _source(self, begin: int, end: int) -> Tensor | NDArray[Any]:
        if self.at is None:
            return self.rows[begin:end]
        at = self.at[begin:end]
        if len(at) and np.array_equal(at, np.arange(at[0], at[0] + len(at))):  # nothing need be copied
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
            raise ValueError(f"{self.name} row {row} holds numbers below float32's range alone: scale them up")

    def _given(self, row: int) -> int:
        """The number of a row among those that the caller gave."""
        return row if self.at is None else int(self.at[row])


def to_float32(rows: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """Dense float32 on the host, a view of rows that are that already; a number past float32's range becomes inf."""
    if isinstance(rows, Tensor):
        numbers: NDArray[np.float32] = rows.detach().resolve_neg().float().cpu().contiguous().numpy()
        return numbers
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows, dtype=np.float32)


def row_slices(count: int, width: int) -> Iterator[slice]:
    """Slices of rows, each of at most SLICE_BYTES as float64, and of one row at least."""
    step = max(1, SLICE_BYTES // (8 * width))
    for begin in range(0, count, step):
        yield slice(begin, min(count, begin + step))


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Finite rows, L2-normalised in float64; a zero row stays zero."""
    unit = rows.astype(np.float64)
    # by the largest number first: squares of float64 may overflow
    largest = np.abs(unit).max(axis=1)
    unit /= np.where(largest > 0, largest, 1)[:, None]
    norm = np.sqrt(np.einsum("ij,ij->i", unit, unit))
    unit /= np.where(norm > 0, norm, 1)[:, None]
    return unit


def row_squares(rows: NDArray[_Float]) -> NDArray[_Float]:
    """[n] each row's product with itself, in the rows' own dtype, by the matrix product that is there for any NumPy."""
    squares: NDArray[_Float] = np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0]
    return squares
