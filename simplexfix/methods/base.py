"""What a way to train a compatible model has to say: its head, and its loss."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ..models import EmbeddingModel

__all__ = ["Method"]


class Method(Protocol):
    """One way to train model versions one after the other.

    A trainer builds each network with `head`, tells it of new classes with `add_classes`, and minimises
    `loss`.
    """

    def head(self, in_features: int) -> nn.Module:
        """A new head on features of this width; the embedding has the same width in every version."""
        ...

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        """Makes room for classes that the model has not seen; ids count up without a gap."""
        ...

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        """Scalar loss of a batch of inputs and class ids [B] int64; `old` is the deployed version, frozen."""
        ...
