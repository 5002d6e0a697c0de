"""Tests replacements that begin with a junction rotated to the deployed version, and with a frozen backbone."""

from __future__ import annotations

from pathlib import Path

import jobs
import pytest
import torch
from torch.nn.functional import normalize

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.methods import ER, HOC
from simplexfix.models import EmbeddingModel
from simplexfix.polytopes import simplex_prototypes
from simplexfix.training import Schedule, Trainer, class_incremental, random_rows, train_versions
from simplexfix.training.junction import aligned_junction

STAGES = jobs.features(120, 8, 5)
NEW, REMEMBERED = jobs.features(50, 8, 1), jobs.features(18, 4, 2)


def turned(weight: torch.Tensor, own: torch.Tensor, held: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Returns `weight` [d, features] rotated by an SVD in all d dimensions; its null space does not matter."""
    targets = 0.3 * simplex_prototypes(own.shape[1] + 1, slots, dtype=torch.float64) + 0.7 * held.double()
    u, _, vt = torch.linalg.svd(own.double().T @ targets)
    return (u @ vt).T @ weight.double()


@pytest.mark.parametrize(("width", "rows"), [(6, 40), (19, 40), (6, 8195)])
def test_the_junction_is_the_nearest_isometry(width: int, rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(19, width, generator=draw)
    own = normalize(torch.randn(rows, width, generator=draw) @ weight.T)
    held = normalize(torch.randn(rows, 19, generator=draw))
    slots = torch.arange(rows) % 20
    made = aligned_junction(weight, own, held, slots)
    torch.testing.assert_close(made.double(), turned(weight, own, held, slots), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.T @ made, weight.T @ weight, rtol=1e-5, atol=1e-5)
    assert made.dtype == weight.dtype


class Watch(HOC):
    """HOC that records the weights of each step."""

    def __init__(self) -> None:
        super().__init__(SlotRegistry(20), lambda_=0.5)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(self, model, input, target, old):
        self._seen.append((model.backbone[0].weight.detach().clone(), model.head.junction.weight.detach().clone()))
        return super().loss(model, input, target, old)


def models(method: HOC) -> tuple[EmbeddingModel, EmbeddingModel]:
    """Returns a replacement and the deployed version."""
    made = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        made.append(EmbeddingModel(jobs.network(dropout=0.0), method.head(10)))
        method.add_classes(made[-1], range(4))
    return made[0], made[1].eval()


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "sgd", "weight_decay": 0.1}])
def test_a_training_begins_at_the_rotated_junction_with_the_backbone_frozen(optimizer: dict) -> None:
    method = Watch()
    parent, old = models(method)
    schedule = Schedule(8, 1e-2, batch=16, clip=1.0, **optimizer)
    data = {"classes": range(8), "memory": REMEMBERED, "old": old}
    Trainer(method).fit(parent, NEW, schedule, **data, seed=0, junction="aligned", frozen=0.25)
    both = torch.cat([NEW.inputs, REMEMBERED.inputs])
    slots = method.slots.lookup("default", torch.cat([NEW.labels, REMEMBERED.labels]))
    expected = turned(parent.head.junction.weight.detach(), parent.extract(both), old.extract(both), slots)
    backbones, junctions = zip(*method._seen, strict=True)
    torch.testing.assert_close(junctions[0].double(), expected, rtol=1e-4, atol=1e-5)
    changed = [not torch.equal(backbone, parent.backbone[0].weight) for backbone in backbones]
    assert changed == [False] * 3 + [True] * 5  # recorded before each update: two frozen steps, and the third one
    assert not torch.equal(junctions[1], junctions[0])


def sequence(folder: Path | None = None, method=None, on_step=lambda task, step: None, **options):
    begin = {"replacement_junction": "aligned", "replacement_frozen": 0.5}
    return list(
        train_versions(
            Trainer(method or HOC(SlotRegistry(20)), save_every=2, ema=0.9),
            class_incremental(STAGES, (4, 2, 2), seed=1),
            jobs.network,
            Schedule(6, 1e-2, batch=16),
            seed=2,
            rehearsal=lambda version, items, generator: random_rows(items.labels, 3, generator),
            folder=folder,
            on_step=on_step,
            **{"replacements": {0: jobs.network, 1: jobs.network}, **begin, **options},
        )
    )


@pytest.mark.parametrize("after", [7, 8, 9])
def test_a_stopped_alignment_resumes_to_the_same_bits(tmp_path: Path, after: int) -> None:
    """The moving average of the weights also starts from the rotated junction."""
    steps = []

    def on_step(task: int, step: int) -> None:
        steps.append(step)
        if len(steps) == after:
            raise InterruptedError

    whole = sequence()
    with pytest.raises(InterruptedError):
        sequence(tmp_path, on_step=on_step)
    for a, b in zip(whole, sequence(tmp_path), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_moving_average_of_weights_begins_at_the_rotated_junction() -> None:
    method = Watch()
    parent, old = models(method)
    data = {"classes": range(8), "memory": REMEMBERED, "old": old, "junction": "aligned"}
    made = Trainer(method, ema=0.999999).fit(parent, NEW, Schedule(1, 1e-2, batch=16), **data, seed=0)
    torch.testing.assert_close(made.head.junction.weight, method._seen[0][1], rtol=0, atol=1e-4)


def test_only_replacements_of_a_deployed_version_are_rotated_and_frozen() -> None:
    """The first network has no deployed version: its junction is not rotated, and its backbone is not frozen."""
    method = Watch()

    def pretrained() -> EmbeddingModel:
        return EmbeddingModel(jobs.network(), method.head(10))

    options = {"hoc_reference": "deployed_or_replacement", "replacements": {0: pretrained, 1: jobs.network}}
    sequence(method=method, **options)
    backbones = [backbone for backbone, _ in method._seen]
    same = [[torch.equal(b, backbones[6 * t]) for b in backbones[6 * t : 6 * t + 6]].count(True) for t in range(3)]
    assert same == [1, 4, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"junction": "turned"}, ValueError, "junction must be one of 'aligned', 'kept', got 'turned'"),
        ({"frozen": 1.5}, ValueError, r"frozen must lie in \[0, 1\], got 1.5"),
        ({"frozen": 1}, ValueError, "frozen must be below 1"),
        ({"old": None, "junction": "aligned"}, ValueError, "needs old, the deployed version, but old is None"),
        ({"method": ER(), "junction": "aligned"}, TypeError, "a model with a SimplexHead, got ER and SimplexHead"),
        ({"bias": True, "junction": "aligned"}, TypeError, "needs a junction without bias, but the parent's has one"),
        ({"slots": 12, "junction": "aligned"}, ValueError, "old must have .* as wide as the new ones, 11, got 19"),
    ],
)
def test_junctions_that_cannot_be_rotated_are_refused(options: dict, error: type[Exception], message: str) -> None:
    parent, old = models(HOC(SlotRegistry(20)))
    bias, slots = options.pop("bias", False), options.pop("slots", 20)
    parent.head = SimplexHead.from_slots(SlotRegistry(slots), 10, bias=bias)
    given = {"old": old, **options}
    with pytest.raises(error, match=message):
        Trainer(given.pop("method", HOC(SlotRegistry(slots)))).fit(
            parent, NEW, Schedule(1, 1e-2, batch=16), classes=range(8), seed=0, **given
        )


def test_alignment_of_a_replacement_that_is_its_own_reference_is_refused() -> None:
    with pytest.raises(ValueError, match='replacement_junction="aligned" excludes hoc_reference="replacement"; pass'):
        sequence(hoc_reference="replacement")


def test_a_folder_of_another_junction_option_is_refused(tmp_path: Path) -> None:
    method = HOC(SlotRegistry(20))
    parent, old = models(method)
    data = {"classes": range(8), "old": old, "seed": 0, "folder": tmp_path}
    Trainer(method).fit(parent, NEW, Schedule(1, 1e-2, batch=16), **data)
    with pytest.raises(ValueError, match="junction: was absent, is 'aligned'"):
        Trainer(method).fit(parent, NEW, Schedule(1, 1e-2, batch=16), **data, junction="aligned")
