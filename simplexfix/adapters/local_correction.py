"""Corrects the queries of another method by its errors at similar items of the fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_fraction, check_integer, check_positive
from ._moments import Moments
from .base import Adapter, AdapterMethod, QueryChange
from .hoc_refined import HOCRefined
from .lambda_orthogonal import LambdaOrthogonal
from .maps import AffineMap, LocalMap
from .procrustes import Procrustes
from .ridge import Ridge
from .simplex_junction import SimplexJunction
from .whitened_procrustes import WhitenedProcrustes

__all__ = ["AFFINE", "LocalCorrection", "check_correction", "fitted_pairs"]

AFFINE = (Procrustes, Ridge, LambdaOrthogonal, WhitenedProcrustes, SimplexJunction, HOCRefined)
_ROWS = 1024


@dataclass(frozen=True)
class LocalCorrection(QueryChange):
    """Moves the queries of another method's adapter by its weighted mean error at similar items of the fit.

        A = adapter that `of` fits,  e_i = n(A.gallery(old_i)) - A(new_i)      i: drawn items of the fit, at most `rows`
        w = softmax_i(scale A(x) . A(new_i))
        adapter(x) = n(A(x) + beta sum_i w_i e_i),  adapter.gallery = A.gallery

    n(v) = v / |v|.  The sum is a kernel regression of the error.  Queries that search a gallery by the new encoder are
    not corrected.

    Each query costs 2 * rows * d multiply-adds more, and the adapter stores 2 * rows * d further numbers.

    Args:
        of: the method that fits the adapter; its query map must be affine: `Procrustes`, `Ridge`, `LambdaOrthogonal`,
            `WhitenedProcrustes`, `SimplexJunction` or `HOCRefined`.
        scale: scale of the cosines, positive; larger values concentrate the weights on fewer, more similar items.
        beta: fraction of the error that is corrected, in [0, 1]; with 0 queries are those of A.
        rows: maximum number of fitted items that the adapter stores, at least 1.
        seed: seed of the draw.

    Reference:
        Nadaraya, "On estimating regression", 1964; Watson, "Smooth regression analysis", 1964.
    """

    name: ClassVar[str] = "local_correction"
    kept: ClassVar[bool] = False
    scale: float = 40.0
    beta: float = 0.25
    rows: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        check_correction(self.of, self.scale, self.beta, self.rows)

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        of = self.of.adapter(moments, old, new)
        assert isinstance(of.query_map, AffineMap)
        mapped, stored = fitted_pairs(moments, self.of, old, new, rows=self.rows, seed=self.seed)
        query = LocalMap(of.query_map.weight, of.query_map.bias, self.scale * mapped, self.beta * (stored - mapped))
        return Adapter(query, of.gallery_map, method=self.described())


def check_correction(of: AdapterMethod, scale: float, beta: float, rows: int) -> None:
    """Raises the errors of the options that corrections share."""
    if not isinstance(of, AFFINE):
        known = ", ".join(kind.__name__ for kind in AFFINE)
        raise TypeError(f"of must be a method with an affine query map ({known}), got {type(of).__name__}")
    check_positive("scale", scale)
    check_fraction("beta", beta)
    if check_integer("rows", rows) < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")


def fitted_pairs(
    moments: Moments, of: AdapterMethod, old: int, new: int, *, rows: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns [M, d] adapted new rows and [M, d] stored vectors of the same random items: unit float32 rows."""
    features, adapter = moments.features, of.adapter(moments, old, new)

    def make() -> tuple[Tensor, Tensor]:
        drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:rows]
        mapped, stored = [], []
        for at in torch.split(drawn.sort().values, _ROWS):
            mapped.append(adapter.query_map(features.gather(new, at)))
            stored.append(adapter.gallery(features.gather(old, at)))
        return torch.cat(mapped), torch.cat(stored)

    return moments.once(("pairs", of, old, new, rows, seed), make)
