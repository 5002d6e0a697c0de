"""One function per operator: it checks its arguments and calls the compiled kernels.

Where the library was not built, or has no kernel for an operator (orthoplex and cube logits) or a device, the reference
implementation in `simplexfix/_reference.py` computes the same results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from . import _gather, _native, _ops, _reference
from ._checks import (
    REDUCTIONS,
    check_codes,
    check_contrast_options,
    check_features,
    check_fraction,
    check_integer,
    check_loss_options,
    check_name,
    check_new_and_old,
    check_pair,
    check_rows,
    check_scale,
    check_target,
)

__all__ = [
    "cosine_topk",
    "cube_cross_entropy",
    "cube_logits",
    "hoc_loss",
    "old_new_contrast",
    "orthoplex_cross_entropy",
    "orthoplex_logits",
    "simplex_cross_entropy",
    "simplex_logits",
]


def simplex_logits(z: Tensor, *, normalize: bool = False, scale: float = 1.0) -> Tensor:
    """Returns the logits of the fixed simplex classifier in O(K) time per row, without the K x d matrix.

        W = simplex_prototypes(K)                       # [K, d], K = d + 1
        logits = scale * F.normalize(z) @ W.T           # F.normalize only with normalize=True

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        normalize: divide each row by its L2 norm first (a zero row stays zero).
        scale: positive factor.

    Returns:
        [..., d + 1], dtype of `z`, differentiable by `z`.

    Raises:
        TypeError: `z` is not a floating tensor.
        ValueError: `z` has no dimension or no columns, or `scale` is not positive and finite.

    Reference:
        arXiv 2405.02581; the closed form: docs/design/math.md.

    Example:
        >>> import torch
        >>> from simplexfix.functional import simplex_logits
        >>> from simplexfix.polytopes import simplex_prototypes
        >>> z = torch.randn(4, 9)
        >>> torch.allclose(simplex_logits(z), z @ simplex_prototypes(10).T, atol=1e-5)
        True
    """
    check_features("z", z)
    check_scale(scale)
    if not _native.has_kernels(z):
        return _reference.simplex_logits(z, normalize=normalize, scale=scale)
    out = _ops.simplex_logits(_as_rows(z), normalize, scale)
    return out.reshape(*z.shape[:-1], z.shape[-1] + 1)


def simplex_cross_entropy(
    z: Tensor,
    target: Tensor,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    margin: tuple[str, float] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Returns the cross-entropy of the fixed simplex classifier, fused: it stores no logits and no K x d matrix.

        W = simplex_prototypes(K)                       # [K, d], K = d + 1
        logits = F.normalize(z) @ W.T                   # F.normalize only with normalize=True
        logits[i, target[i]] -= m                       # margin=("cosine", m): CosFace
        logits[i, target[i]] = cos(theta + m)           # margin=("angular", m): ArcFace
        F.cross_entropy(scale * logits, target, weight, ignore_index=..., label_smoothing=..., reduction=...)

    The softmax runs over all K slots, including those reserved for future classes.  Sums and exponentials are
    computed in float32 (in float64 for a float64 `z`).

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        target: [...] int64, the slot of each row in [0, K), or `ignore_index`.
        normalize: divide each row by its L2 norm first (a zero row stays zero).
        scale: positive factor on the logits (the inverse temperature), in the range of float32.
        margin: None; ("cosine", m) with m in [0, 2] cosine units; or ("angular", m) with m in [0, pi] radians.  Needs
            `normalize=True`.  Where theta + m exceeds pi, the logit is cos(theta) - m sin(m), as in ArcFace.
        weight: [K] floating, one factor per slot, as in `torch.nn.functional.cross_entropy`; it gets no gradient.
        ignore_index: rows with this target contribute nothing to loss and gradient.
        label_smoothing: in [0, 1].
        reduction: "none", "mean" (weighted, over the rows that are not ignored; nan if there are none) or "sum".

    Returns:
        [...] with "none", else a scalar; dtype of `z`, float32 under autocast; differentiable by `z`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape is wrong, or an option or a target is out of range.  Targets are not checked
            on a GPU, which would synchronize, nor under `torch.func`, nor where `torch.compile` traces the reference
            implementation.  There a target out of range gives nan in its row's loss and gradient.

    Reference:
        arXiv 2405.02581; CosFace arXiv 1801.09414; ArcFace arXiv 1801.07698.

    Example:
        >>> import torch
        >>> from simplexfix.functional import simplex_cross_entropy
        >>> z, target = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 9, 3, 3])
        >>> loss = simplex_cross_entropy(z, target, normalize=True, scale=12.0)
        >>> loss.backward()
        >>> z.grad.shape
        torch.Size([4, 9])
    """
    return _cross_entropy(
        "simplex",
        z,
        target,
        None,
        normalize=normalize,
        scale=scale,
        margin=margin,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def orthoplex_logits(z: Tensor, *, normalize: bool = False, scale: float = 1.0) -> Tensor:
    """Returns the logits of the fixed orthoplex classifier; its vertices are the unit vectors and their opposites.

        W = orthoplex_prototypes(2 * d)                 # [2 d, d]: slot c < d is e_c, slot d + c is -e_c
        logits = scale * F.normalize(z) @ W.T           # F.normalize only with normalize=True; W.T: [z, -z]

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        normalize, scale: as in `simplex_logits`.

    Returns:
        [..., 2 d], dtype of `z`, differentiable by `z`.

    Raises:
        TypeError, ValueError: as `simplex_logits`.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.

    Example:
        >>> import torch
        >>> from simplexfix.functional import orthoplex_logits
        >>> orthoplex_logits(torch.tensor([1.0, 3.0]))
        tensor([ 1.,  3., -1., -3.])
    """
    check_features("z", z)
    check_scale(scale)
    return _reference.orthoplex_logits(z, normalize=normalize, scale=scale)


def orthoplex_cross_entropy(
    z: Tensor,
    target: Tensor,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    margin: tuple[str, float] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Returns the cross-entropy of the fixed orthoplex classifier, fused: K = 2 d classes in d dimensions.

        logits = [F.normalize(z), -F.normalize(z)]      # F.normalize only with normalize=True
        ... then as in `simplex_cross_entropy`

    The softmax runs over all 2 d slots.

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        target: [...] int64, the slot of each row in [0, 2 d), or `ignore_index`; slot c < d is e_c, d + c is -e_c.
        weight: [2 d] floating, one factor per slot; it gets no gradient.
        normalize, scale, margin, ignore_index, label_smoothing, reduction: as in `simplex_cross_entropy`.

    Returns:
        [...] with "none", else a scalar; dtype of `z`, float32 under autocast; differentiable by `z`.

    Raises:
        TypeError, ValueError: as `simplex_cross_entropy`.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.

    Example:
        >>> import torch
        >>> from simplexfix.functional import orthoplex_cross_entropy
        >>> z, target = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 17, 3, 3])
        >>> orthoplex_cross_entropy(z, target, reduction="none").shape
        torch.Size([4])
    """
    return _cross_entropy(
        "orthoplex",
        z,
        target,
        None,
        normalize=normalize,
        scale=scale,
        margin=margin,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def cube_logits(z: Tensor, codes: Tensor, *, normalize: bool = False, scale: float = 1.0) -> Tensor:
    """Returns the logits of the d-cube's vertices that `codes` selects.

        W = cube_prototypes(codes, d)                   # [C, d], rows of +-1 / sqrt(d)
        logits = scale * F.normalize(z) @ W.T           # F.normalize only with normalize=True

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        codes: [C, ceil(d / 64)] int64, one vertex per row, from `simplexfix.polytopes.cube_codes`.
        normalize, scale: as in `simplex_logits`.

    Returns:
        [..., C], dtype of `z`, differentiable by `z`.

    Raises:
        TypeError: `z` is not floating, or `codes` not int64.
        ValueError: a shape, a device or `scale` is wrong, or a code has bits beyond d (only checked on the CPU).

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.

    Example:
        >>> import torch
        >>> from simplexfix.functional import cube_logits
        >>> from simplexfix.polytopes import cube_codes
        >>> codes = cube_codes(100, 32)
        >>> cube_logits(torch.randn(4, 32), codes).shape
        torch.Size([4, 100])
    """
    check_features("z", z)
    check_codes(codes, z.shape[-1], z)
    check_scale(scale)
    return _reference.cube_logits(z, codes, normalize=normalize, scale=scale)


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
    """Returns the cross-entropy of the fixed d-cube classifier, a softmax over all 2^d vertices, in O(d) per row.

        W = all 2^d rows of (+-1)^d / sqrt(d)
        F.cross_entropy(scale * z @ W.T, vertex)        # z normalised first with normalize=True
          = sum_j log(1 + exp(-2 scale / sqrt(d) * s_j * z_j)),  s = signs of the vertex of target[i]

    The softmax factorizes over the coordinates, which gives the sum.  Vertices without a class count in it, too.

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        target: [...] int64, the class of each row as a row number of `codes`, or `ignore_index`.
        codes: [C, ceil(d / 64)] int64, the vertex of each class, from `simplexfix.polytopes.cube_codes`.  If None,
            d <= 62 and the target is the vertex number in [0, 2^d): coordinate j is positive where bit j is set.
        weight: [C] floating, one factor per class ([2^d] without `codes`); it gets no gradient.  Not allowed with
            `label_smoothing`, which spreads over all vertices, also over those without a class.
        normalize, scale, margin, ignore_index, label_smoothing, reduction: as in `simplex_cross_entropy`.

    Returns:
        [...] with "none", else a scalar; dtype of `z`, float32 under autocast; differentiable by `z`.

    Raises:
        TypeError, ValueError: as in `simplex_cross_entropy`.
        ValueError: `codes` has the wrong shape, or is missing where d > 62; a target's code has bits beyond d (only
            checked on the CPU); or `weight` is given with `label_smoothing`.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632; the product form: docs/design/math.md.

    Example:
        >>> import torch
        >>> from simplexfix.functional import cube_cross_entropy
        >>> from simplexfix.polytopes import cube_codes
        >>> z, target = torch.randn(4, 32, requires_grad=True), torch.tensor([0, 99, 3, 3])
        >>> cube_cross_entropy(z, target, codes=cube_codes(100, 32), normalize=True, scale=12.0).backward()
        >>> z.grad.shape
        torch.Size([4, 32])
    """
    check_features("z", z)
    if codes is not None:
        check_codes(codes, z.shape[-1], z)
    elif z.shape[-1] > 62:
        raise ValueError(
            f"without codes d must be at most 62, since the target is a vertex number below 2^d, got {z.shape[-1]}; "
            "pass codes=simplexfix.polytopes.cube_codes(num_classes, d)"
        )
    if weight is not None and label_smoothing:
        raise ValueError(
            "weight and label_smoothing exclude each other: smoothing is over all 2^d vertices, of which "
            "only those with a class have a weight"
        )
    return _cross_entropy(
        "cube",
        z,
        target,
        codes,
        normalize=normalize,
        scale=scale,
        margin=margin,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def old_new_contrast(
    new: Tensor,
    old: Tensor,
    target: Tensor,
    *,
    mu: float = 10.0,
    negatives: str = "zero_mask",
    anchor: str = "old",
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Returns a contrastive loss that keeps the new model's features near the old model's features of the same items.

        u, v = F.normalize(old), F.normalize(new)       # no gradient to old
        s = mu * u @ v.T                                # rows: anchors; anchor="new" transposes s
        differs = target[:, None] != target             # negatives: rows of another class
        zero_mask:  -s_ii + log(n_i + sum_j exp(s_ij) over differs)     # n_i: number of rows of i's class, with i
        remove:     -s_ii + log(sum_j exp(s_ij) over differs)           # a row without negatives: -s_ii
        infonce:    -s_ii + log(exp(s_ii) + sum_j exp(s_ij) over differs)

    The kernels compute the similarities in blocks of rows.  A block holds at most 2^22 numbers (16 MiB in float32), but
    has at least 32 rows on a CPU and 128 rows on a GPU.  On a GPU `torch.set_float32_matmul_precision` sets the
    precision of the products.

    Args:
        new: [B, d] floating, features by the model in training, any scale.
        old: [B, d] features of the same items by the deployed model, in the dtype of `new`; they get no gradient.
            Under autocast any floating dtype is accepted and cast to that of `new`.
        target: [B] int64 class ids, any values.
        mu: positive inverse temperature, in the range of float32.
        negatives: "zero_mask" (as in the authors' code), "remove" or "infonce".
        anchor: "old", "new", or "symmetric" (the mean of both).
        reduction: "none", "mean" or "sum".
        group: process group whose batches, each of B rows, form one global batch; None for this process alone,
            `torch.distributed.group.WORLD` for all processes.  j then runs over the global batch and i over the local
            rows.  Gradients flow back to the process of each row.  With "mean" and gradients averaged over the group
            (DistributedDataParallel) the result equals that of one process with the global batch.  Each call first
            compares the shapes of all processes, which synchronizes with the GPU.

    Returns:
        [B] with "none", else a scalar; dtype of `new`, float32 under autocast; differentiable by `new`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape is wrong, a name is unknown, `mu` is not positive and finite, or the group's batches differ
            in shape or dtype.

    Reference:
        arXiv 2405.02581.  The three forms of the denominator: docs/design/math.md.

    Example:
        >>> import torch
        >>> from simplexfix.functional import old_new_contrast
        >>> old, target = torch.randn(8, 16), torch.arange(8) % 4
        >>> far, near = torch.randn(8, 16), old + 0.1 * torch.randn(8, 16)
        >>> bool(old_new_contrast(near, old, target) < old_new_contrast(far, old, target))
        True
    """
    old = _as_dtype_of(new, old)
    check_new_and_old("new", new, old)
    check_target(target, new)
    check_contrast_options(mu, negatives, anchor)
    check_name("reduction", reduction, REDUCTIONS)
    old, all_new, all_old, classes, first = old.detach(), new, old.detach(), target, 0
    if group is not None:
        first = _gather.rank_of(new, group) * len(new)
        all_new, all_old, classes = (_gather.all_rows(rows, group) for rows in (new, all_old, target))
    directions = {"old": (old, all_new), "new": (new, all_old)}
    chosen = [directions[name] for name in ("old", "new") if anchor in (name, "symmetric")]
    losses = [_contrast(*pair, target, classes, first, mu, negatives, reduction) for pair in chosen]
    loss = losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2
    return loss.to(_loss_dtype(new))


