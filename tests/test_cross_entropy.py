"""Tests the closed forms of the three polytopes against their matrices: values, gradients, options and layouts."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, KINDS, assert_accurate, features
from conftest import assert_same_bits, needs_library

import simplexfix.functional as SF
from simplexfix import _native, _reference
from simplexfix.polytopes import cube_codes, cube_prototypes, orthoplex_prototypes, simplex_prototypes

POLYTOPES = ("simplex", "orthoplex", "cube")
OPERATORS = {name: getattr(SF, f"{name}_cross_entropy") for name in POLYTOPES}
REFERENCES = {name: getattr(_reference, f"{name}_cross_entropy") for name in POLYTOPES}
ENUMERATED = 12  # largest dimension of a cube whose 2^d vertices fit into a matrix


def slots_of(polytope: str, d: int) -> int:
    """Returns the number of classes of a sample: for the cube all vertices, or 100 if there are too many."""
    return {"simplex": d + 1, "orthoplex": 2 * d}.get(polytope) or (2**d if d <= ENUMERATED else 100)


def options_of(polytope: str, d: int) -> dict[str, Any]:
    """Returns codes of 100 random vertices, which use all d bits, for a cube with too many vertices; else nothing."""
    if polytope != "cube" or d <= ENUMERATED:
        return {}
    words = torch.randint(-(2**62), 2**62, (100, -(-d // 64)), generator=torch.Generator().manual_seed(7))
    codes = words * 2 + torch.arange(100)[:, None] % 2
    if d % 64:
        codes[:, -1] &= (1 << d % 64) - 1
    return {"codes": codes}


def prototypes(polytope: str, d: int, dtype: torch.dtype) -> torch.Tensor:
    if polytope == "simplex":
        return simplex_prototypes(d + 1, dtype=dtype)
    if polytope == "orthoplex":
        return orthoplex_prototypes(2 * d, dtype=dtype)
    return cube_prototypes(torch.arange(2**d)[:, None], d, dtype=dtype)


def dense(z, target, *, polytope="simplex", normalize=False, scale=1.0, margin=None, **options):
    """Computes the naive equation with the K x d matrix of vertices, in the dtype of z.

    For a cube with d > ENUMERATED it is the reference implementation, rounded to the dtype of z.
    test_the_reference_in_float64_is_the_truth compares that with the matrix.
    """
    if polytope == "cube" and z.shape[1] > ENUMERATED:
        return REFERENCES["cube"](z, target, normalize=normalize, scale=scale, margin=margin, **options).to(z.dtype)
    w = prototypes(polytope, z.shape[1], z.dtype)
    logits = (F.normalize(z) if normalize else z) @ w.T
    if margin is not None:
        kind, size = margin
        row = torch.arange(len(z))
        column = target.where(target >= 0, 0)
        cosine = logits[row, column]
        if kind == "cosine":
            with_margin = cosine - size
        else:
            beyond = cosine <= -math.cos(size)
            with_margin = torch.where(beyond, cosine - size * math.sin(size), (cosine.acos() + size).cos())
        logits = logits.index_put((row, column), with_margin)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(z.dtype)
    return F.cross_entropy(scale * logits, target, **options)


def both(function, z, target, upstream=None, **options):
    z = z.clone().requires_grad_()
    loss = function(z, target, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, z, upstream)[0]


def check(z, target, upstream_seed=0, polytope="simplex", truth=None, naive=None, **options):
    options = {**options_of(polytope, z.shape[1]), **options}
    truth = truth or partial(dense, polytope=polytope)
    naive = naive or partial(dense, polytope=polytope)
    shape = [len(z)] if options.get("reduction") == "none" else []
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(upstream_seed))
    upstream = upstream.to(z.dtype)
    loss, gradient = both(OPERATORS[polytope], z, target, upstream, **options)
    true_loss, true_gradient = both(truth, z.double(), target, upstream.double(), **options)
    naive_loss, naive_gradient = both(naive, z, target, upstream, **options)
    assert loss.dtype == gradient.dtype == z.dtype
    assert_accurate(loss, naive_loss, true_loss, what="loss")
    assert_accurate(gradient, naive_gradient, true_gradient, what="gradient")


def reference_in_the_dtype_of_z(polytope: str):
    return lambda z, target, **options: REFERENCES[polytope](z, target, **options).to(z.dtype)


def labels(rows: int, slots: int, seed: int = 1) -> torch.Tensor:
    target = torch.randint(slots, (rows,), generator=torch.Generator().manual_seed(seed))
    target[0], target[-1] = 0, slots - 1  # the first vertex and the last, which has its own formula
    return target


# less than one vector, tails of every vector width, whole vectors, whole unrolled blocks, the paper's size
@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 12, 15, 16, 32, 64, 65, 79, 129, 1023])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(polytope: str, d: int, dtype: torch.dtype) -> None:
    z = features("normal", 9, d, dtype=dtype)
    for reduction in ("none", "mean", "sum"):
        check(z, labels(9, slots_of(polytope, d)), polytope=polytope, reduction=reduction)


def test_many_classes() -> None:
    """K = 65537 exceeds 16 bits and the L1 cache; the truth is the reference implementation in float64."""
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


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("d", [2048, 2049, 2050, 4096, 4999])
@pytest.mark.parametrize("options", [{}, {"normalize": True, "scale": 30.0}, {"label_smoothing": 0.1, "weight": 1}])
def test_rows_of_several_tiles(polytope: str, d: int, options: dict[str, Any]) -> None:
    """The CPU kernels split a row into tiles of 2048, each with its own shift; labels lie at the ends of tiles."""
    slots = slots_of(polytope, d)
    target = torch.tensor([0, 2047, 2048, d - 1, slots - 1, d // 2, d // 2 + 2048])
    if polytope == "cube":
        target = target % slots
    if "weight" in options:
        weight = torch.rand(slots, generator=torch.Generator().manual_seed(3)).double()
        options = {"weight": weight} if polytope == "cube" else {**options, "weight": weight}
    for kind in ("normal", "heavy tail", "confident", "offset"):
        z = features(kind, len(target), d, dtype=torch.float64)
        z[1, :2048] -= 500  # a tile whose exponentials vanish beside those of another
        z[2] = 0
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            check(
                z.to(dtype),
                target % slots,
                polytope=polytope,
                truth=REFERENCES[polytope],
                naive=reference_in_the_dtype_of_z(polytope),
                reduction="none",
                **options,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 129, 4999])  # 4999 gives three tiles
def test_logits_of_any_size(d: int, dtype: torch.dtype) -> None:
    """The CPU kernel computes unshifted exponentials, and shifts only tiles whose sum is too small or too large.

    The logits lie near those bounds, on both sides of them in one row, and beyond the range in which exp can split off
    a power of two.
    """
    z = features("normal", 1, d, dtype=torch.float64)
    shifts = torch.tensor([-120.0, -90.0, -20.0, -8.0, -6.0, 30.0, 43.0, 46.0, 86.0, 90.0, 130.0])
    spread = torch.tensor([1e-6, 20.0, 44.0, 90.0, 1e3, 3e4])
    rows = torch.cat([z + shifts[:, None], z * spread[:, None]])
    rows = torch.cat([rows, rows.where(torch.arange(d) < d // 2, z)])
    target = labels(len(rows), d + 1)
    naive = reference_in_the_dtype_of_z("simplex")
    check(rows.to(dtype), target, truth=REFERENCES["simplex"], naive=naive, reduction="none")
    if dtype != torch.float16:
        large = (rows * 1e24 / rows.abs().amax(1, keepdim=True)).to(dtype)
        check(large, target, truth=REFERENCES["simplex"], naive=naive, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [200.0, 3e3, 1e6, 1e12, 1e30])
def test_huge_logits_that_are_equal_or_negative(scale: float, dtype: torch.dtype) -> None:
    """Huge logits have huge rounding errors, and a margin may make the label's logit hugely negative, too."""
    same = torch.full((1, 8), 3.3, dtype=dtype)
    loss = OPERATORS["orthoplex"](same, torch.tensor([3]), normalize=True, scale=scale)
    assert float(loss) == pytest.approx(math.log(8), rel=1e-5)
    last = -torch.ones(1, 4, dtype=dtype)
    options = {"normalize": True, "scale": scale, "margin": ("cosine", 2.0)}
    loss = OPERATORS["simplex"](last, torch.tensor([4]), **options)
    truth = REFERENCES["simplex"](last.double(), torch.tensor([4]), **options)
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)


