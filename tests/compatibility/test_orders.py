"""Tests backfill orders against hand-computed values and a float64 loop, and ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from versions import pair

from simplexfix import compatibility
from simplexfix.compatibility import orders


def farthest_from_class_mean(rows, labels):
    return compatibility.farthest_from_class_mean(pair(rows[:1], [0], rows, labels))


def lowest_margin(rows, labels):
    return compatibility.lowest_margin(pair(rows[:1], [0], rows, labels))


ORDERS = {"farthest_from_class_mean": farthest_from_class_mean, "lowest_margin": lowest_margin}


def test_by_hand() -> None:
    # the template of class 4 is along (2, 1), that of class 9 along (1, 4)
    # own cosines: 0.89, 0.45, 0.96 and 0.24, 0.99
    rows = np.array([[1.0, 0.0], [0.0, 0.1], [1.0, 0.9], [0.7, 0.0], [0.3, 4.0]])
    labels = np.array([4, 4, 4, 9, 9])
    assert farthest_from_class_mean(rows, labels).tolist() == [3, 1, 0, 2, 4]
    # margins: 0.89 - 0.24, 0.45 - 0.97, 0.96 - 0.83, 0.24 - 0.89, 0.99 - 0.51
    assert lowest_margin(rows, labels).tolist() == [3, 1, 2, 4, 0]


def by_definition(name: str, rows, labels) -> list[int]:
    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    rows = rows.astype(np.float64)
    classes = np.unique(labels)
    scores = unit(rows) @ unit(np.stack([rows[labels == c].mean(0) for c in classes])).T
    own = labels[:, None] == classes
    values = scores[own] - (np.where(own, -np.inf, scores).max(1) if name == "lowest_margin" else 0)
    gaps = np.diff(np.sort(values))
    assert (gaps > 4e-7).all()  # so that rounding to float32 cannot change the order
    return np.argsort(values).tolist()


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("block", [1, 1000, 2**23])
def test_against_float64(monkeypatch, name: str, block: int) -> None:
    monkeypatch.setattr(orders, "_BLOCK_NUMBERS", block)
    numbers = np.random.default_rng(9)
    labels = numbers.integers(7, size=90) * 5 - 2**35
    rows = (numbers.normal(size=(7, 20))[(labels + 2**35) // 5] + numbers.normal(size=(90, 20))).astype(np.float32)
    rows *= numbers.uniform(0.5, 2, (90, 1)).astype(np.float32)
    expected = by_definition(name, rows, labels)
    assert ORDERS[name](rows, labels).tolist() == expected
    assert ORDERS[name](torch.tensor(rows), torch.tensor(labels)).tolist() == expected


def test_ties_come_by_lower_row() -> None:
    row = np.random.default_rng(2).normal(size=(1, 67))
    rows, labels = np.repeat(np.concatenate([row, -row]), [41, 19], axis=0), np.arange(60) % 3
    assert farthest_from_class_mean(rows, labels).tolist() == [*range(41, 60), *range(41)]
    # every template is along `row`: all margins are 0
    assert lowest_margin(rows, labels).tolist() == list(range(60))
    rows = np.concatenate([rows, np.random.default_rng(3).normal(size=(2, 67))])
    found = lowest_margin(rows, [*[5] * 60, 6, 6]).tolist()
    assert [i for i in found if i < 60] == [*range(41, 60), *range(41)]


def test_one_class_has_no_margins_and_a_row_of_its_own_no_distance() -> None:
    rows = np.random.default_rng(4).normal(size=(9, 5))
    assert lowest_margin(rows, np.full(9, 3)).tolist() == list(range(9))
    assert farthest_from_class_mean(rows, [0, 0, 0, 1, 0, 0, 0, 0, 0]).tolist()[-1] == 3


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.eye(3), [0, 1]), ValueError, r"gallery has 3 rows, gallery_labels has shape \[2\]"),
        ((np.eye(3), [0.0, 1.0, 2.0]), TypeError, "gallery_labels must be integers"),
        ((np.full((3, 2), np.nan), [0, 1, 2]), ValueError, "old.gallery row 0 holds nan or inf"),
        ((np.eye(3, dtype=int), [0, 1, 2]), TypeError, "query must be float32, float64 or float16, got int64"),
    ],
)
def test_bad_input(name: str, arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ORDERS[name](*arguments)
