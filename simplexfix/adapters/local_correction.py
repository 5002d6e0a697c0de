"""Another method's map, corrected by the errors that it makes at similar items of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_fraction, check_integer, check_positive
from ._moments import Moments
from ._paired import PairedFeatures
from .base import Adapter, AdapterMethod
from .hoc_refined import HOCRefined
from .lambda_orthogonal import LambdaOrthogonal
from .maps import AffineMap, LocalMap
from .procrustes import Procrustes
from .ridge import Ridge
from .simplex_junction import SimplexJunction
from .whitened_procrustes import WhitenedProcrustes

__all__ = ["AFFINE", "LocalCorrection"]

AFFINE = (Procrustes, Ridge, LambdaOrthogonal, WhitenedProcrustes, SimplexJunction, HOCRefined)
_ROWS = 1024


@dataclass(frozen=True)
class LocalCorrection(AdapterMethod):
    """Another method's adapter, whose queries are moved by the mean error at fitted items that are similar to them.

        A = adapter that `of` fits,  p(x) = A(x),  e_i = A.gallery(old_i) - p(new_i)   i: `rows` drawn items of the fit
        w = softmax_i(scale p(x) . p(new_i))
        adapter(x) = n(p(x) + beta sum_i w_i e_i),  adapter.gallery = A.gallery

    The sum is a kernel regression of the error.  The new encoder searches a gallery of its own as without it: there is
    no error to correct.

    Each query costs 2 * rows * d multiply-adds more, and the adapter stores 2 * rows * d further numbers.

    Args:
        of: the method that fits the adapter; its query map must be affine: `Procrustes`, `Ridge`, `LambdaOrthogonal`,
            `WhitenedProcrustes`, `SimplexJunction` or `HOCRefined`.
        scale: of the cosines, positive: larger values weigh fewer, more similar items.
        beta: in [0, 1]; with 0 the queries are those of A.
        rows: largest number of fitted items that are kept, at least 1.
        seed: of the draw.

    Reference:
        Nadaraya, "On estimating regression", 1964; Watson, "Smooth regression analysis", 1964.
    """

    name: ClassVar[str] = "local_correction"
    of: AdapterMethod
    scale: float = 40.0
    beta: float = 0.25
    rows: int = 8192
    seed: int = 0

    @property
    def maps_gallery(self) -> bool:  # type: ignore[override]
        return self.of.maps_gallery

    def __post_init__(self) -> None:
        if not isinstance(self.of, AFFINE):
            known = ", ".join(kind.__name__ for kind in AFFINE)
            raise TypeError(f"of must be a method with an affine query map ({known}), got {type(self.of).__name__}")
        check_positive("scale", self.scale)
        check_fraction("beta", self.beta)
        if check_integer("rows", self.rows) < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")

    def adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        """As of `AdapterMethod`, but computed again each time: stored adapters of a grid would fill the memory."""
        return self._adapter(moments, old, new).eval()

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        of = self.of.adapter(moments, old, new)
        assert isinstance(of.query_map, AffineMap)
        mapped, errors = moments.once(
            ("local", self.of, old, new, self.rows, self.seed), lambda: self._errors(moments.features, of, old, new)
        )
        query = LocalMap(of.query_map.weight, of.query_map.bias, self.scale * mapped, self.beta * errors)
        return Adapter(query, of.gallery_map, method=self.described())

    def own_maps(self, moments: Moments) -> Sequence[nn.Module | None]:
        return self.of.own_maps(moments)

    def check(self, features: PairedFeatures) -> None:
        self.of.check(features)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "of": self.of.described()}

    def _errors(self, features: PairedFeatures, of: Adapter, old: int, new: int) -> tuple[Tensor, Tensor]:
        """[M, d] p(new_i) and [M, d] e_i of the equation."""
        drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(self.seed))[: self.rows]
        mapped, wanted = [], []
        for at in torch.split(drawn.sort().values, _ROWS):
            mapped.append(of.query_map(features.gather(new, at)))
            wanted.append(of.gallery(features.gather(old, at)))
        return torch.cat(mapped), torch.cat(wanted) - torch.cat(mapped)
