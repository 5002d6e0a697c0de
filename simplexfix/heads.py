"""Classifier heads with fixed prototypes: drop-in for the last `nn.Linear`, with nothing of size K x d."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as SF
from ._checks import check_margin, check_scale
from .polytopes import simplex_prototypes
from .slots import SlotRegistry

__all__ = ["SimplexHead"]


class SimplexHead(nn.Module):
    """Junction and fixed d-simplex classifier: the head that makes a model's features stationary.

        z = junction(features)                          # bias-free nn.Linear, in_features -> K - 1
        logits = scale * z @ simplex_prototypes(K).T    # fixed; z normalised first with normalize=True

    K is allocated in advance and never changes: slots without a class are the room for those to come.
    `head.slots` says which class has which slot; classes 0 .. num_classes - 1 start in slots of the same
    number, in namespace "default".  The state_dict holds the junction's weight and the registry.

    Args:
        num_classes: classes there are from the start; 0 where `head.slots.add` will name them all.
        in_features: width of the backbone's features.
        num_slots: K; `num_classes` if None.
        slots: a registry to start from instead, copied: the same class, the same slot as in the model it is
            from.  Models that go on to grow apart must take new classes from one registry.
        normalize, scale, margin: of `simplexfix.functional.simplex_cross_entropy`.
        device, dtype: of the junction.

    Raises:
        ValueError: fewer than 2 slots, more classes than slots, or an option out of range.

    Reference:
        Biondi, Pernici, Ricci, Del Bimbo, "Stationary Representations: Optimally Approximating Compatibility
        and Implications for Improved Model Replacements", CVPR 2024, arXiv 2405.02581.
    """

    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        num_slots: int | None = None,
        slots: SlotRegistry | None = None,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 0 or in_features < 1:
            raise ValueError(f"num_classes must be >= 0 and in_features >= 1, got {num_classes} and {in_features}")
        if slots is not None and num_slots not in (None, slots.num_slots):
            raise ValueError(f"slots has {slots.num_slots} slots, num_slots says {num_slots}; leave num_slots out")
        if slots is None:
            slots = SlotRegistry(num_classes if num_slots is None else num_slots)
        self.slots = copy.deepcopy(slots)
        self.slots.add("default", range(num_classes))
        self.normalize = normalize
        self.scale = scale
        self.margin = margin
        check_scale(scale)
        check_margin(margin, normalize)
        self.junction = nn.Linear(in_features, self.embedding_dim, bias=False, device=device, dtype=dtype)

    @property
    def num_slots(self) -> int:
        """K, fixed for the life of the model."""
        return self.slots.num_slots

    @property
    def num_classes(self) -> int:
        """Slots in use."""
        return len(self.slots)

    @property
    def embedding_dim(self) -> int:
        """K - 1: the width of what goes into the gallery."""
        return self.slots.num_slots - 1

    def grow(self, num_classes: int) -> None:
        """Makes room in namespace "default" for classes up to `num_classes`, inside the allocated slots.

        No parameter, no slot and no output changes.

        Raises:
            ValueError: fewer than there are, or more than the slots hold.
        """
        have = len(self.slots.classes("default"))
        if num_classes < have:
            raise ValueError(f"num_classes can only grow, from {have}, got {num_classes}")
        self.slots.add("default", range(have, num_classes))

    def embed(self, features: Tensor) -> Tensor:
        """[B, in_features] -> [B, K - 1]: what a gallery stores and a query is searched by (cosine)."""
        return self.junction(features)  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> [B, K] logits, one per slot."""
        return SF.simplex_logits(self.embed(features), normalize=self.normalize, scale=self.scale)

    def loss(
        self,
        features: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """`F.cross_entropy(self(features), target, ...)`, fused, with the head's margin.

        Args:
            features: [B, in_features].
            target: [B] int64 slots (`head.slots.lookup` maps class ids of a namespace to slots).
            weight, ignore_index, label_smoothing, reduction: as in `simplexfix.functional`.
        """
        return SF.simplex_cross_entropy(
            self.embed(features),
            target,
            normalize=self.normalize,
            scale=self.scale,
            margin=self.margin,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    @torch.no_grad()
    def predict(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k likeliest of the slots in use.

        Returns:
            scores [B, k] logits, descending; classes [B, k] int64 slots (equal to class ids in
            namespace "default"; `head.slots.owner` names the others).

        Raises:
            ValueError: k is below 1 or above the number of classes.
        """
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must lie in [1, {self.num_classes}], the classes in use, got {k}")
        used = self.slots.used().to(features.device)
        scores, at = self(features).index_select(-1, used).topk(k, dim=-1)
        return scores, used[at]

    def prototypes(self, slots: Tensor | None = None) -> Tensor:
        """[n, K - 1] unit vertices of the given slots, of all slots in use if None."""
        weight = self.junction.weight
        wanted = self.slots.used() if slots is None else slots
        return simplex_prototypes(self.num_slots, wanted, dtype=weight.dtype, device=weight.device)

    def get_extra_state(self) -> dict[str, Any]:
        return self.slots.to_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        registry = SlotRegistry.from_dict(state)
        if registry.num_slots != self.num_slots:
            raise ValueError(f"the saved head has {registry.num_slots} slots, this one {self.num_slots}")
        self.slots = registry

    def extra_repr(self) -> str:
        options = f"normalize={self.normalize}, scale={self.scale}, margin={self.margin}"
        return f"num_classes={self.num_classes}, num_slots={self.num_slots}, {options}"
