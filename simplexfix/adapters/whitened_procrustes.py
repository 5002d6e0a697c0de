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

        S = (1 - g) S_w + g trace(S_w) / f I      S_w: covariance within classes; without labels, of all rows
                                                  f: width of the features
        a(x) = n((n(x) - mean) S^{-1/2})          one map per encoder, with its mean and S; n(v) = v / |v|
        Q = U V^T of the SVD of a(X_new)^T a(X_old)
        adapter(x) = n(a_new(x) Q),  adapter.gallery(y) = a_old(y)

    If the new encoder is not wider than the old one, Q keeps the cosines between whitened new vectors.

    Args:
        g: shrinkage, in [0, 1]: 1 does not whiten.

    Reference:
        Whitening by the covariance within classes: Fukunaga, "Introduction to Statistical Pattern Recognition", 1990,
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
    """Returns a(x) before its normalisation, of one encoder, in float64."""
    whitening = moments.whitening(version, g)
    return AffineMap(whitening, -moments.mean(version) @ whitening)
