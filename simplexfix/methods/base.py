"""The protocol of a method that trains compatible models: its head, and its loss."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from ..models import EmbeddingModel

__all__ = ["Method", "ReadsOldEmbeddings"]


class Method(Protocol):
    """A method that trains model versions one after the other.

    A trainer calls `head` for each new backbone, `add_classes` before each training, and minimises `loss`.
    """

    def head(self, in_features: int) -> nn.Module:
        """Returns a new head for features of this width.

        All versions have the same embedding width, unless `fit_to_old` widens it.
        """
        ...

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        """Adds new classes to the model's head; `classes` is the range of all class ids so far, from 0."""
        ...

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        """Returns the scalar loss of a batch of inputs [B, ...] and class ids [B] int64.

        `old` is the deployed version, in evaluation mode; None for the first version.
        """
        ...


@runtime_checkable
class ReadsOldEmbeddings(Protocol):
    """A method that uses the old version's embeddings of a task's items, computed once before the first step.

    `Trainer.fit` calls both functions if there is an old version.
    """

    def fit_to_old(self, model: EmbeddingModel, old: EmbeddingModel) -> None:
        """Sets the shapes of the new model, after `add_classes` and before a checkpoint is loaded."""
        ...

    def read_old(self, model: EmbeddingModel, embeddings: Tensor, labels: Tensor) -> None:
        """Computes buffers of the model that the loss needs; checkpoints store them.

        It is called once per task, by the first of several processes; the others receive its buffers.

        Args:
            model: the new model, with the shapes of `fit_to_old`.
            embeddings: [N, d_o] unit rows on the CPU, by the old version without augmentation: first of the new items,
                then of the remembered ones.
            labels: [N] int64 class ids on the CPU.
        """
        ...
