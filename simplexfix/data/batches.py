"""Iterates over all rows of a tensor, a dataset or a loader in order, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from .dataset_rows import DatasetRows, first_of, type_name

__all__ = ["batches_of"]

_ROWS = 1024
_DATASET_ROWS = 128  # rows per batch of a dataset; small, because prefetched batches take memory too


def batches_of(input: Tensor | Dataset[Any] | DataLoader[Any], *, workers: int = 0) -> Iterator[Tensor]:
    """Yields all rows in order, in batches.

    Args:
        input: a tensor [N, ...]; a map-style dataset; or a loader whose batches are tensors or tuples that begin with
            one.
        workers: number of processes that read a dataset; ignored for a tensor.

    Raises:
        TypeError: `input` has another type.
        ValueError: `workers` is given with a loader, or a loader shuffles or drops rows.
    """
    if isinstance(input, Tensor):
        return iter(torch.split(input, _ROWS))
    if isinstance(input, Dataset):
        return DatasetRows.of(input).batches(_DATASET_ROWS, workers=workers)
    if isinstance(input, DataLoader):
        if workers:
            raise ValueError("workers read a dataset; a DataLoader has its own: DataLoader(dataset, num_workers=...)")
        _check_all_in_order(input)
        return _loaded(input)
    remedy = "torch.as_tensor makes a tensor of an array"
    if isinstance(input, Mapping):
        remedy = "pass the entry that is a tensor"
    elif isinstance(input, (list, tuple)):
        remedy = "torch.stack makes a tensor of inputs, torch.cat of batches"
    raise TypeError(f"input must be a tensor [N, ...], a Dataset or a DataLoader, got {type_name(input)}; {remedy}")


def _loaded(loader: DataLoader[Any]) -> Iterator[Tensor]:
    for batch in loader:
        input = first_of(batch)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"batches of the DataLoader must be tensors, or begin with one, got {type_name(batch)}; "
                "give it a collate_fn that returns the tensor"
            )
        yield input


def _check_all_in_order(loader: DataLoader[Any]) -> None:
    """Raises unless the loader yields all items in order: row i of the embeddings must be item i."""
    inner = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(inner, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        raise ValueError(
            "the DataLoader shuffles: embeddings would not be in the order of the items; pass shuffle=False"
        )
    if loader.drop_last or getattr(loader.batch_sampler, "drop_last", False):
        raise ValueError(
            "the DataLoader has drop_last=True: the last items would have no embeddings; pass drop_last=False"
        )
