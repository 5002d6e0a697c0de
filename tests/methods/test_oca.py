"""Tests OCA: its loss against a loop in float64, its prototypes, and searches of older galleries by prefixes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simplexfix.data import Vectors
from simplexfix.labelled import LabelledItems
from simplexfix.methods import OCA, oca_loss
from simplexfix.models import EmbeddingModel, FeatureMLP, LinearHead, OCAHead, read_identity
from simplexfix.models.oca import OCAObjective
from simplexfix.report import evaluate
from simplexfix.training import Items, Schedule, Trainer, class_incremental, random_rows, read_state, train_versions


def objective_of(d: int, classes: int, prefix: int | None, *, rotation: str = "orthogonal_bias") -> OCAObjective:
    """Returns an objective in float64, with prototypes and a rotation that is not the identity."""
    torch.manual_seed(2)
    objective = OCAObjective(d, classes, prefix=prefix, rotation=rotation).double()
    if objective.prototypes is not None:
        objective.prototypes.copy_(0.7 * torch.randn(classes, prefix, dtype=torch.float64))
    if objective.rotation is not None:
        with torch.no_grad():
            for p in objective.rotation.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return objective


def naive_cross_entropy(logits: list[float], label: int, smoothing: float) -> float:
    log_sum = math.log(sum(math.exp(logit) for logit in logits))
    every = sum(log_sum - logit for logit in logits) / len(logits)
    return (1 - smoothing) * (log_sum - logits[label]) + smoothing * every


def unit(row: list[float]) -> list[float]:
    return [x / math.hypot(*row) for x in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("normalize_prototypes", [False, True])
@pytest.mark.parametrize("rotation", ["orthogonal_bias", "orthogonal", "none"])
def test_the_loss_is_its_equation(rotation: str, normalize_prototypes: bool) -> None:
    objective = objective_of(7, 4, 5, rotation=rotation)
    z, target = torch.randn(6, 7, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2, 3])
    options = {"weights": (1.5, 2.5, 0.75), "temperature": 0.3, "label_smoothing": 0.2}
    turn = torch.eye(7).tolist() if objective.rotation is None else objective.rotation.weight.tolist()
    shift = [0.0] * 7
    if rotation == "orthogonal_bias":
        shift = objective.rotation.bias.tolist()
    assert torch.allclose(torch.tensor(turn) @ torch.tensor(turn).T, torch.eye(7), atol=1e-5)
    expected = 0.0
    for row, y in zip(z.tolist(), target.tolist(), strict=True):
        h = unit(row)
        compatible = unit(h[:5])
        turned = [dot(axis, h) + b for axis, b in zip(turn, shift, strict=True)]
        classify = [dot(turned, w) / 0.3 for w in objective.classifier.weight.tolist()]
        means = objective.prototypes.tolist()
        align = [dot(compatible, unit(p) if normalize_prototypes else p) / 0.3 for p in means]
        expected += (
            1.5 * naive_cross_entropy(classify, y, 0.2)
            + 2.5 * naive_cross_entropy(align, y, 0.2)
            + 0.75 * (1 - dot(compatible, unit(means[y])))
        ) / 6
    found = oca_loss(z, target, objective, normalize_prototypes=normalize_prototypes, **options)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_without_extra_dimensions_and_cross_entropies_it_is_distillation_to_class_means() -> None:
    objective = objective_of(5, 3, 5, rotation="none")
    z, target = torch.randn(8, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2, 2, 1])
    found = oca_loss(z, target, objective, weights=(0.0, 0.0, 1.0))
    cosine = torch.nn.functional.cosine_similarity(z, objective.prototypes[target])
    assert found.item() == pytest.approx((1 - cosine).mean().item(), rel=1e-12)
    assert oca_loss(objective.prototypes, torch.arange(3), objective, weights=(0.0, 0.0, 1.0)).item() < 1e-15


def test_the_first_version_is_cross_entropy_alone() -> None:
    objective = objective_of(5, 3, None)
    assert objective.rotation is None
    z, target = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    rows = [[dot(unit(row), w) for w in objective.classifier.weight.tolist()] for row in z.tolist()]
    expected = sum(naive_cross_entropy(row, y, 0.1) for row, y in zip(rows, target.tolist(), strict=True)) / 4
    assert oca_loss(z, target, objective, weights=(9.0, 9.0, 9.0)).item() == pytest.approx(expected, rel=1e-12)


def test_gradients_of_embeddings_classifier_and_rotation() -> None:
    objective, target = objective_of(6, 3, 4), torch.tensor([0, 2, 1])
    names = [name for name, _ in objective.named_parameters()]
    assert len(names) == 3
    values = [p.detach().clone().requires_grad_() for p in objective.parameters()]

    def loss(z: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(_Loss(objective), dict(zip(prefixed, parameters, strict=True)), (z, target))

    prefixed = [f"objective.{name}" for name in names]
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (z, *values))


class _Loss(nn.Module):
    def __init__(self, objective: OCAObjective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return oca_loss(z, target, self.objective, temperature=0.5)


def test_a_zero_embedding_is_finite_and_bfloat16_is_widened() -> None:
    objective = objective_of(6, 3, 4).float()
    z = torch.zeros(2, 6, requires_grad=True)
    oca_loss(z, torch.tensor([0, 1]), objective).backward()
    assert z.grad.isfinite().all()
    z, target = torch.randn(5, 6, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(oca_loss(z, target, objective), oca_loss(z.float(), target, objective))


def features(rows: int, classes: int, seed: int = 0) -> Items:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(9))
    return Items(centres[labels] + 0.4 * torch.randn(rows, 12, generator=generator), labels)


def add_noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs.float() + 0.5 * torch.randn(inputs.shape, generator=generator)


def remember(version: EmbeddingModel, items: Items, generator: np.random.Generator) -> Tensor:
    return random_rows(items.labels, 6, generator)


def wide() -> nn.Module:
    return FeatureMLP(12, (40, 20))


def chain(folder: Path | None = None, on_step=lambda task, step: None, **options) -> list[EmbeddingModel]:
    """Returns versions of 6, 9 and 12 dimensions; the third starts from another network."""
    return list(
        train_versions(
            Trainer(OCA(embedding_dim=6, extra=3), augment=add_noise, save_every=5, **options),
            class_incremental(features(240, 8), (4, 2, 2), seed=0),
            lambda: FeatureMLP(12, (24,)),
            Schedule(steps=60, learning_rate=2e-2, batch=32),
            seed=0,
            rehearsal=remember,
            replacements={2: wide},
            folder=folder,
            on_step=on_step,
        )
    )


@pytest.fixture(scope="module")
def versions() -> list[EmbeddingModel]:
    return chain()


def judged(versions: list[EmbeddingModel]) -> list:
    asked, held = features(80, 8, seed=1), features(80, 8, seed=2)
    items = LabelledItems(asked.labels, held.labels)
    return [items.version(*(v.extract(i.inputs) for i in (asked, held)), prefixes=v.prefixes) for v in versions]


def test_prototypes_are_class_means_by_the_old_version_in_evaluation_mode(versions) -> None:
    old = copy.deepcopy(versions[0])
    items, memory = features(40, 6, seed=3), features(12, 4, seed=4)
    rows, labels = torch.cat([items.inputs, memory.inputs]), torch.cat([items.labels, memory.labels])
    # float64, which the networks accept only after the preprocessing
    items, memory = (Items(part.inputs.double(), part.labels) for part in (items, memory))
    trainer = Trainer(OCA(embedding_dim=6, extra=3), augment=add_noise, preprocessing=Vectors(12))
    schedule = Schedule(steps=1, learning_rate=1e-9, batch=8)
    made = trainer.fit(old, items, schedule, classes=range(6), seed=0, memory=memory, old=old)
    head = made.head
    assert (head.embedding_dim, made.prefixes, made.preprocessing) == (9, (6,), Vectors(12))
    with torch.no_grad():
        embeddings = nn.functional.normalize(old(rows)).double()  # old is in evaluation mode
        # the old version has not seen classes 4 and 5
        expected = torch.stack([embeddings[labels == c].mean(0) for c in range(6)])
    assert head.objective.prototypes.shape == (6, 6)
    assert torch.equal(head.objective.prototypes, expected.float())
    assert (head.objective.prototypes.norm(dim=1) < 0.999).all()  # not normalised
    old.train()
    with torch.no_grad():
        assert not torch.allclose(nn.functional.normalize(old(rows)).double(), embeddings)  # the check can fail


def test_a_chain_searches_every_older_gallery_by_a_prefix(versions) -> None:
    assert [v.embedding_dim for v in versions] == [6, 9, 12]
    assert [v.prefixes for v in versions] == [(), (6,), (6, 9)]
    of = judged(versions)
    report = evaluate(of, protocol="instance")
    for i, new in enumerate(of):
        for j, old in enumerate(of[: i + 1]):
            q, g = (nn.functional.normalize(torch.as_tensor(r.rows)[:, : 6 + 3 * j]) for r in (new.query, old.gallery))
            found = old.items.gallery_labels[(q @ g.T).argmax(1).numpy()]
            assert report.matrix[i, j] == (found == old.items.query_labels).mean(), (i, j)
    assert report.matrix[2, 0] > 0.6  # by another network; chance is 0.125
    assert report.violations is not None
    assert report.as_dict()["versions"][2] == {"name": "v2", "dimensions": 12, "prefixes": [6, 9]}
    assert any("search older galleries of 6 and 9 by as many leading dimensions" in line for line in report.remarks)


def test_the_junction_keeps_its_old_rows_and_the_objective_is_new(versions) -> None:
    old, method = versions[0], OCA(embedding_dim=6, extra=3)
    model = EmbeddingModel(old.backbone, method.head(24))
    model.head.load_state_dict({"junction.weight": old.head.junction.weight})
    method.add_classes(model, range(4))
    before = model.head.junction.weight.clone()
    method.fit_to_old(model, old)
    assert torch.equal(model.head.junction.weight[:6], before)
    assert torch.equal(model.head.objective.rotation.weight, torch.eye(9))


def test_a_chain_stopped_at_any_step_resumes_to_the_same_bits(versions, tmp_path) -> None:
    class StopError(Exception):
        pass

    def stop(task: int, step: int) -> None:
        if (task, step) in stops:
            stops.remove((task, step))
            raise StopError

    stops = [(0, 13), (1, 3), (1, 22), (2, 41)]
    for _ in range(4):
        with pytest.raises(StopError):
            chain(tmp_path, stop)
    for made, whole in zip(chain(tmp_path, stop), versions, strict=True):
        state = made.state_dict()
        assert state.keys() == whole.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
        assert made.head.ancestors == whole.head.ancestors
    prototypes = read_state(tmp_path / "task-02" / "version.safetensors")["model"]["head.objective.prototypes"]
    assert torch.equal(prototypes, versions[2].head.objective.prototypes)


def test_a_loaded_model_embeds_and_trains_as_the_saved_one(versions, tmp_path) -> None:
    identity = versions[1].save_pretrained(tmp_path, version=1)
    again = EmbeddingModel.from_pretrained(tmp_path)
    rows = features(20, 8).inputs
    assert torch.equal(again.extract(rows), versions[1].extract(rows))
    assert again.head.objective is None
    assert (again.prefixes, again.identity(version=1)) == ((6,), identity)
    assert read_identity(tmp_path) == identity == type(identity).from_dict(identity.to_dict())
    # the folder lacks classifier and rotation, and the next version does not depend on them
    schedule, items = Schedule(steps=3, learning_rate=1e-2, batch=8), features(40, 8)
    made = [
        Trainer(OCA(extra=3)).fit(parent, items, schedule, classes=range(8), seed=0, old=versions[1])
        for parent in (again, versions[1])
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in made), strict=True))


def test_identities_state_which_galleries_a_prefix_searches(versions) -> None:
    v0, v1, v2 = (v.identity(version=t) for t, v in enumerate(versions))
    assert [v2.search_width(v) for v in (v0, v1, v2)] == [6, 9, 12]
    rows = features(5, 5).inputs
    queries = versions[2].extract(rows, width=v2.search_width(v0))
    by_hand = nn.functional.normalize(versions[2].extract(rows)[:, :6])
    assert torch.allclose(queries, by_hand, rtol=0, atol=2e-7)
    (reason,) = v0.why_not_search(v2)
    assert reason == "the gallery's model is newer, and was trained from this one: search it with the newer model"
    stranger = replace(v0, fingerprint="f" * 64)
    (reason,) = v2.why_not_search(stranger)
    assert reason.startswith("the gallery's model ffffffffffff is not an ancestor of this one (ancestors: ")
    assert reason.endswith("or train a version with the gallery's model as old")
    with pytest.raises(ValueError, match=r"cannot search the gallery: the gallery's model ffff.*: extract the gallery"):
        v2.search_width(stranger)
    (reason,) = v2.why_not_search(replace(v0, embedding_dim=7))
    assert reason == "the gallery's embeddings are 7 wide, this model was trained for 6"


def test_any_model_may_be_the_first_ancestor(tmp_path) -> None:
    """The usual case of a service: the deployed model is by others and has a given width."""
    torch.manual_seed(0)
    head = LinearHead(24)
    head.grow(4)
    deployed = EmbeddingModel(FeatureMLP(12, (24,)), head).eval()
    method = OCA(extra=4)
    parent = EmbeddingModel(wide(), method.head(20))
    schedule = Schedule(steps=3, learning_rate=1e-2, batch=8)
    made = Trainer(OCA(embedding_dim=9, extra=4)).fit(
        EmbeddingModel(wide(), OCA(embedding_dim=9).head(20)), features(40, 8), schedule, classes=range(8), seed=0,
        old=deployed,
    )  # fmt: skip
    assert (made.embedding_dim, made.prefixes) == (28, (24,))
    assert made.identity().search_width(deployed.identity()) == 24
    with pytest.raises(ValueError, match=r"gives 128 dimensions and cannot shrink to 28"):
        Trainer(method).fit(parent, features(40, 8), schedule, classes=range(8), seed=0, old=deployed)


def without_class() -> None:
    items = features(40, 8)
    model = chain_start(8)
    schedule = Schedule(steps=1, learning_rate=1e-2, batch=8)
    some = items.take((items.labels > 2).nonzero()[:, 0])
    Trainer(OCA(embedding_dim=6)).fit(model, some, schedule, classes=range(8), seed=0, old=chain_start(8).eval())


def chain_start(classes: int) -> EmbeddingModel:
    method = OCA(embedding_dim=6)
    model = EmbeddingModel(FeatureMLP(12), method.head(12))
    method.add_classes(model, range(classes))
    return model


def fitted_to(old: EmbeddingModel) -> EmbeddingModel:
    """Returns a next version, whose prototypes are not set yet."""
    model = chain_start(2)
    OCA().fit_to_old(model, old)
    return model


def batch(classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 12), torch.tensor([0, classes, 1])


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: OCA(embedding_dim=0), ValueError, "embedding_dim must be at least 1, got 0"),
        (lambda: OCA(extra=-1), ValueError, "extra must be 0 or more dimensions, got -1"),
        (lambda: OCA(extra=1.5), TypeError, "extra must be an integer, got float"),
        (
            lambda: OCA(weights=(1.0, 2.0)),
            ValueError,
            "weights must hold 3 numbers .*, got 2",
        ),
        (
            lambda: OCA(weights=(1.0, -2.0, 0.0)),
            ValueError,
            r"0 or more, and not all 0, got \[1.0, -2.0, 0.0\]",
        ),
        (lambda: OCA(weights=(0.0, 0.0, 0.0)), ValueError, "not all 0"),
        (lambda: OCA(temperature=0.0), ValueError, "temperature must be positive and finite, got 0.0"),
        (lambda: OCA(label_smoothing=1.5), ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        (
            lambda: OCA(rotation="any"),
            ValueError,
            "rotation must be one of 'none', 'orthogonal', .*'any'",
        ),
        (lambda: OCAHead(0, 4), ValueError, "in_features and embedding_dim must be positive, got 0 and 4"),
        (lambda: OCAHead(4, 4, ancestors=[("f", 5)]), ValueError, r"ancestors must lie in \[1, 4\], .* got 5"),
        (
            lambda: OCA().add_classes(EmbeddingModel(FeatureMLP(12), LinearHead(12)), range(2)),
            TypeError,
            r"OCA trains models with an OCAHead, got LinearHead; begin with EmbeddingModel\(backbone, method.head",
        ),
        (
            lambda: OCA().loss(EmbeddingModel(FeatureMLP(12), OCA().head(12)), *batch(1), None),
            ValueError,
            "head is not ready for this task: call add_classes and, with an old version, fit_to_old",
        ),
        (lambda: OCA().loss(chain_start(2), *batch(1), chain_start(2)), ValueError, "head is not ready for this task"),
        (
            lambda: OCA().loss(fitted_to(chain_start(2)), *batch(1), None),
            ValueError,
            "the head was prepared with an old version, but old is None: pass the old version",
        ),
        (
            lambda: OCA().loss(chain_start(2), batch(1)[0], torch.full_like(batch(1)[1], -100), None),
            ValueError,
            r"target row 0 has label -100, but labels of 2 classes lie in \[0, 1\]",
        ),
        (
            lambda: OCA().loss(chain_start(2), *batch(2), None),
            ValueError,
            r"target row 1 has label 2, but labels of 2 classes lie in \[0, 1\]; OCA.add_classes adds classes",
        ),
        (
            without_class,
            ValueError,
            r"of every class for its prototypes, and 3 classes have none \(0, 1, 2\): keep a",
        ),
        (
            lambda: chain_start(2).extract(torch.randn(2, 12), width=5),
            ValueError,
            r"width must be 6 \(all dimensions\) or one of the model's prefixes \(none\), got 5",
        ),
    ],
)
def test_bad_input(act, error, message: str) -> None:
    with pytest.raises(error, match=message):
        act()
