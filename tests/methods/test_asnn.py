"""Tests NNP and ASNN against their equations, neighbourhood component analysis, the queue, and methods with them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplexfix import SlotRegistry
from simplexfix import functional as SF
from simplexfix.methods import ASNN, BCT, ER, FD, HOC, Simplex
from simplexfix.models import EmbeddingModel, LinearHead, NeighbourHead
from simplexfix.neighbours import asnn_loss, nnp_loss
from simplexfix.training import Items, Schedule, Trainer, class_incremental, random_rows, train_versions

WIDTH = 6


def rows_of(number: int, seed: int = 0, width: int = 4) -> Tensor:
    return torch.randn(number, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def class_weights(labels: list[int]) -> dict[int, float]:
    counted = [label for label in labels if label >= 0]
    sizes = {label: counted.count(label) for label in counted}
    mean = len(counted) / len(sizes)
    return {label: mean / size for label, size in sizes.items()}


def apart(a: list[float], b: list[float]) -> float:
    return math.dist(a, b)


def naive_asnn(
    rows: Tensor, target: list[int], pool: Tensor, labels: list[int], radius: float, neighbours: int, first: int | None
) -> float:
    on_sphere = [[[radius * x / math.hypot(*row) for x in row] for row in part.tolist()] for part in (rows, pool)]
    weights = class_weights(labels)
    above = below = 0.0
    for i, (z, y) in enumerate(zip(on_sphere[0], target, strict=True)):
        others = [j for j, label in enumerate(labels) if label >= 0 and (first is None or j != first + i)]
        others.sort(key=lambda j: apart(z, on_sphere[1][j]))
        near = others[:neighbours]
        own = [j for j in others if labels[j] == y]
        if y < 0 or not own:
            continue
        if not any(labels[j] == y for j in near):
            near.append(own[0])
        terms = {j: weights[labels[j]] * math.exp(-(apart(z, on_sphere[1][j]) ** 2)) for j in near}
        p = sum(term for j, term in terms.items() if labels[j] == y) / sum(terms.values())
        above -= weights[y] * math.log(p)
        below += weights[y]
    return above / below


def naive_nnp(
    rows: Tensor, target: list[int], pool: Tensor, labels: list[int], neighbours: int, alpha: float, first: int | None
) -> float:
    counted = pool[torch.tensor(labels) >= 0]
    mean, std = counted.mean(0), counted.std(0, correction=0)
    inside = []
    for part in (rows, pool):
        inside.append([])
        for x in ((part - mean) / std).tolist():
            r = math.hypot(*x)
            inside[-1].append([v / r * (1 - math.exp(-r / 2)) / (1 + math.exp(-r / 2)) for v in x])
    weights = class_weights(labels)
    total = 0.0
    for i, (h, y) in enumerate(zip(inside[0], target, strict=True)):
        if y < 0:
            continue
        others = [j for j, label in enumerate(labels) if label >= 0 and (first is None or j != first + i)]
        others.sort(key=lambda j: apart(h, inside[1][j]))
        weight = 0.0
        for j in others:
            if weight >= neighbours:
                break
            weight += weights[labels[j]]
            sign = -alpha if labels[j] == y else 1.0
            total += weights.get(y, 0.0) * weights[labels[j]] * sign * (2 - apart(h, inside[1][j]))
    return total / sum(y >= 0 for y in target)


# labels of the pool, whose classes have one to six rows; rows with negative labels are ignored
POOL = [3, 0, 1, 2, 0, 5, 1, -1, 0, 2, 2, 0, -100, 1, 0, 0]
CASES = {  # name -> (`first`, batch size)
    "batch alone": (0, 16),
    "in the pool": (2, 6),
    "not in the pool": (None, 5),
}


@pytest.mark.parametrize("neighbours", [1, 3, 50])
@pytest.mark.parametrize("case", CASES)
def test_losses_equal_their_equations(case: str, neighbours: int) -> None:
    first, number = CASES[case]
    pool, labels = rows_of(16), POOL
    if first is None:
        rows, target = rows_of(number, seed=1), [0, 1, 9, -1, 2]  # the pool has no class 9
    else:
        rows, target = pool[first : first + number], POOL[first : first + number]
    places = {} if case == "batch alone" else {"pool": pool, "pool_target": torch.tensor(labels), "first": first}
    found = asnn_loss(rows, torch.tensor(target), **places, radius=1.3, neighbours=neighbours)
    assert found.item() == pytest.approx(naive_asnn(rows, target, pool, labels, 1.3, neighbours, first), rel=1e-10)
    found = nnp_loss(rows, torch.tensor(target), **places, neighbours=neighbours, alpha=0.7)
    assert found.item() == pytest.approx(naive_nnp(rows, target, pool, labels, neighbours, 0.7, first), rel=1e-10)


def test_with_as_many_neighbours_as_rows_it_is_neighbourhood_component_analysis() -> None:
    features, target = rows_of(12), torch.arange(12) % 3
    z = 2.5 * F.normalize(features)
    factors = (-torch.cdist(z, z).square()).exp().fill_diagonal_(0)
    p = (factors * (target[:, None] == target)).sum(1) / factors.sum(1)
    assert asnn_loss(features, target, radius=2.5, neighbours=12).item() == pytest.approx(-p.log().mean().item())


def test_two_far_classes_have_no_loss() -> None:
    side = torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    features = side * torch.tensor([3.0, 0.0]) + 0.01 * torch.randn(40, 2)
    loss = asnn_loss(features.requires_grad_(), (side[:, 0] > 0).long(), radius=16.0, neighbours=25)
    loss.backward()
    assert loss.item() == 0
    assert not features.grad.any()


@pytest.mark.parametrize("first", [3, None])
def test_gradients_are_right(first: int | None) -> None:
    """Checks gradients of the rows, of the radius, and of pool rows that are batch rows; neighbours do not change."""
    pool, labels = rows_of(16).requires_grad_(), torch.tensor(POOL)
    radius = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    def rows(pool: Tensor) -> tuple[Tensor, Tensor]:
        return (pool[:7] + 0.1, labels[:7]) if first is None else (pool[first : first + 7], labels[first : first + 7])

    def asnn(pool: Tensor, radius: Tensor) -> Tensor:
        return asnn_loss(*rows(pool), pool, labels, radius=radius, neighbours=3, first=first)

    assert torch.autograd.gradcheck(asnn, (pool, radius))
    assert torch.autograd.gradcheck(
        lambda pool: nnp_loss(*rows(pool), pool, labels, neighbours=3, first=first), (pool,)
    )


def test_rows_without_a_partner_are_left_out() -> None:
    features = rows_of(5).requires_grad_()
    loss = asnn_loss(features, torch.tensor([0, 0, 1, 2, -1]), radius=1.0, neighbours=2)
    pair = asnn_loss(features[:4], torch.tensor([0, 0, 1, 2]), radius=1.0, neighbours=2)
    assert loss.item() == pytest.approx(pair.item(), rel=1e-12)
    for alone in ([0, 1, 2, 3, 4], [-1] * 5):
        loss = asnn_loss(features, torch.tensor(alone), radius=1.0)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, features)
        assert not gradient.any()
        assert nnp_loss(features, torch.tensor(alone)).isfinite()
    assert asnn_loss(features[:1], torch.tensor([0]), radius=1.0).item() == 0


@pytest.mark.parametrize("loss", [lambda x, y: asnn_loss(x, y, radius=16.0), nnp_loss])
def test_collapsed_features_have_finite_gradients(loss) -> None:
    for features in (torch.zeros(6, 3), torch.ones(6, 3), torch.cat([torch.ones(3, 3), torch.zeros(3, 3)])):
        features.requires_grad_()
        loss(features, torch.arange(6) % 2).backward()
        assert features.grad.isfinite().all()


def test_distances_are_of_float32_under_autocast() -> None:
    """In bfloat16, 8 bits of significand would give errors of 2 radius^2 / 256 in the exponent."""
    features, target = torch.randn(64, 32).bfloat16(), torch.arange(64) % 4
    truth = asnn_loss(features.double(), target, radius=8.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = asnn_loss(features, target, radius=8.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(truth.item(), rel=1e-4)


# head and queue


def test_the_queue_holds_the_newest_rows_as_a_pool() -> None:
    head = NeighbourHead(4, neighbours=3, queue=7).double()
    rows, target = rows_of(15), torch.arange(15) % 3
    for start in (0, 5, 10):
        batch, labels = rows[start : start + 5], target[start : start + 5]
        seen = rows[max(0, start - 7) : start], target[max(0, start - 7) : start]
        pool, pool_target = torch.cat([batch, seen[0]]), torch.cat([labels, seen[1]])
        expected = asnn_loss(batch, labels, pool, pool_target, radius=4.0, neighbours=3, first=0)
        head.eval()
        assert head.loss(batch, labels).item() == pytest.approx(expected.item(), rel=1e-6)
        head.train()
        assert head.loss(batch, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    # a batch longer than the queue leaves its last rows there
    assert set(head.queue.labels.tolist()) >= {0, 1, 2}
    head.loss(rows, target)
    assert sorted(head.queue.features[:, 0].tolist()) == sorted(rows[-7:, 0].tolist())
    head.loss(rows, target)
    assert sorted(head.queue.features[:, 0].tolist()) == sorted(rows[-7:, 0].tolist())


def test_overflown_rows_do_not_stay_in_the_queue() -> None:
    head = NeighbourHead(4, queue=8)
    rows = torch.randn(4, 4)
    rows[1, 2] = math.inf
    head.loss(rows, torch.tensor([0, 1, 1, 0]))
    assert sorted(head.queue.labels.tolist()) == [-1] * 5 + [0, 0, 1]
    assert head.loss(torch.randn(4, 4), torch.tensor([0, 1, 1, 0])).isfinite()


def test_the_radius_stays_in_its_bounds_and_keeps_a_gradient() -> None:
    torch.manual_seed(0)  # a seed with a gradient of the radius at both bounds
    head = NeighbourHead(4)
    assert head.radius.item() == pytest.approx(4.0)
    target = torch.tensor([0, 0, 1, 1])
    for raw, bound in ((-9.0, 1.0), (40.0, 16.0)):
        head.raw_radius.data.fill_(raw)
        head.loss(torch.randn(4, 4), target).backward()
        assert head.radius.item() == pytest.approx(bound)
        assert head.raw_radius.grad  # a clamp in the graph would have no gradient
        head.raw_radius.grad = None


def network() -> nn.Module:
    layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, WIDTH))
    layers.out_features = WIDTH
    return layers


def model_of(method, classes: int, *, seed: int = 0) -> EmbeddingModel:
    torch.manual_seed(seed)
    model = EmbeddingModel(network(), method.head(WIDTH))
    method.add_classes(model, range(classes))
    return model.double().eval()  # the queue does not change


def remembered(method, seed: int = 1) -> EmbeddingModel:
    """Returns a deployed version whose queue has the classes 0, 1 and 2."""
    model = model_of(method, 3, seed=seed)
    model.train()
    method.loss(model, rows_of(12, seed=2, width=5), torch.arange(12) % 3, None)
    return model.eval()


BATCH = rows_of(9, width=5), torch.tensor([0, 1, 2, 0, 3, 3, 4, 1, 4])
OPTIONS = [{"neighbours": 4}, {"loss": "nnp", "alpha": 0.5}]


@pytest.mark.parametrize("options", OPTIONS)
def test_methods_with_classification_equal_their_equations(options: dict) -> None:
    term = ASNN(queue=20, **options)
    rows, target = BATCH
    old = remembered(term)
    model = model_of(term, 5)
    h, u = model.backbone(rows), old.backbone(rows)
    classify = term.loss(model, rows, target, old).item()
    function, fixed = (
        (nnp_loss, {"neighbours": 10, "alpha": 0.5})
        if "alpha" in options
        else (asnn_loss, {"neighbours": 4, "radius": 4.0})
    )
    assert classify == pytest.approx(function(h, target, **fixed).item(), rel=1e-6)

    apart = (1 - F.cosine_similarity(h, u)).mean().item()
    found = FD(weight=2.0, classification=term).loss(model, rows, target, old).item()
    assert found == pytest.approx(classify + 2 * apart, rel=1e-10)

    queue = old.head.queue
    known = target < 3
    pool = queue.features, queue.labels
    influence = function(h[known], target[known], *pool, **fixed).item()
    found = BCT(weight=2.0, classification=term).loss(model, rows, target, old).item()
    assert found == pytest.approx(classify + 2 * influence, rel=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_hoc_applies_classification_to_its_embedding(options: dict) -> None:
    method = HOC(SlotRegistry(11), lambda_=0.3, mu=4.0, classification=ASNN(queue=20, **options))
    old, model = remembered(method), model_of(method, 5)
    rows, target = BATCH
    z = model(rows)
    assert z.shape == (9, 10)
    assert model.head.embedding_dim == 10
    classify = model.head.embedding_loss(z, target)
    contrast = SF.old_new_contrast(z, old(rows), target, mu=4.0)
    expected = 0.3 * classify + 0.7 * contrast
    assert method.loss(model, rows, target, old).item() == pytest.approx(expected.item(), rel=1e-12)
    assert method.loss(model, rows, target, None).item() == pytest.approx(classify.item(), rel=1e-12)


@pytest.mark.parametrize("method", [FD(classification=ASNN()), BCT(classification=ASNN())], ids=["fd", "bct"])
def test_gradients_reach_the_new_model_alone(method) -> None:
    old, model = remembered(method), model_of(method, 5).train()
    method.loss(model, *BATCH, old).backward()
    assert all(p.grad is None for p in old.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_network_from_the_simplex_keeps_its_junction() -> None:
    slots = SlotRegistry(11)
    made = model_of(Simplex(slots, "pretraining"), 3)
    method = HOC(slots, classification=ASNN(queue=4))
    before = made(BATCH[0])
    method.add_classes(made, range(5))
    assert isinstance(made.head, NeighbourHead)
    assert torch.equal(made(BATCH[0]), before)
    assert len(slots.classes("default")) == 0
    head = made.head
    made.train()
    method.loss(made, *BATCH, None)
    assert head.queue.labels.max() >= 0
    method.add_classes(made, range(6))
    assert made.head is head
    assert head.queue.labels.max() < 0  # features of the previous task are of another model


# training


def items(rows: int, classes: int) -> Items:
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, 5, generator=generator)
    return Items(centres[labels] + 0.3 * torch.randn(rows, 5, generator=generator), labels)


def trained(make, **options) -> list[EmbeddingModel]:
    """Trains two versions; the queue wraps around before the first checkpoint."""
    return list(
        train_versions(
            Trainer(make(), save_every=3),
            class_incremental(items(80, 6), (4, 2), seed=0),
            network,
            Schedule(10, 1e-2, batch=16),
            seed=0,
            rehearsal=lambda version, items, generator: random_rows(items.labels, 4, generator),
            **options,
        )
    )


MAKERS = {
    "asnn": lambda: ASNN(queue=40),
    "nnp": lambda: ASNN(loss="nnp", queue=40),
    "bct": lambda: BCT(classification=ASNN(queue=40)),
    "hoc": lambda: HOC(SlotRegistry(12), lambda_=0.5, classification=ASNN(queue=40)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_stopped_training_resumes_to_the_same_bits(tmp_path: Path, name: str) -> None:
    make = MAKERS[name]
    whole = trained(make)
    for after in (8, 17):  # within the first task, and within the second
        steps: list[int] = []

        def on_step(task: int, step: int, after: int = after, steps: list[int] = steps) -> None:
            steps.append(step)
            if len(steps) == after:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            trained(make, folder=tmp_path / str(after), on_step=on_step)
        again = trained(make, folder=tmp_path / str(after))
        for a, b in zip(whole, again, strict=True):
            for key, value in a.state_dict().items():
                assert torch.equal(value, b.state_dict()[key]), key
    # the weights depend on the queue, so the comparison above could fail
    small = trained(lambda: ASNN(queue=8)) if name == "asnn" else None
    assert small is None or not torch.equal(small[0].backbone[0].weight, whole[0].backbone[0].weight)


def test_methods_without_classification_have_their_old_attributes() -> None:
    """A checkpoint describes a method by its attributes, and older checkpoints must resume."""
    assert set(vars(FD())) == {"scale", "weight", "distance"}
    assert set(vars(BCT())) == {"scale", "weight"}
    assert "classification" not in vars(HOC(SlotRegistry(4)))
    assert "classification" in vars(FD(classification=ASNN()))


def old_of(width: int, embedding_dim: int | None = None) -> EmbeddingModel:
    head = NeighbourHead(width, embedding_dim, queue=3)
    head.loss(torch.randn(4, width), torch.tensor([0, 0, 1, 1]))
    return EmbeddingModel(nn.Linear(5, width), head).eval()


ROWS, LABELS = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: ASNN(loss="knn"), ValueError, "loss must be one of 'asnn', 'nnp', got 'knn'"),
        (lambda: ASNN(neighbours=0), ValueError, "neighbours must be at least 1 and queue at least 0, got 0 and 4096"),
        (lambda: ASNN(queue=-1), ValueError, "neighbours must be at least 1 and queue at least 0, got 10 and -1"),
        (lambda: ASNN(queue=1.5), TypeError, "queue must be an integer, got float"),
        (lambda: ASNN(alpha=0.0), ValueError, "alpha must be positive and finite, got 0.0"),
        (
            lambda: HOC(SlotRegistry(4), scale=8.0, classification=ASNN()),
            ValueError,
            "normalize, scale and margin belong to the simplex cross-entropy, which classification replaces: leave",
        ),
        (
            lambda: ASNN().add_classes(EmbeddingModel(network(), LinearHead(WIDTH)), range(2)),
            TypeError,
            "must have a NeighbourHead, or a SimplexHead without bias, got LinearHead: train its backbone with a new",
        ),
        (
            lambda: BCT(classification=ASNN()).loss(model_of(ASNN(), 5), *BATCH, model_of(ASNN(), 3)),
            ValueError,
            "the queue is empty; model folders do not store it: use the version that training returned",
        ),
        (
            lambda: BCT(classification=ASNN()).loss(model_of(ASNN(), 5), *BATCH, model_of(ER(), 3)),
            TypeError,
            "old must have a NeighbourHead, which ASNN trains, and FD and BCT with classification, got LinearHead",
        ),
        (
            lambda: BCT(classification=ASNN()).loss(model_of(ASNN(), 5), *BATCH, old_of(8)),
            ValueError,
            "old's classifier must take features as wide as the new ones, 6, got 8",
        ),
        (
            lambda: BCT(classification=ASNN()).loss(model_of(ASNN(), 5), *BATCH, old_of(6, 4)),
            ValueError,
            "old's classifier must take features as wide as the new ones, 6, got 4",
        ),
        (lambda: asnn_loss(ROWS[0], LABELS, radius=1.0), ValueError, r"features must have 2 dimensions, got \[3\]"),
        (lambda: asnn_loss(ROWS, LABELS.int(), radius=1.0), TypeError, "target must be int64, got torch.int32"),
        (lambda: asnn_loss(ROWS, LABELS, radius=1.0, neighbours=0), ValueError, "neighbours must be at least 1, got 0"),
        (lambda: nnp_loss(ROWS, LABELS, ROWS), ValueError, "pool and pool_target belong together: pass both"),
        (lambda: nnp_loss(ROWS, LABELS, first=0), ValueError, "first is a row of the pool; leave it out"),
        (
            lambda: nnp_loss(ROWS, LABELS, ROWS[:, :2], LABELS),
            ValueError,
            r"pool must have shape \[P, 3\] like the features, P >= 1, got \[4, 2\]",
        ),
        (
            lambda: nnp_loss(ROWS, LABELS, ROWS, LABELS[:2]),
            ValueError,
            r"pool_target must be int64 of shape \[4\], one class id for each row of the pool, got torch.int64 of .*2",
        ),
        (
            lambda: nnp_loss(ROWS, LABELS, ROWS, LABELS, first=1),
            ValueError,
            r"first must lie in \[0, 0\], for a pool of 4 rows that holds all 4 of the batch, got 1",
        ),
        (lambda: nnp_loss(ROWS, LABELS, ROWS.double(), LABELS), TypeError, "must have the same dtype, got torch.float"),
        (lambda: nnp_loss(ROWS, LABELS, alpha=-1.0), ValueError, "alpha must be positive and finite, got -1.0"),
    ],
)
def test_bad_input(act, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()