def _contrast(
    anchors: Tensor,
    candidates: Tensor,
    target: Tensor,
    classes: Tensor,
    first: int,
    mu: float,
    negatives: str,
    reduction: str,
) -> Tensor:
    """Loss of one direction of the contrast, in `accumulate_dtype` of the features.

    `target` holds the anchors' classes, `classes` the candidates'.  Candidate `first + i` is anchor i's item.
    """
    if _native.has_kernels(anchors):
        return _ops.contrast_loss(anchors, candidates, target, classes, first, mu, negatives, reduction)
    rows = _reference.contrast_rows(anchors, candidates, target, classes, first, mu=mu, negatives=negatives)
    return _reference.reduce_rows(rows, reduction)


def hoc_loss(
    z: Tensor,
    old: Tensor,
    target: Tensor,
    *,
    lambda_: float = 0.1,
    mu: float = 10.0,
    negatives: str = "zero_mask",
    anchor: str = "old",
    normalize: bool = False,
    scale: float = 1.0,
    margin: tuple[str, float] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Returns the higher-order compatibility (HOC) loss: simplex cross-entropy plus a contrast to the old model.

        lambda_ * simplex_cross_entropy(z, target) + (1 - lambda_) * old_new_contrast(z, old, target)

    `weight` and `ignore_index` apply to the cross-entropy only.  The contrast runs over all rows of the batch; rows
    with target `ignore_index` form one class in it.

    Args:
        z: [B, d] features by the model in training, d = K - 1.
        old: [B, d] features of the same items by the deployed model, in the dtype of `z`; under autocast in any
            floating dtype.
        target: [B] int64 slots in [0, K), or `ignore_index`.
        lambda_: weight of the cross-entropy, in [0, 1].
        mu, negatives, anchor, group: as in `old_new_contrast`.
        normalize, scale, margin, weight, ignore_index, label_smoothing: as in `simplex_cross_entropy`.
        reduction: "none", "mean" or "sum", applied to each term.  The cross-entropy's mean is weighted, over the rows
            that are not ignored, and nan if there are none.

    Returns:
        [B] with "none", else a scalar; dtype of `z`, float32 under autocast; differentiable by `z`.

    Raises:
        TypeError, ValueError: as in the two losses.
        ValueError: `lambda_` is outside [0, 1].

    Reference:
        arXiv 2405.02581.

    Example:
        >>> import torch
        >>> from simplexfix.functional import hoc_loss, old_new_contrast, simplex_cross_entropy
        >>> z, old, target = torch.randn(8, 9), torch.randn(8, 9), torch.arange(8)
        >>> loss = hoc_loss(z, old, target, lambda_=0.1)
        >>> torch.allclose(loss, 0.1 * simplex_cross_entropy(z, target) + 0.9 * old_new_contrast(z, old, target))
        True
    """
    return mix_with_contrast(
        lambda: simplex_cross_entropy(
            z,
            target,
            normalize=normalize,
            scale=scale,
            margin=margin,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        ),
        z,
        old,
        target,
        lambda_=lambda_,
        mu=mu,
        negatives=negatives,
        anchor=anchor,
        reduction=reduction,
        group=group,
    )


def mix_with_contrast(
    classify: Callable[[], Tensor],
    z: Tensor,
    old: Tensor,
    target: Tensor,
    *,
    lambda_: float,
    mu: float,
    negatives: str,
    anchor: str,
    reduction: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Returns lambda_ * classify() + (1 - lambda_) * contrast; `classify` (a cross-entropy) runs after the checks."""
    old = _as_dtype_of(z, old)
    check_new_and_old("z", z, old)
    check_fraction("lambda_", lambda_)
    cross_entropy = classify()
    contrast = old_new_contrast(
        z, old, target, mu=mu, negatives=negatives, anchor=anchor, reduction=reduction, group=group
    )
    return lambda_ * cross_entropy + (1 - lambda_) * contrast


def cosine_topk(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k gallery rows with the largest cosine similarity to each query; the search is exact.

        q, g = F.normalize(query), F.normalize(gallery)     # rounded to float32
        scores, ids = (q.double() @ g.double().T).float().topk(k)

    A score is the float64 dot product of the normalised float32 rows, rounded to float32.  Results are ordered by
    descending score, then by ascending id.  They do not depend on batch size, thread count or instruction set.
    Ctrl-C ends a call on the CPU within a second.

    Args:
        query: [Q, d] floating, finite.  float64 is rounded to float32.
        gallery: [N, d] floating, finite, same device and dtype.
        k: from 1 to 2^31 - 1.  If k exceeds N, the last k - N places hold id -1 and score -inf.

    Returns:
        scores [Q, k] float32 in descending order, differentiable by query and gallery; ids [Q, k] int64.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape or k is wrong, or a row holds nan or inf; the message names it.  CUDA kernels do not raise
            for such rows, which would synchronize.  They return scores nan and ids -1: for that query, or for all
            queries if the row is in the gallery.

    Example:
        >>> import torch
        >>> from simplexfix import cosine_topk
        >>> gallery = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
        >>> scores, ids = cosine_topk(torch.tensor([[3.0, 0.1]]), gallery, k=2)
        >>> ids
        tensor([[0, 1]])
    """
    for name, rows in (("query", query), ("gallery", gallery)):
        check_rows(name, rows)
    check_pair("query", query, "gallery", gallery)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query and gallery must have the same number of columns, got {query.shape[1]} and {gallery.shape[1]}"
        )
    k = check_integer("k", k)
    if not 1 <= k < 2**31:
        raise ValueError(f"k must lie between 1 and 2^31 - 1, got {k}")
    if not _native.has_kernels(query):
        return _reference.cosine_topk(query.float(), gallery.float(), k)
    if torch.compiler.is_compiling():
        return _ops.cosine_topk(query.float(), gallery.float(), k)
    try:
        return _ops.cosine_topk(query.float(), gallery.float(), k)
    except RuntimeError as error:  # torch turns every exception of an operator into this type
        _native.raise_interrupt(error)
        raise


def _cross_entropy(
    polytope: str,
    z: Tensor,
    target: Tensor,
    codes: Tensor | None,
    *,
    normalize: bool,
    scale: float,
    margin: tuple[str, float] | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Checks the arguments, then calls the polytope's operator or its reference implementation."""
    check_features("z", z)
    d = z.shape[-1]
    slots = {"simplex": d + 1, "orthoplex": 2 * d}.get(polytope) or (2**d if codes is None else len(codes))
    check_loss_options(z, target, slots, normalize, scale, margin, weight, ignore_index, label_smoothing, reduction)
    rows, labels = _as_rows(z), target if target.ndim == 1 else target.reshape(-1)
    if _native.has_kernels(z):
        loss = _ops.cross_entropy(
            polytope,
            rows,
            labels,
            codes,
            normalize,
            scale,
            margin,
            weight,
            ignore_index,
            label_smoothing,
            reduction,
            _loss_dtype(z),
        )
    else:
        reference = getattr(_reference, f"{polytope}_cross_entropy")
        loss = reference(
            rows,
            labels,
            **({"codes": codes} if polytope == "cube" else {}),
            normalize=normalize,
            scale=scale,
            margin=margin,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        ).to(_loss_dtype(z))
    return loss.reshape(target.shape) if reduction == "none" and target.ndim != 1 else loss


def _as_rows(z: Tensor) -> Tensor:
    """[..., d] -> [B, d]."""
    return z if z.ndim == 2 else z.reshape(-1, z.shape[-1])


def _loss_dtype(features: Tensor) -> torch.dtype:
    """Returns the dtype of the loss, as in torch's own losses: that of the features, or float32 under autocast."""
    if features.dtype in (torch.float32, torch.float64):
        return features.dtype
    return torch.float32 if _under_autocast(features) else features.dtype


def _as_dtype_of(new: Tensor, old: Tensor) -> Tensor:
    """Under autocast, casts the old features to the dtype of the new ones."""
    both = isinstance(new, Tensor) and isinstance(old, Tensor)
    if both and new.dtype != old.dtype and old.is_floating_point() and _under_autocast(new):
        return old.detach().to(new.dtype)
    return old


def _under_autocast(tensor: Tensor) -> bool:
    if tensor.is_meta:  # autocast does not apply to the meta device
        return False
    return torch.is_autocast_enabled("cpu" if tensor.is_cpu else tensor.device.type)  # device.type allocates a string
