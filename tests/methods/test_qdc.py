"""Tests QDC: its equation against a loop in float64, its gradients, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from simplexfix.methods import QDC, info_nce
from simplexfix.models import EmbeddingModel

WIDTH = 4


def model_of(seed: int, width: int = WIDTH) -> EmbeddingModel:
    torch.manual_seed(seed)
    return EmbeddingModel(nn.Sequential(nn.Linear(5, width), nn.Tanh()), QDC().head(width)).double()


def batch(rows: int, negatives: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 2 + negatives, 5, dtype=torch.float64, generator=generator), torch.arange(rows)


def unit(rows: Tensor) -> list[list[float]]:
    return [[value / math.hypot(*row) for value in row] for row in rows.tolist()]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def naive_info_nce(queries: list[list[float]], documents: list[list[float]], scale: float) -> float:
    each, total = len(documents) // len(queries), 0.0
    for i, query in enumerate(queries):
        scores = [scale * dot(query, document) for document in documents]
        total += math.log(sum(map(math.exp, scores))) - scores[i * each]
    return total / len(queries)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_is_its_equation(weight: float, negatives: int) -> None:
    method, model, old = QDC(weight=weight, scale=6.0), model_of(0), model_of(1)
    input, target = batch(5, negatives)
    queries, documents = input[:, 0], input[:, 1:].flatten(0, 1)
    expected = naive_info_nce(unit(model(queries)), unit(model(documents)), 6.0)
    assert method.loss(model, input, target, None).item() == pytest.approx(expected, rel=1e-12)
    for rows in (queries, documents):
        pairs = zip(unit(model(rows)), unit(old(rows)), strict=True)
        expected += weight * sum(1 - dot(new, before) for new, before in pairs) / len(rows)
    assert method.loss(model, input, target, old).item() == pytest.approx(expected, rel=1e-12)


def test_gradients_are_right_and_reach_the_new_encoder_alone() -> None:
    method, model, old = QDC(scale=5.0), model_of(0), model_of(1)
    input, target = batch(3, 1)
    names = [name for name, _ in model.named_parameters()]

    def loss(*weights: Tensor) -> Tensor:
        class Given:
            def __call__(self, rows: Tensor) -> Tensor:
                return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (rows,))

        return method.loss(Given(), input, target, old)

    assert torch.autograd.gradcheck(loss, [p.detach().clone().requires_grad_() for p in model.parameters()])
    method.loss(model, input, target, old).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(p.grad is None for p in old.parameters())


def test_without_weight_the_old_encoder_is_not_run() -> None:
    def fails(rows: Tensor) -> Tensor:
        raise AssertionError("the old encoder was run")

    input, target = batch(3, 1)
    model = model_of(0)
    assert torch.equal(QDC(weight=0.0).loss(model, input, target, fails), QDC().loss(model, input, target, None))


def test_under_autocast_the_loss_is_of_float32() -> None:
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert info_nce(rows, rows).dtype == torch.float32
    near = 1 + rows.float() / 16  # logits that differ by less than one step of bfloat16
    exact = info_nce(near.double(), near.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(near, near).item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: QDC(weight=-1.0), ValueError, r"weight must be 0 or more and finite, got -1\.0"),
        (lambda: QDC(weight=math.inf), ValueError, "weight must be 0 or more and finite, got inf"),
        (lambda: QDC(scale=0.0), ValueError, r"scale must be positive and finite, got 0\.0"),
        (
            lambda: QDC().loss(model_of(0), torch.zeros(3, 5), torch.arange(3), None),
            ValueError,
            r"input must be \[B, 2 \+ n, \.\.\.\], a query, its positive document and n hard negatives .*got \[3, 5\]",
        ),
        (
            lambda: info_nce(torch.zeros(3, 4), torch.zeros(4, 4)),
            ValueError,
            r"document must be \[B n, d\] for query \[B, d\], B and n at least 1, got \[4, 4\] for \[3, 4\]",
        ),
        (
            lambda: QDC().loss(model_of(0), *batch(3, 0), model_of(1, 3)),
            ValueError,
            r"new and old must have the same shape, got \[3, 4\] and \[3, 3\]",
        ),
    ],
)
def test_bad_input(act, error, message: str) -> None:
    with pytest.raises(error, match=message):
        act()
