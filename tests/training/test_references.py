"""Tests `hoc_reference="all"`: the loss ties remembered items to their embeddings by all older versions."""

from __future__ import annotations

from pathlib import Path

import jobs
import pytest
import torch
from torch import nn

from simplexfix import SlotRegistry
from simplexfix.methods import FD, HOC, OCA
from simplexfix.models import EmbeddingModel
from simplexfix.training import (
    Items,
    Schedule,
    Trainer,
    class_incremental,
    instance_incremental,
    random_rows,
    train_versions,
)
from simplexfix.training.checkpoint import read_state

STAGES = jobs.features(120, 8, 5)


def remember(version: EmbeddingModel, items: Items, generator) -> torch.Tensor:
    return random_rows(items.labels, 3, generator)


class Watch(HOC):
    """HOC that records the old embeddings of each batch."""

    def __init__(self) -> None:
        super().__init__(SlotRegistry(20), lambda_=0.5)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(self, model, input, target, old):
        if old is not None:
            self._seen.append((input, old(input).detach()))
        return super().loss(model, input, target, old)


def network() -> nn.Module:
    return jobs.network(dropout=0.0)


def sequence(method=None, folder: Path | None = None, tasks=None, on_step=lambda task, step: None, **options):
    trainer = Trainer(method or Watch(), save_every=2)
    return list(
        train_versions(
            trainer,
            tasks or class_incremental(STAGES, (4, 2, 2), seed=1),
            network,
            Schedule(8, 1e-2, batch=16),
            **{"seed": 2, "rehearsal": remember, "folder": folder, "hoc_reference": "all", "align": "none", **options},
            on_step=on_step,
        )
    )


