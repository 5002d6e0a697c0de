"""Labelled items, in memory or read lazily, and the order in which training uses them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from .._devices import to_device_async
from ..data import Preprocessing
from ..data.dataset_rows import DatasetRows, bytes_of
from ..models import EmbeddingModel

__all__ = ["Items", "RowBatches", "embeddings_of"]

_FINGERPRINT_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Items:
    """Labelled items: inputs in memory or read lazily, and class ids.

    Args:
        inputs: [N, ...] tensor of any dtype, or `simplexfix.data.DatasetRows`, which has a `shape` and a `dtype`, too.
        labels: [N] int64 class ids.
        class_names: None, or the names of classes 0, 1, ...
        references: None, or [N, V, d] float32: the items' unit embeddings by versions 0 .. V - 1 (`train_versions`).

    Example:
        >>> import torch
        >>> from simplexfix.training import Items
        >>> items = Items(torch.randn(12, 4), torch.arange(12) % 4)
        >>> items.take(torch.tensor([0, 5])).labels
        tensor([0, 1])
    """

    inputs: Any
    labels: Tensor
    class_names: tuple[str, ...] | None = None
    references: Tensor | None = None

    @classmethod
    def from_dataset(cls, dataset: Dataset[Any], labels: Tensor | Sequence[int] | None = None) -> Items:
        """Returns the items of a map-style dataset; inputs are read lazily.

        Args:
            dataset: each item is a tensor, or a tuple that begins with one, all of one shape and dtype.  Class names
                are those of `dataset.class_names` or `dataset.classes`.
            labels: [N] class ids; None for `dataset.targets`, which torchvision's data sets have, or for the second
                tensor of a `TensorDataset`.  Both are also found inside `torch.utils.data.Subset` and `ConcatDataset`.

        Raises:
            TypeError: the dataset is not map-style, or labels are not integers.
            ValueError: the dataset is empty, has no targets, or the number of labels differs from N.
        """
        inputs = DatasetRows.of(dataset)
        found = _targets(dataset) if labels is None else _integers(labels)
        if found is None:
            raise ValueError(
                f"labels must be given: the {type(dataset).__name__} has no targets, and reading every item for them "
                "may take long; use Items.from_dataset(dataset, labels)"
            )
        if found.shape != (len(inputs),):
            raise ValueError(f"labels must be [{len(inputs)}], one for each item, got {list(found.shape)}")
        names = tuple(getattr(dataset, "class_names", None) or getattr(dataset, "classes", None) or ())
        return cls(inputs, found, names if names and all(isinstance(name, str) for name in names) else None)

    @classmethod
    def of(cls, given: Items | Dataset[Any]) -> Items:
        """Returns items unchanged, and a dataset by `from_dataset`."""
        return given if isinstance(given, Items) else cls.from_dataset(given)

    def take(self, rows: Tensor) -> Items:
        """Returns the items at these indices [n] int64; inputs of datasets are not read."""
        return Items(
            self.inputs[to_device_async(rows, self.inputs.device)],
            self.labels[to_device_async(rows, self.labels.device)],
            self.class_names,
            None if self.references is None else self.references[to_device_async(rows, self.references.device)],
        )

    def joined(self, other: Items) -> Items:
        """Concatenates two sets of items.

        If one list of class names begins with the other, the result has the longer one, else None.  The result has
        references if both sets have them.
        """
        labels = torch.cat([self.labels, other.labels])
        mine, theirs = sorted((self.class_names or (), other.class_names or ()), key=len)
        names = theirs if theirs and theirs[: len(mine)] == mine else None
        both = self.references is not None and other.references is not None
        references = torch.cat([self.references, other.references]) if both else None  # type: ignore[list-item]
        if isinstance(self.inputs, Tensor) and isinstance(other.inputs, Tensor):
            return Items(torch.cat([self.inputs, other.inputs]), labels, names, references)
        first, second = (
            DatasetRows.in_memory(part.inputs) if isinstance(part.inputs, Tensor) else part.inputs
            for part in (self, other)
        )
        return Items(first.joined(second), labels, names, references)

    def read(self, seeds: Sequence[int] | None = None) -> Tensor:
        """Returns all inputs as a tensor; `seeds` as in `simplexfix.data.DatasetRows.read`."""
        return self.inputs if isinstance(self.inputs, Tensor) else self.inputs.read(seeds)

    def fingerprint(self) -> dict[str, Any]:
        """Returns shape, dtype and a checksum of the labels, the references, and up to 4096 evenly spaced inputs.

        The checksum of a dataset's row covers the input's bytes, or `dataset.content(row)` if that method exists.
        """
        step = max(1, -(-len(self.labels) // _FINGERPRINT_ROWS))
        digest = hashlib.sha256(bytes_of(self.labels))
        rows = self.inputs[::step]
        for content in [bytes_of(rows)] if isinstance(rows, Tensor) else rows.contents():
            digest.update(content)
        if self.references is not None:
            digest.update(bytes_of(self.references))
        dtype = str(self.inputs.dtype).removeprefix("torch.")
        return {"shape": list(self.inputs.shape), "dtype": dtype, "sha256": digest.hexdigest()}


def _targets(dataset: Any) -> Tensor | None:
    """Returns a dataset's labels [N], or None if it has none."""
    if isinstance(dataset, Subset):
        inner = _targets(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [_targets(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(parts)  # type: ignore[arg-type]
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return _integers(dataset.tensors[1])
    found = getattr(dataset, "targets", None)
    return None if found is None else _integers(found)


def _integers(labels: Any) -> Tensor:
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # torch raises them for strings and for lists of different lengths
        found = torch.empty(0)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        kind = (
            type(labels[0]).__name__ if isinstance(labels, (list, tuple)) and labels else getattr(labels, "dtype", "?")
        )
        raise TypeError(f"labels must be integers, got {kind}; for names pass np.unique(names, return_inverse=True)[1]")
    return found.to("cpu", torch.int64)


def embeddings_of(items: Items, model: EmbeddingModel, *, preprocessing: Preprocessing | None, workers: int) -> Tensor:
    """Returns unit embeddings [N, d] of items by a model, without augmentation, on the CPU.

    Args:
        items: N items.
        model: any version, on any device.
        preprocessing: preprocessing of the trainer; None for that of the model.
        workers: number of processes that read the items.
    """
    return model.extract(items.inputs, prepare=preprocessing or model.preprocessing, workers=workers).cpu()


class RowBatches:
    """Endless iterator over batches of row indices, [size] int64.

    Each epoch is a new random permutation of all rows.  A batch may span two epochs.

    Args:
        rows: number of rows, at least 1.
        size: rows in a batch, at least 1.
        seed: seed of the permutations.

    Raises:
        ValueError: `rows` or `size` is below 1.

    Example:
        >>> from simplexfix.training import RowBatches
        >>> batches = RowBatches(4, 3, seed=0)
        >>> first, second = next(batches), next(batches)
        >>> sorted([*first.tolist(), second[0].item()])
        [0, 1, 2, 3]
    """

    def __init__(self, rows: int, size: int, *, seed: int) -> None:
        if rows < 1 or size < 1:
            raise ValueError(f"rows and size must be positive, got {rows} and {size}")
        self.rows = rows
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> RowBatches:
        return self

    def __next__(self) -> Tensor:
        while len(self._left) < self.size:
            self._left = torch.cat([self._left, torch.randperm(self.rows, generator=self._generator)])
        batch, self._left = self._left[: self.size], self._left[self.size :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the generator and the unused rows of the permutation, for a checkpoint."""
        return {"generator": self._generator.get_state(), "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state; the next batch is the one that would have followed."""
        self._generator.set_state(state["generator"])
        self._left = state["left"]
