"""Tests the rotation, in closed form after a training, of a version's embeddings to those of all older versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch.nn.functional import normalize

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.methods import ASNN, ER, HOC, OCA
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
from simplexfix.training.old_model import OldModel, class_means, denoised

STAGES = jobs.features(120, 8, 5)
NEW, REMEMBERED = jobs.features(50, 8, 1), jobs.features(18, 4, 2)
TASKS = class_incremental(STAGES, (4, 2, 2), seed=1)


def models(width: int, count: int = 3) -> list[EmbeddingModel]:
    torch.manual_seed(0)
    return [EmbeddingModel(jobs.network(), NeighbourHead(10, width, queue=4)).eval() for _ in range(count)]


@pytest.mark.parametrize("width", [6, 19])
@pytest.mark.parametrize("kind", ["neighbours", "simplex", "bias"])
def test_a_version_is_rotated_by_the_isometry_nearest_to_the_older_ones(width: int, kind: str) -> None:
    """The rotation equals SciPy's solution in all dimensions; similarities within the version do not change."""
    *older, version = models(width)
    if kind != "neighbours":
        version.head = SimplexHead(10, width + 1, bias=kind == "bias")
        torch.nn.init.normal_(version.head.junction.weight)
    older[1].rotation = torch.linalg.qr(torch.randn(width, width))[0]
    made = aligned_with_older(version, older, NEW, REMEMBERED)
    rows, targets = [], []
    for part in (NEW, REMEMBERED):
        root = len(part.labels) ** -0.5  # both parts have the same weight
        rows.append(root * version.extract(part.inputs).double())
        targets.append(root * normalize(sum(model.extract(part.inputs) for model in older)).double())
    own, target = torch.cat(rows), torch.cat(targets)
    turn = torch.from_numpy(orthogonal_procrustes(own.numpy(), target.numpy())[0])
    z, before = made.extract(NEW.inputs), version.extract(NEW.inputs)
    torch.testing.assert_close(z.double(), before.double() @ turn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z @ z.T, before @ before.T, rtol=1e-4, atol=1e-5)
    assert version.rotation is None
    assert made.head is version.head
    again = aligned_with_older(made, older, NEW, REMEMBERED)  # its own rotation is replaced
    torch.testing.assert_close(again.rotation, made.rotation)


def test_stored_embeddings_replace_those_of_older_versions() -> None:
    """Embeddings by the first versions may be stored, without rotations; the other versions embed the items."""
    *older, version = models(19)
    stored = replace(REMEMBERED, references=older[0].extract(REMEMBERED.inputs)[:, None])
    older[0].rotation = torch.linalg.qr(torch.randn(19, 19))[0]
    expected = aligned_with_older(version, older, NEW, REMEMBERED).rotation
    torch.testing.assert_close(aligned_with_older(version, older, NEW, stored).rotation, expected)
    wrong = replace(stored, references=-stored.references)
    assert (aligned_with_older(version, older, NEW, wrong).rotation - expected).abs().max() > 1e-3


def test_a_rotated_version_is_saved_and_loaded(tmp_path: Path) -> None:
    *older, version = models(6)
    made = aligned_with_older(version, older, NEW)
    custom = {"backbone": jobs.network()}
    identity = made.save_pretrained(tmp_path)
    loaded = EmbeddingModel.from_pretrained(tmp_path, **custom)
    assert torch.equal(loaded.extract(NEW.inputs), made.extract(NEW.inputs))
    assert loaded.identity() == identity != version.identity()
    transposed = EmbeddingModel(version.backbone, version.head, rotation=made.rotation.T.contiguous().T)  # column-major
    assert torch.equal(transposed.eval().extract(NEW.inputs), made.extract(NEW.inputs))
    with pytest.raises(ValueError, match=r"rotation must have shape \[6, 6\], got \[6, 5\]"):
        EmbeddingModel(version.backbone, version.head, rotation=torch.zeros(6, 5))
    with pytest.raises(ValueError, match="rotation needs a known width: give the head an attribute embedding_dim"):
        EmbeddingModel(torch.nn.Flatten(), torch.nn.Identity(), rotation=torch.eye(6))


def test_old_embeddings_of_a_rotated_version_are_rotated() -> None:
    """Rows and the class means that they move towards are rotated."""
    deployed = models(6, 1)[0]
    deployed.rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    rows = deployed.extract(NEW.inputs)
    means = class_means(rows, NEW.labels, 8)
    held = OldModel(deployed, 0.5, means)
    held.set_batch(NEW.labels, None)
    torch.testing.assert_close(held(NEW.inputs), denoised(rows, NEW.labels, means, 0.5))


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
            **{"replacements": {1: jobs.network}, **options},
        )
    )


