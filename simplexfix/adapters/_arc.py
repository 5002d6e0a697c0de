"""Spherical interpolation between embeddings of a query by the old encoder and by the adapted new one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["slerp"]

_SMALLEST_SINE = 1e-4  # below it the straight line equals the arc to float32 precision


def slerp(old: Tensor, new: Tensor, alpha: float) -> Tensor:
    """Returns points on the arcs between unit rows.

        cos t = old . new
        out = sin((1 - alpha) t) / sin t * old + sin(alpha t) / sin t * new

    With `alpha` = 0 it returns `old`, with 1 `new`.  Opposite rows have no unique arc: a point on the line between them
    is normalised.

    Args:
        old, new: [B, d] unit rows.
        alpha: position on the arc, in [0, 1].

    Reference:
        Shoemake, "Animating rotation with quaternion curves", 1985; for queries of two encoders arXiv 2609.39836.
    """
    if alpha in (0, 1):
        return new if alpha else old
    cosine = (old * new).sum(-1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    parallel = sine < _SMALLEST_SINE
    sine = torch.where(parallel, 1, sine)
    old_weight = torch.where(parallel, 1 - alpha, torch.sin((1 - alpha) * angle) / sine)
    new_weight = torch.where(parallel, alpha, torch.sin(alpha * angle) / sine)
    return normalize(old_weight * old + new_weight * new, dim=-1)
