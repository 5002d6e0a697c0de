"""Reference implementations of all operators in plain PyTorch, with the same results.

They run where `_native.has_kernels` is false.  Tests compare with them in float64; benchmarks use them as the baseline.
`simplexfix.functional` has checked the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_bits
from ._native import is_readable, is_transformed
from .polytopes import cube_signs, simplex_constants

CUBE_BLOCK = 4096  # most cube vertices whose signs are in memory at once


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums and losses: float64 for float64, float32 for narrower dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Disables autocast for the tensor's device; autocast does not apply to the meta device."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def unit_rows(z: Tensor) -> Tensor:
    """Divides rows by their L2 norm; a zero row stays zero and has a zero gradient."""
    square = z.square().sum(-1, keepdim=True)
    zero = square == 0
    # not rsqrt: its derivative, square^-1.5, overflows float32 for small rows
    return torch.where(zero, 0.0, z / torch.where(zero, 1.0, square).sqrt())


def check_targets(z: Tensor, target: Tensor, slots: int, ignore_index: int) -> Tensor:
    """Raises for a target [B] out of range, or sets its row to nan where `is_readable` is false; returns z [B, d]."""
    bad = ((target < 0) | (target >= slots)) & (target != ignore_index)
    if not is_readable(target):
        return z * torch.ones_like(target, dtype=z.dtype).masked_fill(bad, math.nan).unsqueeze(-1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"target out of range: row {row} has slot {int(target[row])}, "
            f"expected 0 to {slots - 1} or ignore_index {ignore_index}"
        )
    return z


def simplex_logits(z: Tensor, *, normalize: bool = False, scale: float = 1.0) -> Tensor:
    a, m, r = simplex_constants(z.shape[-1] + 1)
    x = z.to(accumulate_dtype(z.dtype))
    if normalize:
        x = unit_rows(x)
    total = x.sum(-1, keepdim=True)
    return (scale / r * torch.cat([x - m * total, (a - m) * total], -1)).to(z.dtype)


def _with_margin(cosine: Tensor, kind: str, size: float) -> Tensor:
    if kind == "cosine":
        return cosine - size
    c = cosine.clamp(-1.0, 1.0)
    sine = ((1 - c) * (1 + c)).clamp_min(1e-12).sqrt()
    with_margin = c * math.cos(size) - sine * math.sin(size)
    return torch.where(c > -math.cos(size), with_margin, c - size * math.sin(size))


def orthoplex_logits(z: Tensor, *, normalize: bool = False, scale: float = 1.0) -> Tensor:
    x = z.to(accumulate_dtype(z.dtype))
    if normalize:
        x = unit_rows(x)
    x = scale * x
    return torch.cat([x, -x], -1).to(z.dtype)


def cube_logits(z: Tensor, codes: Tensor, *, normalize: bool = False, scale: float = 1.0) -> Tensor:
    d = z.shape[-1]
    check_bits(codes, d)
    x = z.to(accumulate_dtype(z.dtype))
    if normalize:
        x = unit_rows(x)
    x = scale / math.sqrt(d) * x
    with no_autocast(z):
        # block by block: the signs of all vertices may need far more memory than z and the logits together
        blocks = [x @ cube_signs(block, d, x.dtype).T for block in torch.split(codes, CUBE_BLOCK)]
    return torch.cat(blocks, -1).to(z.dtype)


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    margin: tuple[str, float] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Returns the cross-entropy of unscaled logits [B, K]; `check_targets` has set rows of invalid targets to nan."""
    counts, target = target != ignore_index, target.clamp(0, logits.shape[-1] - 1)
    if margin is not None:
        index = target.unsqueeze(-1)
        with_margin = _with_margin(logits.gather(-1, index), *margin)
        logits = logits.scatter(-1, index, with_margin)
    with no_autocast(logits):
        return F.cross_entropy(
            scale * logits,
            target.where(counts, -100),
            None if weight is None else weight.to(logits.dtype),
            ignore_index=-100,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


def simplex_cross_entropy(
    z: Tensor, target: Tensor, *, normalize: bool = False, ignore_index: int = -100, **options: Any
) -> Tensor:
    x = check_targets(z.to(accumulate_dtype(z.dtype)), target, z.shape[-1] + 1, ignore_index)
    return _cross_entropy(simplex_logits(x, normalize=normalize), target, ignore_index=ignore_index, **options)


def orthoplex_cross_entropy(
    z: Tensor, target: Tensor, *, normalize: bool = False, ignore_index: int = -100, **options: Any
) -> Tensor:
    x = check_targets(z.to(accumulate_dtype(z.dtype)), target, 2 * z.shape[-1], ignore_index)
    return _cross_entropy(orthoplex_logits(x, normalize=normalize), target, ignore_index=ignore_index, **options)


def cube_cross_entropy(
    z: Tensor,
    target: Tensor,
    *,
    codes: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    margin: tuple[str, float] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    d = z.shape[-1]
    slots = 2**d if codes is None else len(codes)
    x = check_targets(z.to(accumulate_dtype(z.dtype)), target, slots, ignore_index)
    counts = target != ignore_index
    label = target.where(counts, 0).clamp(0, slots - 1)
    x = x.where(counts.unsqueeze(-1), 0.0)
    x = x + 0.0 * x  # inf becomes nan, as in a softmax
    if normalize:
        x = unit_rows(x)
    code = label.unsqueeze(-1) if codes is None else codes[label]
    if codes is not None:
        check_bits(code.where(counts.unsqueeze(-1), 0), d, label)
    own = cube_signs(code, d, x.dtype) * x / math.sqrt(d)
    flips = -2 * scale * own  # logit of a vertex minus the label's, per differing coordinate
    gap = _softplus(flips).sum(-1)  # logsumexp minus the label's logit
    with_margin = cosine = own.sum(-1)
    if margin is not None:
        with_margin = _with_margin(cosine, *margin)
        gap = _softplus(_log_expm1(gap, flips) + scale * (cosine - with_margin))
    rows = (1 - label_smoothing) * gap
    if label_smoothing > 0:  # vertices sum to zero, so logits do as well, up to the margin
        rows = rows + label_smoothing * (gap + scale * with_margin + scale * (cosine - with_margin) * 0.5**d)
    factor = torch.ones_like(rows) if weight is None else weight.to(rows.dtype)[label]
    rows = (factor * rows).where(counts, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / factor.where(counts, 0.0).sum()


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to full relative precision; F.softplus is linear above 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _log_expm1(gap: Tensor, flips: Tensor) -> Tensor:
    """log(exp(gap) - 1) for gap = sum_j softplus(flips_j); for gap below eps this is logsumexp(flips)."""
    tiny = gap < torch.finfo(gap.dtype).eps
    safe = gap.where(~tiny, 1.0)
    return torch.where(tiny, flips.logsumexp(-1), safe + (-torch.expm1(-safe)).log())


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def contrast_rows(
    anchors: Tensor,
    candidates: Tensor,
    anchor_class: Tensor,
    candidate_class: Tensor,
    first_positive: int,
    *,
    mu: float,
    negatives: str,
) -> Tensor:
    """Contrastive loss of each anchor, as in `simplexfix.functional.old_new_contrast`: log(denominator) - s_own.

    Anchor i and its own candidate, `first_positive + i`, are embeddings of the same item.
    """
    dtype = accumulate_dtype(anchors.dtype)
    with no_autocast(anchors):
        similarity = mu * (unit_rows(anchors.to(dtype)) @ unit_rows(candidates.to(dtype)).T)
    own = similarity.diagonal(first_positive)
    same = anchor_class[:, None] == candidate_class
    if negatives == "zero_mask":
        return similarity.masked_fill(same, 0.0).logsumexp(1) - own
    if negatives == "infonce":
        others = same & ~torch.ones_like(same).triu(first_positive).tril(first_positive)
        return similarity.masked_fill(others, -math.inf).logsumexp(1) - own
    alone = same.all(1)
    masked = similarity.masked_fill(same & ~alone[:, None], -math.inf)
    return torch.where(alone, 0.0, masked.logsumexp(1)) - own


def cosine_topk(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Implements `simplexfix.functional.cosine_topk`; only the order of float64 sums differs."""
    for name, rows in (("query", query), ("gallery", gallery)):
        # values are also checked on a GPU, although that synchronizes
        looks = not (torch.compiler.is_compiling() or is_transformed() or rows.is_meta)
        if looks and not rows.isfinite().all():
            raise ValueError(f"{name} row {int((~rows.isfinite()).any(1).nonzero()[0])} holds nan or inf")
    return unit_topk(unit_float32(query), map(unit_float32, torch.split(gallery, 8192)), k)


def unit_float32(rows: Tensor) -> Tensor:
    """Normalises rows in float64 and rounds them to float32, as a search does."""
    return unit_rows(rows.double()).float()


def unit_topk(q: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Returns `cosine_topk` of normalised float32 rows, with the gallery in blocks."""
    q = q.double()
    # The running best k have lower ids and come before each block's scores: a stable sort orders ties by id.
    scores = q.new_full((len(q), k), -math.inf, dtype=torch.float32)
    ids = torch.full_like(scores, -1, dtype=torch.int64)
    start = 0
    for block in blocks:
        block_ids = torch.arange(start, start + len(block), device=q.device).expand(len(q), -1)
        start += len(block)
        scores, order = torch.cat([scores, (q @ block.double().T).float()], 1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, block_ids], 1).gather(1, order)
        scores, ids = scores[:, :k], ids[:, :k]
    return scores, ids
