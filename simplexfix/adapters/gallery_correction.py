"""Moves stored vectors towards the vectors that the newest encoder gives similar items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ._moments import Moments
from ._paired import PairedFeatures
from .base import Adapter, AdapterMethod
from .local_correction import check_correction, fitted_pairs
from .maps import AffineMap, LocalMap

__all__ = ["GalleryCorrection"]


@dataclass(frozen=True)
class GalleryCorrection(AdapterMethod):
    """Moves the stored vectors of another method's adapter, using similar items of the fit.

        A = adapter that `of` fits,  s(y) = n(A.gallery(y)),  e_i = A(new_i) - s(old_i)
        w = softmax_i(scale s(y) . s(old_i))                  i: drawn items of the fit, at most `rows`
        adapter.gallery(y) = n(s(y) + beta sum_i w_i e_i),  adapter(x) = A(x)

    n(v) = v / |v|.  The sum is a kernel regression of the difference e between the vectors of the new and the old
    encoder.  It moves stored vectors part of the way to those of a new extraction.  In a chain, e_i is the difference
    to the newest version, so that each gallery has one map.

    Queries cost nothing more.  Each stored vector costs 2 * rows * d multiply-adds once, and the adapter stores
    2 * rows * d further numbers.

    Args:
        of: the method that fits the adapter; its query map must be affine, as for `LocalCorrection`.
        scale: scale of the cosines, positive; larger values concentrate the weights on fewer, more similar items.
        beta: factor of the regressed difference, in [0, 1]; with 0 stored vectors are those of A.
        rows: maximum number of fitted items that the adapter stores, at least 1.
        seed: seed of the draw.

    Reference:
        Nadaraya, "On estimating regression", 1964; Watson, "Smooth regression analysis", 1964.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import GalleryCorrection, Procrustes
        >>> old, new = torch.randn(100, 8), torch.randn(100, 16)
        >>> adapter = GalleryCorrection(Procrustes()).fit(old, new)
        >>> adapter(new).shape, adapter.gallery(old).shape
        (torch.Size([100, 8]), torch.Size([100, 8]))
    """

    name: ClassVar[str] = "gallery_correction"
    maps_gallery: ClassVar[bool] = True
    kept: ClassVar[bool] = False
    of: AdapterMethod
    scale: float = 20.0
    beta: float = 0.5
    rows: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        check_correction(self.of, self.scale, self.beta, self.rows)

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        query = self.of.adapter(moments, old, new).query_map
        return Adapter(query, self._gallery_map(moments, old), method=self.described())

    def own_maps(self, moments: Moments) -> Sequence[nn.Module | None]:
        of = self.of.own_maps(moments)
        return [*(self._gallery_map(moments, version) for version in range(len(of) - 1)), of[-1]]

    def check(self, features: PairedFeatures) -> None:
        self.of.check(features)

    def _gallery_map(self, moments: Moments, old: int) -> LocalMap:
        newest = len(moments.features.versions) - 1
        of = self.of.adapter(moments, old, newest).gallery_map
        if of is None:
            of = AffineMap(torch.eye(moments.features.width(old), device=moments.features.device))
        assert isinstance(of, AffineMap)
        mapped, stored = fitted_pairs(moments, self.of, old, newest, rows=self.rows, seed=self.seed)
        return LocalMap(of.weight, of.bias, self.scale * stored, self.beta * (mapped - stored))
