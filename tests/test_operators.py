"""Tests torch's requirements on operators: schema, tracing, gradients, compilation, determinism."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from accuracy import features
from conftest import needs_library
from torch._subclasses.fake_tensor import FakeTensorMode

import simplexfix.functional as SF
from simplexfix import _native


def loss_samples():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for reduction in (0, 1, 2):
            for kind, weighted in ((0, False), (1, True), (2, False)):
                z = features("normal", 5, 11, dtype=dtype)
                accumulate = torch.float64 if dtype == torch.float64 else torch.float32
                weight = torch.rand(12, dtype=accumulate) if weighted else None
                target = torch.tensor([0, 11, 5, -100, 3])
                divides_later = dtype == torch.float16 and reduction == 1  # such a loss is float32
                loss_dtype = dtype if kind == 1 and not divides_later else accumulate
                yield z, target, kind > 0, 4.0, kind, 0.3, weight, -100, 0.1, reduction, True, loss_dtype


def op_samples():
    ops = torch.ops.simplexfix
    for sample in loss_samples():
        z, target, *options = sample
        name = f"{z.dtype}-{sample[9]}-{sample[4]}"
        yield pytest.param(ops.simplex_cross_entropy.default, sample, id=f"loss-{name}")
        wider = torch.cat([sample[6], torch.rand(10, dtype=sample[6].dtype)]) if sample[6] is not None else None
        orthoplex = (z, torch.tensor([0, 21, 5, -100, 14]), *options[:4], wider, *options[5:])
        yield pytest.param(ops.orthoplex_cross_entropy.default, orthoplex, id=f"orthoplex-{name}")
        smoothing = 0.0 if sample[6] is not None else 0.1
        codes = torch.arange(12)[:, None] * 150
        cube = (z, target, codes, *options[:6], smoothing, *options[7:])
        yield pytest.param(ops.cube_cross_entropy.default, cube, id=f"cube-{name}")
    yield pytest.param(
        ops.cube_cross_entropy.default,
        (
            torch.randn(3, 4),
            torch.tensor([0, 15, 2]),
            None,
            False,
            1.0,
            0,
            0.0,
            None,
            -100,
            0.0,
            1,
            True,
            torch.float32,
        ),
        id="cube-without-codes",
    )
    yield pytest.param(
        ops.simplex_cross_entropy.default,
        (torch.randn(3, 4), torch.tensor([0, 1, 2]), False, 1.0, 0, 0.0, None, -100, 0.0, 1, False, torch.float32),
        id="loss-without-gradient",
    )
    for normalize in (False, True):
        z = torch.randn(4, 6)
        yield pytest.param(ops.simplex_logits.default, (z, normalize, 2.0), id=f"logits-{normalize}")
        backward = (torch.randn(4, 7), z, normalize, 2.0)
        yield pytest.param(ops.simplex_logits_backward.default, backward, id=f"logits-backward-{normalize}")
    yield pytest.param(ops.scale_rows.default, (torch.randn(4, 6), torch.randn(4)), id="scale-rows")
    yield pytest.param(ops.scale_rows.default, (torch.randn(4, 6), torch.randn(())), id="scale-all")
    divided = torch.randn(4, 6).half(), torch.randn(()), torch.tensor(3.0)
    yield pytest.param(ops.scale_rows.default, divided, id="scale-and-divide")
    for upstream in (None, torch.rand(4)):
        for to_anchors in (False, True):
            rows, classes = (torch.randn(4, 6), torch.randn(9, 6)), (torch.arange(4), torch.arange(9) // 2)
            arguments = (*rows, *classes, 3, 5.0, 0, upstream, to_anchors)
            name = f"contrast-{upstream is not None}-{to_anchors}"
            yield pytest.param(ops.old_new_contrast.default, arguments, id=name)
    yield pytest.param(ops.cosine_topk.default, (torch.randn(3, 8), torch.randn(20, 8), 4), id="topk")


@needs_library
@pytest.mark.parametrize(("op", "arguments"), list(op_samples()) if hasattr(torch.ops.simplexfix, "scale_rows") else [])
def test_opcheck(op, arguments) -> None:
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("polytope", ["simplex", "orthoplex", "cube"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("margin", [None, ("cosine", 0.2), ("angular", 0.3)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_gradcheck(polytope, normalize, margin, label_smoothing, reduction) -> None:
    if margin is not None and not normalize:
        return  # refused: tests/test_bad_input.py
    z = features("normal", 4, 9, dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 9, 4, -100])
    weight = torch.rand({"simplex": 10, "orthoplex": 18, "cube": 512}[polytope], dtype=torch.float64)
    if polytope == "cube" and label_smoothing:
        weight = None  # refused: tests/test_bad_input.py
    factors = torch.randn(4, dtype=torch.float64)  # a random upstream gradient for every row

    def loss(z):
        options = {"margin": margin, "weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
        rows = getattr(SF, f"{polytope}_cross_entropy")(z, target, normalize=normalize, scale=2.0, **options)
        return (factors * rows).sum() if reduction == "none" else factors[0] * rows

    assert torch.autograd.gradcheck(loss, (z,))


def test_logits_gradcheck() -> None:
    z = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    for normalize in (False, True):
        assert torch.autograd.gradcheck(lambda z, n=normalize: SF.simplex_logits(z, normalize=n, scale=3.0), (z,))


@pytest.mark.parametrize("negatives", ["zero_mask", "remove", "infonce"])
@pytest.mark.parametrize("anchor", ["old", "new", "symmetric"])
def test_contrast_gradcheck(negatives: str, anchor: str) -> None:
    new = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    old = torch.randn(6, 5, dtype=torch.float64)
    target = torch.tensor([1, 1, 2, 3, 3, 3])
    assert torch.autograd.gradcheck(
        lambda new: SF.old_new_contrast(new, old, target, negatives=negatives, anchor=anchor, reduction="none"), (new,)
    )


@needs_library
def test_double_backward_is_refused() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    for loss in (
        SF.simplex_cross_entropy(z * 1.0, torch.tensor([0, 1, 2])),
        SF.orthoplex_cross_entropy(z * 1.0, torch.tensor([0, 1, 2])),
        SF.cube_cross_entropy(z * 1.0, torch.tensor([0, 1, 2])),
        SF.simplex_logits(z).sum(),
        SF.cosine_topk(z, z.detach(), 1)[0].sum(),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, z, create_graph=True)


@needs_library
def test_a_loss_has_the_dtype_of_the_features_or_of_the_sums() -> None:
    z, target = torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor([3, 0])
    loss = torch.ops.simplexfix.simplex_cross_entropy
    options = (z, target, False, 1.0, 0, 0.0, None, -100, 0.0, 0, False)
    wide, narrow = (loss(*options, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(wide.bfloat16(), narrow)
    with pytest.raises(ValueError, match="loss_dtype must be BFloat16 or Float, got Half"):
        loss(*options, torch.float16)
    mean = (z.half(), target, False, 1.0, 0, 0.0, None, -100, 0.0, 1, True)
    with pytest.raises(ValueError, match="loss_dtype must be Float for the gradient of a mean of Half, got Half"):
        loss(*mean, torch.float16)
    (value, divisor), _ = loss(*mean, torch.float32)
    assert (value, divisor) == (loss(*mean[:-1], False, torch.float32)[0], 2)


def functions():
    target = torch.tensor([0, 9, 4, 2])
    old = torch.randn(4, 9)
    gallery = torch.randn(30, 9)
    yield "loss", lambda z: SF.simplex_cross_entropy(z * 2, target, label_smoothing=0.1) * 3
    yield (
        "rows",
        lambda z: (SF.simplex_cross_entropy(z, target, normalize=True, scale=9.0, reduction="none") * z[:, 0]).sum(),
    )
    yield "orthoplex", lambda z: SF.orthoplex_cross_entropy(z * 2, target * 2 - 1, label_smoothing=0.1, ignore_index=-1)
    yield "cube", lambda z: SF.cube_cross_entropy(z * 2, target, codes=target[:, None].repeat(3, 1), scale=3.0)
    yield "vertices", lambda z: SF.cube_cross_entropy(z, target, normalize=True, margin=("angular", 0.1)) * 2
    yield "orthoplex-logits", lambda z: SF.orthoplex_logits(z, normalize=True).square().sum()
    yield "cube-logits", lambda z: SF.cube_logits(z, target[:, None]).square().sum()
    yield "logits", lambda z: SF.simplex_logits(z + 1, normalize=True).square().sum()
    yield "contrast", lambda z: SF.old_new_contrast(z, old, target % 2)
    yield "hoc", lambda z: SF.hoc_loss(z, old, target)
    yield "topk", lambda z: SF.cosine_topk(z, gallery, 3)[0].sum()


@pytest.mark.parametrize(("name", "function"), list(functions()), ids=[name for name, _ in functions()])
def test_compiles_without_a_graph_break(name: str, function) -> None:
    z = torch.randn(4, 9, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True)
    eager, traced = function(z), compiled(z)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(torch.autograd.grad(traced, z), torch.autograd.grad(eager, z))


def test_compiles_for_changing_batch_sizes() -> None:
    compiled = torch.compile(SF.simplex_cross_entropy, fullgraph=True, dynamic=True)
    for rows in (3, 8, 5):
        z, target = torch.randn(rows, 9, requires_grad=True), torch.randint(10, (rows,))
        torch.testing.assert_close(compiled(z, target), SF.simplex_cross_entropy(z, target))


def test_repeats_to_the_bit() -> None:
    for _, function in functions():
        z = torch.randn(4, 9, requires_grad=True)
        first, second = function(z), function(z)
        assert torch.equal(first, second)
        assert torch.equal(torch.autograd.grad(first, z)[0], torch.autograd.grad(second, z)[0])


def test_meta_tensors_have_shapes_and_no_values() -> None:
    z = torch.empty(4, 9, device="meta", dtype=torch.bfloat16)
    target = torch.empty(4, device="meta", dtype=torch.int64)
    assert SF.simplex_cross_entropy(z, target).shape == ()
    assert SF.simplex_cross_entropy(z, target, reduction="none").shape == (4,)
    assert SF.orthoplex_cross_entropy(z, target, reduction="none").shape == (4,)
    assert SF.cube_cross_entropy(z, target, codes=target[:, None], reduction="none").shape == (4,)
    assert SF.simplex_logits(z).shape == (4, 10)
    scores, ids = SF.cosine_topk(z, z, 3)
    assert (scores.shape, scores.dtype, ids.dtype) == ((4, 3), torch.float32, torch.int64)


@pytest.mark.parametrize("polytope", ["simplex", "orthoplex", "cube"])
def test_function_transforms_and_forward_mode_use_the_reference(polytope: str) -> None:
    loss = getattr(SF, f"{polytope}_cross_entropy")
    z, target = torch.randn(5, 9, dtype=torch.float64), torch.tensor([0, 9, 4, 2, 2])
    expected = torch.autograd.grad(loss(z.requires_grad_(), target), z)[0]
    z = z.detach()
    torch.testing.assert_close(torch.func.grad(loss)(z, target), expected)
    rows = torch.func.vmap(lambda z, t: loss(z, t, reduction="none"))(z, target)
    torch.testing.assert_close(rows, loss(z, target, reduction="none"))
    tangent = torch.randn_like(z)
    _, along = torch.func.jvp(lambda z: loss(z, target), (z,), (tangent,))
    torch.testing.assert_close(along, (expected * tangent).sum())
    _, moved = torch.func.jvp(SF.simplex_logits, (z,), (tangent,))
    torch.testing.assert_close(moved, SF.simplex_logits(tangent))


LOSSES = {
    "simplex": SF.simplex_cross_entropy,
    "orthoplex": SF.orthoplex_cross_entropy,
    "cube": SF.cube_cross_entropy,
    "codes": lambda z, target, **options: SF.cube_cross_entropy(z, target, codes=torch.arange(5)[:, None], **options),
}


@pytest.mark.parametrize("polytope", LOSSES)
@pytest.mark.parametrize("options", [{}, {"normalize": True, "margin": ("angular", 0.1)}, {"ignore_index": 0}])
def test_a_target_out_of_range_is_nan_where_it_cannot_be_read(polytope: str, options: dict, monkeypatch) -> None:
    torch.compiler.reset()  # torch limits the compilations of a function, over all tests
    loss = LOSSES[polytope]
    z, target = torch.randn(4, 4), torch.tensor([1, 2**40, -7, 0])
    monkeypatch.setattr(_native, "library", None)  # compiles the reference implementation; the operators read targets

    def rows(z, target):
        return loss(z, target, reduction="none", **options)

    kept = torch.tensor([0, 3])
    part = z[kept].requires_grad_()
    expected = rows(part, target[kept])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), part)
    traced = z.clone().requires_grad_()
    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")(traced, target)
    (compiled_gradient,) = torch.autograd.grad(compiled.sum(), traced)
    everywhere = torch.func.vmap(rows)(z, target), torch.func.vmap(torch.func.grad(rows))(z, target)
    together = torch.func.grad(lambda z: rows(z, target).sum())(z)
    for value, gradient in ((compiled, compiled_gradient), everywhere, (compiled, together)):
        assert value.isnan().tolist() == [False, True, True, False]
        assert gradient.isnan().tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
        torch.testing.assert_close(value[kept], expected)
        torch.testing.assert_close(gradient[kept], expected_gradient)
    for reduction in ("mean", "sum"):
        assert torch.func.grad_and_value(loss)(z, target, reduction=reduction, **options)[1].isnan()


@pytest.mark.parametrize("polytope", LOSSES)
def test_a_target_on_a_gpu_is_not_read(polytope: str) -> None:
    """Fake tensors have no values that could be read."""
    # a torch without CUDA does not support indexing by CUDA tensors, which the cube needs
    device = "cuda" if polytope in ("simplex", "orthoplex") or torch.cuda.is_available() else "meta"
    with FakeTensorMode():
        z, target = torch.empty(3, 4, device=device), torch.empty(3, device=device, dtype=torch.int64)
        codes = {"codes": torch.empty(5, 1, device=device, dtype=torch.int64)} if polytope == "codes" else {}
        function = SF.cube_cross_entropy if codes else LOSSES[polytope]
        loss = function(z, target, reduction="none", **codes)
    assert (loss.shape, loss.device.type) == ((3,), device)


@needs_library
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, torch.compile], ids=["eager", "compiled"])
def test_a_refused_argument_raises_a_value_error_with_only_the_message(gradient: bool, wrap) -> None:
    z, target = torch.randn(3, 4, requires_grad=gradient), torch.tensor([0, 9, 1])
    for loss, slots in (
        (SF.simplex_cross_entropy, 5),
        (SF.orthoplex_cross_entropy, 8),
        (partial(SF.cube_cross_entropy, codes=torch.arange(6)[:, None]), 6),
    ):
        with pytest.raises(ValueError, match="target") as raised:
            wrap(loss)(z, target)
        expected = f"target out of range: row 1 has slot 9, expected 0 to {slots - 1} or ignore_index -100"
        assert str(raised.value) == expected
    with pytest.raises(ValueError, match="query") as raised:
        wrap(SF.cosine_topk)(z * math.inf, z, 1)
    assert str(raised.value) == "query row 0 holds nan or inf"
