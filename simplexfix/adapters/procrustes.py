"""The orthogonal map between two encoders' features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._moments import Moments, polar
from .base import Adapter, AdapterMethod
from .maps import AffineMap

__all__ = ["Procrustes", "procrustes_map"]


@dataclass(frozen=True)
class Procrustes(AdapterMethod):
    """Maps new queries into the old space by the orthogonal map with the smallest error; stored vectors stay.

        X, Y = unit rows of new and old, minus their means
        Q = argmin |X Q - Y|^2 over maps with orthonormal columns, or rows if the old encoder is wider
          = U V^T of the SVD of X^T Y
        adapter(x) = n((n(x) - mean_new) Q + mean_old)      n(v) = v / |v|

    Reference:
        Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import Procrustes
        >>> new = torch.randn(100, 16)
        >>> old = new @ torch.linalg.qr(torch.randn(16, 16))[0]       # the same features, rotated
        >>> adapter = Procrustes().fit(old, new)
        >>> torch.allclose(adapter(new), torch.nn.functional.normalize(old), atol=1e-4)
        True
    """

    name: ClassVar[str] = "procrustes"

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        return Adapter(procrustes_map(moments, old, new), method=self.described())


def procrustes_map(moments: Moments, old: int, new: int) -> AffineMap:
    """Returns the Procrustes map from new to old features, in float64."""
    q = moments.once(("procrustes", old, new), lambda: polar(moments.cross(new, old)))
    return AffineMap(q, moments.mean(old) - moments.mean(new) @ q)
