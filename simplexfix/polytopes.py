"""Geometry of the fixed classifier: the regular simplex, its constants and its vertices on demand."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SimplexConstants", "simplex_constants", "simplex_prototypes"]


class SimplexConstants(NamedTuple):
    """Before centring the last vertex is `a * 1`; the mean vertex is `m * 1`; `r` is a centred vertex's norm."""

    a: float
    m: float
    r: float


def simplex_constants(num_classes: int) -> SimplexConstants:
    """The three numbers behind the closed form of a simplex with `num_classes` vertices in
    `d = num_classes - 1` dimensions: `a = (1 - sqrt(1 + d)) / d`, `m = (1 + a) / (d + 1)`,
    `r = sqrt(d / (d + 1))`.

    Raises:
        ValueError: `num_classes` is below 2.
    """
    if num_classes < 2:
        raise ValueError(
            f"num_classes must be at least 2, got {num_classes}: a simplex of one vertex has no directions"
        )
    d = num_classes - 1
    a = -1 / (1 + math.sqrt(1 + d))  # the same number, free of cancellation
    return SimplexConstants(a, (1 + a) / (d + 1), math.sqrt(d / (d + 1)))


def simplex_prototypes(
    num_classes: int,
    slots: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Vertices of the fixed simplex, made on demand.

    Row `i` is `(t_i - mean(t)) / |t_i - mean(t)|` with `t_i = e_i` for `i < d` and `t_d = a * 1`: unit
    rows with pairwise cosine `-1 / (K - 1)` that sum to zero, in the order and with the signs of
    deployed models.

    Args:
        num_classes: K, at least 2.
        slots: [n] int64, the rows wanted, each in [0, K); all K of them if None (K x d numbers: for
            looking at, not for computing with, which `simplexfix.functional` does without them).
        dtype: of the result; the values are computed in float64 and rounded once.
        device: of the result; that of `slots` if None.

    Returns:
        [n, K - 1].

    Raises:
        ValueError: K is below 2, or a slot is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632; arXiv 2405.02581.
    """
    a, m, r = simplex_constants(num_classes)
    d = num_classes - 1
    if slots is None:
        slots = torch.arange(num_classes, device=device)
    elif device is not None:
        slots = slots.to(device)
    if slots.numel() and (slots.min() < 0 or slots.max() > d):
        raise ValueError(f"slots must lie in [0, {d}], got {int(slots.min())} to {int(slots.max())}")
    rows = torch.full((len(slots), d), -m / r, dtype=torch.float64, device=slots.device)
    last = slots == d
    rows[last] = (a - m) / r
    inner = (~last).nonzero().squeeze(1)
    rows[inner, slots[inner]] = (1 - m) / r
    return rows.to(dtype)