def test_remembered_items_are_tied_to_every_older_version_and_new_ones_to_the_deployed_one() -> None:
    method = Watch()
    made = sequence(method)
    assert len(method._seen) == 16  # the first task has no older version
    used = set()
    for step, (input, held) in enumerate(method._seen):
        older = made[: 1 + step // 8]
        torch.testing.assert_close(held[:8], older[-1](input[:8]))
        same = [t for t, v in enumerate(older) if torch.allclose(held[8:], v.extract(input[8:]), atol=1e-6)]
        assert len(same) == 1  # one version for the whole batch
        used.add((len(older), same[0]))
    assert used == {(1, 0), (2, 0), (2, 1)}


@pytest.mark.parametrize("reference", ["all", "deployed"])
def test_embeddings_may_be_drawn_to_their_class_means(reference: str) -> None:
    """Each mean is over new and remembered items, embedded by the version whose embedding moves."""
    method = Watch()
    tasks = class_incremental(STAGES, (4, 2, 2), seed=1)
    memories: list[Items] = []

    def remember(version: EmbeddingModel, items: Items, generator) -> torch.Tensor:
        rows = random_rows(items.labels, 3, generator)
        memories.append(items.take(rows))
        return rows

    made = sequence(method, tasks=tasks, denoise=0.5, hoc_reference=reference, rehearsal=remember)
    pool = memories[0].joined(memories[1])
    both = pool.joined(tasks[2].items)

    def expected(version: EmbeddingModel, input: torch.Tensor, items: Items) -> torch.Tensor:
        u, all_u = version.extract(input), version.extract(items.inputs)
        labels = [int(both.labels[(both.inputs == row).all(1)][0]) for row in input]
        means = torch.stack([all_u[items.labels == y].mean(0) for y in labels])
        return torch.nn.functional.normalize(0.5 * u + 0.5 * means)

    versions_used = set()
    for input, held in method._seen[8:]:
        torch.testing.assert_close(held[:8], expected(made[1], input[:8], both))
        candidates = [expected(version, input[8:], pool) for version in made[:2]]
        same = [t for t, rows in enumerate(candidates) if torch.allclose(held[8:], rows, atol=1e-5)]
        assert len(same) == 1
        versions_used.add(same[0])
    assert versions_used == ({0, 1} if reference == "all" else {1})


@pytest.mark.parametrize("lazy", [False, True])
def test_embeddings_are_stored_with_the_memory_and_extracted_once(tmp_path: Path, monkeypatch, lazy: bool) -> None:
    """Each version embeds the remembered items once; a resumed run reads the embeddings."""
    items = Items.from_dataset(jobs.Noisy(STAGES, 0.0)) if lazy else STAGES
    tasks = class_incremental(items, (4, 2, 2), seed=1)
    made = sequence(folder=tmp_path, tasks=tasks)
    states = [read_state(tmp_path / f"task-0{t}" / "memory.safetensors") for t in (0, 1)]
    assert [list(state["references"].shape) for state in states] == [[12, 1, 19], [18, 2, 19]]
    if not lazy:
        expected = torch.stack([version.extract(states[1]["inputs"]) for version in made[:2]], 1)
        torch.testing.assert_close(states[1]["references"], expected)
    assert torch.equal(states[1]["references"][:12, :1], states[0]["references"])  # not extracted again
    monkeypatch.setattr(EmbeddingModel, "extract", None)
    again = sequence(folder=tmp_path, tasks=tasks)
    assert all(torch.equal(a.head.junction.weight, b.head.junction.weight) for a, b in zip(made, again, strict=True))


@pytest.mark.parametrize(("after", "denoise"), [(9, 0.0), (13, 0.5), (16, 0.0), (21, 0.5)])
def test_a_stopped_sequence_held_to_all_resumes_to_the_same_bits(tmp_path: Path, after: int, denoise: float) -> None:
    whole = sequence(denoise=denoise)
    steps = []

    def on_step(task: int, step: int) -> None:
        steps.append(step)
        if len(steps) == after:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sequence(folder=tmp_path, on_step=on_step, denoise=denoise)
    again = sequence(folder=tmp_path, denoise=denoise)
    for a, b in zip(whole, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_items_of_repeated_classes_are_embedded_by_all_versions(tmp_path: Path) -> None:
    made = sequence(folder=tmp_path, tasks=instance_incremental(STAGES, 3, seed=0))
    state = read_state(tmp_path / "task-01" / "memory.safetensors")
    expected = torch.stack([version.extract(state["inputs"]) for version in made[:2]], 1)
    torch.testing.assert_close(state["references"], expected)


def test_feature_distillation_may_use_all_older_versions() -> None:
    """Stored embeddings equal computed ones if there is one older version, and differ if there are two."""
    alone, held = (
        [version.backbone[0].weight for version in sequence(FD(), hoc_reference=name)] for name in ("deployed", "all")
    )
    torch.testing.assert_close(alone[1], held[1])
    assert (alone[2] - held[2]).abs().max() > 1e-3


@pytest.mark.parametrize("trained", [False, True])
def test_the_first_replacement_is_its_own_reference_if_it_has_a_trained_head(trained: bool) -> None:
    method = Watch()

    def replacement() -> nn.Module:
        return EmbeddingModel(network(), method.head(10)) if trained else network()

    sequence(method, replacements={0: replacement})
    assert len(method._seen) == (24 if trained else 16)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: sequence(rehearsal=None), 'hoc_reference="all" needs remembered items, but rehearsal is None'),
        (lambda: sequence(FD(distance="l2")), "of the same width, .* got simplexfix.methods.fd.FD"),
        (lambda: sequence(denoise=1.5), r"denoise must lie in \[0, 1\], got 1.5"),
        (
            lambda: sequence(FD(distance="l2"), hoc_reference="deployed", denoise=0.5),
            "denoise needs a method that compares unit embeddings",
        ),
        (
            lambda: sequence(OCA(embedding_dim=10)),
            "of the same width, .* got simplexfix.methods.oca.OCA",
        ),
    ],
)
def test_bad_input(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_items_keep_references_and_fingerprint_them() -> None:
    items = Items(torch.zeros(3, 2), torch.arange(3), references=torch.arange(12.0).view(3, 2, 2))
    assert torch.equal(items.take(torch.tensor([2, 0])).references, items.references[[2, 0]])
    assert torch.equal(items.joined(items).references, items.references.repeat(2, 1, 1))
    bare = Items(items.inputs, items.labels)
    assert items.joined(bare).references is None
    assert items.fingerprint() != bare.fingerprint()
    flipped = Items(items.inputs, items.labels, references=items.references.flip(1))
    assert items.fingerprint() != flipped.fingerprint()
