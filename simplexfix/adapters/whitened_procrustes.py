"""The orthogonal map between whitened features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .._checks import check_fraction
from ._moments import Moments, polar
from .base import Adapter, AdapterMethod
from .maps import AffineMap

__all__ = ["WhitenedProcrustes", "whitening_map"]


@dataclass(frozen=True)
class WhitenedProcrustes(AdapterMethod):
    """Whitens the features of both encoders and maps the new ones to the old ones orthogonally.

    The gallery is mapped too: its vectors are whitened.

        S = (1 - g) S_w + g (trace(S_w) / f) I    S_w: within-class covariance of n(x); without labels, of all rows
                                                  f: width of the features;  n(v) = v / |v|
        a(x) = n((n(x) - mean) S^{-1/2})          a_old and a_new, each with its own mean of n(x) and its own S
        U diag(s) V^T = SVD of a_new(X_new)^T a_old(X_old)     X_old, X_new: features of the same items, a row each
        Q = U V^T
        adapter(x) = n(a_new(x) Q),  adapter.gallery(y) = a_old(y)

    If the new encoder is not wider than the old one, Q keeps the cosines between whitened new vectors.

    Args:
        g: shrinkage, in [0, 1]: 0 whitens fully, 1 only subtracts the mean.

    Reference:
        Whitening by the within-class covariance: Fukunaga, "Introduction to Statistical Pattern Recognition", 1990,
        chapter 10; shrinkage: Ledoit and Wolf, 2004.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import WhitenedProcrustes
        >>> labels = torch.arange(200) % 10
        >>> items = torch.randn(10, 32)[labels] + 0.5 * torch.randn(200, 32)
        >>> old, new = items @ torch.randn(32, 8), items @ torch.randn(32, 16)
        >>> adapter = WhitenedProcrustes().fit(old, new, labels=labels)
        >>> adapter(new).shape, adapter.gallery(old).shape
        (torch.Size([200, 8]), torch.Size([200, 8]))
    """

    name: ClassVar[str] = "whitened_procrustes"
    maps_gallery: ClassVar[bool] = True
    g: float = 0.3

    def __post_init__(self) -> None:
        check_fraction("g", self.g)

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        q = moments.once(("whitened", old, new, self.g), lambda: polar(moments.whitened(new, old, self.g)))
        weight = moments.whitening(new, self.g) @ q
        query = AffineMap(weight, -moments.mean(new) @ weight)
        return Adapter(query, whitening_map(moments, old, self.g), method=self.described())

    def own_maps(self, moments: Moments) -> Sequence[nn.Module]:
        return [whitening_map(moments, i, self.g) for i in range(len(moments.features.versions))]


def whitening_map(moments: Moments, version: int, g: float) -> AffineMap:
    """Returns the map a(x) of one encoder, with float64 weights."""
    whitening = moments.whitening(version, g)
    return AffineMap(whitening, -moments.mean(version) @ whitening)
