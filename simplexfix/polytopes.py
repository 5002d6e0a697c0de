"""Geometry of the fixed classifiers: vertices of the regular simplex, the orthoplex and the cube."""

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
    """Constants of the simplex.  With the all-ones vector 1, `a * 1` is the last vertex before centring and `m * 1` the
    mean vertex; `r` is the norm of a centred vertex.
    """

    a: float
    m: float
    r: float


def simplex_constants(num_classes: int) -> SimplexConstants:
    """Returns the three constants of a simplex's closed form.

        d = num_classes - 1
        a = (1 - sqrt(1 + d)) / d
        m = (1 + a) / (d + 1)
        r = sqrt(d / (d + 1))

    Args:
        num_classes: K, the number of vertices, at least 2.

    Raises:
        TypeError: `num_classes` is not an integer.
        ValueError: `num_classes` is below 2.

    Reference:
        docs/design/math.md.

    Example:
        >>> from simplexfix.polytopes import simplex_constants
        >>> a, m, r = simplex_constants(4)
        >>> round(a, 4), round(m, 4), round(r, 4)
        (-0.3333, 0.1667, 0.866)
    """
    num_classes = check_integer("num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(
            f"num_classes must be at least 2, got {num_classes}: a simplex of one vertex has no directions"
        )
    d = num_classes - 1
    a = -1 / (1 + math.sqrt(1 + d))  # equal to (1 - sqrt(1 + d)) / d, without cancellation
    return SimplexConstants(a, (1 + a) / (d + 1), math.sqrt(d / (d + 1)))


