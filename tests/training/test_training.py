"""Tests batches, schedules, methods and versions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import simplexfix.functional as SF
from simplexfix import SlotRegistry
from simplexfix.data import RandomWarp
from simplexfix.methods import ER, HOC, Simplex
from simplexfix.models import EmbeddingModel, SmallConvNet
from simplexfix.training import Items, RowBatches, Schedule, Trainer


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (3, 10), (4, 4), (1, 1)])
def test_batches_contain_every_row_once_before_repeating(rows: int, size: int) -> None:
    batches = RowBatches(rows, size, seed=0)
    seen = torch.cat([next(batches) for _ in range(rows)])  # `size` whole rounds
    for start in range(0, rows * size, rows):
        assert sorted(seen[start : start + rows].tolist()) == list(range(rows))


def test_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = Schedule(100, 2.0, warmup=0.1)
    rates = [schedule.at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[-1] < 1e-3
    assert rates[50] == pytest.approx(1.0)


def test_bad_schedules_are_refused() -> None:
    for arguments, message in (((0, 1.0), "steps"), ((5, 0.0), "learning_rate"), ((5, 1.0, 8, 2.0), "warmup")):
        with pytest.raises(ValueError, match=message):
            Schedule(*arguments)
    assert Schedule(5, 1.0, warmup=0.0).at(0) == 1.0


def test_only_a_warp_of_zero_strength_keeps_images() -> None:
    images = (torch.rand(4, 28, 28) > 0.7).to(torch.uint8)
    still = RandomWarp(rotate=0, log_scale=0, shear=0, shift=0, elastic=0)
    torch.testing.assert_close(still(images, torch.Generator()), images.float()[:, None], atol=1e-4, rtol=0)
    warp = RandomWarp()
    first = warp(images, torch.Generator().manual_seed(1))
    assert first.shape == (4, 1, 28, 28)
    assert torch.equal(first, warp(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, warp(images, torch.Generator().manual_seed(2)))
    assert 0.5 < first.sum() / images.sum() < 2


def model_of(method, seed: int = 0) -> EmbeddingModel:
    torch.manual_seed(seed)
    model = EmbeddingModel(SmallConvNet(4, 16), method.head(16))
    method.add_classes(model, range(5))
    return model


def test_losses_equal_those_of_the_functional_module() -> None:
    slots = SlotRegistry(12)
    slots.add("elsewhere", range(3))  # so that slots and class ids differ
    images, target = torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 2, 3, 4, 0])
    for method in (Simplex(slots, "here"), HOC(slots, "here", mu=5.0, lambda_=0.3)):
        model, old = model_of(method), model_of(method, seed=1)
        z, in_slots = model(images), target + 3
        classify = SF.simplex_cross_entropy(z, in_slots)
        torch.testing.assert_close(method.loss(model, images, target, None), classify)
        expected = classify
        if isinstance(method, HOC):
            expected = SF.hoc_loss(z, old(images), in_slots, lambda_=0.3, mu=5.0)
        loss = method.loss(model, images, target, old)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert all(p.grad is None for p in old.parameters())


def test_er_adds_classes_and_keeps_their_old_weights() -> None:
    for scale in (None, 7.0):
        method = ER(scale=scale)
        model = model_of(method)
        images, target = torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 2, 3, 4, 0])
        features = model.backbone(images)
        classifier = model.head.classifier
        if scale is None:
            logits = features @ classifier.weight.T + classifier.bias
        else:
            logits = scale * F.normalize(features) @ F.normalize(classifier.weight).T
        torch.testing.assert_close(method.loss(model, images, target, None), F.cross_entropy(logits, target))
        before = classifier.weight.clone()
        method.add_classes(model, range(9))
        assert model.head.classifier.weight.shape == (9, 16)
        assert torch.equal(model.head.classifier.weight[:5], before)
        assert torch.equal(model.head.embed(features), features)


def test_training_changes_neither_the_parent_nor_the_global_generator() -> None:
    method = Simplex(SlotRegistry(8))
    parent = model_of(method)
    before = {name: value.clone() for name, value in parent.state_dict().items() if isinstance(value, torch.Tensor)}
    items = Items(torch.randint(2, (20, 28, 28)), torch.arange(20) % 5)
    state = torch.get_rng_state()
    steps = []
    version = Trainer(method, augment=RandomWarp()).fit(
        parent,
        items,
        Schedule(4, 1e-2, batch=8),
        classes=range(7),
        seed=0,
        memory=items,
        old=parent.eval(),
        on_step=steps.append,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert steps == [1, 2, 3, 4]
    for name, value in parent.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name])
    assert not torch.equal(version.head.junction.weight, parent.head.junction.weight)
    assert version.head.num_classes == 7
    assert parent.head.num_classes == 5
    assert not version.training


def test_training_lowers_the_loss() -> None:
    method = Simplex(SlotRegistry(8), normalize=True, scale=8.0)
    parent = model_of(method)
    images = torch.zeros(50, 28, 28)
    labels = torch.arange(50) % 5
    images[torch.arange(50), labels * 5] = 1.0  # a stroke whose height depends on the class
    items = Items(images, labels)
    warp = RandomWarp(rotate=0.05, log_scale=0.05, shear=0.05, shift=0.01, elastic=0.01)
    version = Trainer(method, augment=warp).fit(parent, items, Schedule(40, 1e-2, batch=25), classes=range(5), seed=0)
    _, classes = version.head.predict(version.backbone(images.unsqueeze(1)))
    assert (classes[:, 0] == labels).double().mean() > 0.9


def test_an_old_model_in_training_mode_is_refused() -> None:
    method = Simplex(SlotRegistry(8))
    items = Items(torch.zeros(4, 28, 28), torch.arange(4))
    with pytest.raises(ValueError, match="old is in training mode"):
        Trainer(method).fit(
            model_of(method),
            items,
            Schedule(1, 1e-3),
            classes=range(5),
            seed=0,
            old=model_of(Simplex(SlotRegistry(8))),
        )


def test_extract_normalises_and_keeps_the_training_mode() -> None:
    model = model_of(Simplex(SlotRegistry(8))).train()
    model.backbone.layers[2].eval()
    rows = model.extract(torch.rand(5, 1, 28, 28))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    assert model.training
    assert not model.backbone.layers[2].training
    assert not rows.requires_grad


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: RowBatches(0, 4, seed=0), "rows and size must be positive, got 0 and 4"),
        (lambda: SmallConvNet(0, 4), "width and out_features must be positive, got 0 and 4"),
        (
            lambda: SmallConvNet(4, 4)(torch.zeros(2, 1, 32, 32)),
            r"images must have shape \[B, 1, 28, 28\], got \[2, 1, 32, 32\]",
        ),
    ],
)
def test_bad_input(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_cosine_decay_is_finite_for_one_step() -> None:
    assert math.isfinite(Schedule(1, 1.0).at(0))
