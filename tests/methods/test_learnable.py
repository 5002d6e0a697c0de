"""Tests FD and BCT against their equations in float64, their gradients, and classes that the old model lacks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from simplexfix import SlotRegistry
from simplexfix.methods import BCT, ER, FD, Simplex
from simplexfix.models import EmbeddingModel, FeatureMLP, LinearHead

WIDTH = 6


def model_of(method, classes: int, *, inputs: int = 5, seed: int = 0) -> EmbeddingModel:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(inputs, WIDTH), nn.Tanh())
    model = EmbeddingModel(backbone, method.head(WIDTH))
    method.add_classes(model, range(classes))
    return model.double()


def batch(*labels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rows = torch.randn(len(labels), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows, torch.tensor(labels)


def naive_logits(model: EmbeddingModel, feature: Tensor) -> list[float]:
    head = model.head
    logits = []
    for weight, bias in zip(head.classifier.weight.tolist(), head.classifier.bias.tolist(), strict=True):
        dot = sum(w * f for w, f in zip(weight, feature.tolist(), strict=True))
        if head.scale is None:
            logits.append(dot + bias)
        else:
            logits.append(head.scale * dot / (math.hypot(*weight) * math.hypot(*feature.tolist())))
    return logits


def naive_cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[label]


@pytest.mark.parametrize("scale", [None, 7.0])
@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_feature_distillation_equals_its_equation(distance: str, scale: float | None) -> None:
    method = FD(weight=2.5, distance=distance, scale=scale)
    model, old = model_of(method, 5), model_of(method, 3, seed=1)
    rows, target = batch(0, 4, 2, 2, 3)
    expected = 0.0
    for h, u, y in zip(model.backbone(rows), old.backbone(rows), target.tolist(), strict=True):
        if distance == "l2":
            apart = sum((a - b) ** 2 for a, b in zip(h.tolist(), u.tolist(), strict=True))
        else:
            apart = 1 - (h @ u).item() / (math.hypot(*h.tolist()) * math.hypot(*u.tolist()))
        expected += (naive_cross_entropy(naive_logits(model, h), y) + 2.5 * apart) / 5
    assert method.loss(model, rows, target, old).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [None, 7.0])
def test_influence_equals_its_equation_over_the_classes_of_the_old_classifier(scale: float | None) -> None:
    method = BCT(weight=1.5, scale=scale)
    model, old = model_of(method, 5), model_of(BCT(scale=3.0), 3, seed=1)  # the old scale differs
    rows, target = batch(0, 4, 2, 2, 3)
    expected = 0.0
    for h, y in zip(model.backbone(rows), target.tolist(), strict=True):
        expected += naive_cross_entropy(naive_logits(model, h), y) / 5
        if y < 3:
            expected += 1.5 * naive_cross_entropy(naive_logits(old, h), y) / 3
    assert method.loss(model, rows, target, old).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", [FD(), FD(distance="l2"), BCT(), BCT(scale=5.0)])
def test_gradients_are_right_and_reach_the_new_model_alone(method) -> None:
    model, old = model_of(method, 5), model_of(method, 3, seed=1)
    rows, target = batch(0, 4, 2, 1)
    trained = [p.requires_grad for p in old.parameters()]
    method.loss(model, rows, target, old).backward()
    assert all(p.grad is None for p in old.parameters())
    assert [p.requires_grad for p in old.parameters()] == trained  # requires_grad of the caller's model is unchanged
    # a trained parameter without a gradient would block DistributedDataParallel
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for p in model.parameters():
        direction = torch.randn_like(p)
        step, slopes = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * step)
                slopes.append(method.loss(model, rows, target, old).item())
                p.sub_(direction, alpha=sign * step)
        found = 0.0 if p.grad is None else float((p.grad * direction).sum())
        assert (slopes[0] - slopes[1]) / (2 * step) == pytest.approx(found, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("scale", [None, 5.0])
@pytest.mark.parametrize("known", [0, 3])
def test_a_batch_of_classes_that_the_old_classifier_lacks_has_no_influence(known: int, scale: float | None) -> None:
    method = BCT(scale=scale)
    model, old = model_of(method, 5), model_of(method, known, seed=1)
    rows, target = batch(3, 4, 4)
    gradients = []
    for loss in (method.loss(model, rows, target, old), method.loss(model, rows, target, None)):
        model.zero_grad()
        loss.backward()
        gradients.append((loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]))
    for with_old, without in zip(*gradients, strict=True):
        assert torch.equal(with_old, without)
        assert with_old.isfinite().all()


@pytest.mark.parametrize("scale", [None, 7.0])
def test_influence_of_a_rotated_old_model_is_that_of_its_rotated_classifier(scale: float | None) -> None:
    """The gallery holds h R.  The classifier of such rows is W R, because (h R) (W R)^T = h W^T."""
    method = BCT(scale=scale)
    model, old, same = model_of(method, 5), model_of(method, 3, seed=1), model_of(method, 3, seed=1)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]
    old.rotation = turn
    with torch.no_grad():
        same.head.classifier.weight.copy_(old.head.classifier.weight @ turn)
    rows, target = batch(0, 4, 2, 2, 3)
    torch.testing.assert_close(method.loss(model, rows, target, old), method.loss(model, rows, target, same))


def test_an_old_classifier_of_fewer_classes_trains_a_replacement() -> None:
    """The new head has more classes and another initialisation than the deployed one, which does not change."""
    method = BCT()
    deployed = model_of(method, 4)
    torch.manual_seed(3)
    replacement = EmbeddingModel(FeatureMLP(5, (9, WIDTH)), method.head(WIDTH)).double()
    method.add_classes(replacement, range(7))
    rows, target = batch(0, 3, 6, 5)
    before = [p.clone() for p in deployed.parameters()]
    losses = []
    optimizer = torch.optim.SGD(replacement.parameters(), lr=0.3)
    for _ in range(200):
        loss = method.loss(replacement, rows, target, deployed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(p, q) for p, q in zip(deployed.parameters(), before, strict=True))
    right = deployed.head(replacement.backbone(rows))[:2].argmax(1)
    assert right.tolist() == [0, 3]  # the old classifier on new features


@pytest.mark.parametrize("method", [FD(), FD(distance="l2"), BCT()])
def test_without_an_old_model_it_is_experience_replay(method) -> None:
    model = model_of(method, 4)
    rows, target = batch(0, 3, 1)
    assert torch.equal(method.loss(model, rows, target, None), ER().loss(model, rows, target, None))


def test_zero_features_have_a_finite_loss_and_equal_ones_have_none() -> None:
    rows, target = torch.zeros(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2])
    for distance in ("cosine", "l2"):
        method = FD(distance=distance, weight=3.0)
        model = model_of(method, 3)
        model.backbone[0].bias.data.zero_()
        assert not model(rows).any()
        loss = method.loss(model, rows, target, model)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        rows_of_some, target_of_some = batch(0, 1, 2)
        same = method.loss(model, rows_of_some, target_of_some, model)
        assert same.item() == pytest.approx(ER().loss(model, rows_of_some, target_of_some, None).item(), abs=1e-15)


def test_distances_are_of_float32_under_autocast() -> None:
    """A sum of 512 squares in bfloat16 would lose most of its bits."""
    method = FD(distance="l2", weight=1.0)
    torch.manual_seed(0)
    model = EmbeddingModel(nn.Linear(64, 512, bias=False), method.head(512))
    method.add_classes(model, range(2))
    old = EmbeddingModel(nn.Linear(64, 512, bias=False), method.head(512))
    rows, target = torch.randn(4, 64), torch.tensor([0, 1, 0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        new, reference = model.backbone(rows), old.backbone(rows)
        assert new.dtype == torch.bfloat16
        found = method.loss(model, rows, target, old) - method.loss(model, rows, target, None)
    truth = (new.double() - reference.double()).square().sum(1).mean()
    assert found.item() == pytest.approx(truth.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: FD(distance="l1"), ValueError, r"distance must be one of 'cosine', 'l2', got 'l1'"),
        (lambda: FD(weight=0.0), ValueError, "weight must be positive and finite, got 0.0"),
        (lambda: BCT(weight=-1.0), ValueError, "weight must be positive and finite, got -1.0"),
        (
            lambda: FD().loss(model_of(FD(), 3), *batch(0, 1), wider()),
            ValueError,
            r"new and old must have the same shape, got \[2, 6\] and \[2, 8\]",
        ),
        (
            lambda: BCT().loss(model_of(BCT(), 3), *batch(0, 1), wider()),
            ValueError,
            "old's classifier must take features as wide as the new ones, 6, got 8",
        ),
        (
            lambda: BCT().loss(model_of(BCT(), 3), *batch(0, 1), model_of(Simplex(SlotRegistry(8)), 3)),
            TypeError,
            "old must have a LinearHead, which ER, FD and BCT train, got SimplexHead",
        ),
    ],
)
def test_bad_input(act, error, message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def wider() -> EmbeddingModel:
    method = ER()
    model = EmbeddingModel(nn.Linear(5, 8), method.head(8))
    method.add_classes(model, range(3))
    return model.double()


@pytest.mark.parametrize("classes", [0, 3])
def test_a_learnable_head_refuses_labels_without_a_class(classes: int) -> None:
    """A head without classes refuses them too: it has one row, so label 0 would pass."""
    head = LinearHead(5)
    head.grow(classes)
    known = r"labels of 3 classes lie in \[0, 2\]" if classes else "there are no classes yet"
    with pytest.raises(ValueError, match=rf"target row 1 has label {classes}, but {known}; head.grow"):
        head.loss(torch.randn(3, 5), torch.tensor([-100, classes, -100]))
    with pytest.raises(ValueError, match="target row 0 has label -1, but"):
        head.loss(torch.randn(2, 5), torch.tensor([-1, -100]))
    if classes:
        assert head.loss(torch.randn(3, 5), torch.tensor([-100, classes - 1, 0])).isfinite()
