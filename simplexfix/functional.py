"""One function per operator: the naive equation in its docstring, checks in front, kernels behind.

Where the library was not built, or has no kernels for a tensor's device, the reference implementation of
`simplexfix/_reference.py` gives the same results.
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
    """Logits of the fixed simplex classifier, in O(B K) and without its matrix.

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
        arXiv 2405.02581; the closed form: docs/math.md.
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
    """Cross-entropy through the fixed simplex classifier, fused: no logits and no K x d matrix.

        W = simplex_prototypes(K)                       # [K, d], K = d + 1
        logits = F.normalize(z) @ W.T                   # F.normalize only with normalize=True
        logits[i, target[i]] -= m                       # margin=("cosine", m): CosFace
        logits[i, target[i]] = cos(theta + m)           # margin=("angular", m): ArcFace
        F.cross_entropy(scale * logits, target, weight, ignore_index=..., label_smoothing=..., reduction=...)

    All K slots take part in the softmax, used or not: they are the room for future classes.  Sums and
    exponentials are float32 (float64 for float64) whatever the dtype of `z`.

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        target: [...] int64, the slot of each row in [0, K), or `ignore_index`.
        normalize: divide each row by its L2 norm first (a zero row stays zero).
        scale: positive factor on the logits (the inverse temperature), in the range of float32.
        margin: None, ("cosine", m) with m in cosine units, or ("angular", m) with m in radians, in
            [0, pi]; needs `normalize`.  Where theta + m would pass pi, ArcFace's usual continuation
            cos(theta) - m sin(m) is used.
        weight: [K] one factor per class, as in `torch.nn.functional.cross_entropy`; not differentiated.
        ignore_index: rows with this target add nothing to loss and gradient.
        label_smoothing: in [0, 1].
        reduction: "none", "mean" (over the rows that count, weighted; nan if there are none) or "sum".

    Returns:
        [...] with "none", else a scalar; dtype of `z`, float32 under autocast; differentiable by `z`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: wrong shape, an option out of range, or a target out of range.  Where targets cannot be looked at
            (on a GPU, without synchronizing; under `torch.func`; in a compiled reference implementation), that row's
            loss and gradient are nan instead.

    Reference:
        arXiv 2405.02581; CosFace arXiv 1801.09414; ArcFace arXiv 1801.07698.
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
    """Logits of the fixed orthoplex classifier, whose vertices are the unit vectors and their opposites.

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
    """Cross-entropy through the fixed orthoplex classifier, fused: K = 2 d classes in d dimensions.

        logits = [F.normalize(z), -F.normalize(z)]      # F.normalize only with normalize=True
        ... then as `simplex_cross_entropy`

    All 2 d slots take part in the softmax.

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        target: [...] int64, the slot of each row in [0, 2 d), or `ignore_index`; slot c < d is e_c, d + c is -e_c.
        weight: [2 d] one factor per class; not differentiated.
        normalize, scale, margin, ignore_index, label_smoothing, reduction: as in `simplex_cross_entropy`.

    Returns:
        [...] with "none", else a scalar; dtype of `z`, float32 under autocast; differentiable by `z`.

    Raises:
        TypeError, ValueError: as `simplex_cross_entropy`.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.
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
    """Logits of chosen vertices of the d-cube.

        W = cube_prototypes(codes, d)                   # [C, d], rows of +-1 / sqrt(d)
        logits = scale * F.normalize(z) @ W.T           # F.normalize only with normalize=True

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        codes: [C, ceil(d / 64)] int64, the vertices, as `simplexfix.polytopes.cube_codes` makes them.
        normalize, scale: as in `simplex_logits`.

    Returns:
        [..., C], dtype of `z`, differentiable by `z`.

    Raises:
        TypeError: `z` is not floating, or `codes` not int64.
        ValueError: a shape, a device or `scale` is wrong, or a code has bits beyond d (on a GPU these are not seen).

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.
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
    """Cross-entropy through the fixed d-cube classifier: a softmax over all 2^d vertices, in O(d) by its product form.

        s = (+-1)^d, the signs of the vertex target[i]
        logsumexp - logit = sum_j log(1 + exp(-2 scale / sqrt(d) * s_j * z_j))     # z normalised with normalize=True
        ... which is F.cross_entropy(scale * z @ W.T, vertex), W = all 2^d rows of (+-1)^d / sqrt(d)

    The vertices of the classes are a few among those of the softmax.

    Args:
        z: [..., d] features, float32, float64, bfloat16 or float16; d >= 1.
        target: [...] int64, the class of each row, a row of `codes`, or `ignore_index`.
        codes: [C, ceil(d / 64)] int64, the vertex of each class, as `simplexfix.polytopes.cube_codes` makes them.
            If None the target is the number of the vertex, in [0, 2^d), d <= 62: coordinate j is positive where
            bit j is set.
        weight: [C] one factor per class ([2^d] without `codes`); not differentiated.  Not with
            `label_smoothing`, which is over all vertices, most of which have no class.
        normalize, scale, margin, ignore_index, label_smoothing, reduction: as in `simplex_cross_entropy`.

    Returns:
        [...] with "none", else a scalar; dtype of `z`, float32 under autocast; differentiable by `z`.

    Raises:
        TypeError, ValueError: as `simplex_cross_entropy`; codes of a wrong shape, or missing where d > 62; a target
            whose code has bits beyond d (on a GPU these are not seen); `weight` together with `label_smoothing`.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632; the product form: docs/math.md.
    """
    check_features("z", z)
    if codes is not None:
        check_codes(codes, z.shape[-1], z)
    elif z.shape[-1] > 62:
        raise ValueError(
            f"without codes d must be at most 62, so that a target is the number of a vertex, got {z.shape[-1]}; "
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
    """Contrast that holds the new model's features to the old model's, of the same batch of images.

        u, v = F.normalize(old), F.normalize(new)       # no gradient to old
        s = mu * u @ v.T                                # rows: anchors; anchor="new" transposes s
        differs = target[:, None] != target
        zero_mask:  -s_ii + log(sum_j exp(s_ij) over differs + number of j with the same target, i too)
        remove:     -s_ii + log(sum_j exp(s_ij) over differs)      (a row without negatives: -s_ii alone)
        infonce:    -s_ii + log(exp(s_ii) + sum_j exp(s_ij) over differs)

    The B x B similarities exist in blocks only, in float32 of 16 MiB (128 bytes x B on a CPU and 512 on a GPU where
    that is more).  On a GPU the products are as exact as `torch.set_float32_matmul_precision` says.

    Args:
        new: [B, d] features by the model in training, any scale.
        old: [B, d] features of the same images by the deployed model; no gradient flows here.  Under autocast, where
            the dtype of `new` is autocast's choice, it may be of another floating dtype and is cast to that of `new`.
        target: [B] int64 class ids, any values.
        mu: positive inverse temperature, in the range of float32.
        negatives: "zero_mask" (as the authors' code computes it), "remove" or "infonce".
        anchor: "old", "new", or "symmetric" (the mean of both).
        reduction: "none", "mean" or "sum".
        group: processes whose batches, all of B rows, are contrasted as one (`torch.distributed.group.WORLD`
            for all): j then runs over the rows of all of them, i over one's own.  Gradients flow back to the
            process that a row came from.  With "mean" and gradients averaged over the group, as
            DistributedDataParallel does, all is as if one process had the whole batch.  Each call compares the
            processes' shapes first, and waits for a GPU as it does.

    Returns:
        [B] with "none", else a scalar; dtype of `new`, float32 under autocast; differentiable by `new`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: wrong shapes, an unknown name, `mu` not positive and finite, or unlike batches in the group.

    Reference:
        arXiv 2405.02581.  The forms: docs/math.md.
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
    """One direction of the contrast, in the accumulating dtype."""
    if _native.has_kernels(anchors):
        return _ops.contrast_rows(anchors, candidates, target, classes, first, mu, negatives, reduction)
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
    """The higher-order compatibility loss: stationary features that also keep to the old model's.

        lambda_ * simplex_cross_entropy(z, target) + (1 - lambda_) * old_new_contrast(z, old, target)

    The contrast is over every image of the batch.  `weight` and `ignore_index` are of the cross-entropy alone: an image
    with the target `ignore_index` has the contrast as its whole loss, where it counts as one of a class of its own
    that all such images share.

    Args:
        z: [B, d] features by the model in training, d = K - 1.
        old: [B, d] features of the same images by the deployed model; under autocast of any floating dtype.
        target: [B] int64 slots in [0, K), or `ignore_index`.
        lambda_: fraction of the cross-entropy, in [0, 1].
        mu, negatives, anchor, group: of `old_new_contrast`.
        normalize, scale, margin, weight, ignore_index, label_smoothing: of `simplex_cross_entropy`.
        reduction: "none", "mean" (each part by its own mean: the cross-entropy's is weighted, over the rows that count,
            and nan if there are none) or "sum".

    Returns:
        [B] with "none", else a scalar; dtype of `z`, float32 under autocast.

    Raises:
        TypeError, ValueError: as the two losses, and `lambda_` outside [0, 1].

    Reference:
        arXiv 2405.02581.
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
    """Mixes any cross-entropy of `z` with the contrast, as `hoc_loss` does; `classify` runs after the checks."""
    old = _as_dtype_of(z, old)
    check_new_and_old("z", z, old)
    check_fraction("lambda_", lambda_)
    cross_entropy = classify()
    contrast = old_new_contrast(
        z, old, target, mu=mu, negatives=negatives, anchor=anchor, reduction=reduction, group=group
    )
    return lambda_ * cross_entropy + (1 - lambda_) * contrast


def cosine_topk(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k gallery rows nearest to each query by cosine, exactly.

        q, g = F.normalize(query), F.normalize(gallery)     # rounded to float32
        scores, ids = (q.double() @ g.double().T).float().topk(k)

    A score is the float64 dot product of the normalised float32 rows, rounded to float32; order is by
    score, then by lower id.  Batch, threads and instruction set change nothing.  Ctrl-C ends a call on the CPU within a
    second.

    Args:
        query: [Q, d] floating, finite.  float64 is rounded to float32.
        gallery: [N, d] floating, finite, same device and dtype.
        k: at least 1.  Where the gallery has fewer rows, id -1 with score -inf follows.

    Returns:
        scores [Q, k] float32 descending, differentiable by query and gallery; ids [Q, k] int64.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: wrong shapes, k below 1, or a row that holds nan or inf, by name.  CUDA kernels are not waited
            for: scores are nan there and ids -1, of that query, or of all where the gallery holds such a row.
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
    except RuntimeError as error:  # torch lets no other exception through
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
    """Checks the arguments and calls the operator of this polytope, or its reference implementation."""
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
    """What torch's own losses have: the dtype of the features, float32 under autocast."""
    if features.dtype in (torch.float32, torch.float64):
        return features.dtype
    return torch.float32 if _under_autocast(features) else features.dtype


def _as_dtype_of(new: Tensor, old: Tensor) -> Tensor:
    """Casts the old features to the dtype that autocast gave the new ones."""
    both = isinstance(new, Tensor) and isinstance(old, Tensor)
    if both and new.dtype != old.dtype and old.is_floating_point() and _under_autocast(new):
        return old.detach().to(new.dtype)
    return old


def _under_autocast(tensor: Tensor) -> bool:
    if tensor.is_meta:  # which has no autocast
        return False
    return torch.is_autocast_enabled("cpu" if tensor.is_cpu else tensor.device.type)  # the latter makes a string
