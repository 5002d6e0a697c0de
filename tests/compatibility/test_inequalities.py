"""Tests violation rates of the two inequalities against hand-computed values, rationals and float64, and edge cases."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
import versions as loose

from simplexfix import compatibility
from simplexfix.compatibility import Violations, inequalities
from simplexfix.labelled import _rows


def inequality_violations(new_query, old_query, old_gallery, query_labels, gallery_labels, **ids) -> Violations:
    """Calls `simplexfix.compatibility.inequality_violations` with separate arrays."""
    old, new = loose.upgrade(old_query, new_query, query_labels, old_gallery, gallery_labels, **ids)
    return compatibility.inequality_violations(old, new)


def in_float64(new, old, gallery, query_labels, gallery_labels) -> Violations:
    """Computes the equation of `inequality_violations` in float64."""

    def unit(rows):
        rows = rows.astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    change = unit(new) @ unit(gallery).T - unit(old) @ unit(gallery).T
    same = query_labels[:, None] == gallery_labels[None]
    return Violations(
        int(same.sum()), int((same & (change < 0)).sum()), int((~same).sum()), int((~same & (change > 0)).sum())
    )


def test_by_hand() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    old = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    # query 0 moves right: nearer to item 0, farther from item 1; query 1 moves left; query 2 does not move
    new = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 5.0]])
    found = inequality_violations(new, old, gallery, [7, 7, 7], [7, 2**40])
    assert found == Violations(same_pairs=3, same_violations=1, other_pairs=3, other_violations=1)
    assert found.same == pytest.approx(1 / 3)
    assert found.other == pytest.approx(1 / 3)


# one tile; partial tiles in rows and columns; several blocks of tiles
@pytest.mark.parametrize(("queries", "items", "block_rows"), [(7, 5, 10**6), (300, 4100, 10**6), (300, 500, 90)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_against_float64(monkeypatch, queries: int, items: int, block_rows: int, dtype) -> None:
    d = 33
    monkeypatch.setattr(_rows, "SLICE_BYTES", 8 * d * block_rows)
    numbers = np.random.default_rng(0)
    old, gallery = numbers.normal(size=(queries, d)).astype(dtype), numbers.normal(size=(items, d)).astype(dtype)
    new = (old + 0.1 * numbers.normal(size=(queries, d))).astype(dtype)
    labels = numbers.integers(-3, 9, queries) * 5, numbers.integers(-4, 8, items) * 5
    found = inequality_violations(new, old, gallery, *labels)
    assert found == in_float64(new, old, gallery, *labels)
    assert 0.2 < found.same < 0.8  # so that a reversed inequality is detected
    assert 0.3 < found.other < 0.6


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9])
def test_where_float32_products_are_wrong(step: float) -> None:
    """Rounding can flip the sign of a difference of float32 products; rational numbers give the exact sign."""
    numbers = np.random.default_rng(1)
    old = numbers.normal(size=(40, 16))
    new = old + step * numbers.normal(size=old.shape)
    gallery = numbers.normal(size=(50, 16))
    labels = numbers.integers(3, size=40), numbers.integers(3, size=50)
    found = inequality_violations(new, old, gallery, *labels)

    counts = [0, 0]
    for i in range(40):
        a, b = ([Fraction(x) for x in rows[i].tolist()] for rows in (new, old))
        for j in range(50):
            g = [Fraction(x) for x in gallery[j].tolist()]
            # a.g / |a| - b.g / |b|  has the sign of the difference of their signed squares
            p, q = (sum(x * y for x, y in zip(r, g, strict=True)) for r in (a, b))
            signed = p * abs(p) * sum(x * x for x in b) - q * abs(q) * sum(x * x for x in a)
            same = labels[0][i] == labels[1][j]
            counts[not same] += signed < 0 if same else signed > 0
    assert [found.same_violations, found.other_violations] == counts

    small = [(r / np.linalg.norm(r, axis=1, keepdims=True)).astype(np.float32) for r in (new, old, gallery)]
    naive = small[0] @ small[2].T - small[1] @ small[2].T
    same = labels[0][:, None] == labels[1]
    if step < 1e-4:  # the float32 products are wrong for such steps
        assert counts != [int((same & (naive < 0)).sum()), int((~same & (naive > 0)).sum())]


def test_equal_scores_are_no_violations() -> None:
    numbers = np.random.default_rng(2)
    rows = numbers.normal(size=(100, 700)).astype(np.float32)
    labels = np.arange(100) % 4
    for other in (rows, 4 * rows, rows.astype(np.float64) * 0.1):
        found = inequality_violations(other, rows, rows[::-1], labels, labels)
        assert (found.same_violations, found.other_violations) == (0, 0)
    # orthogonal moves: every product is 0, as for one-hot features
    moved = np.eye(8)[[0, 1]] + np.eye(8)[[2, 3]]
    found = inequality_violations(moved, 2 * moved, np.eye(8)[4:], [0, 1], [0, 1, 2, 3])
    assert (found.same_violations, found.other_violations) == (0, 0)


def test_unchanged_queries_among_changed_ones() -> None:
    numbers = np.random.default_rng(6)
    old, gallery = numbers.normal(size=(90, 12)), numbers.normal(size=(70, 12))
    new = np.where(np.arange(90)[:, None] % 3 == 0, old, numbers.normal(size=old.shape))
    labels = np.arange(90) // 10, np.arange(70) % 9
    found = inequality_violations(new, old, gallery, *labels)
    assert found == in_float64(new, old, gallery, *labels)
    assert found.same_violations > 100


def test_few_and_many_undecided_pairs_agree(monkeypatch) -> None:
    """Near duplicates: all pairs of a tile are recomputed in float64, by either method."""
    numbers = np.random.default_rng(3)
    gallery = np.repeat(numbers.normal(size=(1, 64)), 90, axis=0) + 1e-9 * numbers.normal(size=(90, 64))
    old = numbers.normal(size=(50, 64))
    new = old + numbers.normal(size=(50, 64))
    unit = gallery[0] / np.linalg.norm(gallery[0])
    # new rows have the old cosine with the first item, so only the noise decides
    new /= np.linalg.norm(new, axis=1, keepdims=True)
    cosine = (old @ unit) / np.linalg.norm(old, axis=1)
    aside = new - np.outer(new @ unit, unit)
    aside *= (np.sqrt(1 - cosine**2) / np.linalg.norm(aside, axis=1))[:, None]
    new = aside + np.outer(cosine, unit)
    labels = np.arange(50) % 3, np.arange(90) % 3
    sizes = []
    whole = inequalities._exact_products
    monkeypatch.setattr(
        inequalities, "_exact_products", lambda m, t, i, j: (sizes.append(len(i)), whole(m, t, i, j))[1]
    )
    found = inequality_violations(new, old, gallery, *labels)
    assert sizes == [50 * 90]
    one_by_one = inequality_violations(new, old, gallery[:1], labels[0], labels[1][:1])
    parts = [inequality_violations(new, old, gallery[j : j + 1], labels[0], labels[1][j : j + 1]) for j in range(90)]
    assert parts[0] == one_by_one
    assert found.same_violations == sum(part.same_violations for part in parts)
    assert found.other_violations == sum(part.other_violations for part in parts)
    monkeypatch.setattr(inequalities, "_exact_products", lambda m, t, i, j: np.einsum("ij,ij->i", m[i], t[j]))
    assert inequality_violations(new, old, gallery, *labels) == found


def test_an_item_is_not_compared_with_itself() -> None:
    numbers = np.random.default_rng(4)
    old = numbers.normal(size=(60, 9))
    new = old + 0.3 * numbers.normal(size=old.shape)
    labels = np.arange(60) % 5
    ids = np.arange(60) * 2**33
    order = numbers.permutation(60)[:45]
    everything = inequality_violations(new, old, old[order], labels, labels[order])
    found = inequality_violations(
        new, old, old[order], labels, labels[order], query_ids=ids, gallery_ids=torch.tensor(ids[order])
    )
    assert found.same_pairs == everything.same_pairs - 45
    assert found.other_pairs == everything.other_pairs
    assert found.same_violations == everything.same_violations - 45  # nothing is as near as the item itself
    # an item that has another label as a query forms other-class pairs
    shifted = inequality_violations(new, old, old, labels, labels + 1, query_ids=ids, gallery_ids=ids)
    assert (shifted.same_pairs, shifted.other_pairs) == (12 * 48, 3600 - 12 * 48 - 60)


def test_zero_rows_and_huge_and_denormal_numbers() -> None:
    old = np.array([[1e300, 1e300], [1e-310, 2e-310], [0.0, 0.0]])
    new = np.array([[1e300, 0.0], [0.0, 1e-310], [1.0, 0.0]])
    found = inequality_violations(new, old, np.array([[1.0, 0.0], [0.0, 0.0]]), [0, 0, 0], [0, 1])
    assert found == Violations(same_pairs=3, same_violations=1, other_pairs=3, other_violations=0)


def test_no_pair_of_a_kind_is_nan() -> None:
    found = inequality_violations(np.eye(2), np.eye(2), np.eye(2), [0, 1], [2, 3])
    assert math.isnan(found.same)
    assert found.other == 0


def test_memory_does_not_grow_with_the_pairs() -> None:
    d, count = 8, 6000
    rows = np.random.default_rng(5).normal(size=(count, d)).astype(np.float32)
    labels = np.arange(count) % 10
    tracemalloc.start()
    inequality_violations(rows, rows[::-1], rows, labels, labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < count * count * 4 / 6  # a sixth of one float32 score matrix


BAD = [
    ({"new_query": np.ones((3, 4))}, ValueError, "new.query has 4 columns, old.gallery has 2: features of different"),
    ({"old_gallery": np.ones((2, 4))}, ValueError, "has 2 columns, old.gallery has 4"),
    ({"new_query": np.ones((2, 2))}, ValueError, r"query has 2 rows, query_labels has shape \[3\]"),
    (
        {"new_query": np.ones((3, 2), int)},
        TypeError,
        "query must be float32, float64 or float16, got int64",
    ),
    ({"old_gallery": np.array([[1, 1], [1, np.nan]])}, ValueError, "old.gallery row 1 holds nan or inf"),
    ({"new_query": np.array([[1, 1], [1, 1], [np.inf, 1]])}, ValueError, "new.query row 2 holds nan or inf"),
    ({"query_labels": [0, 1]}, ValueError, r"query has 3 rows, query_labels has shape \[2\]"),
    ({"gallery_labels": [0.0, 1.0]}, TypeError, "gallery_labels must be integers or names, got float64"),
    ({"gallery_labels": np.array([0, 2**63], np.uint64)}, ValueError, "gallery_labels must fit into int64"),
    ({"query_ids": [0, 1, 2]}, ValueError, "query_ids without gallery_ids"),
    (
        {"query_ids": [0, 1, 2], "gallery_ids": [1, 1]},
        ValueError,
        "gallery_ids must hold each id once, got 1",
    ),
    ({"query_ids": [0, 1, 2], "gallery_ids": [0]}, ValueError, r"gallery has 2 rows, gallery_ids has shape \[1\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message: str) -> None:
    arguments = {
        "new_query": np.ones((3, 2)),
        "old_query": np.ones((3, 2)),
        "old_gallery": np.ones((2, 2)),
        "query_labels": [0, 1, 2],
        "gallery_labels": [0, 1],
    }
    with pytest.raises(error, match=message):
        inequality_violations(**{**arguments, **change})
