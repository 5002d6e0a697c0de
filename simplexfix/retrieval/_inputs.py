"""Features and labels as callers have them: tensors, arrays, memory-mapped files.  Features are read in blocks."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_features

__all__ = ["Features", "Ids", "Rows", "SearchInput", "read_ids", "read_labels", "row_squares"]

Rows: TypeAlias = "Tensor | NDArray[np.floating]"
Ids: TypeAlias = "Tensor | NDArray[np.integer] | Sequence[int]"

_Float = TypeVar("_Float", bound=np.floating)
_BLOCK_BYTES = 2**25  # of float32: past L2, so that calls cost nothing, and far below what a gallery takes


class Features:
    """[n, d] features under the name that the caller knows them by.

    Raises:
        TypeError: not a tensor or array of floating numbers.
        ValueError: not [n, d], or no rows unless they `may_be_empty`, as a rank's share of a gallery.
    """

    def __init__(self, name: str, rows: Rows, *, may_be_empty: bool = False) -> None:
        if isinstance(rows, Tensor):
            check_features(name, rows)
        elif not isinstance(rows, np.ndarray):
            raise TypeError(f"{name} must be a torch.Tensor or a NumPy array, got {type(rows).__name__}")
        elif np.ma.isMaskedArray(rows):
            raise TypeError(f"{name} must have no masked numbers; pass those rows that count")
        elif rows.dtype.kind != "f" or rows.dtype.itemsize > 8:
            raise TypeError(f"{name} must be float32, float64 or float16, got {rows.dtype}")
        if rows.ndim != 2 or not rows.shape[1]:
            raise ValueError(f"{name} must have 2 dimensions, [rows, d] with d >= 1, got {list(rows.shape)}")
        if not len(rows) and not may_be_empty:
            raise ValueError(f"{name} has no rows")
        self.name = name
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return int(self.rows.shape[1])

    @property
    def dtype(self) -> str:
        """Its name, which tensors and arrays share."""
        return str(self.rows.dtype).removeprefix("torch.")

    @property
    def on_cpu(self) -> bool:
        return not isinstance(self.rows, Tensor) or self.rows.device.type == "cpu"

    def block(self, begin: int, end: int) -> NDArray[np.float32]:
        """Rows [begin, end) as dense float32; a view of the caller's numbers where they are that already.

        Raises:
            ValueError: a row holds nan or inf, by its number.
        """
        if isinstance(self.rows, Tensor):
            block = self.rows[begin:end].detach().resolve_neg().float().cpu().contiguous().numpy()
        else:
            with np.errstate(over="ignore"):  # becomes inf, and is refused with its row
                block = np.ascontiguousarray(self.rows[begin:end], dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            suspects = np.flatnonzero(~np.isfinite(row_squares(block)))  # a finite row's may overflow too
        for row in suspects:
            if not np.isfinite(block[row]).all():
                raise ValueError(f"{self.name} row {begin + int(row)} holds nan or inf")
        return block

    def block_tensor(self, begin: int, end: int) -> Tensor:
        """The same as a tensor, on the device of the rows; a copy of what is read-only, which torch does not know."""
        if isinstance(self.rows, Tensor) and not self.on_cpu:
            on_device = self.rows[begin:end].detach().float()
            bad = (~on_device.isfinite()).any(1).nonzero()
            if len(bad):
                raise ValueError(f"{self.name} row {begin + int(bad[0])} holds nan or inf")
            return on_device
        block = self.block(begin, end)
        return torch.from_numpy(block if block.flags.writeable else block.copy())

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, block) one after the other; `rows` at a time, or as many as make 32 MiB."""
        rows = rows or max(1, _BLOCK_BYTES // (4 * self.width))
        for begin in range(0, len(self), rows):
            yield begin, self.block(begin, min(len(self), begin + rows))
        self.release()

    def check_finite(self) -> None:
        """Reads all rows once, for a caller that will not by `block`.

        Raises:
            ValueError: as `block`.
        """
        for _ in self.blocks():
            pass

    def tensor(self) -> Tensor:
        """All rows in their own dtype: the caller's tensor, or a copy of an array (torch has no read-only tensors)."""
        if isinstance(self.rows, Tensor):
            return self.rows
        native = self.rows.dtype.newbyteorder("=")
        tensor = torch.from_numpy(np.array(self.rows, dtype=native, order="C"))
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


def row_squares(rows: NDArray[_Float]) -> NDArray[_Float]:
    """[n] each row's product with itself, in the rows' own dtype, by the matrix product that is there for any NumPy."""
    squares: NDArray[_Float] = np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0]
    return squares


