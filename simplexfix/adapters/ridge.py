"""Ridge regression from the new encoder's features to those of the old encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_name, check_positive
from ._moments import Moments
from .base import Adapter, AdapterMethod
from .maps import AffineMap
from .procrustes import procrustes_map

__all__ = ["Ridge", "ridge_solution"]


@dataclass(frozen=True)
class Ridge(AdapterMethod):
    """Maps new queries into the old space by a linear map with a penalty; stored vectors stay.

        X, Y = unit rows of new and old, minus their means;  r = penalty * trace(X^T X) / f_new
        W = argmin |X W - Y|^2 + r |W - A|^2 = (X^T X + r I)^{-1} (X^T Y + r A)
        A = 0 for anchor "zero", the map of `Procrustes` for anchor "procrustes"
        adapter(x) = n((n(x) - mean_new) W + mean_old)      n(v) = v / |v|

    Args:
        penalty: weight of the penalty, above 0, relative to the mean of X^T X's diagonal: it suits any number of rows.
        anchor: "zero" or "procrustes", the map A from which the penalty measures W.

    Reference:
        Hoerl and Kennard, "Ridge regression", 1970.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import Ridge
        >>> new = torch.randn(200, 16)
        >>> old = new @ torch.randn(16, 8)
        >>> cosines = (Ridge(1e-3).fit(old, new)(new) * torch.nn.functional.normalize(old)).sum(1)
        >>> bool((cosines > 0.9).all())
        True
    """

    name: ClassVar[str] = "ridge"
    penalty: float = 0.1
    anchor: str = "zero"

    def __post_init__(self) -> None:
        check_positive("penalty", self.penalty)
        check_name("anchor", self.anchor, ("zero", "procrustes"))

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        anchor = procrustes_map(moments, old, new).weight if self.anchor == "procrustes" else None
        w = ridge_solution(moments, old, new, self.penalty, anchor)
        return Adapter(AffineMap(w, moments.mean(old) - moments.mean(new) @ w), method=self.described())


def ridge_solution(moments: Moments, old: int, new: int, penalty: float, anchor: Tensor | None = None) -> Tensor:
    """Returns W of `Ridge`, [f_new, f_old]."""
    gram, cross = moments.gram(new), moments.cross(new, old)
    r = penalty * gram.trace() / len(gram)
    factor = torch.linalg.cholesky(gram + r * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(cross if anchor is None else cross + r * anchor, factor)
