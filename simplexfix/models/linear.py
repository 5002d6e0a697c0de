"""A learnable linear classifier that grows with the number of classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._native import is_readable

__all__ = ["LinearHead", "check_known"]

IGNORED = -100  # class id of ignored rows, as in torch


class LinearHead(nn.Module):
    """A learnable linear classifier; the embedding is the features themselves.

        logits = W h + b                                        # scale=None
        logits = scale * F.normalize(W) @ F.normalize(h)        # with a scale; b is neither used nor trained

    Args:
        in_features: width of the features.
        scale: positive factor on the cosines; None for plain logits.

    Example:
        >>> import torch
        >>> from simplexfix.models import LinearHead
        >>> head = LinearHead(32)
        >>> head.embed(torch.randn(2, 32)).shape
        torch.Size([2, 32])
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
        """Returns the features [B, in_features] unchanged."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Returns the logits [B, C] of features [B, in_features], C the present number of classes."""
        if self.scale is None:
            return self.classifier(features)  # type: ignore[no-any-return]
        return self.scale * F.linear(F.normalize(features), F.normalize(self.classifier.weight))

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Returns the mean cross-entropy over the present classes.

        Args:
            features: [B, in_features] floating.
            target: [B] int64 class ids, or -100 for ignored rows.

        Returns:
            A scalar.

        Raises:
            ValueError: a label has no class (only checked on the CPU).
        """
        check_known(target, self.num_classes, "head.grow", ignored=IGNORED)
        return F.cross_entropy(self(features), target, ignore_index=IGNORED)

    @torch.no_grad()
    def grow(self, classes: int) -> None:
        """Adds newly initialised rows until there are `classes`; existing rows do not change."""
        old, kept = self.classifier, self.num_classes
        if classes > kept:
            self.classifier = nn.Linear(old.in_features, classes).to(old.weight)
            self.classifier.weight[:kept] = old.weight[:kept]
            self.classifier.bias[:kept] = old.bias[:kept]
            self.classifier.bias.requires_grad_(self.scale is None)
            self.num_classes = classes


def check_known(target: Tensor, classes: int, remedy: str, *, ignored: int | None = None) -> None:
    """Raises ValueError if a label has no class and is not `ignored` (only on the CPU).

    `remedy` names the function that adds classes.
    """
    if not is_readable(target):
        return
    unknown = (target < 0) | (target >= classes)
    if ignored is not None:
        unknown &= target != ignored
    if unknown.any():
        row = int(unknown.nonzero()[0])
        known = f"labels of {classes} classes lie in [0, {classes - 1}]" if classes else "there are no classes yet"
        raise ValueError(f"target row {row} has label {int(target[row])}, but {known}; {remedy} adds classes")
