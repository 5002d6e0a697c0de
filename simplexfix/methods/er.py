"""Experience replay: the ordinary way, a learnable linear classifier that grows with its classes."""

from __future__ import annotations

from torch import Tensor

from ..models import EmbeddingModel, LinearHead

__all__ = ["ER"]


class ER:
    """Cross-entropy through a learnable head on new and remembered items; the old model plays no part.

    Args:
        scale: of `LinearHead`.
    """

    def __init__(self, *, scale: float | None = None) -> None:
        self.scale = scale

    def head(self, in_features: int) -> LinearHead:
        return LinearHead(in_features, scale=self.scale)

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        model.head.grow(classes.stop)  # type: ignore[operator]

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        return model.head.loss(model.backbone(input), target)  # type: ignore[no-any-return, operator]
