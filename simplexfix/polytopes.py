"""Geometry of the fixed classifiers: regular simplex, orthoplex and cube, their vertices on demand."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_bits, check_codes, check_integer, check_tensor, shape

__all__ = [
    "SimplexConstants",
    "cube_codes",
    "cube_prototypes",
    "cube_signs",
    "orthoplex_prototypes",
    "simplex_constants",
    "simplex_prototypes",
]

_MOST_CODES = 1 << 24


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
        TypeError: `num_classes` is no integer.
        ValueError: `num_classes` is below 2.
    """
    num_classes = check_integer("num_classes", num_classes)
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
        TypeError: K is no integer, or `slots` not an int64 tensor.
        ValueError: K is below 2, or a slot is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632; arXiv 2405.02581.
    """
    num_classes = check_integer("num_classes", num_classes)
    a, m, r = simplex_constants(num_classes)
    d = num_classes - 1
    slots = _wanted(slots, num_classes, device)
    rows = torch.full((len(slots), d), -m / r, dtype=torch.float64, device=slots.device)
    last = slots == d
    rows[last] = (a - m) / r
    inner = (~last).nonzero().squeeze(1)
    rows[inner, slots[inner]] = (1 - m) / r
    return rows.to(dtype)


def orthoplex_prototypes(
    num_classes: int,
    slots: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Vertices of the orthoplex (cross-polytope), made on demand.

    Row `i < d` is `e_i`, row `d + i` is `-e_i`, `d = num_classes / 2`: cosine -1 to the opposite vertex and 0 to
    all others.

    Args:
        num_classes: K, even, at least 2.
        slots: [n] int64, the rows wanted, each in [0, K); all K of them if None.
        dtype: of the result.
        device: of the result; that of `slots` if None.

    Returns:
        [n, K / 2].

    Raises:
        TypeError: K is no integer, or `slots` not an int64 tensor.
        ValueError: K is odd or below 2, or a slot is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.
    """
    num_classes = check_integer("num_classes", num_classes)
    if num_classes < 2 or num_classes % 2:
        raise ValueError(
            f"num_classes must be even and at least 2, got {num_classes}: each vertex comes with its opposite"
        )
    d = num_classes // 2
    slots = _wanted(slots, num_classes, device)
    rows = torch.zeros(len(slots), d, dtype=dtype, device=slots.device)
    return rows.scatter_(1, (slots % d).unsqueeze(1), torch.where(slots < d, 1.0, -1.0).to(dtype).unsqueeze(1))


