"""Backward-compatible training: new features must also be right in the old model's classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from .._checks import check_positive
from ..models import EmbeddingModel, LinearHead
from .er import ER

__all__ = ["BCT"]

_IGNORED = -100


class BCT(ER):
    """Experience replay with the influence loss of the old classifier.

        loss      = cross_entropy(logits(h), y) + weight * influence
        influence = 1 / |S| sum_{i in S} cross_entropy(old_logits(h_i), y_i),    S = {i : y_i is of the old classes}

    with h_i the new features, and `old_logits` the old model's own classifier, which is not trained.  Rows of classes
    that it lacks are left out; where no row is left, and without an old model, the influence is 0 and has no gradient.
    The old backbone is not run.

    Of several processes, or parts of a batch, each takes the mean over its own rows: that is the batch's where all hold
    as many rows of old classes, as they do where these are the remembered half.

    Args:
        weight: of the influence loss.
        scale: of `LinearHead`; the old classifier keeps the one that it was trained with.

    Raises:
        ValueError: a weight that is not positive and finite; in `loss`: the old classifier is of features of another
            width.
        TypeError: in `loss`: the old model's head is no `LinearHead`.

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, arXiv 2003.11942: the variant
        that trains with the influence loss on items of the old classes.
    """

    def __init__(self, *, weight: float = 1.0, scale: float | None = None) -> None:
        super().__init__(scale=scale)
        check_positive("weight", weight)
        self.weight = weight

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        if old is None:
            return super().loss(model, input, target, old)
        if not isinstance(old.head, LinearHead):
            raise TypeError(
                f"old must have a LinearHead, which ER, FD and BCT train, got {type(old.head).__name__}: "
                "the influence loss is of the old model's classifier"
            )
        features = model.backbone(input)
        if features.shape[1] != old.head.classifier.in_features:
            raise ValueError(
                f"old's classifier must be of features as wide as the new ones, {features.shape[1]}, "
                f"got {old.head.classifier.in_features}"
            )
        classify: Tensor = model.head.loss(features, target)  # type: ignore[operator]
        # without its parameters' gradients, whether or not the caller has turned them off
        frozen = {name: parameter.detach() for name, parameter in old.head.named_parameters()}
        logits = functional_call(old.head, frozen, (features,))
        known = target < old.head.num_classes
        # a masked sum, not the mean of chosen rows: that would be nan over none, and a device would be waited for
        influence = F.cross_entropy(
            logits, target.where(known, _IGNORED), ignore_index=_IGNORED, reduction="sum"
        ) / known.sum().clamp(min=1)
        return classify + self.weight * influence
