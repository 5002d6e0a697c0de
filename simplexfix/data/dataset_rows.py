"""Rows of map-style datasets, read lazily."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .._seeds import kept_generators, seed_generators
from .reading import read_ahead

__all__ = ["DatasetRows", "bytes_of", "first_of", "type_name"]


class DatasetRows(Dataset[Tensor]):
    """Inputs [N, ...] from rows of map-style datasets, read lazily.

    Each item has its own seed for the global generators of torch, NumPy and `random`.  So an item does not depend on
    the process that reads it.  Reading restores these generators.

    Args:
        datasets: map-style datasets; an item is a tensor, an array, or a tuple that begins with one.
        rows: [N, 2] int64: index of the dataset, and index of the item in it.
        kind: shape and dtype of every item.
    """

    device = torch.device("cpu")

    def __init__(self, datasets: tuple[Dataset[Any], ...], rows: Tensor, kind: tuple[torch.Size, torch.dtype]) -> None:
        self.datasets = datasets
        self.rows = rows
        self.kind = kind

    @classmethod
    def in_memory(cls, inputs: Tensor) -> DatasetRows:
        """Wraps a tensor [N, ...]."""
        rows = torch.stack([torch.zeros(len(inputs), dtype=torch.int64), torch.arange(len(inputs))], 1)
        return cls((_InMemory(inputs),), rows, (inputs.shape[1:], inputs.dtype))

    @classmethod
    def of(cls, dataset: Dataset[Any]) -> DatasetRows:
        """Returns all rows of a dataset; a `DatasetRows` is returned unchanged.

        The first item is read for shape and dtype.

        Raises:
            TypeError: the dataset is not map-style, or its items are not tensors.
            ValueError: the dataset is empty.
        """
        if isinstance(dataset, DatasetRows):
            return dataset
        reads = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not reads:
            raise TypeError(
                f"dataset must be map-style, with __len__ and __getitem__, got {type(dataset).__name__}: rows are read "
                "by index, in any order"
            )
        count = len(dataset)  # type: ignore[arg-type]
        if not count:
            raise ValueError(f"dataset must have an item, this {type(dataset).__name__} has none")
        with kept_generators(0):
            first = _input_of(dataset, 0)
        rows = torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], 1)
        return cls((dataset,), rows, (first.shape, first.dtype))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self.kind[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.kind[1]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, rows: int) -> Tensor: ...

    @overload
    def __getitem__(self, rows: Tensor | slice) -> DatasetRows: ...

    def __getitem__(self, rows: int | Tensor | slice) -> Tensor | DatasetRows:
        """An integer reads that input; a tensor or a slice selects rows and reads nothing."""
        if isinstance(rows, int):
            return DatasetRows(self.datasets, self.rows[rows].unsqueeze(0), self.kind).read()[0]
        return DatasetRows(self.datasets, self.rows[rows], self.kind)

    def joined(self, other: DatasetRows) -> DatasetRows:
        """Concatenates the rows of both.

        Raises:
            ValueError: shapes or dtypes of items differ.
        """
        if self.kind != other.kind:
            kinds = " and ".join(f"{list(shape)} {dtype}" for shape, dtype in (self.kind, other.kind))
            raise ValueError(f"inputs must have one shape and dtype, got {kinds}")
        datasets = self.datasets + tuple(d for d in other.datasets if all(d is not mine for mine in self.datasets))
        number = torch.tensor([next(i for i, d in enumerate(datasets) if d is theirs) for theirs in other.datasets])
        rows = torch.stack([number[other.rows[:, 0]], other.rows[:, 1]], 1)
        return DatasetRows(datasets, torch.cat([self.rows, rows]), self.kind)

    def read(self, seeds: Sequence[int] | None = None) -> Tensor:
        """Reads all rows, [N, ...].

        Args:
            seeds: one seed per row; None for the index of the item in its dataset.

        Raises:
            TypeError: an item is not a tensor.
            ValueError: an item has another shape or dtype than the first one.
        """
        rows = self.rows.tolist()
        found = []
        with kept_generators(0):
            for (number, row), seed in zip(rows, seeds or [row for _, row in rows], strict=True):
                seed_generators(seed)
                input = _input_of(self.datasets[number], row)
                if (input.shape, input.dtype) != self.kind:
                    raise ValueError(
                        f"items must have one shape and dtype, here {list(self.kind[0])} {self.kind[1]}; item {row} of "
                        f"the {type(self.datasets[number]).__name__} is {list(input.shape)} {input.dtype}"
                    )
                found.append(input)
        return torch.stack(found) if found else torch.empty(self.shape, dtype=self.dtype)

    def batches(self, size: int, *, workers: int) -> Generator[Tensor, None, None]:
        """Yields all inputs in order, `size` rows per batch, prefetched by `workers` processes."""
        starts = range(0, len(self), size)
        return read_ahead(partial(_read_slice, self, size), starts, workers=workers)

    def contents(self) -> Iterator[bytes]:
        """Yields bytes that identify each row: `dataset.content(row)` if that method exists, else the input's bytes."""
        for at, (number, row) in enumerate(self.rows.tolist()):
            content = getattr(self.datasets[number], "content", None)
            yield content(row) if content else bytes_of(self[at : at + 1].read())


def _read_slice(rows: DatasetRows, size: int, start: int) -> Tensor:
    return rows[start : start + size].read()


class _InMemory(Dataset[Tensor]):
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs.cpu()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> Tensor:
        return self.inputs[row]


def _input_of(dataset: Dataset[Any], row: int) -> Tensor:
    item = dataset[row]
    input = first_of(item)
    if isinstance(input, np.ndarray):
        input = torch.from_numpy(input)
    if not isinstance(input, Tensor):
        raise TypeError(
            f"items of a dataset must be tensors, or tuples that begin with one, item {row} of the "
            f"{type(dataset).__name__} is {type_name(item)}; give it a transform that makes tensors of one shape"
        )
    return input


def first_of(item: Any) -> Any:
    """Returns the input of an item or batch, which may be a tuple of input and label."""
    return item[0] if isinstance(item, (tuple, list)) and item else item


def type_name(item: Any) -> str:
    """Returns the type of an item and of its entries, for error messages."""
    if isinstance(item, Mapping):
        return f"{type(item).__name__} of {', '.join(map(str, item)) or 'nothing'}"
    if isinstance(item, (tuple, list)):
        return f"{type(item).__name__} of {type(item[0]).__name__ if item else 'nothing'}"
    return type(item).__name__


def bytes_of(tensor: Tensor) -> Any:
    """Returns the bytes of a tensor as a buffer, for a checksum."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