def equal_weights(some: list[EmbeddingModel], others: list[EmbeddingModel]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(
        torch.equal(x, y)
        for a, b in pairs
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("reference", ["all", "deployed"])
def test_the_deployed_version_is_the_rotated_one(tmp_path: Path, reference: str) -> None:
    """Training does not depend on rotations: it uses versions and stored embeddings without them."""
    made = sequence(tmp_path / "older", hoc_reference=reference)
    plain = sequence(tmp_path / "none", hoc_reference=reference, align="none")
    assert all(version.rotation is None for version in (made[0], *plain))
    for t in (0, 1):
        files = [read_state(tmp_path / name / f"task-0{t}/memory.safetensors") for name in ("older", "none")]
        assert torch.equal(files[0]["inputs"], files[1]["inputs"])
        assert ("references" in files[0]) == (reference == "all")
        if reference == "all":
            assert torch.equal(files[0]["references"], files[1]["references"])
    for t in (1, 2):
        assert equal_weights([EmbeddingModel(made[t].backbone, made[t].head)], [plain[t]])
        state = read_state(tmp_path / f"older/task-0{t - 1}/memory.safetensors")
        parts = TASKS[t].items, Items(state["inputs"], state["labels"])
        expected = aligned_with_older(plain[t], made[:t], *parts)
        torch.testing.assert_close(made[t].rotation, expected.rotation, rtol=0, atol=1e-5)
        assert (made[t].extract(NEW.inputs) - plain[t].extract(NEW.inputs)).abs().max() > 1e-3


def test_a_version_does_not_inherit_the_rotation_of_its_parent() -> None:
    first, second = sequence()[:2]
    schedule = Schedule(2, 1e-2, batch=16)
    trainer = Trainer(HOC(SlotRegistry(20), classification=ASNN(queue=32)))
    made = trainer.fit(second, TASKS[1].items, schedule, classes=TASKS[1].classes, seed=1, old=first)
    assert second.rotation is not None
    assert made.rotation is None


@pytest.mark.parametrize("moment", ["step 9", "step 12", "rotating", "rotated"])
def test_a_stopped_sequence_resumes_to_the_same_bits(tmp_path: Path, monkeypatch, moment: str) -> None:
    """It is stopped in a task, at its end, in the middle of a rotation, and after it."""
    whole = sequence()
    steps = []

    def on_step(task: int, step: int) -> None:
        steps.append(step)
        if moment == f"step {len(steps)}" or (moment == "rotated" and len(steps) == 13):
            raise InterruptedError

    def stop(*arguments, **options):
        raise InterruptedError

    with monkeypatch.context() as patch:
        if moment == "rotating":
            patch.setattr("simplexfix.training.scenario.aligned_with_older", stop)
        with pytest.raises(InterruptedError):
            sequence(tmp_path, on_step)
    assert (tmp_path / "task-01" / "rotation.safetensors").exists() == (moment == "rotated")
    assert equal_weights(whole, sequence(tmp_path))
    monkeypatch.setattr("simplexfix.training.scenario.aligned_with_older", None)
    assert equal_weights(whole, sequence(tmp_path))  # a finished alignment is read


def test_a_folder_of_rotated_versions_is_refused_with_align_none(tmp_path: Path) -> None:
    sequence(tmp_path)
    with pytest.raises(ValueError, match="align: was 'older', is 'none'"):
        sequence(tmp_path, align="none")


@pytest.mark.parametrize(
    ("method", "options", "rotated"),
    [
        (HOC(SlotRegistry(20)), {}, True),
        (HOC(SlotRegistry(20)), {"hoc_reference": "deployed"}, True),
        (HOC(SlotRegistry(20)), {"hoc_reference": "replacement"}, False),
        (ER(), {}, False),
        (ER(), {"align": "older"}, True),
    ],
)
def test_versions_are_rotated_depending_on_method_and_reference(method, options: dict, rotated: bool) -> None:
    if "hoc_reference" in options:
        options = {"replacements": {}, **options}
    made = sequence(method=method, **options)
    assert [version.rotation is not None for version in made] == [False, rotated, rotated]


def test_versions_that_cannot_be_rotated_are_refused() -> None:
    first, version = models(19, 2)
    with pytest.raises(ValueError, match="align must be one of 'none', 'older', got 'newer'"):
        sequence(align="newer")
    with pytest.raises(TypeError, match="version has prefixes of 128 dimensions for older galleries"):
        sequence(method=OCA(), align="older", replacements={})
    with pytest.raises(ValueError, match=r"as wide as version's, 19, got widths \[\]"):
        aligned_with_older(version, [], NEW)
    with pytest.raises(ValueError, match=r"as wide as version's, 19, got widths \[19, 6\]"):
        aligned_with_older(version, [first, *models(6, 1)], NEW)
    with pytest.raises(ValueError, match="parts must hold at least one item, got none"):
        aligned_with_older(version, [first])
