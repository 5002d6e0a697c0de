"""HOC: the fixed d-simplex, and a contrast that keeps new features near the old model's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functional as SF
from .._checks import check_contrast_options, check_fraction
from ..models import EmbeddingModel
from ..slots import SlotRegistry
from .asnn import ASNN
from .simplex import Simplex

__all__ = ["HOC"]


class HOC(Simplex):
    """`simplexfix.functional.hoc_loss` on new and remembered items; cross-entropy alone without an old model.

        loss = lambda_ * classification + (1 - lambda_) * contrast

    A `classification` by nearest neighbours replaces the simplex cross-entropy.  The loss then uses no vertices, and
    classes take no slots.  Embeddings still have K - 1 dimensions, and the contrast alone makes versions compatible.

    Args:
        slots, namespace, normalize, scale, margin: as in `Simplex`.
        lambda_, mu, negatives, anchor, group: as in `hoc_loss`; with a group, negatives come from all its processes.
        classification: replaces the simplex cross-entropy; None for the cross-entropy.

    Raises:
        TypeError, ValueError: an option is out of range, or `normalize`, `scale` or `margin` is given with a
            `classification`.

    Reference:
        arXiv 2405.02581.
    """

    # Set only if it is given: checkpoints record instance attributes, and older ones do not have this one.
    classification: ASNN | None = None

    def __init__(
        self,
        slots: SlotRegistry,
        namespace: str = "default",
        *,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        lambda_: float = 0.1,
        mu: float = 10.0,
        negatives: str = "zero_mask",
        anchor: str = "old",
        group: dist.ProcessGroup | None = None,
        classification: ASNN | None = None,
    ) -> None:
        super().__init__(slots, namespace, normalize=normalize, scale=scale, margin=margin)
        check_fraction("lambda_", lambda_)
        check_contrast_options(mu, negatives, anchor)
        self.lambda_ = lambda_
        self.mu = mu
        self.negatives = negatives
        self.anchor = anchor
        self.group = group
        if classification is not None:
            if normalize or scale != 1 or margin is not None:
                raise ValueError(
                    "normalize, scale and margin belong to the simplex cross-entropy, which classification replaces: "
                    f"leave them out, got {normalize}, {scale} and {margin}"
                )
            self.classification = classification

    def head(self, in_features: int) -> nn.Module:
        if self.classification is not None:
            return self.classification.head(in_features, self.slots.num_slots - 1)
        return super().head(in_features)

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        if self.classification is not None:
            self.classification.add_classes(model, classes)
        else:
            super().add_classes(model, classes)

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        if old is None:
            if self.classification is not None:
                return self.classification.loss(model, input, target, old)
            return super().loss(model, input, target, old)
        with torch.no_grad():
            reference = old(input)
        if self.classification is not None:
            return self._mixed(self.classification, model, input, target, reference)
        return model.head.hoc_loss(  # type: ignore[no-any-return, operator]
            model.backbone(input),
            reference,
            self._slots(target),
            lambda_=self.lambda_,
            mu=self.mu,
            negatives=self.negatives,
            anchor=self.anchor,
            group=self.group,
        )

    def embedding_loss(
        self, z: Tensor, target: Tensor, old: Tensor | None = None, *, reduction: str = "mean"
    ) -> Tensor:
        """Returns the loss of embeddings by a model of another library; its last layer is the junction, without a head.

            hoc_loss(z, old, slots.lookup(namespace, target))

        Args:
            z: [B, K - 1] floating.
            target: [B] int64 class ids.
            old: [B, K - 1] embeddings of the same items by the old model, in the dtype of `z`; None for the
                cross-entropy alone.
            reduction: "none", "mean" or "sum".

        Returns:
            [B] with "none", else a scalar.

        Raises:
            TypeError: HOC has a `classification`, which needs a head.
            TypeError, ValueError: as in `simplexfix.functional.hoc_loss`.
            ValueError: a class has no slot.
        """
        if self.classification is not None:
            raise TypeError("embedding_loss is for HOC with the simplex, and this HOC has a classification; use loss")
        if old is None:
            return super().embedding_loss(z, target, reduction=reduction)
        return SF.hoc_loss(
            z,
            old,
            self._slots(target),
            lambda_=self.lambda_,
            mu=self.mu,
            negatives=self.negatives,
            anchor=self.anchor,
            normalize=self.normalize,
            scale=self.scale,
            margin=self.margin,
            reduction=reduction,
            group=self.group,
        )

    def _mixed(
        self, classification: ASNN, model: EmbeddingModel, input: Tensor, target: Tensor, reference: Tensor
    ) -> Tensor:
        z = model(input)
        return SF.mix_with_contrast(
            lambda: model.head.embedding_loss(z, target, group=classification.group),  # type: ignore[operator]
            z,
            reference,
            target,
            lambda_=self.lambda_,
            mu=self.mu,
            negatives=self.negatives,
            anchor=self.anchor,
            reduction="mean",
            group=self.group,
        )
