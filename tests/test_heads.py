"""SimplexHead: drop-in for nn.Linear, nothing of size K x d, growth that changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.polytopes import simplex_prototypes


def head(**options) -> SimplexHead:
    torch.manual_seed(0)
    return SimplexHead(10, 6, num_slots=16, **options)


@pytest.mark.parametrize("options", [{}, {"normalize": True, "scale": 12.0}])
def test_forward_is_the_matrix_product(options: dict) -> None:
    model, x = head(**options), torch.randn(5, 6)
    z = model.junction(x)
    assert torch.equal(model.embed(x), z)
    w = simplex_prototypes(16)
    z = F.normalize(z) if options else z
    torch.testing.assert_close(model(x), options.get("scale", 1.0) * z @ w.T, rtol=1e-5, atol=1e-5)


def test_loss_is_the_cross_entropy_of_forward() -> None:
    model, x, target = head(scale=3.0), torch.randn(5, 6), torch.tensor([0, 15, 3, 2, 1])
    weight = torch.rand(16)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}, {"ignore_index": 3}):
        ours, expected = model.loss(x, target, **options), F.cross_entropy(model(x), target, **options)
        torch.testing.assert_close(ours, expected)
        gradients = [
            torch.autograd.grad(loss, model.junction.weight, retain_graph=True)[0] for loss in (ours, expected)
        ]
        torch.testing.assert_close(*gradients)


def test_the_margin_acts_in_the_loss_only() -> None:
    plain, margin = head(normalize=True, scale=9.0), head(normalize=True, scale=9.0, margin=("cosine", 0.3))
    x, target = torch.randn(5, 6), torch.arange(5)
    assert torch.equal(plain(x), margin(x))
    assert margin.loss(x, target) > plain.loss(x, target)


def test_predict_names_slots_in_use_only() -> None:
    model, x = head(), torch.randn(50, 6)
    scores, classes = model.predict(x, k=10)
    logits = model(x)
    assert classes.max() < 10
    assert torch.equal(scores, logits[:, :10].sort(1, descending=True).values)
    assert torch.equal(logits.gather(1, classes), scores)
    assert not scores.requires_grad
    high = SimplexHead(0, 6, num_slots=16)
    high.slots.add("fine", range(3), end="high")
    assert set(high.predict(x, k=3)[1].flatten().tolist()) == {13, 14, 15}


def test_growth_changes_nothing() -> None:
    model, x = head(), torch.randn(7, 6)
    before = {name: value.clone() for name, value in model.named_parameters()}
    embedded, logits, loss = model.embed(x), model(x), model.loss(x, torch.arange(7))
    model.grow(14)
    model.slots.add("more", [5, 9], end="high")
    assert model.num_classes == 16
    assert model.num_slots == 16
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
    assert torch.equal(model.embed(x), embedded)
    assert torch.equal(model(x), logits)
    assert torch.equal(model.loss(x, torch.arange(7)), loss)
    assert model.slots.lookup("default", torch.arange(14)).tolist() == list(range(14))


def test_the_state_dict_holds_the_junction_and_the_registry_only(tmp_path) -> None:
    model = SimplexHead(0, 6, num_slots=1024)
    model.slots.add("imagenet", range(600))
    state = model.state_dict()
    assert sorted(state) == ["_extra_state", "junction.weight"]
    assert state["junction.weight"].shape == (1023, 6)
    assert not list(model.buffers())
    torch.save(state, tmp_path / "head.pt")
    again = SimplexHead(0, 6, num_slots=1024)
    again.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert again.slots.to_dict() == model.slots.to_dict()
    assert torch.equal(again.junction.weight, model.junction.weight)
    with pytest.raises(ValueError, match="the saved head has 1024 slots, this one 3"):
        SimplexHead(3, 6).load_state_dict(state)


def test_a_registry_is_copied_into_a_head_and_never_shared() -> None:
    old = head()
    new = SimplexHead(0, 8, slots=old.slots)
    new.grow(14)
    assert (old.num_classes, new.num_classes) == (10, 14)
    assert new.slots.lookup("default", torch.arange(10)).tolist() == list(range(10))
    with pytest.raises(ValueError, match="scale"):
        SimplexHead(3, 8, slots=SlotRegistry(8), scale=-1.0)
    with pytest.raises(ValueError, match="slots has 16 slots, num_slots says 8; leave num_slots out"):
        SimplexHead(0, 8, slots=old.slots, num_slots=8)


def test_prototypes_of_the_slots_in_use() -> None:
    model = head()
    assert torch.equal(model.prototypes(), simplex_prototypes(16)[:10])
    assert torch.equal(model.prototypes(torch.tensor([15])), simplex_prototypes(16)[15:])
    assert head(dtype=torch.float64).prototypes().dtype == torch.float64


def test_trains_and_compiles() -> None:
    model = head()
    x, target = torch.randn(64, 6), torch.arange(64) % 6
    x = x + 4 * F.one_hot(target, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    first = model.loss(x, target).item()
    step = torch.compile(model.loss, fullgraph=True)
    for _ in range(60):
        optimizer.zero_grad()
        step(x, target).backward()
        optimizer.step()
    assert model.loss(x, target).item() < first / 3
    assert (model.predict(x)[1][:, 0] == target).float().mean() > 0.9


def test_repr_says_the_options() -> None:
    assert "num_classes=10, num_slots=16, normalize=False, scale=1.0, margin=None" in repr(head())


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: SimplexHead(1, 4), ValueError, "num_slots must be at least 2, got 1"),
        (lambda: SimplexHead(-1, 4, num_slots=4), ValueError, "num_classes must be >= 0"),
        (lambda: SimplexHead(9, 4, num_slots=8), ValueError, "namespace 'default' needs 9 slots, 8 of 8 are free"),
        (lambda: SimplexHead(4, 0), ValueError, "in_features >= 1, got 4 and 0"),
        (lambda: head(scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
        (lambda: head(margin=("cosine", 0.3)), ValueError, "margin needs normalize=True"),
        (
            lambda: head().predict(torch.randn(2, 6), k=11),
            ValueError,
            r"k must lie in \[1, 10\], the classes in use, got 11",
        ),
        (lambda: head().grow(9), ValueError, "num_classes can only grow, from 10, got 9"),
        (lambda: head().grow(17), ValueError, "needs 7 slots, 6 of 16 are free"),
    ],
)
def test_bad_input(act, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()