def read_labels(name: str, labels: Ids, rows_name: str, count: int) -> NDArray[np.int64]:
    """[count] int64 class ids, of the rows that the caller calls `rows_name`.

    Raises:
        TypeError: not integers.
        ValueError: another length, or a number that int64 lacks.
    """
    return _integers(name, labels, rows_name, count, "class ids are integers from end to end")


def read_ids(name: str, ids: Ids, rows_name: str, count: int, *, unique: bool) -> NDArray[np.int64]:
    """[count] int64 ids of items, each once where `unique`.

    Raises:
        TypeError, ValueError: as `read_labels`; an id that comes twice, by name.
    """
    array = _integers(name, ids, rows_name, count, "ids are integers from end to end")
    if unique:
        order = np.argsort(array, kind="stable")
        again = np.flatnonzero(array[order[1:]] == array[order[:-1]])
        if len(again):
            first, second = (int(order[again[0] + i]) for i in (0, 1))
            raise ValueError(f"{name} must hold each id once, got {array[first]} in rows {first} and {second}")
    return array


def _integers(name: str, values: Ids, rows_name: str, count: int, why: str) -> NDArray[np.int64]:
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {str(values.dtype).removeprefix('torch.')}; {why}")
        values = values.detach().cpu().numpy()
    if np.ma.is_masked(values):
        raise TypeError(f"{name} must have no masked numbers; pass those rows that count")
    array = np.asarray(values)
    if not array.size:
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}; {why}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit into int64, at most 2^63 - 1, got {array.max()}")
    if array.shape != (count,):
        raise ValueError(f"{rows_name} has {count} rows, {name} has shape {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=np.int64)


class SearchInput(NamedTuple):
    """Labelled queries and a labelled gallery of one width.

    Attributes:
        query, gallery: [Q, d], [N, d].
        query_labels, gallery_labels: [Q], [N].
        excluded: [Q] int64, the gallery row that is the query itself, by id; -1 if none is.
        gallery_ids: [N] int64 of our own, or None.
    """

    query: Features
    gallery: Features
    query_labels: NDArray[np.int64]
    gallery_labels: NDArray[np.int64]
    excluded: NDArray[np.int64]
    gallery_ids: NDArray[np.int64] | None

    @classmethod
    def read(
        cls,
        query: Rows,
        query_labels: Ids,
        gallery: Rows,
        gallery_labels: Ids,
        query_ids: Ids | None = None,
        gallery_ids: Ids | None = None,
    ) -> SearchInput:
        """
        Raises:
            TypeError, ValueError: as `RetrievalResults.search`, but for nan and inf.
        """
        queries, items = Features("query", query), Features("gallery", gallery)
        if queries.width != items.width:
            raise ValueError(f"query has {queries.width} columns, gallery has {items.width}; they must be of one width")
        query_classes = read_labels("query_labels", query_labels, "query", len(queries))
        gallery_classes = read_labels("gallery_labels", gallery_labels, "gallery", len(items))
        held, excluded = _find_excluded(query_ids, gallery_ids, len(queries), len(items))
        return cls(queries, items, query_classes, gallery_classes, excluded, held)


def _find_excluded(
    query_ids: Ids | None, gallery_ids: Ids | None, queries: int, items: int
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64]]:
    """The gallery's ids as int64, of our own; and the gallery row of each query's id, -1 where it has none."""
    if (query_ids is None) != (gallery_ids is None):
        given, missing = ("gallery_ids", "query_ids") if query_ids is None else ("query_ids", "gallery_ids")
        raise ValueError(f"{given} without {missing}: both say which gallery item is the query itself; pass neither")
    if query_ids is None or gallery_ids is None:
        return None, np.full(queries, -1, dtype=np.int64)
    wanted = read_ids("query_ids", query_ids, "query", queries, unique=False)
    held = read_ids("gallery_ids", gallery_ids, "gallery", items, unique=True).copy()
    order = np.argsort(held)
    place = order[np.searchsorted(held, wanted, sorter=order).clip(max=items - 1)]
    return held, np.where(held[place] == wanted, place, -1)
