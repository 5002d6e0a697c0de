"""Tests the contents of tasks, and that stopped sequences of versions resume."""

from __future__ import annotations

from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from torch import nn

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.methods import ASNN, BCT, ER, FD, HOC, Simplex
from simplexfix.models import EmbeddingModel
from simplexfix.training import (
    Items,
    Schedule,
    Trainer,
    class_incremental,
    class_order,
    dataset_sequence,
    herding_rows,
    instance_incremental,
    train_versions,
)

LABELS = torch.tensor([30, 7, 7, 2**40, 30, -5, 7, 2**40, -5, 30, 30, -5, 2**40])
ITEMS = Items(torch.arange(13.0).view(13, 1), LABELS)


def test_class_incremental_has_each_class_once_under_a_new_id() -> None:
    order = class_order(LABELS, seed=4)
    assert sorted(order.tolist()) == [-5, 7, 30, 2**40]
    tasks = class_incremental(ITEMS, (1, 2), seed=4)
    assert [task.classes for task in tasks] == [range(1), range(3)]
    for task, ids in zip(tasks, ([0], [1, 2]), strict=True):
        rows = task.items.inputs[:, 0].long()
        assert torch.equal(order[task.items.labels], LABELS[rows])
        assert sorted(rows.tolist()) == torch.isin(LABELS, order[ids]).nonzero()[:, 0].tolist()
    orders = {tuple(class_order(LABELS, seed=seed).tolist()) for seed in range(20)}
    assert len(orders) > 5


def test_instance_incremental_splits_every_class() -> None:
    tasks = instance_incremental(ITEMS, 3, seed=0)
    assert [task.classes for task in tasks] == [range(4)] * 3
    rows = torch.cat([task.items.inputs[:, 0] for task in tasks])
    assert sorted(rows.tolist()) == list(range(13))
    for task in tasks:
        assert set(torch.bincount(task.items.labels, minlength=4).tolist()) <= {1, 2}
        assert torch.equal(class_order(LABELS, seed=0)[task.items.labels], LABELS[task.items.inputs[:, 0].long()])


def test_dataset_sequence_keeps_classes_of_equal_ids_apart() -> None:
    tasks = dataset_sequence([ITEMS, ITEMS], seed=0)
    assert [task.classes for task in tasks] == [range(4), range(8)]
    assert torch.equal(tasks[1].items.labels, tasks[0].items.labels + 4)


STAGES = jobs.features(120, 8, 5)


def start() -> nn.Module:
    return jobs.network()


def wider(features: int = 24) -> nn.Module:
    layers = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, features))
    layers.out_features = features
    return layers


def remember(version: EmbeddingModel, items: Items, generator: np.random.Generator) -> torch.Tensor:
    drawn = torch.from_numpy(generator.permutation(len(items.labels)))
    return torch.cat([drawn[items.labels[drawn] == c][:3] for c in items.labels.unique()])


class Recorder(HOC):
    """HOC that records its old model."""

    def __init__(self) -> None:
        super().__init__(SlotRegistry(20), lambda_=0.5)
        self._old: list[EmbeddingModel | None] = []

    def loss(self, model, input, target, old):
        self._old.append(old)
        return super().loss(model, input, target, old)


def versions(method=None, folder: Path | None = None, **options) -> list[EmbeddingModel]:
    trainer = Trainer(method or Recorder(), augment=jobs.add_noise, save_every=2)
    return list(
        train_versions(
            trainer,
            class_incremental(STAGES, (4, 2, 2), seed=1),
            start,
            Schedule(5, 1e-2, batch=16),
            **{"seed": 2, "rehearsal": remember, "folder": folder, "replacements": {1: wider}, **options},
        )
    )


def test_a_replacement_of_another_width_keeps_slots_and_gets_a_new_junction() -> None:
    method = Recorder()
    first, second, third = versions(method, align="none")
    assert [v.head.junction.in_features for v in (first, second, third)] == [10, 24, 24]
    assert [v.head.num_classes for v in (first, second, third)] == [4, 6, 8]
    assert {v.extract(STAGES.inputs[:2]).shape[1] for v in (first, second, third)} == {19}
    ids = torch.arange(4)
    assert torch.equal(first.head.slots.lookup("default", ids), third.head.slots.lookup("default", ids))
    assert method._old == [None] * 5 + [first] * 5 + [second] * 5


def test_a_new_junction_does_not_depend_on_draws_of_the_replacement_function() -> None:
    """A function that trains draws random numbers on the first call; on the next one it only reads a file."""

    def drawing() -> nn.Module:
        made = wider()
        torch.rand(7)
        return made

    results = [versions(replacements={1: make})[1].head.junction.weight for make in (wider, drawing)]
    assert torch.equal(*results)