def cube_codes(num_classes: int, d: int, *, device: torch.device | str | None = None) -> Tensor:
    """Well-separated vertices of the d-cube `(+-1)^d / sqrt(d)`, one per class, as a table of bits.

    Row `u` is the codeword of the number `u` in a binary linear code of length `d`: bit `j` is the parity of
    `u & g_j`, for generators `g_j` chosen one after the other so that codewords keep far from each other
    (docs/math.md).  Two vertices that differ in `h` coordinates have cosine `1 - 2 h / d`.  The same arguments
    give the same codes everywhere, and for fewer classes the first rows, up to the same power of two.

    Args:
        num_classes: C, from 1 to 2^24.  Takes O(d C log C): seconds for 2^20 classes in 64 dimensions.
        d: dimensions, at least log2(C).
        device: of the result, torch's default if None; the codes are made on the CPU.

    Returns:
        [C, ceil(d / 64)] int64, rows all different: bit `j % 64` of word `j // 64` is set where coordinate `j`
        is positive.

    Raises:
        TypeError: C or d is no integer.
        ValueError: C is out of range, or larger than 2^d.

    Reference:
        Greedy choice by the method of conditional expectations, as in the proof of the Gilbert-Varshamov bound.
    """
    num_classes, d = check_integer("num_classes", num_classes), check_integer("d", d)
    if not 1 <= num_classes <= _MOST_CODES:
        raise ValueError(f"num_classes must lie in [1, {_MOST_CODES}], got {num_classes}")
    bits = (num_classes - 1).bit_length()
    if d < max(bits, 1):
        raise ValueError(f"d must be at least {max(bits, 1)} for {num_classes} classes, got {d}: 2^d vertices in all")
    messages = torch.arange(1 << bits, dtype=torch.int32, device="cpu")
    weights = torch.zeros_like(messages)  # of the codewords so far
    codes = torch.zeros(num_classes, -(-d // 64), dtype=torch.int64, device="cpu")
    # A codeword counts 2^-(its weight above the least): those that may stay the nearest count most.  Integers, so
    # that the choice is the same everywhere; 2^bits of 2^depth each stay below 2^31.
    depth = min(10, 30 - bits)
    for j in range(d):
        above = weights - weights[1:].min() if bits else weights
        counts = torch.where(above <= depth, 1 << (depth - above).clamp_min(0), 0).to(torch.int32)
        counts[0] = 0  # the zero message has no choice
        # sum_u counts_u (-1)^(u . g) for every g: the least has the most of the near codewords grow
        spectrum = _walsh_hadamard(counts)
        spectrum[0] = torch.iinfo(torch.int32).max
        generator = int((spectrum == spectrum.min()).nonzero()[0]) if bits else 0
        column = _parity(messages & generator)
        weights += column
        codes[:, j // 64] |= column[:num_classes].to(torch.int64) << (j % 64)
    return codes.to(torch.get_default_device() if device is None else device)


def cube_signs(codes: Tensor, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., ceil(d / 64)] int64 bits of `cube_codes` -> [..., d], 1 where a coordinate is positive and -1 elsewhere."""
    j = torch.arange(d, device=codes.device)
    bit = torch.ones_like(j).bitwise_left_shift(j % 64)
    return (codes[..., j // 64].bitwise_and(bit) != 0).to(dtype) * 2 - 1


def cube_prototypes(
    codes: Tensor, d: int, slots: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Vertices of the d-cube by their codes: rows of norm 1, each coordinate `+-1 / sqrt(d)`.

    Args:
        codes: [C, ceil(d / 64)] int64, as `cube_codes` makes them.
        d: dimensions, at least 1.
        slots: [n] int64, the rows wanted, each in [0, C); all of them if None.
        dtype: of the result; the values are computed in float64 and rounded once.

    Returns:
        [n, d], on the device of `codes`.

    Raises:
        TypeError: `codes` or `slots` is not an int64 tensor, or d no integer.
        ValueError: `codes` has the wrong shape or (on the CPU) bits beyond d, or a slot is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.
    """
    d = check_integer("d", d)
    if d < 1:
        raise ValueError(f"d must be at least 1, got {d}")
    check_codes(codes, d)
    check_bits(codes, d)
    slots = _wanted(slots, len(codes), codes.device)
    return (cube_signs(codes[slots], d, torch.float64) / math.sqrt(d)).to(dtype)


def _wanted(slots: Tensor | None, num_classes: int, device: torch.device | str | None) -> Tensor:
    """The slots asked for, all of them if None, each checked to be one."""
    if slots is None:
        return torch.arange(num_classes, device=device)
    check_tensor("slots", slots)
    if slots.dtype != torch.int64:
        raise TypeError(f"slots must be int64, got {slots.dtype}")
    if slots.ndim != 1:
        raise ValueError(f"slots must have shape [n], got {shape(slots)}")
    if device is not None:
        slots = slots.to(device)
    if slots.numel() and (slots.min() < 0 or slots.max() >= num_classes):
        raise ValueError(f"slots must lie in [0, {num_classes - 1}], got {int(slots.min())} to {int(slots.max())}")
    return slots


def _walsh_hadamard(values: Tensor) -> Tensor:
    """In place: values_g <- sum_u values_u (-1)^(u . g), for [2^k] integers."""
    half = 1
    while half < len(values):
        low, high = values.view(-1, 2, half).unbind(1)
        difference = low - high
        low += high
        high.copy_(difference)
        half *= 2
    return values


def _parity(numbers: Tensor) -> Tensor:
    """The number of set bits of each int32, modulo 2."""
    for shift in (16, 8, 4, 2, 1):
        numbers = numbers ^ (numbers >> shift)
    return numbers & 1
