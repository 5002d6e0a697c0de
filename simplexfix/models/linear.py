"""The ordinary classifier, learnable and growing with its classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._native import is_readable

__all__ = ["LinearHead", "check_known"]


class LinearHead(nn.Module):
    """A learnable classifier on the features, which are the embedding themselves.

    Args:
        in_features: width of the features.
        scale: None for plain logits `W h + b`; else logits are `scale` times the cosines of features and rows
            of W, and b stays as it is.
    """

    def __init__(self, in_features: int, *, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.classifier = nn.Linear(in_features, 1)
        self.classifier.bias.requires_grad_(scale is None)
        self.num_classes = 0

    @property
    def embedding_dim(self) -> int:
        return self.classifier.in_features

    def embed(self, features: Tensor) -> Tensor:
        """[B, in_features], unchanged."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> [B, C] logits of the classes there are."""
        if self.scale is None:
            return self.classifier(features)  # type: ignore[no-any-return]
        return self.scale * F.linear(F.normalize(features), F.normalize(self.classifier.weight))

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy over the classes there are.

        Args:
            features: [B, in_features].
            target: [B] int64 class ids, or -100 for rows that do not count.

        Raises:
            ValueError: a label has no class, on the CPU.
        """
        check_known(target, self.num_classes, "head.grow")
        return F.cross_entropy(self(features), target)

    @torch.no_grad()
    def grow(self, classes: int) -> None:
        """Adds freshly initialised rows up to `classes`; the old rows stay."""
        old, kept = self.classifier, self.num_classes
        if classes > kept:
            self.classifier = nn.Linear(old.in_features, classes).to(old.weight)
            self.classifier.weight[:kept] = old.weight[:kept]
            self.classifier.bias[:kept] = old.bias[:kept]
            self.classifier.bias.requires_grad_(self.scale is None)
            self.num_classes = classes


def check_known(target: Tensor, classes: int, remedy: str) -> None:
    """Raises ValueError where a label has no class, on the CPU; `remedy` is the function that adds classes."""
    if is_readable(target) and target.numel() and target.max().item() >= classes:
        row = int((target >= classes).nonzero()[0])
        raise ValueError(
            f"target row {row} has label {int(target[row])}, the head has {classes} classes, from 0 on; "
            f"{remedy} adds classes"
        )
