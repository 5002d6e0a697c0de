"""Experience replay (ER): a learnable linear classifier that grows with the number of classes."""

from __future__ import annotations

from torch import Tensor, nn

from ..models import EmbeddingModel, LinearHead
from .asnn import ASNN

__all__ = ["ER"]


class ER:
    """Cross-entropy of a learnable linear classifier on new and rehearsed items; the old model is not used.

    Args:
        scale: as in `LinearHead`.
    """

    # Method whose classification loss replaces cross-entropy; None for the latter.  FD and BCT set the attribute only
    # if it is given: checkpoints record instance attributes, and older checkpoints do not have this one.
    classification: ASNN | None = None

    def __init__(self, *, scale: float | None = None) -> None:
        self.scale = scale

    def head(self, in_features: int) -> nn.Module:
        if self.classification is not None:
            return self.classification.head(in_features)
        return LinearHead(in_features, scale=self.scale)

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        if self.classification is not None:
            self.classification.add_classes(model, classes)
        else:
            model.head.grow(classes.stop)  # type: ignore[operator]

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        return self._classify(model.head, model.backbone(input), target)

    def _classify(self, head: nn.Module, features: Tensor, target: Tensor) -> Tensor:
        if self.classification is not None:
            return self.classification.classify(head, features, target)
        return head.loss(features, target)  # type: ignore[no-any-return, operator]
