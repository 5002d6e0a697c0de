"""Feature distillation: a learnable classifier, and features held near the old model's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_name, check_new_and_old, check_positive
from .._reference import accumulate_dtype
from ..models import EmbeddingModel
from .asnn import ASNN
from .er import ER

__all__ = ["FD"]

_DISTANCES = ("cosine", "l2")


class FD(ER):
    """Experience replay with a distance between the new and the old model's features of each item.

        loss = cross_entropy(logits(h), y) + weight / B * sum_i D(h_i, u_i)

        cosine    D(h, u) = 1 - h . u / (|h| |u|)
        l2        D(h, u) = |h - u|^2

    h_i are the new features, u_i the old model's (without gradient), of new and remembered items.  Without an old model
    the loss is the cross-entropy.  The cosine of a zero feature is 0.  Distances are computed in float32 or wider.

        method = FD(weight=1.0, distance="cosine")

    Args:
        weight: weight of the distance, above 0.
        distance: "cosine" or "l2".
        scale: scale of `LinearHead`.
        classification: replaces the cross-entropy; None for cross-entropy.

    Raises:
        ValueError: the distance is unknown, or the weight is not positive and finite; in `loss`: the old features have
            another width.

    Reference:
        cosine: Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing", CVPR 2019 (less-forget
        constraint).  l2: Jung et al., "Less-forgetting Learning in Deep Neural Networks", arXiv 1607.00122; as a
        compatible training in Shen et al., arXiv 2003.11942.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        distance: str = "cosine",
        scale: float | None = None,
        classification: ASNN | None = None,
    ) -> None:
        super().__init__(scale=scale)
        check_positive("weight", weight)
        check_name("distance", distance, _DISTANCES)
        self.weight = weight
        self.distance = distance
        if classification is not None:
            self.classification = classification

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        if old is None:
            return super().loss(model, input, target, old)
        features = model.backbone(input)
        with torch.no_grad():
            reference = old(input)
        check_new_and_old("new", features, reference)
        classify = self._classify(model.head, features, target)
        return classify + self.weight * self._distances(features, reference).mean()

    def _distances(self, new: Tensor, old: Tensor) -> Tensor:
        if self.distance == "cosine":
            return cosine_distances(new, old)
        wide = accumulate_dtype(new.dtype)
        return (new.to(wide) - old.to(wide)).square().sum(1)


def cosine_distances(new: Tensor, old: Tensor) -> Tensor:
    """Returns 1 - cosine [B] of each pair of rows, in float32 or wider: bfloat16 is too coarse for cosines near 1."""
    wide = accumulate_dtype(new.dtype)
    return 1 - (F.normalize(new.to(wide)) * F.normalize(old.to(wide))).sum(1)
