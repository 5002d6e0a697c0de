"""Tests rehearsal: herding against hand-computed values and its equation, budgets, samples, and states."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from simplexfix.training import Rehearsal, herding_rows, random_rows, read_state, write_state


def at(*degrees: float) -> np.ndarray:
    """Returns unit vectors of the plane."""
    return np.array([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def memory(per_class: int = 3, selection: str = "random", seed: int = 0) -> Rehearsal:
    return Rehearsal(per_class, selection=selection, generator=np.random.default_rng(seed))


def test_herding_by_hand() -> None:
    """Directions of 0, 10, 40 and 90 degrees as (cos, sin); their mean m is (.6877, .4541).

    First: 40 degrees, (.7660, .6428), is .204 from m (10 degrees: .409, 0: .551, 90: .878).
    Second: the mean of 40 and 10 degrees, (.8754, .4082), is .193 from m; of 40 and 0, (.8830, .3214): .236; of 40 and
    90, (.3830, .8214): .477.
    Third: the mean of 40, 10 and 90 degrees, (.5836, .6055), is .184 from m; of 40, 10 and 0, (.9170, .2722): .293.
    0 degrees is last.
    """
    assert herding_rows(at(0, 10, 40, 90), [5, 5, 5, 5], 4).tolist() == [2, 1, 3, 0]
    # lengths have no effect
    assert herding_rows(at(0, 10, 40, 90) * [[9.0], [1e-200], [3.0], [1e30]], [5] * 4, 3).tolist() == [2, 1, 3]


def test_herding_balances_the_mean() -> None:
    """30 degrees is nearest to the mean. -40 degrees is second, since it balances 30, although 40 is nearer."""
    assert herding_rows(at(40, -40, 30), [0, 0, 0], 3).tolist() == [2, 1, 0]


def naive_herding(features: np.ndarray, count: int) -> list[int]:
    x = [row / np.linalg.norm(row) if row.any() else row for row in features.astype(np.longdouble)]
    mean = sum(x) / len(x)
    chosen: list[int] = []
    while len(chosen) < min(count, len(x)):
        apart = {
            i: np.linalg.norm(mean - (x[i] + sum(x[j] for j in chosen)) / (len(chosen) + 1))
            for i in range(len(x))
            if i not in chosen
        }
        chosen.append(min(apart, key=apart.get))
    return chosen


@pytest.mark.parametrize("kind", ["float32", "float64", "tensor", "bfloat16"])
def test_herding_equals_its_equation_in_each_class(kind: str) -> None:
    numbers = np.random.default_rng(4)
    features = numbers.normal(size=(90, 7)).astype(np.float64 if kind == "float64" else np.float32)
    features[13] = 0
    labels = numbers.choice([-3, 8, 2**40], size=90)
    given = features if kind.startswith("float") else torch.from_numpy(features)
    if kind == "bfloat16":
        given = given.bfloat16()
        features = given.double().numpy()
    found = herding_rows(given, labels, 6)
    expected = []
    for c in (-3, 8, 2**40):
        rows = np.flatnonzero(labels == c)
        expected += rows[naive_herding(features[rows], 6)].tolist()
    assert found.tolist() == expected
    assert torch.equal(torch.cat([part[:4] for part in found.split(6)]), herding_rows(given, labels, 4))  # a prefix


def test_herding_takes_the_first_of_equal_rows() -> None:
    features = np.repeat(np.random.default_rng(0).normal(size=(3, 33)).astype(np.float32), 5, axis=0)
    assert sorted(herding_rows(features, np.zeros(15, int), 3).tolist()) == [0, 5, 10]


def test_random_rows_are_of_every_class_and_all_equally_often() -> None:
    labels = torch.tensor([7, 7, 2, 7, 2, 7, 9])
    counts = np.zeros(7)
    for seed in range(2000):
        rows = random_rows(labels, 2, np.random.default_rng(seed))
        assert labels[rows].tolist() == [2, 2, 7, 7, 9]
        assert len(set(rows.tolist())) == 5
        counts[rows.numpy()] += 1
    assert counts[[2, 4, 6]].tolist() == [2000] * 3
    assert abs(counts[[0, 1, 3, 5]] - 1000).max() < 5 * math.sqrt(2000 / 4)
    more = random_rows(labels, 3, np.random.default_rng(1))
    assert more.tolist()[2:4] == random_rows(labels, 2, np.random.default_rng(1)).tolist()[2:4]


def fill(remembered: Rehearsal, classes=(4, 1)) -> None:
    for c in classes:
        numbers = np.random.default_rng(c)
        inputs = torch.arange(8).view(8, 1, 1) + 100 * c
        features = numbers.normal(size=(8, 5)) if remembered.selection == "herding" else None
        remembered.add_class(c, inputs.expand(8, 2, 2), features)


@pytest.mark.parametrize("selection", ["random", "herding"])
def test_a_memory_holds_the_items_of_its_selection(selection: str) -> None:
    remembered = memory(3, selection)
    assert len(remembered) == 0
    assert remembered.classes == []
    numbers = np.random.default_rng(0)  # draws as the memory's own generator does
    kept = {}
    for c, count in ((4, 8), (1, 2)):
        inputs, features = torch.arange(count)[:, None] + 100 * c, np.random.default_rng(c).normal(size=(count, 5))
        if selection == "herding":
            remembered.add_class(c, inputs, features)
            rows = herding_rows(features, [c] * count, 3)
        else:
            remembered.add_class(c, inputs)
            rows = random_rows([c] * count, 3, numbers)
        kept[c] = inputs[rows]
    assert remembered.classes == [1, 4]
    assert len(remembered) == 5  # class 1 has two items
    assert torch.equal(remembered.items().inputs, torch.cat([kept[4], kept[1]]))
    assert remembered.items().labels.tolist() == [4, 4, 4, 1, 1]
    assert torch.equal(remembered.pop_class(4), kept[4])
    assert remembered.classes == [1]
    remembered.pop_class(1)
    assert len(remembered) == 0


def test_samples_contain_every_item_once_before_repeating() -> None:
    remembered = memory()
    fill(remembered)
    drawn = torch.cat([remembered.sample(4).inputs[:, 0, 0] for _ in range(6)])
    all_items = sorted(remembered.items().inputs[:, 0, 0].tolist())
    rounds = [sorted(part.tolist()) for part in drawn.split(6)]
    assert rounds == [all_items] * 4
    assert len({tuple(part.tolist()) for part in drawn.split(6)}) > 1
    assert len(remembered.sample(20).labels) == 20  # more than there are
    sample = remembered.sample(6)
    assert torch.equal(sample.inputs[:, 0, 0] // 100, sample.labels)
    fill(remembered, [0])
    assert sorted(remembered.sample(9).labels.tolist()) == [0] * 3 + [1] * 3 + [4] * 3


@pytest.mark.parametrize("selection", ["random", "herding"])
def test_a_saved_memory_resumes_to_the_same_bits(tmp_path, selection: str) -> None:
    pytest.importorskip("safetensors", reason="states are written as safetensors")
    first = memory(3, selection)
    saved = [first.state_dict()]  # of an empty memory
    fill(first)
    first.sample(4)
    saved.append(first.state_dict())
    for i, state in enumerate(saved):
        plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        assert json.loads(json.dumps(plain)) == plain
        write_state(tmp_path / f"{i}.safetensors", state)
    expected = [first.sample(5) for _ in range(4)]
    fill(first, [2])
    expected.append(first.sample(9))

    second = memory(3, selection, seed=50)
    fill(second, [3])
    second.load_state_dict(read_state(tmp_path / "0.safetensors"))
    assert len(second) == 0
    fill(second)
    second.sample(4)
    third = memory(3, selection, seed=51)
    third.load_state_dict(read_state(tmp_path / "1.safetensors"))
    for other in (second, third):
        for want in expected[:4]:
            got = other.sample(5)
            assert torch.equal(got.inputs, want.inputs)
            assert torch.equal(got.labels, want.labels)
        fill(other, [2])
        assert torch.equal(other.sample(9).inputs, expected[4].inputs)


BAD = [
    (lambda: memory(0), ValueError, "per_class must be at least 1, got 0"),
    (lambda: memory(2.0), TypeError, "per_class must be an integer, got float"),
    (lambda: memory(selection="best"), ValueError, "selection must be one of 'random', 'herding', got 'best'"),
    (lambda: Rehearsal(3, generator=np.random.Generator(np.random.MT19937(0))), TypeError, "got .*MT19937"),
    (lambda: Rehearsal(3, generator=7), TypeError, "generator must be made by numpy.random.default_rng"),
    (lambda: memory().items(), ValueError, "the memory is empty: call add_class first"),
    (lambda: memory().sample(3), ValueError, "the memory is empty"),
    (lambda: filled().sample(0), ValueError, "count must be at least 1, got 0"),
    (lambda: filled().pop_class(2), ValueError, "class 2 is not in memory, which has"),
    (
        lambda: fill(filled(), [4]),
        ValueError,
        r"class 4 is in memory already: to replace its items, call pop_class\(4\) first",
    ),
    (lambda: memory().add_class(1, torch.zeros(0, 2)), ValueError, "inputs of class 1 must have at least one row"),
    (
        lambda: filled().add_class(2, torch.zeros(3, 2, 1)),
        ValueError,
        r"inputs must be torch.int64 \[N, 2, 2\] like those in memory, got torch.float32 \[3, 2, 1\]",
    ),
    (lambda: memory().add_class(1, torch.zeros(3), at(0, 1, 2)), ValueError, "features must be left out"),
    (lambda: memory(selection="herding").add_class(1, torch.zeros(3)), ValueError, r"needs features \[N, d\]"),
    (
        lambda: memory(selection="herding").add_class(1, torch.zeros(3), at(0, 1)),
        ValueError,
        "features has 2 rows, inputs has 3",
    ),
    (lambda: herding_rows(at(0, 1), [1, 2, 3], 2), ValueError, r"features has 2 rows, labels has shape \[3\]"),
    (lambda: herding_rows(at(0, math.nan), [1, 2], 2), ValueError, "features row 1 holds nan or inf"),
    (lambda: herding_rows(at(0, 1).astype(int), [1, 2], 2), TypeError, "features must be float32, float64 or float16"),
    (lambda: herding_rows(at(0, 1), [1.0, 2.0], 2), TypeError, "labels must be integers, got float64"),
    (lambda: random_rows(torch.zeros(3), 2, np.random.default_rng(0)), TypeError, "labels must be integers"),
    (lambda: random_rows(torch.arange(3), 0, np.random.default_rng(0)), ValueError, "per_class must be at least 1"),
    (
        lambda: memory(3).load_state_dict(memory(4).state_dict()),
        ValueError,
        "the state has per_class=4, but this memory has 3",
    ),
    (
        lambda: memory().load_state_dict(memory(selection="herding").state_dict()),
        ValueError,
        "the state has selection='herding', but this memory has 'random'",
    ),
]


@pytest.mark.parametrize(("act", "error", "message"), BAD)
def test_bad_input(act, error, message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def filled() -> Rehearsal:
    remembered = memory()
    fill(remembered)
    return remembered
