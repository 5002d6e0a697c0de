"""Tests the old/new contrast and HOC against loops written from the equations."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accuracy import DTYPES, assert_accurate, features
from conftest import needs_library
from processes import free_port, run_ranks

import simplexfix.functional as SF
from simplexfix import _reference

FORMS = ("zero_mask", "remove", "infonce")
TARGETS = torch.tensor([3, 3, 7, 2**40, 3, 7, -5])  # classes of three, two and one rows


def by_loop(new, old, target, *, mu=10.0, negatives="zero_mask", anchor="old"):
    """Computes the loss row by row in Python floats."""
    u, v = old.double(), new.double()
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    if anchor == "symmetric":
        pair = [by_loop(new, old, target, mu=mu, negatives=negatives, anchor=a) for a in ("old", "new")]
        return (pair[0] + pair[1]) / 2
    rows = []
    for i in range(len(target)):
        # anchors are old features and the sum runs over new ones, or the reverse
        s = [float(u[i] @ v[j]) if anchor == "old" else float(u[j] @ v[i]) for j in range(len(target))]
        inside = sum(math.exp(mu * s[j]) for j in range(len(target)) if target[j] != target[i])
        if negatives == "zero_mask":
            inside += sum(1 for j in range(len(target)) if target[j] == target[i])
        elif negatives == "infonce":
            inside += math.exp(mu * s[i])
        rows.append(-mu * s[i] + (math.log(inside) if inside > 0 else 0.0))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("negatives", FORMS)
@pytest.mark.parametrize("anchor", ["old", "new", "symmetric"])
@pytest.mark.parametrize("mu", [1.0, 10.0, 50.0])
def test_forms(negatives: str, anchor: str, mu: float) -> None:
    new, old = (features("normal", 7, 5, dtype=torch.float64, seed=seed) for seed in (0, 1))
    options = {"mu": mu, "negatives": negatives, "anchor": anchor}
    truth = by_loop(new, old, TARGETS, **options)
    rows = SF.old_new_contrast(new, old, TARGETS, reduction="none", **options)
    torch.testing.assert_close(rows, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(SF.old_new_contrast(new, old, TARGETS, **options), truth.mean())
    torch.testing.assert_close(SF.old_new_contrast(new, old, TARGETS, reduction="sum", **options), truth.sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_formats(dtype: torch.dtype) -> None:
    new, old = (features("normal", 7, 33, dtype=dtype, seed=seed) for seed in (0, 1))
    rows = SF.old_new_contrast(new, old, TARGETS, reduction="none")
    assert rows.dtype == dtype
    truth = by_loop(new, old, TARGETS)
    assert_accurate(rows, truth.to(dtype), truth)


@pytest.mark.parametrize("negatives", FORMS)
def test_one_class_only_is_finite(negatives: str) -> None:
    """Without negatives the loss is neither -inf nor nan, and its gradient is finite."""
    new = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    old = torch.randn(4, 6, dtype=torch.float64)
    rows = SF.old_new_contrast(new, old, torch.zeros(4, dtype=torch.int64), negatives=negatives, reduction="none")
    torch.testing.assert_close(rows, by_loop(new.detach(), old, torch.zeros(4), negatives=negatives))
    assert torch.autograd.grad(rows.sum(), new)[0].isfinite().all()


def test_zero_rows_are_finite() -> None:
    new = torch.zeros(3, 4, requires_grad=True)
    loss = SF.old_new_contrast(new, torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)
    assert torch.autograd.grad(loss, new)[0].isfinite().all()


def test_no_gradient_reaches_the_old_model() -> None:
    new, old = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = SF.old_new_contrast(new, old, torch.tensor([0, 1, 0, 1]))
    gradients = torch.autograd.grad(loss, (new, old), allow_unused=True)
    assert gradients[0].any()
    assert gradients[1] is None


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_hoc_is_the_weighted_sum_of_both_losses(reduction: str) -> None:
    z, old = (features("normal", 7, 5, dtype=torch.float64, seed=seed) for seed in (0, 1))
    target = torch.tensor([0, 0, 5, 1, 0, 5, 2])
    loss = SF.hoc_loss(z, old, target, lambda_=0.3, mu=7.0, reduction=reduction)
    rows = 0.3 * SF.simplex_cross_entropy(z, target, reduction="none") + 0.7 * by_loop(z, old, target, mu=7.0)
    expected = {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_hoc_applies_weight_and_ignore_index_to_its_cross_entropy_only(reduction: str) -> None:
    """The contrast covers all rows of the batch; the ignored rows form one class in it."""
    z, old = (features("normal", 7, 5, dtype=torch.float64, seed=seed) for seed in (0, 1))
    target, weight = torch.tensor([0, 0, 9, 1, 9, 5, 2]), torch.rand(6, generator=torch.Generator().manual_seed(2))
    loss = SF.hoc_loss(z, old, target, lambda_=0.3, weight=weight, ignore_index=9, reduction=reduction)
    rows = SF.simplex_cross_entropy(z, target, weight=weight, ignore_index=9, reduction="none")
    assert rows[[2, 4]].tolist() == [0, 0]
    contrast = by_loop(z, old, target)
    counted = weight.double()[target[target != 9]].sum()
    expected = {
        "none": 0.3 * rows + 0.7 * contrast,
        "mean": 0.3 * rows.sum() / counted + 0.7 * contrast.mean(),
        "sum": 0.3 * rows.sum() + 0.7 * contrast.sum(),
    }
    torch.testing.assert_close(loss, expected[reduction], rtol=1e-12, atol=1e-12)
    assert SF.hoc_loss(z, old, torch.full((7,), -100)).isnan()  # as in torch: a mean over no rows
    assert SF.hoc_loss(z, old, torch.full((7,), -100), reduction="sum").isfinite()


@pytest.mark.parametrize(("new_dtype", "old_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_under_autocast_old_and_new_features_may_differ_in_dtype(new_dtype: str, old_dtype: str) -> None:
    """One of the two may have been computed outside of autocast."""
    z = features("normal", 7, 5, dtype=getattr(torch, new_dtype)).requires_grad_()
    old, target = features("normal", 7, 5, dtype=getattr(torch, old_dtype), seed=1), torch.tensor([0, 0, 5, 1, 0, 5, 2])
    for loss in (SF.hoc_loss, SF.old_new_contrast):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(z, old, target)
            assert found.dtype == torch.float32
            assert torch.equal(found, loss(z, old.to(z.dtype), target))
        assert torch.autograd.grad(found, z)[0].dtype == z.dtype
        with pytest.raises(TypeError, match="and old must have the same dtype"):
            loss(z, old, target)


def by_reference(new, old, target, *, mu=10.0, negatives="zero_mask", anchor="old", reduction="mean"):
    pairs = {"old": [(old, new)], "new": [(new, old)], "symmetric": [(old, new), (new, old)]}[anchor]
    rows = [_reference.contrast_rows(*pair, target, target, 0, mu=mu, negatives=negatives) for pair in pairs]
    mean = sum(rows) / len(rows)
    return mean if reduction == "none" else mean.mean() if reduction == "mean" else mean.sum()


def loss_and_gradient(function, new, old, target, upstream, **options):
    new = new.clone().requires_grad_()
    loss = function(new, old, target, **options)
    return loss.detach(), torch.autograd.grad(loss, new, upstream.to(loss.dtype).expand(loss.shape))[0]


# one row, less than one vector, tails of every width; 2200 rows give several blocks of anchors and chunks of candidates
@pytest.mark.parametrize(("rows", "d"), [(1, 2), (2, 3), (37, 17), (130, 65), (2200, 33)])
@pytest.mark.parametrize("negatives", FORMS)
@pytest.mark.parametrize("anchor", ["old", "new", "symmetric"])
def test_against_the_reference_in_float64(rows: int, d: int, negatives: str, anchor: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    target = torch.randint(max(1, rows // 4), (rows,), generator=generator) * 2**33
    target[rows // 2] = -1  # a class of one row
    for dtype in DTYPES if rows < 1000 else (torch.float32,):
        new, old = (features("normal", rows, d, dtype=dtype, seed=seed) for seed in (0, 1))
        if rows > 2:
            new[rows // 3] = old[rows // 3]  # an easy row: a small loss under infonce
        for reduction in ("none", "mean", "sum") if rows < 1000 else ("mean",):
            shape = [rows] if reduction == "none" else []
            upstream = torch.randn(shape, dtype=torch.float64, generator=generator)
            options = {"negatives": negatives, "anchor": anchor, "reduction": reduction, "mu": 12.0}
            truth = loss_and_gradient(by_reference, new.double(), old.double(), target, upstream, **options)
            naive = loss_and_gradient(by_reference, new, old, target, upstream, **options)
            ours = loss_and_gradient(SF.old_new_contrast, new, old, target, upstream, **options)
            for what, o, n, t in zip(("loss", "gradient"), ours, naive, truth, strict=True):
                assert_accurate(o.to(dtype), n.to(dtype), t, what=f"{what} {dtype} {reduction}")


def test_zero_rows_strides_and_nan() -> None:
    new, old = (features("normal", 9, 12, dtype=torch.float32, seed=seed) for seed in (0, 1))
    target = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5])
    new[4] = 0
    expected = loss_and_gradient(SF.old_new_contrast, new, old, target, torch.ones(()))
    assert not expected[1][4].any()
    wide = torch.full((18, 24), math.nan)
    wide[::2, :12] = new
    strided = loss_and_gradient(SF.old_new_contrast, wide[::2, :12], old.T.contiguous().T, target, torch.ones(()))
    torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-7)
    new[2, 3] = math.nan
    rows = SF.old_new_contrast(new, old, target, reduction="none")
    # row 2 is nan, and so are the rows that have it as a negative
    assert rows.isnan().tolist() == [target[i] != 2 or i == 2 for i in range(9)]


def test_an_empty_batch_is_as_in_torch() -> None:
    empty, none = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert SF.old_new_contrast(empty, empty, none).isnan()
    assert SF.old_new_contrast(empty, empty, none, reduction="sum") == 0
    assert torch.autograd.grad(SF.old_new_contrast(empty, empty, none, reduction="sum"), empty)[0].shape == (0, 5)


def test_float16_gradients_survive_a_gradient_scaler() -> None:
    new, old = (features("normal", 4096, 8, dtype=torch.float16, seed=seed) for seed in (0, 1))
    target = torch.arange(4096)
    new.requires_grad_()
    (scaled,) = torch.autograd.grad(SF.old_new_contrast(new, old, target).float() * 4096, new)
    wide = new.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(by_reference(wide, old.double(), target) * 4096, wide)
    assert (scaled.double() - truth).abs().max() < 2e-3 * truth.abs().max()


@needs_library
def test_memory_is_below_a_tenth_of_the_matrix_of_scores() -> None:
    """Besides its results the operator allocates less than a tenth of a B x B matrix; a new process measures it."""
    code = """
