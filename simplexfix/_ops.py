"""Autograd functions and fake (shape) implementations of the library's operators.

`simplexfix.functional` has checked the arguments.  The functions require the compiled library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._checks import MARGINS, NEGATIVES, REDUCTIONS
from ._reference import accumulate_dtype, reduce_rows, unit_rows


def cross_entropy(
    polytope: str,
    z: Tensor,
    target: Tensor,
    codes: Tensor | None,
    normalize: bool,
    scale: float,
    margin: tuple[str, float] | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the loss in `dtype`; `polytope` is "simplex", "orthoplex" or "cube"; only the cube has codes."""
    kind, size = (0, 0.0) if margin is None else (MARGINS[margin[0]], margin[1])
    if weight is not None:
        weight = weight.detach().to(accumulate_dtype(z.dtype))
    first = (target, codes) if polytope == "cube" else (target,)
    options = (normalize, scale, kind, size, weight, ignore_index, label_smoothing)
    arguments = (*first, *options, REDUCTIONS[reduction])
    if z.requires_grad and torch.is_grad_enabled():
        function = _Float16Mean if z.dtype == torch.float16 and reduction == "mean" else _Loss
        return function.apply(z, polytope, arguments, dtype)  # type: ignore[no-any-return, no-untyped-call]
    return _loss_operator(polytope)(z, *arguments, False, dtype)[0]  # type: ignore[no-any-return]


def _loss_operator(polytope: str) -> Callable[..., Any]:
    return getattr(torch.ops.simplexfix, f"{polytope}_cross_entropy").default  # type: ignore[no-any-return]


def simplex_logits(z: Tensor, normalize: bool, scale: float) -> Tensor:
    if z.requires_grad and torch.is_grad_enabled():
        return _Logits.apply(z, normalize, scale)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.simplexfix.simplex_logits.default(z, normalize, scale)  # type: ignore[no-any-return]


def contrast_loss(
    anchors: Tensor,
    candidates: Tensor,
    anchor_class: Tensor,
    candidate_class: Tensor,
    first_positive: int,
    mu: float,
    negatives: str,
    reduction: str,
) -> Tensor:
    """Returns the loss in `accumulate_dtype`.  At most one of anchors and candidates requires a gradient.

    Anchor i and candidate `first_positive + i` are embeddings of the same item.
    """
    arguments = (anchor_class, candidate_class, first_positive, mu, NEGATIVES[negatives])
    differentiable = anchors.requires_grad or candidates.requires_grad
    if not differentiable or not torch.is_grad_enabled():
        op = torch.ops.simplexfix.old_new_contrast.default
        rows = op(anchors, candidates, *arguments, None, False)[0]
    elif reduction == "none" or anchors.dtype == torch.float16:  # a float16 gradient with 1 / B would underflow
        rows = _ContrastRows.apply(anchors, candidates, arguments)  # type: ignore[no-untyped-call]
    else:
        weight = 1.0 / len(anchors) if reduction == "mean" and len(anchors) else 1.0
        total = _ContrastSum.apply(anchors, candidates, arguments, weight)  # type: ignore[no-untyped-call]
        return total if len(anchors) or reduction == "sum" else total / 0  # type: ignore[no-any-return]
    return reduce_rows(rows, reduction)


