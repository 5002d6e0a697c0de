"""Compares CUDA with the CPU, on a machine with a GPU: `make test-gpu`.

    pytest --emulated-cuda tests/test_gpu.py

runs the tests that need no GPU on the emulated kernels (tests/native/README.md). This tests the suite itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import DTYPES, KINDS, assert_accurate, features
from exact_search import GALLERIES, hard_gallery, queries_for
from test_contrast import FORMS
from test_cross_entropy import OPERATORS, POLYTOPES, labels, options_of, slots_of
from test_heads import KINDS as HEADS
from test_heads import head_of
from test_operators import op_samples
from torch import Tensor
from torch.utils._pytree import tree_map_only

import simplexfix.functional as SF
from simplexfix import SlotRegistry, _native
from simplexfix.cli.doctor import diagnose
from simplexfix.data import Normalize, RandomCropFlip
from simplexfix.methods import ASNN, BCT, HOC, Method
from simplexfix.models import EmbeddingModel, ResNet18
from simplexfix.training import Items, Schedule
from simplexfix.training.steps import Steps

if _native.library is None:
    pytest.skip(f"no kernels: {_native.missing}", allow_module_level=True)
CPU_OPERATORS = torch._ops._OpNamespace("simplexfix")  # --emulated-cuda replaces the operators of torch.ops.simplexfix


@cache
def cuda_usable() -> str:
    return diagnose()["CUDA usable"]


@pytest.fixture
def gpu() -> str:
    usable = cuda_usable()
    if not usable.startswith("yes"):
        pytest.skip(f"no GPU that simplexfix can use: {usable}")
    torch.set_float32_matmul_precision("highest")  # some distributions of torch enable TF32
    return "cuda"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Returns the device of the CUDA operators: a GPU, or the CPU if they are emulated."""
    return "cpu" if request.config.getoption("--emulated-cuda") else request.getfixturevalue("gpu")


@contextmanager
def cpu_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "simplexfix", CPU_OPERATORS)
        yield


@contextmanager
def nothing_waited_for(device: str) -> Iterator[None]:
    """Raises for every synchronization with the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(values: Any, device: str) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(device), values)


def wide(values: Any) -> Any:
    def widened(x: Tensor | torch.dtype) -> Tensor | torch.dtype:
        if isinstance(x, torch.dtype):
            return torch.float64
        return x.double() if x.is_floating_point() else x

    return tree_map_only((Tensor, torch.dtype), widened, values)


def on_cpu(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with cpu_kernels():
        return function(*arguments, **options)


def agree(device: str, function: Callable[..., tuple[Tensor, ...]], *arguments: Any, **options: Any) -> None:
    """Checks that the device's errors are at most twice those of the CPU; the truth is the CPU in float64."""
    expected = on_cpu(function, *arguments, **options)
    truth = on_cpu(function, *wide(arguments), **wide(options))
    found = function(*moved(arguments, device), **moved(options, device))
    for i, (ours, cpu, true) in enumerate(zip(found, expected, truth, strict=True)):
        assert (ours.dtype, ours.device.type) == (cpu.dtype, device)
        assert_accurate(ours.cpu(), cpu, true, what=f"result {i}")


