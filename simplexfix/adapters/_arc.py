"""Spherical interpolation of a query by the old encoder and its adapted counterpart by the new one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["slerp"]

_SMALLEST_SINE = 1e-4  # below it rows are nearly parallel, and the straight line is the arc to float32's precision


def slerp(old: Tensor, new: Tensor, alpha: float) -> Tensor:
    """Points on the arcs between unit rows.

        cos t = old . new
        out = sin((1 - alpha) t) / sin t * old + sin(alpha t) / sin t * new

    `alpha` = 0 gives `old` to the bit, 1 gives `new`.  Opposite rows have no arc: the line is taken.

    Args:
        old, new: [B, d] unit rows.
        alpha: in [0, 1].

    Reference:
        Shoemake, "Animating rotation with quaternion curves", 1985; for queries of two encoders arXiv 2609.39836.
    """
    if alpha in (0, 1):
        return new if alpha else old
    cosine = (old * new).sum(-1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    flat = sine < _SMALLEST_SINE
    sine = torch.where(flat, 1, sine)
    before = torch.where(flat, 1 - alpha, torch.sin((1 - alpha) * angle) / sine)
    after = torch.where(flat, alpha, torch.sin(alpha * angle) / sine)
    return normalize(before * old + after * new, dim=-1)
