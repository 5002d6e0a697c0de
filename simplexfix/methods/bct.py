"""Backward-compatible training: the old model's classifier must also classify the new features correctly."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from .._checks import check_positive
from ..models import EmbeddingModel, LinearHead, NeighbourHead
from .asnn import ASNN
from .er import ER

__all__ = ["BCT"]

_IGNORED = -100


class BCT(ER):
    """Experience replay with the influence loss of the old classifier.

        loss      = cross_entropy(logits(h), y) + weight * influence
        influence = 1 / |S| sum_{i in S} cross_entropy(old_logits(h_i), y_i),    S = {i : y_i is of the old classes}

    h_i are the new features, and `old_logits` is the old model's classifier, which is not trained.  Without rows of old
    classes, and without an old model, the influence and its gradient are 0.  The old backbone is not run.  If the old
    model has a rotation R, its classifier gets h_i R^T.

    With a `classification` by nearest neighbours, the old classifier is the old model's queue of its newest features
    (`NeighbourHead.queued_loss`): the influence is the neighbour loss of h_i with its neighbours there.

    With several processes, or with gradient accumulation, each part of a batch has its own mean over S.  The average
    equals the mean of the batch if all parts have equally many rows of old classes, such as a remembered half.

        method = BCT(weight=1.0)

    Args:
        weight: weight of the influence loss, above 0.
        scale: scale of `LinearHead`; the old classifier keeps the scale of its training.
        classification: replaces the cross-entropy in both terms; None for cross-entropy.

    Raises:
        ValueError: the weight is not positive and finite; in `loss`: the old classifier has another feature width.
        TypeError: in `loss`: the old head is not a `LinearHead`, or with `classification` not a `NeighbourHead`.

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, arXiv 2003.11942: the variant
        that trains with the influence loss on items of the old classes.
    """

    def __init__(self, *, weight: float = 1.0, scale: float | None = None, classification: ASNN | None = None) -> None:
        super().__init__(scale=scale)
        check_positive("weight", weight)
        self.weight = weight
        if classification is not None:
            self.classification = classification

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        if old is None:
            return super().loss(model, input, target, old)
        features = model.backbone(input)
        classify = self._classify(model.head, features, target)
        influence = self._influence(old, features, target)
        return classify + self.weight * influence

    def _influence(self, deployed: EmbeddingModel, features: Tensor, target: Tensor) -> Tensor:
        old = deployed.head
        kind, trainers = (
            (LinearHead, "ER, FD and BCT train")
            if self.classification is None
            else (NeighbourHead, "ASNN trains, and FD and BCT with classification")
        )
        if not isinstance(old, kind):
            raise TypeError(
                f"old must have a {kind.__name__}, which {trainers}, got {type(old).__name__}: "
                "the influence loss needs the old model's classifier"
            )
        width = old.embedding_dim if isinstance(old, NeighbourHead) else old.classifier.in_features
        if features.shape[1] != width:
            raise ValueError(
                f"old's classifier must take features as wide as the new ones, {features.shape[1]}, got {width}; "
                "give both backbones the same out_features"
            )
        if deployed.rotation is not None:  # its gallery is rotated, its classifier is not
            features = features @ deployed.rotation.T.to(features.dtype)
        if isinstance(old, NeighbourHead):
            return old.queued_loss(features, target)
        # no gradients of its parameters, whatever their requires_grad
        frozen = {name: parameter.detach() for name, parameter in old.named_parameters()}
        logits = functional_call(old, frozen, (features,))
        known = target < old.num_classes
        # a masked sum: the mean of selected rows would be nan without rows, and selecting would synchronize
        return F.cross_entropy(
            logits, target.where(known, _IGNORED), ignore_index=_IGNORED, reduction="sum"
        ) / known.sum().clamp(min=1)
