"""The protocol of a method that trains compatible models: its head, and its loss."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from ..models import EmbeddingModel

__all__ = ["Method", "ReadsOldEmbeddings"]


class Method(Protocol):
    """A method that trains model versions one after the other.

    A trainer builds each network with `head`, tells it of new classes with `add_classes`, and minimises
    `loss`.
    """

    def head(self, in_features: int) -> nn.Module:
        """A new head on features of this width.

        Its embeddings are as wide in every version, but for methods whose `fit_to_old` widens them.
        """
        ...

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        """Makes room for classes that the model has not seen; ids count up without a gap."""
        ...

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        """Scalar loss of a batch of inputs and class ids [B] int64; `old` is the deployed version, frozen."""
        ...


@runtime_checkable
class ReadsOldEmbeddings(Protocol):
    """A method that learns from the old version's embeddings of a task's items, read once before the first step.

    `Trainer.fit` calls both where there is an old version.
    """

    def fit_to_old(self, model: EmbeddingModel, old: EmbeddingModel) -> None:
        """Gives the new model its shapes, after `add_classes`; also where weights of a checkpoint are loaded next."""
        ...

    def read_old(self, model: EmbeddingModel, embeddings: Tensor, labels: Tensor) -> None:
        """Stores in buffers of the model what the loss needs, for checkpoints to hold it.

        Called once for a task, by the first of several processes; the others receive its buffers.

        Args:
            model: the new one, in the shapes of `fit_to_old`.
            embeddings: [N, d_o] unit rows by the old version in evaluation mode, without augmentation, of the new
                items, then of the remembered ones; on the CPU.
            labels: [N] int64, on the CPU.
        """
        ...