def simplex_prototypes(
    num_classes: int,
    slots: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Returns vertices of the fixed simplex as unit rows.

        t_i = e_i for i < d,  t_d = (a, ..., a)         # d = K - 1, a of `simplex_constants`
        row i = (t_i - mean(t)) / |t_i - mean(t)|

    Two rows have cosine `-1 / (K - 1)`, and all K rows sum to zero.  Order and signs are those of models that are
    already deployed.

    Args:
        num_classes: K, at least 2.
        slots: [n] int64, the rows to return, each in [0, K); None for all K.  The losses and logits of
            `simplexfix.functional` never need this matrix of K x d numbers.
        dtype: dtype of the result; values are computed in float64 and rounded once.
        device: device of the result; None for that of `slots`.

    Returns:
        [n, K - 1].

    Raises:
        TypeError: K is not an integer, or `slots` is not an int64 tensor.
        ValueError: K is below 2, or a slot is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632; arXiv 2405.02581.

    Example:
        >>> import torch
        >>> from simplexfix.polytopes import simplex_prototypes
        >>> rows = simplex_prototypes(5, dtype=torch.float64)
        >>> cosines = rows @ rows.T
        >>> round(cosines[0, 1].item(), 6), round(cosines[3, 4].item(), 6)
        (-0.25, -0.25)
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
    """Returns vertices of the orthoplex (cross-polytope) as unit rows.

        row i = e_i,  row d + i = -e_i                  # i < d = K / 2

    A vertex has cosine -1 to its opposite and 0 to all others.

    Args:
        num_classes: K, even, at least 2.
        slots: [n] int64, the rows to return, each in [0, K); None for all K.
        dtype: dtype of the result.
        device: device of the result; None for that of `slots`.

    Returns:
        [n, K / 2].

    Raises:
        TypeError: K is not an integer, or `slots` is not an int64 tensor.
        ValueError: K is odd or below 2, or a slot is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.

    Example:
        >>> from simplexfix.polytopes import orthoplex_prototypes
        >>> orthoplex_prototypes(4)
        tensor([[ 1.,  0.],
                [ 0.,  1.],
                [-1.,  0.],
                [ 0., -1.]])
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
    """Returns well-separated vertices of the d-cube `(+-1)^d / sqrt(d)`, one per class, as a table of bits.

        bit j of row u = parity(u & g_j)                # generators g_0, ..., g_(d - 1) of a binary linear code

    The generators are chosen greedily so that codewords have large Hamming distances (docs/design/math.md).  Two
    vertices that differ in h coordinates have cosine `1 - 2 h / d`.  The codes are a function of d and of C rounded up
    to a power of two: they are the same on every machine, and a smaller C with the same power of two gives the first
    rows.

    Args:
        num_classes: C, from 1 to 2^24.  The time is O(d C log C): seconds for 2^20 classes in 64 dimensions.
        d: number of dimensions, at least log2(C).
        device: device of the result; None for torch's default.  The codes are computed on the CPU.

    Returns:
        [C, ceil(d / 64)] int64, all rows different.  Bit `j % 64` of word `j // 64` is set where coordinate j is
        positive.

    Raises:
        TypeError: C or d is not an integer.
        ValueError: C is out of range, or larger than 2^d.

    Reference:
        Greedy choice by the method of conditional expectations, as in the proof of the Gilbert-Varshamov bound.

    Example:
        >>> from simplexfix.polytopes import cube_codes
        >>> cube_codes(1000, 128).shape                  # 128 bits are two words of 64
        torch.Size([1000, 2])
    """
    num_classes, d = check_integer("num_classes", num_classes), check_integer("d", d)
    if not 1 <= num_classes <= _MOST_CODES:
        raise ValueError(f"num_classes must lie in [1, {_MOST_CODES}], got {num_classes}")
    bits = (num_classes - 1).bit_length()
    if d < max(bits, 1):
        raise ValueError(f"d must be at least {max(bits, 1)} for {num_classes} classes, got {d}: 2^d vertices in all")
    messages = torch.arange(1 << bits, dtype=torch.int32, device="cpu")
    weights = torch.zeros_like(messages)  # Hamming weights of the codewords over the columns chosen so far
    codes = torch.zeros(num_classes, -(-d // 64), dtype=torch.int64, device="cpu")
    # A codeword counts 2^-(weight - least weight): the lightest codewords bound the code's distance, so they count
    # most.  Integer arithmetic gives the same choice on every machine.  2^bits counts of at most 2^depth sum to less
    # than 2^31.
    depth = min(10, 30 - bits)
    for j in range(d):
        above = weights - weights[1:].min() if bits else weights
        counts = torch.where(above <= depth, 1 << (depth - above).clamp_min(0), 0).to(torch.int32)
        counts[0] = 0  # the zero message's codeword is zero for all generators
        # sum_u counts_u (-1)^(u . g) for every g: the smallest sum adds a 1 to the most light codewords
        spectrum = _walsh_hadamard(counts)
        spectrum[0] = torch.iinfo(torch.int32).max
        generator = int((spectrum == spectrum.min()).nonzero()[0]) if bits else 0
        column = _parity(messages & generator)
        weights += column
        codes[:, j // 64] |= column[:num_classes].to(torch.int64) << (j % 64)
    return codes.to(torch.get_default_device() if device is None else device)


def cube_signs(codes: Tensor, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the signs of cube vertices: 1 where a coordinate is positive, -1 elsewhere.

    Args:
        codes: [..., ceil(d / 64)] int64 bits from `cube_codes`.
        d: number of dimensions.
        dtype: dtype of the result.

    Returns:
        [..., d], on the device of `codes`.

    Example:
        >>> from simplexfix.polytopes import cube_codes, cube_signs
        >>> signs = cube_signs(cube_codes(1000, 128), 128)
        >>> signs.shape, signs.abs().min().item(), signs.abs().max().item()
        (torch.Size([1000, 128]), 1.0, 1.0)
    """
    j = torch.arange(d, device=codes.device)
    bit = torch.ones_like(j).bitwise_left_shift(j % 64)
    return (codes[..., j // 64].bitwise_and(bit) != 0).to(dtype) * 2 - 1


def cube_prototypes(
    codes: Tensor, d: int, slots: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns vertices of the d-cube as unit rows.

        cube_signs(codes[slots], d) / sqrt(d)

    Args:
        codes: [C, ceil(d / 64)] int64 bits from `cube_codes`.
        d: number of dimensions, at least 1.
        slots: [n] int64, the rows to return, each in [0, C); None for all C.
        dtype: dtype of the result; values are computed in float64 and rounded once.

    Returns:
        [n, d], on the device of `codes`.

    Raises:
        TypeError: `codes` or `slots` is not an int64 tensor, or d is not an integer.
        ValueError: `codes` has the wrong shape or bits beyond d (only checked on the CPU), or a slot is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.

    Example:
        >>> from simplexfix.polytopes import cube_codes, cube_prototypes
        >>> rows = cube_prototypes(cube_codes(1000, 128), 128)
        >>> round(rows.norm(dim=1).mean().item(), 4)
        1.0
    """
    d = check_integer("d", d)
    if d < 1:
        raise ValueError(f"d must be at least 1, got {d}")
    check_codes(codes, d)
    check_bits(codes, d)
    slots = _wanted(slots, len(codes), codes.device)
    return (cube_signs(codes[slots], d, torch.float64) / math.sqrt(d)).to(dtype)


def _wanted(slots: Tensor | None, num_classes: int, device: torch.device | str | None) -> Tensor:
    """Returns the requested slots after a range check; all slots for None."""
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
        raise ValueError(
            f"slots must lie in [0, {num_classes - 1}], got values from {int(slots.min())} to {int(slots.max())}"
        )
    return slots


def _walsh_hadamard(values: Tensor) -> Tensor:
    """Walsh-Hadamard transform of [2^k] integers in place: values_g <- sum_u values_u (-1)^(u . g)."""
    half = 1
    while half < len(values):
        low, high = values.view(-1, 2, half).unbind(1)
        difference = low - high
        low += high
        high.copy_(difference)
        half *= 2
    return values


def _parity(numbers: Tensor) -> Tensor:
    """Number of set bits of each int32, modulo 2."""
    for shift in (16, 8, 4, 2, 1):
        numbers = numbers ^ (numbers >> shift)
    return numbers & 1
