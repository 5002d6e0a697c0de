"""Tests versions that are rotated towards all older ones in closed form after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch.nn.functional import normalize

from simplexfix import SlotRegistry
from simplexfix.methods import ASNN, FD, HOC
from simplexfix.models import EmbeddingModel, NeighbourHead
from simplexfix.training import (
    Items,
    Schedule,
    Trainer,
    aligned_with_older,
    class_incremental,
    random_rows,
    read_state,
    train_versions,
)

STAGES = jobs.features(120, 8, 5)
NEW, REMEMBERED = jobs.features(50, 8, 1), jobs.features(18, 4, 2)
TASKS = class_incremental(STAGES, (4, 2, 2), seed=1)


def models(width: int, count: int = 3) -> list[EmbeddingModel]:
    torch.manual_seed(0)
    return [EmbeddingModel(jobs.network(), NeighbourHead(10, width, queue=4)).eval() for _ in range(count)]


@pytest.mark.parametrize("width", [6, 19])
def test_a_version_is_turned_by_the_isometry_nearest_to_the_older_ones(width: int) -> None:
    """The isometry is SciPy's in all dimensions; similarities within the version, and the given version, stay."""
    *older, version = models(width)
    before = version.head.junction.weight.detach().clone()
    version.head.queue.add(torch.ones(4, width), torch.zeros(4, dtype=torch.int64))
    made = aligned_with_older(version, older, NEW, REMEMBERED)
    assert (made.head.queue.labels == -1).all()  # its rows were embedded before the turn
    rows, targets = [], []
    for part in (NEW, REMEMBERED):
        root = len(part.labels) ** -0.5  # both parts have the same weight
        rows.append(root * version.extract(part.inputs).double())
        targets.append(root * normalize(sum(model.extract(part.inputs) for model in older)).double())
    own, target = torch.cat(rows), torch.cat(targets)
    turn = torch.from_numpy(orthogonal_procrustes(own.numpy(), target.numpy())[0])
    z = made.extract(NEW.inputs)
    torch.testing.assert_close(z.double(), version.extract(NEW.inputs).double() @ turn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z @ z.T, version.extract(NEW.inputs) @ version.extract(NEW.inputs).T)
    assert torch.equal(version.head.junction.weight, before)


def test_stored_embeddings_stand_for_the_older_versions() -> None:
    """Stored embeddings are used for the first versions; the others embed the items."""
    *older, version = models(19)
    expected = aligned_with_older(version, older, NEW, REMEMBERED).head.junction.weight
    stored = replace(REMEMBERED, references=older[0].extract(REMEMBERED.inputs)[:, None])
    torch.testing.assert_close(aligned_with_older(version, older, NEW, stored).head.junction.weight, expected)
    wrong = replace(stored, references=-stored.references)
    assert (aligned_with_older(version, older, NEW, wrong).head.junction.weight - expected).abs().max() > 1e-3


def sequence(folder: Path | None = None, on_step=lambda task, step: None, **options) -> list[EmbeddingModel]:
    method = options.pop("method", None) or HOC(SlotRegistry(20), lambda_=0.5, classification=ASNN(queue=32))
    return list(
        train_versions(
            Trainer(method, save_every=2),
            TASKS,
            jobs.network,
            Schedule(6, 1e-2, batch=16),
            seed=2,
            rehearsal=lambda version, items, generator: random_rows(items.labels, 3, generator),
            folder=folder,
            on_step=on_step,
            **{"align": "older", "replacements": {1: jobs.network}, **options},
        )
    )


def same(some: list[EmbeddingModel], others: list[EmbeddingModel]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(
        torch.equal(x, y)
        for a, b in pairs
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("reference", ["all", "deployed"])
def test_the_deployed_version_is_the_turned_one(tmp_path: Path, reference: str) -> None:
    """The turned version is deployed: it is returned, it is the next parent, and stored embeddings are by it."""
    made = sequence(tmp_path, hoc_reference=reference)
    parts: list[list[Items]] = [[TASKS[1].items], [TASKS[2].items]]
    for t in (0, 1):
        state = read_state(tmp_path / f"task-0{t}" / "memory.safetensors")
        parts[t].append(Items(state["inputs"], state["labels"]))
        if reference == "all":
            expected = torch.stack([version.extract(state["inputs"]) for version in made[: t + 1]], 1)
            torch.testing.assert_close(state["references"], expected)
    for t in (1, 2):
        assert (made[t].head.queue.labels == -1).all()
        again = aligned_with_older(made[t], made[:t], *parts[t - 1])  # the alignment changes nothing more
        torch.testing.assert_close(again.extract(NEW.inputs), made[t].extract(NEW.inputs), rtol=0, atol=1e-5)
    trained = read_state(tmp_path / "task-01" / "version.safetensors")["model"]["head.junction.weight"]
    assert (trained - made[1].head.junction.weight).abs().max() > 1e-3


@pytest.mark.parametrize("moment", ["step 9", "step 12", "turning", "turned"])
def test_a_stopped_sequence_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch, moment: str) -> None:
    """The sequence stops in a task, at its end, during an alignment, and after it."""
    whole = sequence()
    steps = []

    def on_step(task: int, step: int) -> None:
        steps.append(step)
        if moment == f"step {len(steps)}" or (moment == "turned" and len(steps) == 13):
            raise InterruptedError

    def stop(*arguments, **options):
        raise InterruptedError

    with monkeypatch.context() as patch:
        if moment == "turning":
            patch.setattr("simplexfix.training.scenario.aligned_with_older", stop)
        with pytest.raises(InterruptedError):
            sequence(tmp_path, on_step)
    assert (tmp_path / "task-01" / "aligned.safetensors").exists() == (moment == "turned")
    assert same(whole, sequence(tmp_path))
    monkeypatch.setattr("simplexfix.training.scenario.aligned_with_older", None)
    assert same(whole, sequence(tmp_path))  # a finished alignment is read


def test_a_folder_of_turned_versions_is_refused_without(tmp_path: Path) -> None:
    sequence(tmp_path)
    with pytest.raises(ValueError, match="align: was 'older', is 'none'"):
        sequence(tmp_path, align="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": "newer"}, "align must be one of 'none', 'older', got 'newer'"),
        (
            {"method": HOC(SlotRegistry(20))},
            'align="older" turns embeddings away from .* got simplexfix.methods.hoc.HOC',
        ),
        ({"method": FD(classification=ASNN())}, "is of HOC with a classification by neighbours, got .*FD"),
    ],
)
def test_methods_whose_classifier_stands_still_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence(**options)


def test_what_cannot_be_turned_is_refused() -> None:
    first, version = models(19, 2)
    simplex = EmbeddingModel(jobs.network(), HOC(SlotRegistry(20)).head(10))
    with pytest.raises(TypeError, match=r"must have a NeighbourHead with a junction, .* got SimplexHead"):
        aligned_with_older(simplex, [first], NEW)
    with pytest.raises(ValueError, match=r"as wide as version's, 19, got widths \[\]"):
        aligned_with_older(version, [], NEW)
    with pytest.raises(ValueError, match=r"as wide as version's, 19, got widths \[19, 6\]"):
        aligned_with_older(version, [first, *models(6, 1)], NEW)
    with pytest.raises(ValueError, match="parts must hold items that all versions embed, got none"):
        aligned_with_older(version, [first])
