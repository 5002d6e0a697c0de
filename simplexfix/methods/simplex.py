"""Cross-entropy with the fixed d-simplex classifier, which makes features stationary."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from .. import functional as SF
from .._checks import check_margin, check_scale
from ..heads import SimplexHead
from ..models import EmbeddingModel
from ..slots import SlotRegistry

__all__ = ["Simplex"]


class Simplex:
    """Cross-entropy of the fixed simplex classifier on new and rehearsed items; the old model is not used.

    Args:
        slots: registry that all versions and replacements share; it gives each class a permanent slot.
        namespace: namespace of the classes in the registry.
        normalize, scale, margin: as in `simplexfix.functional.simplex_cross_entropy`.

    Raises:
        ValueError: `scale` or `margin` is out of range, or a margin is given without `normalize`.

    Reference:
        arXiv 2405.02581.
    """

    def __init__(
        self,
        slots: SlotRegistry,
        namespace: str = "default",
        *,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
    ) -> None:
        check_scale(scale)
        check_margin(margin, normalize)
        self.slots = slots
        self.namespace = namespace
        self.normalize = normalize
        self.scale = scale
        self.margin = margin

    def head(self, in_features: int) -> nn.Module:
        return SimplexHead.from_slots(
            self.slots, in_features, normalize=self.normalize, scale=self.scale, margin=self.margin
        )

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        known = set(self.slots.classes(self.namespace).tolist())
        self.slots.add(self.namespace, [class_id for class_id in classes if class_id not in known])
        # each version has a copy of the registry as it was when the version was made
        device = model.head.junction.weight.device  # type: ignore[union-attr]
        model.head.slots = copy.deepcopy(self.slots).to(device)  # type: ignore[arg-type]

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        return model.head.loss(model.backbone(input), self._slots(target))  # type: ignore[no-any-return, operator]

    def embedding_loss(
        self, z: Tensor, target: Tensor, old: Tensor | None = None, *, reduction: str = "mean"
    ) -> Tensor:
        """Returns the loss of embeddings by a model of another library; its last layer is the junction, without a head.

            simplex_cross_entropy(z, slots.lookup(namespace, target))

        Args:
            z: [B, K - 1] floating.
            target: [B] int64 class ids.
            old: [B, K - 1] embeddings of the same items by the old model, in the dtype of `z`, or None; not used.
            reduction: "none", "mean" or "sum".

        Returns:
            [B] with "none", else a scalar.

        Raises:
            TypeError, ValueError: as in `simplexfix.functional.simplex_cross_entropy`.
            ValueError: a class has no slot.
        """
        return SF.simplex_cross_entropy(
            z,
            self._slots(target),
            normalize=self.normalize,
            scale=self.scale,
            margin=self.margin,
            reduction=reduction,
        )

    def _slots(self, target: Tensor) -> Tensor:
        """Maps class ids to slots.  On a GPU unknown classes give -1, whose loss is nan, to avoid synchronizing."""
        return self.slots.lookup(self.namespace, target, missing=None if target.is_cpu else -1)
