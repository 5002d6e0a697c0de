"""The operators of the library as torch sees them: shapes for tracing, gradients, errors.

Functions here take what `simplexfix.functional` has checked, and only where the library is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._checks import MARGINS, REDUCTIONS
from ._reference import accumulate_dtype, unit_rows

_ERROR_PREFIX = "simplexfix: "


def _call(op: Callable[..., Any], *args: object) -> Any:
    """Runs an operator; what its front refuses reaches the user as a ValueError."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error)
        if _ERROR_PREFIX not in message:
            raise
        raise ValueError(message.split(_ERROR_PREFIX, 1)[1].split("\n", 1)[0]) from None


def simplex_cross_entropy(
    z: Tensor,
    target: Tensor,
    normalize: bool,
    scale: float,
    margin: tuple[str, float] | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The loss in the accumulating dtype."""
    kind, size = (0, 0.0) if margin is None else (MARGINS[margin[0]], margin[1])
    if weight is not None:
        weight = weight.detach().to(accumulate_dtype(z.dtype))
    wants_gradient = z.requires_grad and torch.is_grad_enabled()
    op = torch.ops.simplexfix.simplex_cross_entropy.default
    loss, _ = _call(
        op, z, target, normalize, scale, kind, size, weight, ignore_index, label_smoothing, REDUCTIONS[reduction], wants_gradient
    )
    return loss  # type: ignore[no-any-return]


def simplex_logits(z: Tensor, normalize: bool, scale: float) -> Tensor:
    return _call(torch.ops.simplexfix.simplex_logits.default, z, normalize, scale)  # type: ignore[no-any-return]


def cosine_topk(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _call(torch.ops.simplexfix.cosine_topk.default, query, gallery, k)  # type: ignore[no-any-return]


def _register() -> None:
    fake, autograd = torch.library.register_fake, torch.library.register_autograd

    @fake("simplexfix::simplex_cross_entropy")
    def _(z, target, normalize, scale, margin_kind, margin_size, weight, ignore_index, label_smoothing, reduction, wants_gradient):  # type: ignore[no-untyped-def]  # noqa: E501
        loss = z.new_empty([z.shape[0]] if reduction == 0 else [], dtype=accumulate_dtype(z.dtype))
        return loss, z.new_empty(z.shape if wants_gradient else [0])

    @fake("simplexfix::scale_rows")
    def _(gradient, upstream):  # type: ignore[no-untyped-def]
        return gradient.new_empty(gradient.shape)

    @fake("simplexfix::simplex_logits")
    def _(z, normalize, scale):  # type: ignore[no-untyped-def]
        return z.new_empty([z.shape[0], z.shape[1] + 1])

    @fake("simplexfix::simplex_logits_backward")
    def _(gradient, z, normalize, scale):  # type: ignore[no-untyped-def]
        return z.new_empty(z.shape)

    @fake("simplexfix::cosine_topk")
    def _(query, gallery, k):  # type: ignore[no-untyped-def]
        scores = query.new_empty([query.shape[0], k])
        return scores, torch.empty_like(scores, dtype=torch.int64)

    autograd("simplexfix::simplex_cross_entropy", _loss_backward, setup_context=_loss_context)
    autograd("simplexfix::simplex_logits", _logits_backward, setup_context=_logits_context)
    autograd("simplexfix::cosine_topk", _topk_backward, setup_context=_topk_context)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.arguments = len(inputs)
    ctx.wants_gradient = inputs[-1]
    ctx.leaf = inputs[0].is_leaf


def _loss_backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """The forward pass wrote the gradient already: scale it by what comes from above.

    Mostly that is the 1 of `loss.backward()`, and there is nothing to do.  A leaf's `.grad` may take over
    the very tensor returned here, so a leaf gets a tensor of its own and the saved one stays as it is.
    """
    (gradient,) = ctx.saved_tensors
    if not ctx.wants_gradient:
        raise RuntimeError("simplexfix::simplex_cross_entropy ran with wants_gradient=False and has no gradient")
    if upstream is not None:
        eager = type(upstream) is Tensor and not torch.compiler.is_compiling()
        if not (eager and upstream.ndim == 0 and upstream.device.type == "cpu" and upstream.item() == 1 and not ctx.leaf):
            gradient = torch.ops.simplexfix.scale_rows(gradient, upstream)
    return (gradient if upstream is not None else None, *[None] * (ctx.arguments - 1))


def _logits_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, ctx.normalize, ctx.scale = inputs
    ctx.save_for_backward(z)


def _logits_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    (z,) = ctx.saved_tensors
    return torch.ops.simplexfix.simplex_logits_backward(upstream, z, ctx.normalize, ctx.scale), None, None


def _topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], *output)


def _topk_backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    """d(q . g) / dq of unit vectors: (g - (q . g) q) / |query|, and the same with q and g exchanged."""
    if upstream is None:
        return None, None, None
    query, gallery, scores, ids = ctx.saved_tensors
    found = ids >= 0  # the others are padding: score -inf, id -1
    weight = upstream.masked_fill(~found, 0.0).unsqueeze(-1)
    score = scores.masked_fill(~found, 0.0).unsqueeze(-1)
    rows = ids.clamp_min(0)
    q = unit_rows(query).unsqueeze(1)
    g = unit_rows(gallery)[rows]
    d_query = d_gallery = None
    if ctx.needs_input_grad[0]:
        d_query = (weight * (g - score * q)).sum(1) * _inverse_norm(query)
    if ctx.needs_input_grad[1]:
        flat = (weight * (q - score * g)).flatten(0, 1)
        d_gallery = torch.zeros_like(gallery).index_add(0, rows.flatten(), flat) * _inverse_norm(gallery)
    return d_query, d_gallery, None


def _inverse_norm(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0.0)


if _native.library is not None:
    _register()
