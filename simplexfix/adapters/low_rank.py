"""An affine map of low rank, which needs little memory and few multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .._checks import check_integer, check_positive
from ._moments import Moments
from .base import Adapter, AdapterMethod
from .maps import LowRankMap
from .ridge import ridge_solution

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank(AdapterMethod):
    """Maps new queries into the old space by an affine map of rank r, in closed form; stored vectors stay.

        W, X = as in `Ridge`,  V = the r leading eigenvectors of W^T (X^T X + r' I) W,  r' = r of `Ridge`
        adapter(x) = n((n(x) - mean_new) W V V^T + mean_old)                    n(v) = v / |v|

    W V V^T is the best map of that rank for the objective of `Ridge`.

    Args:
        rank: r, at least 1; it is limited to the smaller of both widths.
        penalty: as in `Ridge`, with anchor "zero".

    Reference:
        Reinsel and Velu, "Multivariate reduced-rank regression", 1998; as an adapter: Drift-Adapter, arXiv 2509.23471,
        which trains the two factors by gradient steps.
    """

    name: ClassVar[str] = "low_rank"
    rank: int = 64
    penalty: float = 0.1

    def __post_init__(self) -> None:
        if check_integer("rank", self.rank) < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        check_positive("penalty", self.penalty)

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        w = ridge_solution(moments, old, new, self.penalty)
        _, vectors = torch.linalg.eigh(w.T @ moments.cross(new, old))  # (X^T X + r' I) W is X^T Y
        leading = vectors[:, -min(self.rank, *w.shape) :]
        down = w @ leading
        bias = moments.mean(old) - moments.mean(new) @ down @ leading.T
        return Adapter(LowRankMap(down, leading.T.contiguous(), bias), method=self.described())