def test_the_reference_of_a_replacement_may_be_itself() -> None:
    method = Recorder()

    def pretrained() -> EmbeddingModel:
        torch.manual_seed(8)
        return EmbeddingModel(wider(), method.head(24))

    made = pretrained()
    result = versions(method, replacements={0: pretrained, 1: pretrained}, hoc_reference="replacement")
    for old in method._old[:10]:
        assert torch.equal(old.backbone[0].weight, made.backbone[0].weight)
        assert not old.training
    assert method._old[10:] == [result[1]] * 5
    assert not torch.equal(result[0].backbone[0].weight, made.backbone[0].weight)


def test_the_first_replacement_may_be_its_own_reference_and_others_have_the_deployed_one() -> None:
    method = Recorder()

    def pretrained() -> EmbeddingModel:
        torch.manual_seed(8)
        return EmbeddingModel(wider(), method.head(24))

    replacements = {0: pretrained, 1: wider}  # the second needs no trained head
    result = versions(method, replacements=replacements, hoc_reference="deployed_or_replacement", align="none")
    made = pretrained()
    assert all(torch.equal(old.backbone[0].weight, made.backbone[0].weight) for old in method._old[:5])
    assert method._old[5:] == [result[0]] * 5 + [result[1]] * 5
    with pytest.raises(ValueError, match='hoc_reference="deployed_or_replacement" needs a trained head'):
        versions(Recorder(), replacements={0: wider}, hoc_reference="deployed_or_replacement")


def unbiased() -> EmbeddingModel:
    return EmbeddingModel(wider(), SimplexHead.from_slots(SlotRegistry(20), 24))


def biased() -> EmbeddingModel:
    return EmbeddingModel(wider(), SimplexHead.from_slots(SlotRegistry(20), 24, bias=True))


@pytest.mark.parametrize(
    ("method", "options", "begun"),
    [
        (HOC(SlotRegistry(20)), {}, ("aligned", 0.1)),
        (HOC(SlotRegistry(20)), {"replacement_frozen": 0.5}, ("aligned", 0.5)),
        (HOC(SlotRegistry(20)), {"replacement_junction": "kept"}, ("kept", 0.0)),
        (HOC(SlotRegistry(20)), {"replacements": {1: biased}}, ("kept", 0.0)),
        (HOC(SlotRegistry(20)), {"rehearsal": None}, ("aligned", 0.1)),
        (HOC(SlotRegistry(20)), {"hoc_reference": "all"}, ("aligned", 0.1)),
        (HOC(SlotRegistry(20), classification=ASNN()), {}, ("kept", 0.0)),
        (HOC(SlotRegistry(20), classification=ASNN()), {"replacements": {1: unbiased}}, ("kept", 0.0)),
        (Simplex(SlotRegistry(20)), {}, ("kept", 0.0)),
        (ER(), {"replacements": {1: start}}, ("kept", 0.0)),
    ],
)
def test_how_a_replacement_begins_by_default(monkeypatch, method, options: dict, begun: tuple[str, float]) -> None:
    calls: list[dict] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, *a, **given: calls.append(given) or fit(self, *a, **given))
    versions(method, **options)
    got = [(call.get("junction", "kept"), call.get("frozen", 0.0)) for call in calls]
    assert got == [("kept", 0.0), begun, ("kept", 0.0)]


@pytest.mark.parametrize("trained", [True, False])
def test_the_default_reference_of_the_first_version(trained: bool) -> None:
    """A first replacement with a trained head is held to its initial state; later versions to the deployed one."""
    method = Recorder()

    def pretrained() -> EmbeddingModel:
        torch.manual_seed(8)
        return EmbeddingModel(wider(), method.head(24))

    result = versions(method, replacements={0: pretrained if trained else wider, 1: wider}, align="none")
    first, weight = method._old[:5], pretrained().backbone[0].weight
    assert all(torch.equal(old.backbone[0].weight, weight) for old in first) if trained else first == [None] * 5
    assert method._old[5:] == [result[0]] * 5 + [result[1]] * 5


def test_the_authors_reference_has_no_alignment(monkeypatch) -> None:
    """`hoc_reference="replacement"`, the authors' reference, has neither an aligned junction nor a rotation."""

    def pretrained() -> EmbeddingModel:
        return EmbeddingModel(wider(), method.head(24))

    method = HOC(SlotRegistry(20))
    begun: list[dict] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, *a, **given: begun.append(given) or fit(self, *a, **given))
    made = versions(method, replacements={1: pretrained}, hoc_reference="replacement")
    assert (begun[1]["junction"], begun[1]["frozen"]) == ("kept", 0.0)
    assert all(version.rotation is None for version in made)


