"""Stored vectors, moved to where the newest encoder puts similar items."""

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
    """Another method's adapter, whose stored vectors are moved by the mean move of fitted items that are similar.

        A = adapter that `of` fits,  s(y) = n(A.gallery(y)),  e_i = A(new_i) - s(old_i)
        w = softmax_i(scale s(y) . s(old_i))                  i: drawn items of the fit, at most `rows`
        adapter.gallery(y) = n(s(y) + beta sum_i w_i e_i),  adapter(x) = A(x)

    The sum is a kernel regression of the move from the old encoder's vector to the new one's.  It gives stored vectors
    a part of the new encoder's knowledge about similar items, as a new extraction would.  In a chain e_i leads to the
    newest version, so that each gallery is mapped in one way.

    Queries cost nothing more.  Each stored vector costs 2 * rows * d multiply-adds once, and the adapter stores
    2 * rows * d further numbers.

    Args:
        of: the method that fits the adapter; its query map must be affine, as for `LocalCorrection`.
        scale: scale of the cosines, positive: larger values weigh fewer, more similar items.
        beta: in [0, 1], fraction of the move; with 0 stored vectors are those of A.
        rows: fitted items that the adapter stores, at least 1; all of them if the fit has fewer.
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