def with_gradient(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Returns a function (loss, gradient) of z; the upstream gradient differs by row and is exact in every dtype."""

    def both(z: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        z = z.detach().requires_grad_()
        value = loss(z, *arguments, **options)
        upstream = (torch.arange(value.numel(), device=value.device) % 7 - 3.5) / 4
        return value.detach(), torch.autograd.grad(value, z, upstream.to(value.dtype).reshape(value.shape))[0]

    return both


# ---- parity


@pytest.mark.parametrize(("op", "arguments"), list(op_samples()))
def test_operators(device: str, op, arguments) -> None:
    name = op._schema.name.split("::")[1]

    def call(*arguments):
        found = getattr(torch.ops.simplexfix, name).default(*arguments)
        if name.endswith("cross_entropy"):
            loss, gradient = found
            if loss.shape == (2,):  # a float16 mean and its divisor, by which the gradient is not divided yet
                loss, divisor = loss
                gradient = torch.ops.simplexfix.scale_rows.default(gradient, torch.ones_like(loss), divisor)
            return loss, gradient
        return found if isinstance(found, tuple) else (found,)

    if name == "cosine_topk":
        for ours, cpu in zip(call(*moved(arguments, device)), on_cpu(call, *arguments), strict=True):
            assert torch.equal(ours.cpu(), cpu)
    else:
        agree(device, call, *arguments)


# kernels: a warp per row, a block of 128 or of 512 threads per row, chunks of a row; sizes on both sides of each limit
@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("d", [1, 7, 12, 256, 257, 1023, 4089, 4090, 11257, 22600, 70000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_all_sizes(device: str, polytope: str, d: int, dtype: torch.dtype) -> None:
    z, target = features("normal", 5, d, dtype=dtype), labels(5, slots_of(polytope, d))
    target[2] = -100
    for options in ({}, {"normalize": True, "scale": 16.0, "reduction": "none"}):
        if options and d == 1:  # in one dimension normalised numbers are signs, without a gradient
            continue
        agree(device, with_gradient(OPERATORS[polytope]), z, target, **options_of(polytope, d), **options)


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("margin", [None, ("cosine", 0.35), ("angular", 0.5)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses_with_all_options(device: str, polytope: str, margin, weighted, label_smoothing, reduction) -> None:
    if polytope == "cube" and weighted and label_smoothing:
        return  # refused: tests/test_bad_input.py
    for d in (9, 300):
        slots = slots_of(polytope, d)
        weight = torch.rand(slots, generator=torch.Generator().manual_seed(3)).double() if weighted else None
        options = {"margin": margin, "weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
        target = labels(9, slots)
        target[3] = 4
        for dtype in DTYPES:
            z = features("normal", 9, d, dtype=dtype)
            for normalize in (True, False) if margin is None else (True,):
                options.update(normalize=normalize, scale=16.0 if normalize else 0.5, ignore_index=4)
                agree(device, with_gradient(OPERATORS[polytope]), z, target, **options_of(polytope, d), **options)


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_logits_of_all_distributions(device: str, polytope: str, kind: str) -> None:
    for dtype in DTYPES:
        z = features(kind, 17, 129, dtype=dtype)
        target = labels(17, slots_of(polytope, 129))
        for options in ({"normalize": False}, {"normalize": True, "scale": 8.0}):
            losses = options_of(polytope, 129) | options | {"reduction": "none"}
            agree(device, with_gradient(OPERATORS[polytope]), z, target, **losses)
            if polytope == "simplex":
                agree(device, with_gradient(SF.simplex_logits), z, **options)


@pytest.mark.parametrize("d", [1, 16, 256, 257, 1023, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(device: str, d: int, dtype: torch.dtype) -> None:
    z = features("normal", 6, d, dtype=dtype)
    for normalize in (False, True) if d > 1 else (False,):
        agree(device, with_gradient(SF.simplex_logits), z, normalize=normalize, scale=3.0)
    agree(device, with_gradient(SF.orthoplex_logits), z)
    if d < 2000:
        agree(device, with_gradient(SF.cube_logits), z, torch.zeros(9, -(-d // 64), dtype=torch.int64))


# 2200 rows are several blocks of anchors
@pytest.mark.parametrize(("rows", "d"), [(1, 2), (37, 17), (130, 300), (2200, 33)])
@pytest.mark.parametrize("negatives", FORMS)
@pytest.mark.parametrize("anchor", ["old", "new", "symmetric"])
def test_contrast(device: str, rows: int, d: int, negatives: str, anchor: str) -> None:
    target = torch.randint(max(1, rows // 4), (rows,), generator=torch.Generator().manual_seed(rows)) * 2**33
    target[rows // 2] = -1  # a class of one row
    for dtype in DTYPES if rows < 2000 else (torch.float32,):
        new, old = (features("normal", rows, d, dtype=dtype, seed=seed) for seed in (0, 1))
        for reduction in ("none", "mean", "sum") if rows < 2000 else ("mean",):
            options = {"negatives": negatives, "anchor": anchor, "reduction": reduction}
            agree(device, with_gradient(SF.old_new_contrast), new, old, target, **options)


def same_search(device: str, query: Tensor, gallery: Tensor, k: int) -> None:
    expected = on_cpu(SF.cosine_topk, query, gallery, k)
    for name, ours, cpu in zip(
        ("scores", "ids"), SF.cosine_topk(*moved((query, gallery), device), k), expected, strict=True
    ):
        assert torch.equal(ours.cpu(), cpu), f"{name} differ at {(ours.cpu() != cpu).nonzero()[:3].tolist()}"


@pytest.mark.parametrize("kind", GALLERIES)
def test_search_to_the_bit(device: str, kind: str) -> None:
    for n, d, k in ((700, 33, 10), (1500, 8, 100), (300, 129, 290)):  # the last k is nearly n: no first pass
        rng = np.random.default_rng(n)
        gallery = hard_gallery(kind, n, d, rng)
        same_search(device, *(torch.from_numpy(x) for x in (queries_for(gallery, 20, rng), gallery)), k)


@pytest.mark.parametrize(
    ("queries", "n", "d", "k"), [(300, 200_000, 129, 100), (1, 100_000, 1023, 10), (70, 9001, 16, 1)]
)
@pytest.mark.parametrize("kind", ["normal", "near-duplicates"])
def test_large_searches_to_the_bit(gpu: str, kind: str, queries: int, n: int, d: int, k: int) -> None:
    query, gallery = features(kind, queries, d, dtype=torch.float32, seed=1), features(kind, n, d, dtype=torch.float32)
    same_search(gpu, query, gallery, k)


def test_gradients_of_a_search(device: str) -> None:
    gallery = features("normal", 30, 12, dtype=torch.float32)
    both = with_gradient(lambda query, gallery: SF.cosine_topk(query, gallery, 5)[0])
    query = features("normal", 4, 12, dtype=torch.float32, seed=2)
    for ours, cpu in zip(both(*moved((query, gallery), device)), on_cpu(both, query, gallery), strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("options", [{}, {"normalize": True, "scale": 12.0, "margin": ("cosine", 0.2)}])
def test_heads(device: str, kind: str, options: dict[str, Any]) -> None:
    model = head_of(kind, **options)
    there = copy.deepcopy(model).to(device)
    x, target = features("normal", 8, 6, dtype=torch.float32), torch.arange(8)

    def results(model, x, target):
        loss = model.loss(x, target)
        return model(x), loss, torch.autograd.grad(loss, model.junction.weight)[0], *model.predict(x, k=3)

    for ours, cpu in zip(results(there, *moved((x, target), device)), on_cpu(results, model, x, target), strict=True):
        assert ours.device.type == device
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-4, atol=1e-5)


# ---- repeatability, synchronization, graphs, streams and devices: each operator


@cache
def codes_on(device: torch.device, polytope: str, d: int) -> dict[str, Tensor]:
    """Copies the codes once, before a graph is captured or synchronization is forbidden."""
    return {name: codes.to(device) for name, codes in options_of(polytope, d).items()}


def calls() -> Iterator[tuple[str, Callable[..., tuple[Tensor, ...]], int]]:
    """Yields (name, function(z, old, target), d) of each operator; a loss has one d for each of its kernels."""
    for polytope in POLYTOPES:
        for d in (40, 1023, 8000, 30000):

            def call(z, old, target, polytope=polytope, d=d):
                codes = codes_on(z.device, polytope, d)
                return with_gradient(OPERATORS[polytope])(z, target, label_smoothing=0.1, **codes)

            yield f"{polytope}-{d}", call, d
    for d in (40, 1023):
        yield f"logits-{d}", lambda z, old, target: with_gradient(SF.simplex_logits)(z, normalize=True), d
    for reduction in ("none", "mean"):

        def contrast(z, old, target, reduction=reduction):
            return with_gradient(SF.old_new_contrast)(z, old, target % 3, reduction=reduction)

        yield f"contrast-{reduction}", contrast, 65
    yield "search", lambda z, old, target: SF.cosine_topk(z[:9], old, 2), 129
    yield "search-all", lambda z, old, target: SF.cosine_topk(z[:9], old, 20), 129


def inputs(d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    z, old = (features("normal", 24, d, dtype=torch.float32, seed=seed + i) for i in (0, 1))
    return z, old, labels(24, 40, seed=seed + 2)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], name: str) -> None:
    """Compares bits, except for the contrast, whose products are cuBLAS's."""
    for ours, theirs in zip(found, expected, strict=True):
        if name.startswith("contrast"):
            torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(ours.cpu(), theirs.cpu())


CALLS = pytest.mark.parametrize(("name", "call", "d"), list(calls()), ids=[name for name, _, _ in calls()])


@CALLS
def test_each_kernel_once(device: str, name: str, call, d: int) -> None:
    """tools/sanitize_gpu.sh runs this test under compute-sanitizer."""
    arguments = moved(inputs(d), device)
    first = call(*arguments)
    assert all(x.isfinite().all() for x in first)
    assert_same(first, call(*arguments), name)


@CALLS
def test_no_call_synchronizes(device: str, name: str, call, d: int) -> None:
    arguments = moved(inputs(d), device)
    expected = call(*arguments)
    with nothing_waited_for(device):
        found = call(*arguments)
    assert_same(found, expected, name)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("method", [HOC(SlotRegistry(32), lambda_=0.5), BCT(), ASNN()], ids=["hoc", "bct", "asnn"])
def test_a_training_step_does_not_synchronize(device: str, method: Method, precision: str) -> None:
    """The step starts from rows on the host and includes the optimizer."""
    backbone = ResNet18("cifar", width=4, in_channels=3)
    model = EmbeddingModel(backbone, method.head(backbone.out_features))
    method.add_classes(model, range(8))
    model.to(device)
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    steps = Steps(
        model,
        method,
        copy.deepcopy(model).eval(),
        Items(images, torch.arange(64) % 8),
        Items(images[:16], torch.arange(16) % 4),
        Schedule(9, 1e-3, batch=16, optimizer="sgd", clip=1.0, accumulate=2),
        seed=0,
        augment=RandomCropFlip(Normalize((0.5,) * 3, (0.2,) * 3)),
        device=torch.device(device),
        precision=precision,
        ema=0.9,
        compile=False,
        workers=0,
    )
    steps.advance()  # the first step copies channel means and slots to the device, and creates the optimizer's state
    with nothing_waited_for(device):
        steps.advance()
        steps.advance()
    steps.check()


@CALLS
def test_graphs_replay_with_other_inputs(gpu: str, name: str, call, d: int) -> None:
    held = moved(inputs(d), gpu)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            call(*held)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(*held)
    for seed in (0, 10, 20):
        others = moved(inputs(d, seed), gpu)
        for tensor, value in zip(held, others, strict=True):
            tensor.copy_(value)
        graph.replay()
        assert_same(found, call(*others), name)


@CALLS
def test_side_streams(gpu: str, name: str, call, d: int) -> None:
    """The stream fills the inputs late: a kernel on another stream would read nan and targets of -1."""
    values = moved(inputs(d), gpu)
    expected = call(*values)
    late = [torch.full_like(x, math.nan if x.is_floating_point() else -1) for x in values]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for tensor, value in zip(late, values, strict=True):
            tensor.copy_(value)
        found = call(*late)
    stream.synchronize()
    assert_same(found, expected, name)


@CALLS
def test_a_second_device(gpu: str, name: str, call, d: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    values = inputs(d)
    found = call(*(x.to("cuda:1") for x in values))
    assert {x.device.index for x in found} == {1}
    assert torch.cuda.current_device() == 0
    # the second GPU may be of another kind
    for ours, theirs in zip(found, call(*moved(values, "cuda:0")), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-5)


# ---- edges


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
def test_strides(device: str, view) -> None:
    z = view(features("normal", 300, 300, dtype=torch.float32).to(device))
    target = labels(len(z), z.shape[1] + 1).to(device)
    functions = {name: lambda z, f=f: with_gradient(f)(z, target) for name, f in OPERATORS.items() if name != "cube"}
    functions["cube"] = lambda z: with_gradient(SF.cube_cross_entropy)(z[:, :40], target)
    functions["logits"] = with_gradient(SF.simplex_logits)
    functions["search"] = lambda z: SF.cosine_topk(z[:5], z, 3)
    functions["contrast"] = lambda z: with_gradient(SF.old_new_contrast)(z, z.flip(0), target)
    for name, function in functions.items():
        assert_same(function(z), function(z.contiguous()), name)


def test_empty_batches_and_ignored_rows(device: str) -> None:
    """No rows, or only ignored rows, give the CPU's result."""
    none, empty = torch.empty(0, dtype=torch.int64), torch.empty(0, 6)
    ignored = torch.full((3,), -100)
    for reduction in ("none", "mean", "sum"):
        for loss in OPERATORS.values():
            agree(device, with_gradient(loss), empty, none, reduction=reduction)
            agree(device, with_gradient(loss), torch.randn(3, 6), ignored, reduction=reduction)
        agree(device, with_gradient(SF.old_new_contrast), empty, empty, none, reduction=reduction)
    agree(device, with_gradient(SF.simplex_logits), empty)
    for query, gallery in (
        (empty, torch.randn(5, 6)),
        (torch.randn(2, 6), empty),
        (torch.randn(2, 6), torch.randn(2, 6)),
    ):
        same_search(device, query, gallery, 4)


@pytest.mark.parametrize("polytope", [*POLYTOPES, "codes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_target_is_nan_without_synchronization(device: str, polytope: str, dtype: torch.dtype) -> None:
    loss = OPERATORS.get(polytope, SF.cube_cross_entropy)
    for d in (4, 300, 30000):  # the kernels of short rows, of long rows, and of chunks
        codes = torch.arange(5)[:, None].repeat(1, -(-d // 64)).to(device)
        if polytope == "cube" and d > 62:
            continue
        options = {"codes": codes} if polytope == "codes" else {}
        z = features("normal", 4, d, dtype=dtype).to(device).requires_grad_()
        target = torch.tensor([1, 2**40 if d < 62 else 2**62, -7, 0], device=device)
        if polytope == "cube":
            target[1] = 2**d
        ones = torch.ones(4, device=device, dtype=dtype)
        loss(z, target, reduction="none", **options)  # the first call may synchronize to load kernels
        with nothing_waited_for(device):
            rows = loss(z, target, reduction="none", **options)
            (gradient,) = torch.autograd.grad(rows, z, ones)
            mean = loss(z, target, **options)
            (of_mean,) = torch.autograd.grad(mean, z)
        bad = [False, True, True, False]
        assert rows.isnan().tolist() == bad
        for found in (gradient, of_mean):
            assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == bad
        assert mean.isnan()


def test_a_search_for_nan_is_nan(device: str) -> None:
    query, gallery = (features("normal", n, 9, dtype=torch.float32).to(device) for n in (3, 50))
    query[1, 4] = math.inf
    with nothing_waited_for(device):
        scores, ids = SF.cosine_topk(query, gallery, 2)
    assert scores.isnan().all(1).tolist() == [False, True, False]
    assert (ids == -1).all(1).tolist() == [False, True, False]
    gallery[7, 0] = math.nan
    scores, ids = SF.cosine_topk(query, gallery, 2)
    assert scores.isnan().all()
    assert (ids == -1).all()


def test_messages_name_shape_and_device(device: str) -> None:
    z, target = torch.zeros(3, 4, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    where = str(z.device)
    for act, message in (
        (
            lambda: SF.simplex_cross_entropy(z, target[:2]),
            "target must have shape [3] to go with features [3, 4], got [2]",
        ),
        (
            lambda: SF.simplex_cross_entropy(z, target.to("meta")),
            f"target must be on {where} like the features, got meta",
        ),
        (
            lambda: SF.old_new_contrast(z, z.to("meta"), target),
            f"new and old must be on the same device, got {where} and meta",
        ),
        (
            lambda: SF.cosine_topk(z, z.to("meta"), 1),
            f"query and gallery must be on the same device, got {where} and meta",
        ),
        (
            lambda: torch.ops.simplexfix.cosine_topk(z, z[:, :3], 1),
            "query has 4 columns, gallery has 3",
        ),
        (
            lambda: torch.ops.simplexfix.scale_rows(z, torch.ones(2, device=device)),
            "upstream must be a scalar or have shape [3]",
        ),
        (
            lambda: torch.ops.simplexfix.scale_rows(z, torch.ones((), device=device), torch.ones(1, device=device)),
            "divisor must be a scalar of Float, got [1] of Float",
        ),
    ):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            act()
        assert str(raised.value).startswith(message)


@pytest.mark.parametrize(("rows", "d"), [(2**15 + 8, 2**16), (2**20 + 8, 2**11)], ids=["swept rows", "rows that stay"])
def test_more_than_2_31_numbers(gpu: str, rows: int, d: int) -> None:
    """Indices exceed int32: the last rows of a 4 GiB tensor have the results that they have alone."""
    if torch.cuda.mem_get_info()[0] < 8 * rows * d:
        pytest.skip("takes 16 GiB of GPU memory")
    z = torch.randn(rows, d, device=gpu, dtype=torch.bfloat16)
    target = torch.arange(rows, device=gpu) % d
    for loss in (SF.simplex_cross_entropy, SF.orthoplex_cross_entropy):
        leaf = z.requires_grad_()
        value = loss(leaf, target, reduction="sum")
        (gradient,) = torch.autograd.grad(value, leaf)
        alone = z[-3:].detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(alone, target[-3:], reduction="sum"), alone)
        assert torch.equal(gradient[-3:], expected)
        del gradient
    z = z.detach()
    assert torch.equal(SF.simplex_logits(z)[-3:], SF.simplex_logits(z[-3:].clone()))
    found = SF.cosine_topk(z[-3:].float(), z.float(), 1)[1]
    assert found[:, 0].tolist() == [rows - 3, rows - 2, rows - 1]


def test_arguments_of_two_devices_are_refused_before_anything_is_done(gpu: str) -> None:
    z, target = torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)
    loss = torch.ops.simplexfix.simplex_cross_entropy
    for where, message in (((z, target.to(gpu)), "z is not on a GPU"), ((z.to(gpu), target), "different devices")):
        with pytest.raises(ValueError, match=message):
            loss(*where, False, 1.0, 0, 0.0, None, -100, 0.0, 1, True, torch.float32)


def test_out_of_memory(gpu: str) -> None:
    one = torch.zeros(2**12, 1, device=gpu)
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory\. Tried to allocate"):
        SF.cosine_topk(one, one, 2**30)