@pytest.mark.parametrize("lazy", [False, True])
def test_bytes_without_preprocessing_are_refused_before_any_step(lazy: bool) -> None:
    """Items are embedded for the rotation without augmentation, so they need a preprocessing."""
    inputs = (STAGES.inputs * 10).to(torch.uint8)
    pairs = [(row, int(label)) for row, label in zip(inputs, STAGES.labels, strict=True)]
    items = Items.from_dataset(pairs, STAGES.labels) if lazy else Items(inputs, STAGES.labels)
    trainer = Trainer(HOC(SlotRegistry(20)), augment=lambda batch, generator: batch.float())
    run = (trainer, class_incremental(items, (4, 4), seed=1), start, Schedule(1, 1e-2, batch=16))
    with pytest.raises(ValueError, match=r"needs a preprocessing for uint8 items, .* pass Trainer\(preprocessing="):
        next(train_versions(*run, seed=0))
    assert len(list(train_versions(*run, seed=0, align="none"))) == 2
    alone = (trainer, class_incremental(items, (8,), seed=1), *run[2:])
    assert len(list(train_versions(*alone, seed=0))) == 1  # the first version has no rotation


def test_half_of_each_batch_is_remembered_items_of_earlier_classes() -> None:
    seen: list[list[int]] = []

    class Watch(ER):
        def loss(self, model, input, target, old):
            seen.append(target.tolist())
            return super().loss(model, input, target, old)

    versions(Watch(), replacements={})
    assert all(max(labels) < 4 for labels in seen[:5])
    for labels in seen[5:10]:
        assert [label < 4 for label in labels] == [False] * 8 + [True] * 8
    for labels in seen[10:]:
        assert [label < 6 for label in labels] == [False] * 8 + [True] * 8
    assert {label for labels in seen[10:] for label in labels[8:]} == set(range(6))


@pytest.mark.parametrize("after", [1, 4, 5, 6, 8, 11, 14])
def test_a_stopped_sequence_resumes_to_the_same_bits(tmp_path: Path, after: int) -> None:
    state = torch.get_rng_state()
    whole = versions()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(after)
    steps: list[int] = []

    def on_step(task: int, step: int) -> None:
        steps.append(task)
        if len(steps) == after:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        versions(folder=tmp_path, on_step=on_step)
    steps.clear()
    again = versions(folder=tmp_path, on_step=lambda task, step: steps.append(task))
    assert len(steps) == 15 - (after - after % 5) - after % 5 // 2 * 2
    for a, b in zip(whole, again, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("make", [BCT, FD, lambda: FD(distance="l2", scale=5.0)])
@pytest.mark.parametrize("after", [6, 12])
def test_versions_with_a_classifier_and_herding_resume_to_the_same_bits(tmp_path: Path, make, after: int) -> None:
    """The old classifier and the memory are read from files; the last task has a replacement."""

    def herd(version: EmbeddingModel, items: Items, generator: np.random.Generator) -> torch.Tensor:
        return herding_rows(version.extract(items.inputs), items.labels, 3)

    options = {"rehearsal": herd, "replacements": {2: start}}
    whole = versions(make(), **options)
    assert [version.head.num_classes for version in whole] == [4, 6, 8]
    steps: list[int] = []

    def on_step(task: int, step: int) -> None:
        steps.append(task)
        if len(steps) == after:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        versions(make(), folder=tmp_path, on_step=on_step, **options)
    again = versions(make(), folder=tmp_path, **options)
    for a, b in zip(whole, again, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)
    alone = versions(ER(scale=make().scale), **options)
    assert torch.equal(alone[0].backbone[0].weight, whole[0].backbone[0].weight)  # the first task has no old model
    assert not torch.equal(alone[1].backbone[0].weight, whole[1].backbone[0].weight)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: class_incremental(ITEMS, (2, 3), seed=0), r"a sum of at most 4, .* got \[2, 3\]"),
        (lambda: class_incremental(ITEMS, (0, 3), seed=0), r"counts must be one or more numbers of at least 1"),
        (lambda: instance_incremental(ITEMS, 4, seed=0), r"parts must lie in \[1, 3\].*got 4"),
        (lambda: dataset_sequence([], seed=0), "the same shape and dtype, got none"),
        (
            lambda: dataset_sequence([ITEMS, jobs.features(4, 2, 0)], seed=0),
            r"the same shape and dtype, got \[1\] torch.float32, \[12\] torch.float32",
        ),
        (lambda: versions(replacements={3: wider}), r"keys of replacements must be tasks 0 to 2, got \[3\]"),
        (
            lambda: versions(hoc_reference="old"),
            "hoc_reference must be one of 'all', 'deployed', 'deployed_or_replacement', 'replacement', got 'old'",
        ),
        (
            lambda: versions(hoc_reference="replacement"),
            r"needs a trained head, but replacements\[1\] returned a backbone",
        ),
        (lambda: versions(replacements={1: nn.ReLU}), "a backbone with an int attribute out_features, .* got ReLU"),
        (
            lambda: versions(replacements={1: lambda: EmbeddingModel(wider(), HOC(SlotRegistry(9)).head(24))}),
            "a replacement's embeddings must be 19 wide like those before, got 8",
        ),
        (lambda: versions(ER()), "a replacement's embeddings must be 10 wide like those before, got 24"),
    ],
)
def test_bad_input(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()