import ctypes, torch, simplexfix.functional as SF
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))
torch.set_num_threads(1)
new, old = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
torch.autograd.grad(SF.old_new_contrast(new, old, torch.arange(64)), new)  # loads what a first call loads
new, old, target = torch.randn(8192, 64, requires_grad=True), torch.randn(8192, 64), torch.arange(8192)
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
torch.autograd.grad(SF.old_new_contrast(new, old, target), new)
print((status("VmHWM") - before) / 1024)
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux' /proc")
    here = Path(__file__).parent  # in the repository's folder Python would import the source, without the library
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    mebibytes = float(done.stdout) - 8192 * 64 * 4 / 2**20  # the gradient is a result
    assert mebibytes < 0.1 * 8192**2 * 4 / 2**20


@needs_library
@pytest.mark.parametrize("anchor", ["old", "new"])
def test_loss_and_gradient_are_the_same_on_any_number_of_threads(anchor: str, pytestconfig: pytest.Config) -> None:
    """1100 rows are several blocks of anchors and more than one chunk of candidates."""
    if pytestconfig.getoption("--emulated-cuda"):
        pytest.skip("a GPU's matrix products are torch's")
    new, old = (features("normal", 1100, 40, dtype=torch.float32, seed=seed) for seed in (0, 1))
    target = torch.randint(50, (1100,), generator=torch.Generator().manual_seed(0))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            options = {"anchor": anchor, "reduction": "none"}
            found.append(loss_and_gradient(SF.old_new_contrast, new, old, target, torch.ones(()), **options))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def contrast_of_a_rank(rank: int, size: int, port: int, unequal: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.set_num_threads(1)
    try:
        images, target = features("normal", 12, 9, dtype=torch.float64), torch.arange(12) % 5
        old = features("normal", 12, 7, dtype=torch.float64, seed=1)
        mine = slice(rank * 12 // size, (rank + 1) * 12 // size)
        if unequal:
            with pytest.raises(ValueError, match="batches of one shape"):
                SF.old_new_contrast(old[rank:], old[rank:], target[rank:], group=dist.group.WORLD)
            return
        for anchor in ("old", "new", "symmetric"):
            weight = features("normal", 7, 9, dtype=torch.float64, seed=2).requires_grad_()
            new = images[mine] @ weight.T
            loss = SF.old_new_contrast(new, old[mine], target[mine], anchor=anchor, group=dist.group.WORLD)
            (gradient,) = torch.autograd.grad(loss, weight)
            dist.all_reduce(gradient)
            everywhere = loss.detach().clone()
            dist.all_reduce(everywhere)
            whole = SF.old_new_contrast(images @ weight.T, old, target, anchor=anchor)
            torch.testing.assert_close(everywhere / size, whole.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradient / size, torch.autograd.grad(whole, weight)[0], rtol=1e-10, atol=1e-12)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("unequal", [False, True])
def test_gathered_batches_are_one_batch(unequal: bool) -> None:
    """Two processes have half of the rows each: their mean loss and gradient equal those of all rows in one."""
    run_ranks(contrast_of_a_rank, 2, free_port(), unequal)
