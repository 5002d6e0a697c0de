"""Interpolates between the old encoder's query and the adapted new query; both encoders run at query time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .._checks import check_fraction
from ._moments import Moments
from .base import Adapter, QueryChange

__all__ = ["Slerp"]


@dataclass(frozen=True)
class Slerp(QueryChange):
    """Interpolates between the old encoder's query and the query of another method's adapter, on the arc between them.

        q = sin((1 - alpha) t) / sin t * u + sin(alpha t) / sin t * v,     cos t = u . v
        u = n(adapter.gallery(old(query))),  v = adapter(new(query)),      n(a) = a / |a|

    `alpha` = 0 is the search by the old encoder, 1 that by the adapter.  Both encoders run for each query.

    Args:
        of: the method that fits the adapter.
        alpha: position on the arc, in [0, 1].

    Reference:
        arXiv 2609.39836.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import Ridge, Slerp
        >>> old, new = torch.randn(100, 8), torch.randn(100, 16)
        >>> adapter = Slerp(Ridge(), alpha=0.5).fit(old, new)
        >>> adapter(new, old).shape                                     # the old encoder runs at query time too
        torch.Size([100, 8])
    """

    name: ClassVar[str] = "slerp"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha)

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        of = self.of.adapter(moments, old, new)
        return Adapter(of.query_map, of.gallery_map, alpha=self.alpha, method=self.described())