def cosine_topk(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if (query.requires_grad or gallery.requires_grad) and torch.is_grad_enabled():
        return _TopK.apply(query, gallery, k)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.simplexfix.cosine_topk.default(query, gallery, k)  # type: ignore[no-any-return]


# autograd.Function costs a quarter of torch.library.register_autograd per call, and torch.compile traces it as well.


def _refuse_second_derivative() -> None:
    """Raises for double backward: autograd treats the saved gradient as a constant and would omit terms silently."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "simplexfix's kernels have no second derivative, which create_graph=True requires; set SIMPLEXFIX_NATIVE=0 "
            "to run plain PyTorch, which has one"
        )


class _Loss(torch.autograd.Function):
    """The forward pass also computes the gradient; the backward pass multiplies it by the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, polytope: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        loss, gradient = _loss_operator(polytope)(z, *arguments, True, dtype)
        ctx.save_for_backward(gradient)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        # Usually upstream is the 1 of `loss.backward()`.  On the CPU this is checked, and the saved tensor itself is
        # returned.  With retain_graph=True autograd copies it into a leaf's .grad, because it is still saved.
        _refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        if not _is_one(upstream):
            upstream = upstream.to(accumulate_dtype(gradient.dtype))
            gradient = torch.ops.simplexfix.scale_rows.default(gradient, upstream)
        return gradient, None, None, None


class _Float16Mean(torch.autograd.Function):
    """`_Loss` for a mean in float16: the backward pass divides, so that the saved gradient cannot underflow."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, polytope: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        both, gradient = _loss_operator(polytope)(z, *arguments, True, torch.float32)
        loss, divisor = both.unbind()
        ctx.save_for_backward(gradient, divisor)
        return loss.to(dtype, copy=True)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        _refuse_second_derivative()
        gradient, divisor = ctx.saved_tensors
        return torch.ops.simplexfix.scale_rows.default(gradient, upstream.float(), divisor), None, None, None


def _is_one(upstream: Tensor) -> bool:
    """Returns whether upstream is 1; false if reading it would synchronize with a GPU, or while tracing."""
    return (
        not torch.compiler.is_compiling()
        and type(upstream) is Tensor
        and upstream.ndim == 0
        and upstream.is_cpu
        and upstream.item() == 1
    )


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, normalize: bool, scale: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.normalize, ctx.scale = normalize, scale
        return torch.ops.simplexfix.simplex_logits.default(z, normalize, scale)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second_derivative()
        (z,) = ctx.saved_tensors
        op = torch.ops.simplexfix.simplex_logits_backward.default
        return op(upstream, z, ctx.normalize, ctx.scale), None, None


class _ContrastSum(torch.autograd.Function):
    """weight * sum of all rows' losses; the forward pass also computes the gradient."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, arguments: tuple[Any, ...], weight: float) -> Tensor:
        upstream = anchors.new_full((len(anchors),), weight, dtype=accumulate_dtype(anchors.dtype))
        to_anchors = ctx.needs_input_grad[0]
        op = torch.ops.simplexfix.old_new_contrast.default
        rows, gradient = op(anchors, candidates, *arguments, upstream, to_anchors)
        ctx.save_for_backward(gradient)
        ctx.to_anchors = to_anchors
        return rows.sum() * weight  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        _refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        if not _is_one(upstream):
            gradient = torch.ops.simplexfix.scale_rows.default(gradient, upstream)
        return (gradient, None, None, None) if ctx.to_anchors else (None, gradient, None, None)


class _ContrastRows(torch.autograd.Function):
    """Losses of all rows; the backward pass recomputes the block products, weighted by the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(anchors, candidates, *arguments[:2])
        ctx.arguments = arguments[2:]
        op = torch.ops.simplexfix.old_new_contrast.default
        return op(anchors, candidates, *arguments, None, False)[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        _refuse_second_derivative()
        to_anchors = ctx.needs_input_grad[0]
        op = torch.ops.simplexfix.old_new_contrast.default
        gradient = op(*ctx.saved_tensors, *ctx.arguments, upstream, to_anchors)[1]
        return (gradient, None, None) if to_anchors else (None, gradient, None)


class _TopK(torch.autograd.Function):
    """For unit vectors q and g, d(q . g) / dquery = (g - (q . g) q) / |query|; the gallery's gradient is symmetric."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, ids = torch.ops.simplexfix.cosine_topk.default(query, gallery, k)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(query, gallery, scores, ids)
        return scores, ids

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        _refuse_second_derivative()
        query, gallery, scores, ids = ctx.saved_tensors
        found = ids >= 0  # other places are padding: id -1, score -inf
        weight = upstream.masked_fill(~found, 0.0).unsqueeze(-1)
        score = scores.masked_fill(~found, 0.0).unsqueeze(-1)
        rows = ids.clamp_min(0)
        q = unit_rows(query).unsqueeze(1)
        g = unit_rows(gallery)[rows]
        d_query = d_gallery = None
        if ctx.needs_input_grad[0]:
            d_query = (weight * (g - score * q)).sum(1) * _inverse_norm(query)
        if ctx.needs_input_grad[1]:
            pairs = (weight * (q - score * g)).flatten(0, 1)
            d_gallery = torch.zeros_like(gallery).index_add(0, rows.flatten(), pairs) * _inverse_norm(gallery)
        return d_query, d_gallery, None


def _inverse_norm(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0.0)


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("simplexfix::cube_cross_entropy")
    def of_codes(
        z: Tensor,
        target: Tensor,
        codes: Tensor | None,
        normalize: bool,
        scale: float,
        margin_kind: int,
        margin_size: float,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
        wants_gradient: bool,
        loss_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        shape = [z.shape[0]] if reduction == REDUCTIONS["none"] else []
        if wants_gradient and z.dtype == torch.float16 and reduction == REDUCTIONS["mean"]:
            shape = [2]  # the mean and its divisor: csrc/ops/cross_entropy.h
        return z.new_empty(shape, dtype=loss_dtype), z.new_empty(z.shape if wants_gradient else [0])

    def without_codes(z: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        return of_codes(z, target, None, *options)  # type: ignore[no-any-return]

    fake("simplexfix::simplex_cross_entropy", without_codes)
    fake("simplexfix::orthoplex_cross_entropy", without_codes)

    @fake("simplexfix::scale_rows")
    def _(gradient: Tensor, upstream: Tensor, divisor: Tensor | None = None) -> Tensor:
        return gradient.new_empty(gradient.shape)

    @fake("simplexfix::simplex_logits")
    def _(z: Tensor, normalize: bool, scale: float) -> Tensor:
        return z.new_empty([z.shape[0], z.shape[1] + 1])

    @fake("simplexfix::simplex_logits_backward")
    def _(gradient: Tensor, z: Tensor, normalize: bool, scale: float) -> Tensor:
        return z.new_empty(z.shape)

    @fake("simplexfix::old_new_contrast")
    def _(
        anchors: Tensor,
        candidates: Tensor,
        anchor_class: Tensor,
        candidate_class: Tensor,
        first_positive: int,
        mu: float,
        negatives: int,
        upstream: Tensor | None,
        to_anchors: bool,
    ) -> tuple[Tensor, Tensor]:
        loss = anchors.new_empty([anchors.shape[0]], dtype=accumulate_dtype(anchors.dtype))
        side = anchors if to_anchors else candidates
        return loss, side.new_empty([0] if upstream is None else side.shape)

    @fake("simplexfix::cosine_topk")
    def _(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores = query.new_empty([query.shape[0], k])
        return scores, torch.empty_like(scores, dtype=torch.int64)


if _native.library is not None:
    _register_fakes()