@pytest.mark.parametrize("own", [30.0, 60.0, 87.0, 95.0])
@pytest.mark.parametrize("other", [0.0, 20.0, 40.0])
def test_a_small_loss_beside_large_logits(own: float, other: float) -> None:
    z = torch.zeros(1, 8)
    z[0, 0], z[0, 1] = own, other
    loss, gradient = both(OPERATORS["simplex"], z, torch.tensor([0]))
    w = simplex_prototypes(9, dtype=torch.float64)
    # relative to the label's logit: float64 represents all of them
    p = (z.double() @ w.T)[0].sub((z.double() @ w.T)[0, 0]).exp()
    others = p[1:].sum()
    p[0] = -others
    assert float(loss) == pytest.approx(float(others.log1p()), rel=2e-5, abs=1e-30)
    assert float(gradient[0, 1]) == pytest.approx(float((p / (1 + others)) @ w[:, 1]), rel=2e-5, abs=1e-30)


def test_smoothing_of_logits_near_the_largest_float() -> None:
    z = torch.zeros(1, 65535)
    z[0, 0] = -1e34
    loss = OPERATORS["simplex"](z, torch.tensor([0]), label_smoothing=0.1)
    truth = REFERENCES["simplex"](z.double(), torch.tensor([0]), label_smoothing=0.1)
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions(polytope: str, kind: str, dtype: torch.dtype) -> None:
    for d in (12, 129):  # the first case uses the matrix of all cube vertices
        z = features(kind, 33, d, dtype=dtype)
        target = labels(33, slots_of(polytope, d))
        for normalize in (False, True):
            scale = 8.0 if normalize else 1.0
            check(z, target, polytope=polytope, normalize=normalize, scale=scale, reduction="none")


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("margin", [None, ("cosine", 0.35), ("angular", 0.5)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_options(polytope: str, margin, weighted: bool, label_smoothing: float, reduction: str) -> None:
    if polytope == "cube" and weighted and label_smoothing:
        return  # refused: tests/test_bad_input.py
    d = 9 if polytope == "cube" else 70
    slots = slots_of(polytope, d)
    z = features("normal", 21, d, dtype=torch.float64)
    target = labels(21, slots)
    target[3] = -100
    weight = torch.rand(slots, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction, "polytope": polytope}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(z.to(dtype), target, normalize=True, scale=16.0, margin=margin, **options)
        if margin is None:
            check(z.to(dtype), target, scale=0.5, **options)


@pytest.mark.parametrize("polytope", POLYTOPES)
def test_angular_margin_beyond_pi(polytope: str) -> None:
    w = prototypes(polytope, 4, torch.float64)
    z = 0.2 * features("normal", len(w), 4, dtype=torch.float64) - w
    assert (F.cosine_similarity(z, w) < -math.cos(1.2)).all()
    target = torch.arange(len(w))
    check(z, target, polytope=polytope, normalize=True, scale=4.0, margin=("angular", 1.2), reduction="none")


@needs_library
@pytest.mark.parametrize("polytope", POLYTOPES)
def test_a_row_at_its_own_vertex_keeps_its_small_loss(polytope: str) -> None:
    """At cosine 1 and these scales the loss is about 1e-24: log1p keeps it, and 1 - p would be 0."""
    d, scale = {"simplex": (63, 60.0), "orthoplex": (64, 60.0), "cube": (10, 300.0)}[polytope]
    w = prototypes(polytope, d, torch.float64)
    loss = OPERATORS[polytope](w, torch.arange(len(w)), scale=scale, reduction="none")
    expected = {
        "simplex": 63 * math.exp(-60 * (1 + 1 / 63)),
        "orthoplex": 126 * math.exp(-60) + math.exp(-120),
        "cube": 10 * math.exp(-600 / 10),
    }[polytope]
    torch.testing.assert_close(loss, torch.full_like(loss, expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("margin", [("cosine", 0.5), ("angular", 1.0)])
def test_a_margin_where_the_loss_without_it_underflows(dtype: torch.dtype, margin: tuple[str, float]) -> None:
    """Without the margin, the loss is about exp(-2 scale / d), at some scales less than the dtype's smallest number.

    The truth is the reference implementation in float64; the matrix of vertices gives 0 for most rows.
    """
    # the error of logits is scale * epsilon
    scale, tolerance = (2500.0, 1e-9) if dtype == torch.float64 else (250.0, 2e-3)
    w = prototypes("cube", 4, torch.float64)
    z, target = (w + 0.02 * features("normal", 16, 4, dtype=torch.float64)).to(dtype), torch.arange(16)
    for factor in (0.03, 0.1, 0.3, 0.8, 1.0, 1.3):  # on both sides of the threshold between the kernel's formulas
        options = {"normalize": True, "scale": factor * scale, "margin": margin, "reduction": "none"}
        loss, gradient = both(SF.cube_cross_entropy, z, target, **options)
        true_loss, true_gradient = both(_reference.cube_cross_entropy, z.double(), target, **options)
        torch.testing.assert_close(loss.double(), true_loss, rtol=tolerance, atol=1e-30)
        size = float(true_gradient.abs().max())
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=tolerance * size)
        assert true_loss.min() > 0


def test_a_cubes_target_is_the_vertex_number_or_its_row_of_codes() -> None:
    z, target = features("normal", 9, 62, dtype=torch.float32), torch.arange(9) * 2**58 + 12345
    target[0], target[-1] = 0, 2**62 - 1
    numbers = both(SF.cube_cross_entropy, z, target, scale=3.0)
    codes = both(SF.cube_cross_entropy, z, torch.arange(9), codes=target[:, None], scale=3.0)
    assert all(torch.equal(a, b) for a, b in zip(numbers, codes, strict=True))
    transposed = torch.stack([target, target], 1)[:, :1]  # codes of any stride
    assert torch.equal(numbers[0], SF.cube_cross_entropy(z, torch.arange(9), codes=transposed, scale=3.0))


@pytest.mark.cpu_only
def test_codes_with_bits_beyond_the_features_are_refused() -> None:
    z = features("normal", 9, 62, dtype=torch.float32)
    beyond = torch.tensor([[0], [2**62]])  # raises only if the row of codes is used
    assert SF.cube_cross_entropy(z, torch.zeros(9, dtype=torch.int64), codes=beyond).isfinite()
    with pytest.raises(ValueError, match="row 1 of codes has bits beyond d = 62"):
        SF.cube_cross_entropy(z, torch.ones(9, dtype=torch.int64), codes=beyond)


@pytest.mark.parametrize("polytope", POLYTOPES)
def test_ignored_rows(polytope: str) -> None:
    f = OPERATORS[polytope]
    z = features("normal", 4, 9, dtype=torch.float32)
    z[2, 0] = math.nan
    target = torch.tensor([3, 7, -1, 9])
    loss, gradient = both(f, z, target, ignore_index=-1)
    kept = torch.tensor([0, 1, 3])
    part, part_gradient = both(f, z[kept], target[kept])
    assert torch.equal(loss, part)
    assert torch.equal(gradient[kept], part_gradient)
    if _native.library is not None:
        assert not gradient[2].any()
    # as in torch, an ignored class may be a class in use
    z[2, 0] = 1.0
    loss, gradient = both(f, z, target.abs(), ignore_index=3)
    expected = both(partial(dense, polytope=polytope), z.double(), target.abs(), ignore_index=3)[0]
    torch.testing.assert_close(loss, expected.float())
    assert not gradient[0].any()


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_counted_rows_is_as_in_torch(polytope: str, reduction: str) -> None:
    for z, target in (
        (torch.randn(3, 5), torch.full((3,), -100)),
        (torch.randn(0, 5), torch.empty(0, dtype=torch.int64)),
    ):
        loss, gradient = both(OPERATORS[polytope], z, target, reduction=reduction)
        expected, expected_gradient = both(partial(dense, polytope=polytope), z, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)


@pytest.mark.parametrize("polytope", POLYTOPES)
def test_leading_dimensions(polytope: str) -> None:
    f, z = OPERATORS[polytope], torch.randn(2, 3, 7)
    target = torch.randint(8, (2, 3))
    rows = f(z, target, reduction="none")
    assert_same_bits(rows, f(z.view(6, 7), target.view(6), reduction="none").view(2, 3))
    one = f(z[0, 0], target[0, 0], reduction="none")
    assert one.shape == ()
    assert_same_bits(one, rows[0, 0])


@needs_library
@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda z: z[:, :40],  # the row stride exceeds the row's length
        lambda z: z[::3],
        lambda z: z.T,  # a column stride: the operator copies it
        lambda z: z[:1].expand(5, -1),  # all rows share memory
        lambda z: z[:, 1:42],  # rows are not aligned to vectors
    ],
)
def test_strided_rows(polytope: str, view) -> None:
    z = view(features("normal", 60, 60, dtype=torch.float32))
    target, f = labels(len(z), z.shape[1] + 1), OPERATORS[polytope]
    loss, gradient = both(f, z, target)
    dense_loss, dense_gradient = both(f, z.contiguous(), target)
    assert torch.equal(loss, dense_loss)
    assert torch.equal(gradient, dense_gradient)


@pytest.mark.parametrize("polytope", POLYTOPES)
def test_zero_rows_and_nan_rows(polytope: str) -> None:
    f, z = OPERATORS[polytope], features("normal", 3, 20, dtype=torch.float32)
    z[1] = 0
    loss, gradient = both(f, z, torch.tensor([1, 2, 3]), normalize=True, scale=9.0, reduction="none")
    slots = 2**20 if polytope == "cube" else slots_of(polytope, 20)
    assert loss[1] == pytest.approx(math.log(slots), rel=1e-6)
    assert not gradient[1].any()
    assert gradient.isfinite().all()
    for bad in (math.nan, -math.nan, math.inf, -math.inf):  # infinite logits have no softmax, whatever their signs
        for at in (1, 2, 5):
            z[1] = 0.5
            z[1, at] = bad
            for options in ({}, {"normalize": True}, {"normalize": True, "margin": ("angular", 0.2)}):
                loss, gradient = both(f, z, torch.tensor([1, 2, 3]), reduction="none", **options)
                assert loss.isnan().tolist() == [False, True, False]
                assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize(("rows", "d"), [(300, 513), (130, 16400)])  # the second case uses non-temporal stores
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_is_the_same_alone_and_in_a_batch_and_on_any_number_of_threads(
    polytope: str, rows: int, d: int, dtype: torch.dtype, normalize: bool, weighted: bool
) -> None:
    options = options_of(polytope, d)
    if weighted:
        count = len(options["codes"]) if polytope == "cube" else slots_of(polytope, d)
        options["weight"] = torch.rand(count, generator=torch.Generator().manual_seed(5))
        options["label_smoothing"] = 0.0 if polytope == "cube" else 0.1
    f = partial(OPERATORS[polytope], normalize=normalize, **options)
    z, target = features("normal", rows, d, dtype=dtype), labels(rows, slots_of(polytope, d))
    threads = torch.get_num_threads()
    whole = both(f, z, target, reduction="none")
    mean = both(f, z, target)
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        for ours, again in zip(whole, both(f, z, target, reduction="none"), strict=True):
            assert torch.equal(ours, again)
        assert torch.equal(mean[0], both(f, z, target)[0])
    finally:
        torch.set_num_threads(threads)
    for row in range(0, rows, 1 if d < 1000 else 17):
        alone = both(f, z[row : row + 1], target[row : row + 1], reduction="none")
        assert torch.equal(alone[0][0], whole[0][row])
        assert torch.equal(alone[1][0], whole[1][row])


@needs_library
@pytest.mark.cpu_only
def test_memory_of_gradients_is_reused_and_never_shared() -> None:
    z, target = torch.randn(64, 1023, requires_grad=True), labels(64, 1024)

    def gradient(scale: float) -> torch.Tensor:
        return torch.autograd.grad(SF.simplex_cross_entropy(z, target, scale=scale), z)[0]

    place = gradient(1.0).data_ptr()
    assert gradient(2.0).data_ptr() == place  # the first one is freed
    held = [gradient(float(scale)) for scale in range(1, 30)]  # more than the pool stores
    assert len({g.data_ptr() for g in held}) == len(held)
    copies = [g.clone() for g in held]
    view = held[7][3]  # keeps its memory alive after the tensor itself
    expected = view.clone()
    del held[5:10]
    again = [gradient(float(scale)) for scale in range(40, 60)]
    for g, copy in zip(held, copies[:5] + copies[10:], strict=True):
        assert torch.equal(g, copy)
    assert torch.equal(view, expected)
    del held, again
    with ThreadPoolExecutor(4) as pool:  # several threads allocate and free at once
        for found in pool.map(gradient, [1.0, 2.0, 3.0] * 40):
            assert any(torch.equal(found, copy) for copy in copies[:3])


def test_backward_twice_and_grad_of_a_leaf() -> None:
    """The saved gradient survives changes of .grad: accumulation, zeroing, a second backward pass."""
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


def test_no_gradient_is_computed_where_none_is_required() -> None:
    z = torch.randn(4, 9, requires_grad=True)
    with torch.no_grad():
        loss = SF.simplex_cross_entropy(z, torch.zeros(4, dtype=torch.int64))
    assert not loss.requires_grad
    assert not SF.simplex_cross_entropy(z.detach(), torch.zeros(4, dtype=torch.int64)).requires_grad


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_gives_float32_as_torch_does(polytope: str, dtype: torch.dtype) -> None:
    z, target = features("normal", 5, 9, dtype=dtype), labels(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = both(OPERATORS[polytope], z, target)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, dense(z.double(), target, polytope=polytope).float())


@pytest.mark.parametrize("polytope", POLYTOPES)
def test_the_reference_in_float64_is_the_truth(polytope: str) -> None:
    d = ENUMERATED if polytope == "cube" else 50
    z, target = features("heavy tail", 20, d, dtype=torch.float64), labels(20, slots_of(polytope, d))
    weight = torch.rand(slots_of(polytope, d), dtype=torch.float64)
    for options in (
        {},
        {"normalize": True, "scale": 30.0, "margin": ("angular", 0.4)},
        {"normalize": True, "scale": 30.0, "margin": ("cosine", 0.4), "label_smoothing": 0.3},
        {"label_smoothing": 0.2},
        {"weight": weight},
    ):
        truth = partial(dense, polytope=polytope)
        for ours, expected in zip(
            both(REFERENCES[polytope], z, target, **options), both(truth, z, target, **options), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_the_cube_of_all_vertices_agrees_with_its_classes() -> None:
    """Targets without codes are vertex numbers, which cube_codes returns for classes."""
    z, target, codes = features("normal", 30, 10, dtype=torch.float64), labels(30, 40), cube_codes(40, 10)
    expected = both(partial(dense, polytope="cube"), z, codes[target, 0], scale=4.0)
    for ours, truth in zip(both(SF.cube_cross_entropy, z, target, codes=codes, scale=4.0), expected, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("weighted", [False, True])
def test_float16_gradients_survive_a_gradient_scaler(weighted: bool) -> None:
    """1 / B is applied after the upstream scale: otherwise most of these gradients would be zero in float16."""
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("polytope", POLYTOPES)
def test_a_mean_over_no_rows_is_nan_and_its_gradient_is_zero(polytope: str, dtype: torch.dtype) -> None:
    loss, gradient = both(OPERATORS[polytope], features("normal", 3, 9, dtype=dtype), torch.full((3,), -100))
    assert loss.isnan()
    assert torch.equal(gradient, torch.zeros(3, 9, dtype=dtype))


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("size", [1e-18, 1e-9, 1e9, 1e19])
def test_norms_whose_squares_fit_into_float32(polytope: str, size: float) -> None:
    z = F.normalize(features("normal", 5, 40, dtype=torch.float32))
    loss, gradient = both(OPERATORS[polytope], z, torch.arange(5), normalize=True, scale=9.0)
    huge, its_gradient = both(OPERATORS[polytope], z * size, torch.arange(5), normalize=True, scale=9.0)
    torch.testing.assert_close(huge, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(its_gradient * size, gradient, rtol=1e-4, atol=1e-6)
