"""Old/new contrast and HOC against loops written from method.md, section 3."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import DTYPES, assert_accurate, features

import simplexfix.functional as SF

FORMS = ("zero_mask", "remove", "infonce")
TARGETS = torch.tensor([3, 3, 7, 2**40, 3, 7, -5])  # classes of three, two and one


def by_loop(new, old, target, *, mu=10.0, negatives="zero_mask", anchor="old"):
    """Row by row, in Python floats."""
    u, v = old.double(), new.double()
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    if anchor == "symmetric":
        pair = [by_loop(new, old, target, mu=mu, negatives=negatives, anchor=a) for a in ("old", "new")]
        return (pair[0] + pair[1]) / 2
    rows = []
    for i in range(len(target)):
        # anchors are old features and the sum runs over new ones, or the other way round
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
    """No negatives at all: never -inf or nan, and a gradient that is finite too."""
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
def test_hoc_is_the_mixture(reduction: str) -> None:
    z, old = (features("normal", 7, 5, dtype=torch.float64, seed=seed) for seed in (0, 1))
    target = torch.tensor([0, 0, 5, 1, 0, 5, 2])
    loss = SF.hoc_loss(z, old, target, lambda_=0.3, mu=7.0, reduction=reduction)
    rows = 0.3 * SF.simplex_cross_entropy(z, target, reduction="none") + 0.7 * by_loop(z, old, target, mu=7.0)
    expected = {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
