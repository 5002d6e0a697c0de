"""Closed form against the matrix: values, gradients, options, formats."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, KINDS, assert_accurate, features
from conftest import needs_library

import simplexfix.functional as SF
from simplexfix import _reference
from simplexfix.polytopes import simplex_prototypes


def dense(z, target, *, normalize=False, scale=1.0, margin=None, **options):
    """The naive equation of the docstring, with the K x d matrix, in the dtype of z."""
    w = simplex_prototypes(z.shape[1] + 1, dtype=z.dtype)
    logits = (F.normalize(z) if normalize else z) @ w.T
    if margin is not None:
        kind, size = margin
        row = torch.arange(len(z))
        column = target.where(target >= 0, 0)
        cosine = logits[row, column]
        if kind == "cosine":
            moved = cosine - size
        else:
            beyond = cosine <= -math.cos(size)
            moved = torch.where(beyond, cosine - size * math.sin(size), (cosine.acos() + size).cos())
        logits = logits.index_put((row, column), moved)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(z.dtype)
    return F.cross_entropy(scale * logits, target, **options)


def both(function, z, target, upstream=None, **options):
    z = z.clone().requires_grad_()
    loss = function(z, target, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, z, upstream)[0]


def check(z, target, upstream_seed=0, truth=dense, naive=dense, **options):
    shape = [len(z)] if options.get("reduction") == "none" else []
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(upstream_seed))
    upstream = upstream.to(z.dtype)
    loss, gradient = both(SF.simplex_cross_entropy, z, target, upstream, **options)
    true_loss, true_gradient = both(truth, z.double(), target, upstream.double(), **options)
    naive_loss, naive_gradient = both(naive, z, target, upstream, **options)
    assert loss.dtype == gradient.dtype == z.dtype
    assert_accurate(loss, naive_loss, true_loss, what="loss")
    assert_accurate(gradient, naive_gradient, true_gradient, what="gradient")


def labels(rows: int, slots: int, seed: int = 1) -> torch.Tensor:
    target = torch.randint(slots, (rows,), generator=torch.Generator().manual_seed(seed))
    target[0], target[-1] = 0, slots - 1  # the first vertex and the last, which has a formula of its own
    return target


# below one vector, tails of every vector width, whole vectors, whole unrolled blocks, the paper's size
@pytest.mark.parametrize("num_classes", [2, 3, 4, 5, 8, 16, 17, 33, 65, 66, 80, 130, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(num_classes: int, dtype: torch.dtype) -> None:
    z = features("normal", 9, num_classes - 1, dtype=dtype)
    for reduction in ("none", "mean", "sum"):
        check(z, labels(9, num_classes), reduction=reduction)


def test_many_classes() -> None:
    """K = 65537: past 16 bits, and past the first level of cache; the truth is the plain twin in float64."""
    z = features("normal", 3, 65536, dtype=torch.float32)
    target = torch.tensor([0, 65536, 40000])
    for dtype in (torch.float32, torch.bfloat16):
        check(
            z.to(dtype),
            target,
            truth=_reference.simplex_cross_entropy,
            naive=lambda z, t, **o: _reference.simplex_cross_entropy(z, t, **o).to(z.dtype),
            reduction="none",
        )
    check(
        z.double(),
        target,
        truth=_reference.simplex_cross_entropy,
        naive=lambda z, t, **o: F.cross_entropy(_reference.simplex_logits(z), t, **o),
        reduction="none",
    )


@pytest.mark.parametrize("num_classes", [2049, 2050, 2051, 4097, 5000])
@pytest.mark.parametrize("options", [{}, {"normalize": True, "scale": 30.0}, {"label_smoothing": 0.1, "weight": 1}])
def test_rows_of_several_tiles(num_classes: int, options: dict[str, Any]) -> None:
    """The CPU kernels take a row in tiles of 2048, each with a largest logit of its own: labels at their ends."""
    d = num_classes - 1
    target = torch.tensor([0, 2047, 2048, d - 1, d, d // 2])
    if "weight" in options:
        options = {**options, "weight": torch.rand(num_classes, generator=torch.Generator().manual_seed(3)).double()}
    for kind in ("normal", "heavy tail", "confident", "offset"):
        z = features(kind, len(target), d, dtype=torch.float64)
        z[1, :2048] -= 500  # a tile whose exponentials vanish beside another's
        z[2] = 0
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            check(
                z.to(dtype),
                target,
                truth=_reference.simplex_cross_entropy,
                naive=lambda z, t, **o: _reference.simplex_cross_entropy(z, t, **o).to(z.dtype),
                reduction="none",
                **options,
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions(kind: str, dtype: torch.dtype) -> None:
    z = features(kind, 33, 129, dtype=dtype)
    for normalize in (False, True):
        check(z, labels(33, 130), normalize=normalize, scale=8.0 if normalize else 1.0, reduction="none")


@pytest.mark.parametrize("margin", [None, ("cosine", 0.35), ("angular", 0.5)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_options(margin, weighted: bool, label_smoothing: float, reduction: str) -> None:
    z = features("normal", 21, 70, dtype=torch.float64)
    target = labels(21, 71)
    target[3] = -100
    weight = torch.rand(71, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(z.to(dtype), target, normalize=True, scale=16.0, margin=margin, **options)
        if margin is None:
            check(z.to(dtype), target, scale=0.5, **options)


def test_angular_margin_beyond_pi() -> None:
    z = 0.2 * features("normal", 5, 4, dtype=torch.float64) - simplex_prototypes(5, dtype=torch.float64)
    assert (F.cosine_similarity(z, simplex_prototypes(5, dtype=torch.float64)) < -math.cos(1.2)).all()
    check(z, torch.arange(5), normalize=True, scale=4.0, margin=("angular", 1.2), reduction="none")


def test_a_row_at_its_own_vertex_keeps_its_small_loss() -> None:
    """log1p, not log(1 + tiny): at cosine 1 and scale 60 the loss is 1e-24, which 1 - p would lose."""
    w = simplex_prototypes(64, dtype=torch.float64)
    loss = SF.simplex_cross_entropy(w, torch.arange(64), scale=60.0, reduction="none")
    expected = 63 * math.exp(-60 * (1 + 1 / 63))
    torch.testing.assert_close(loss, torch.full_like(loss, expected), rtol=1e-10, atol=0)


def test_ignored_rows() -> None:
    z = features("normal", 4, 9, dtype=torch.float32)
    target = torch.tensor([3, 7, -1, 9])
    loss, gradient = both(SF.simplex_cross_entropy, z, target, ignore_index=-1)
    kept = torch.tensor([0, 1, 3])
    part, part_gradient = both(SF.simplex_cross_entropy, z[kept], target[kept])
    assert torch.equal(loss, part)
    assert torch.equal(gradient[kept], part_gradient)
    assert not gradient[2].any()
    # a class in use may be the one to ignore, as in torch
    loss, gradient = both(SF.simplex_cross_entropy, z, target.abs(), ignore_index=3)
    torch.testing.assert_close(loss, both(dense, z.double(), target.abs(), ignore_index=3)[0].float())
    assert not gradient[0].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_left_is_as_in_torch(reduction: str) -> None:
    for z, target in (
        (torch.randn(3, 5), torch.full((3,), -100)),
        (torch.randn(0, 5), torch.empty(0, dtype=torch.int64)),
    ):
        loss, gradient = both(SF.simplex_cross_entropy, z, target, reduction=reduction)
        expected, expected_gradient = both(dense, z, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)


def test_leading_dimensions() -> None:
    z = torch.randn(2, 3, 7)
    target = torch.randint(8, (2, 3))
    rows = SF.simplex_cross_entropy(z, target, reduction="none")
    assert torch.equal(rows, SF.simplex_cross_entropy(z.view(6, 7), target.view(6), reduction="none").view(2, 3))
    one = SF.simplex_cross_entropy(z[0, 0], target[0, 0], reduction="none")
    assert one.shape == ()
    assert torch.equal(one, rows[0, 0])


@pytest.mark.parametrize(
    "view",
    [
        lambda z: z[:, :40],  # rows further apart than they are long
        lambda z: z[::3],
        lambda z: z.T,  # columns apart: made dense
        lambda z: z[:1].expand(5, -1),  # all rows the same memory
        lambda z: z[:, 1:42],  # rows that start off any vector boundary
    ],
)
def test_strided_rows(view) -> None:
    z = view(features("normal", 60, 60, dtype=torch.float32))
    target = labels(len(z), z.shape[1] + 1)
    loss, gradient = both(SF.simplex_cross_entropy, z, target)
    dense_loss, dense_gradient = both(SF.simplex_cross_entropy, z.contiguous(), target)
    assert torch.equal(loss, dense_loss)
    assert torch.equal(gradient, dense_gradient)


def test_zero_rows_and_nan_rows() -> None:
    z = features("normal", 3, 20, dtype=torch.float32)
    z[1] = 0
    loss, gradient = both(
        SF.simplex_cross_entropy, z, torch.tensor([1, 2, 3]), normalize=True, scale=9.0, reduction="none"
    )
    assert loss[1] == pytest.approx(math.log(21), rel=1e-6)
    assert not gradient[1].any()
    assert gradient.isfinite().all()
    z[1, 5] = math.nan
    for normalize in (False, True):
        loss, gradient = both(
            SF.simplex_cross_entropy, z, torch.tensor([1, 2, 3]), normalize=normalize, reduction="none"
        )
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(("rows", "d"), [(300, 513), (130, 16400)])  # the second is written past the caches
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone_and_in_a_batch_and_on_any_number_of_threads(
    rows: int, d: int, dtype: torch.dtype
) -> None:
    z, target = features("normal", rows, d, dtype=dtype), labels(rows, d + 1)
    threads = torch.get_num_threads()
    whole = both(SF.simplex_cross_entropy, z, target, reduction="none")
    mean = both(SF.simplex_cross_entropy, z, target)
    try:
        torch.set_num_threads(1)
        for ours, again in zip(whole, both(SF.simplex_cross_entropy, z, target, reduction="none"), strict=True):
            assert torch.equal(ours, again)
        assert torch.equal(mean[0], both(SF.simplex_cross_entropy, z, target)[0])
    finally:
        torch.set_num_threads(threads)
    for row in (0, 17, rows - 1):
        alone = both(SF.simplex_cross_entropy, z[row : row + 1], target[row : row + 1], reduction="none")
        assert torch.equal(alone[0][0], whole[0][row])
        assert torch.equal(alone[1][0], whole[1][row])


@needs_library
def test_memory_of_gradients_is_used_again_and_never_shared() -> None:
    z, target = torch.randn(64, 1023, requires_grad=True), labels(64, 1024)

    def gradient(scale: float) -> torch.Tensor:
        return torch.autograd.grad(SF.simplex_cross_entropy(z, target, scale=scale), z)[0]

    place = gradient(1.0).data_ptr()
    assert gradient(2.0).data_ptr() == place  # the first is gone
    held = [gradient(float(scale)) for scale in range(1, 30)]  # more than are kept
    assert len({g.data_ptr() for g in held}) == len(held)
    copies = [g.clone() for g in held]
    view = held[7][3]  # keeps its memory after the tensor itself
    expected = view.clone()
    del held[5:10]
    again = [gradient(float(scale)) for scale in range(40, 60)]
    for g, copy in zip(held, copies[:5] + copies[10:], strict=True):
        assert torch.equal(g, copy)
    assert torch.equal(view, expected)
    del held, again
    with ThreadPoolExecutor(4) as pool:  # several threads take and give back at once
        for found in pool.map(gradient, [1.0, 2.0, 3.0] * 40):
            assert any(torch.equal(found, copy) for copy in copies[:3])


def test_backward_twice_and_grad_of_a_leaf() -> None:
    """The saved gradient survives what users do to .grad: accumulate, zero, run backward again."""
    z = torch.randn(4, 9, requires_grad=True)
    target = torch.tensor([0, 9, 4, 2])
    loss = SF.simplex_cross_entropy(z, target)
    once = torch.autograd.grad(loss, z, retain_graph=True)[0].clone()
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(z.grad, 3 * once)
    z.grad.zero_()
    loss.backward()
    assert torch.equal(z.grad, once)


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    z = torch.randn(4, 9, requires_grad=True)
    with torch.no_grad():
        loss = SF.simplex_cross_entropy(z, torch.zeros(4, dtype=torch.int64))
    assert not loss.requires_grad
    assert not SF.simplex_cross_entropy(z.detach(), torch.zeros(4, dtype=torch.int64)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_gives_float32_as_torch_does(dtype: torch.dtype) -> None:
    z, target = features("normal", 5, 9, dtype=dtype), labels(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = both(SF.simplex_cross_entropy, z, target)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, dense(z.double(), target).float())


def test_the_twin_in_float64_is_the_truth() -> None:
    z, target = features("heavy tail", 20, 50, dtype=torch.float64), labels(20, 51)
    for options in ({}, {"normalize": True, "scale": 30.0, "margin": ("angular", 0.4)}, {"label_smoothing": 0.2}):
        for ours, truth in zip(
            both(_reference.simplex_cross_entropy, z, target, **options), both(dense, z, target, **options), strict=True
        ):
            torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_float16_gradients_survive_a_gradient_scaler(weighted: bool) -> None:
    """1 / B is taken after the scale from above: most of these gradients would be zero in float16 otherwise."""
    z = features("normal", 256, 4095, dtype=torch.float16)
    target = labels(256, 4096)
    target[5] = -100
    weight = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.5 if weighted else None
    scale = torch.tensor(16384.0)
    loss, gradient = both(SF.simplex_cross_entropy, z, target, scale, weight=weight)
    truth, true_gradient = both(_reference.simplex_cross_entropy, z.double(), target, scale, weight=weight)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    others = torch.ones_like(z, dtype=torch.bool)
    others[torch.arange(256), target.clamp(0, 4094)] = False
    error = (gradient.double() - true_gradient)[others].norm() / true_gradient[others].norm()
    assert error < 2e-2
    assert (gradient[others] == 0).double().mean() < 0.02
