"""Tests backfill curves and mixed galleries against hand-computed values and an evaluation of each step.

The widths of the versions may differ.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from versions import pair

from simplexfix import compatibility
from simplexfix.compatibility import BackfillCurve
from simplexfix.labelled import LabelledItems
from simplexfix.retrieval import PROTOCOLS, Protocol, RetrievalResults, cosine_topk, metrics


def backfill_curve(query, query_labels, old_gallery, new_gallery, gallery_labels, **options) -> BackfillCurve:
    """`simplexfix.compatibility.backfill_curve` of separate arrays; queries by the old model do not matter."""
    items = LabelledItems(query_labels, gallery_labels)
    old_query = np.ones((len(query), old_gallery.shape[1]), dtype=np.float32)
    old, new = items.version(old_query, old_gallery), items.version(query, new_gallery)
    return compatibility.backfill_curve(old, new, **options)


def mixed_topk(query, old_gallery, new_gallery, replaced, k, **options) -> tuple[Tensor, Tensor]:
    items = LabelledItems([0] * len(query), [0] * len(old_gallery))
    old, new = items.version(query, old_gallery), items.version(query, new_gallery)
    return compatibility.mixed_topk(old, new, replaced, k, **options)


def items(old_width: int = 12, new_width: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns new queries, their labels, the gallery by both models, and its labels; the old gallery is noisier."""
    g = torch.Generator().manual_seed(5)
    centres = torch.randn(9, max(old_width, new_width), generator=g)
    gallery_labels, query_labels = torch.randint(9, (110,), generator=g), torch.randint(10, (140,), generator=g)

    def features(labels: Tensor, noise: float, width: int) -> Tensor:
        rows = centres[labels % 9] + noise * torch.randn(len(labels), centres.shape[1], generator=g)
        return (rows * torch.rand(len(rows), 1, generator=g).exp())[:, :width].contiguous()

    old, new = features(gallery_labels, 1.9, old_width), features(gallery_labels, 1.1, new_width)
    # class ids are neither contiguous nor small, and one of them has queries only
    return features(query_labels, 1.1, new_width), query_labels * 3 + 2**40, old, new, gallery_labels * 3 + 2**40


def test_by_hand() -> None:
    # Queries lie along the axes. In the old gallery item 0 is near the wrong axis; new item 1 is wrong, new item 0 is
    # right.
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    old = torch.tensor([[0.1, 0.9], [0.0, 0.8], [0.6, 0.8]])
    new = torch.tensor([[1.0, 0.0], [0.8, 0.7], [0.0, 1.0]])
    # Labels of items: 7, 8, 8.  Query 0 (class 7) finds old item 2 until item 0 is new, then item 0.
    # Query 1 (class 8) finds item 1 while that is old, then item 0 while that is old, then item 2.
    curve = backfill_curve(query, [7, 8], old, new, [7, 8, 8], protocol="instance", steps=3, order=[1, 0, 2])
    # step 1, item 1 new: query 0 finds item 1 (wrong), query 1 finds item 0 (wrong); step 2, item 0 new: query 0 finds
    # it, query 1 item 2, 0.8 against 0.66; step 3: both right
    assert curve.hits is not None
    assert curve.hits.tolist() == [[False, True], [False, False], [True, True], [True, True]]
    assert curve.scores.tolist() == [0.5, 0.0, 1.0, 1.0]
    assert curve.fractions == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert curve.area == pytest.approx((0.25 + 0.5 + 1.0) / 3)
    assert curve.above_line == pytest.approx(curve.area - 0.75)
    assert curve.order.tolist() == [1, 0, 2]
    # the templates are (0.1, 0.9) and (0.6, 1.6); query 0 is nearer to the second until item 0 is new
    means = backfill_curve(query, [7, 8], old, new, [7, 8, 8], steps=3, order=[0, 1, 2])
    assert means.scores.tolist() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("order", ["random", "farthest_from_class_mean", "lowest_margin", "given"])
@pytest.mark.parametrize("steps", [1, 7, 109, 500])
def test_every_step_is_the_protocol_on_the_mixed_gallery(protocol: str, order: str, steps: int) -> None:
    query, query_labels, old, new, gallery_labels = items()
    given = np.random.default_rng(8).permutation(len(old)) if order == "given" else order
    curve = backfill_curve(query, query_labels, old, new, gallery_labels, order=given, protocol=protocol, steps=steps)
    assert curve.hits is not None
    assert sorted(curve.order.tolist()) == list(range(len(old)))
    assert len(curve.scores) == min(steps, len(old)) + 1
    for fraction, score, hits in zip(curve.fractions.tolist(), curve.scores.tolist(), curve.hits, strict=True):
        gallery = old.clone()
        at = torch.tensor(curve.order[: round(fraction * len(old))].copy())
        gallery[at] = new[at]
        expected = PROTOCOLS[protocol].hits(pair(query, query_labels, gallery, gallery_labels))
        assert hits.tolist() == expected.tolist()
        assert score == int(expected.sum()) / len(expected)
    score = PROTOCOLS[protocol].score
    assert curve.scores[0] == score(pair(query, query_labels, old, gallery_labels))
    assert curve.scores[-1] == score(pair(query, query_labels, new, gallery_labels))
    assert curve.scores[-1] > curve.scores[0] + 0.05  # so that an unchanged curve is detected
    slices = zip(curve.scores, curve.scores[1:], curve.fractions, curve.fractions[1:], strict=False)
    assert curve.area == pytest.approx(sum((a + b) / 2 * (right - left) for a, b, left, right in slices), abs=1e-12)


def test_a_protocol_of_ones_own() -> None:
    query, query_labels, old, new, gallery_labels = items()

    def mean_ap(version) -> float:
        return float(metrics.mean_average_precision(RetrievalResults.search(version)))

    own = Protocol("mean_ap", score=mean_ap)
    curve = backfill_curve(query, query_labels, old, new, gallery_labels, protocol=own, steps=2)
    gallery = old.clone()
    gallery[curve.order[:55].copy()] = new[curve.order[:55].copy()]
    assert curve.scores.tolist() == [mean_ap(pair(query, query_labels, x, gallery_labels)) for x in (old, gallery, new)]
    assert (curve.hits, curve.protocol) == (None, "mean_ap")


@pytest.mark.parametrize(("old_width", "new_width"), [(7, 12), (12, 7), (12, 12)])
def test_the_ends_in_two_widths_are_those_of_the_pure_galleries(old_width: int, new_width: int) -> None:
    query, query_labels, old, new, gallery_labels = items(old_width, new_width)
    width = min(old_width, new_width)
    for protocol, row in PROTOCOLS.items():
        curve = backfill_curve(
            query, query_labels, old, new, gallery_labels, protocol=protocol, steps=3, widths="leading"
        )
        assert curve.hits is not None
        before = row.hits(
            pair(query[:, :width].contiguous(), query_labels, old[:, :width].contiguous(), gallery_labels)
        )
        assert curve.hits[0].tolist() == before.tolist()
        assert curve.hits[-1].tolist() == row.hits(pair(query, query_labels, new, gallery_labels)).tolist()
        assert 0.2 < curve.scores[0] < curve.scores[-1]


@pytest.mark.parametrize(("old_width", "new_width"), [(7, 12), (12, 7)])
def test_templates_in_two_widths_against_a_loop(old_width: int, new_width: int) -> None:
    query, query_labels, old, new, gallery_labels = items(old_width, new_width)
    by_class = gallery_labels.argsort(stable=True)  # so that class templates mix both widths
    curve = backfill_curve(query, query_labels, old, new, gallery_labels, order=by_class, steps=4, widths="leading")
    assert curve.hits is not None
    classes = gallery_labels.unique()
    for t, hits in enumerate(curve.hits):
        replaced = set(curve.order[: t * 110 // 4].tolist())
        scores = []
        for c in classes:
            members = (gallery_labels == c).nonzero()[:, 0].tolist()
            width = new_width if replaced & set(members) else min(old_width, new_width)
            total = torch.zeros(width, dtype=torch.float64)
            for i in members:
                row = (new if i in replaced else old)[i, :width].double()
                total[: len(row)] += row
            scores.append(F.normalize(query[:, :width].double()) @ F.normalize(total, dim=0))
        nearest = torch.stack(scores).argmax(0)
        assert hits.tolist() == (classes[nearest] == query_labels).tolist()


def definition(query: Tensor, old: Tensor, new: Tensor, replaced: Tensor, k: int) -> tuple[Tensor, list[list[int]]]:
    """Computes each row's score in the dimensions that query and row share, then sorts once."""
    scores = torch.empty(len(query), len(old))
    for i in range(len(old)):
        row = new[i] if replaced[i] else old[i]
        width = min(query.shape[1], len(row))
        unit = F.normalize(query[:, :width].double()).float().double()
        scores[:, i] = (unit @ F.normalize(row[:width].double(), dim=0).float().double()).float()
    order = [sorted(range(len(old)), key=lambda i: (-scores[q, i].item(), i))[:k] for q in range(len(query))]
    return scores.gather(1, torch.tensor(order)), order


# (query width, old width, new width): queries may have the width of either model
@pytest.mark.parametrize("widths", [(12, 12, 12), (12, 7, 12), (7, 7, 12), (7, 12, 7), (12, 12, 7)])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_mixed_topk_against_the_definition(widths: tuple[int, int, int], fraction: float) -> None:
    g = torch.Generator().manual_seed(1)
    query, old, new = (torch.randn(n, d, generator=g) for n, d in zip((20, 60, 60), widths, strict=True))
    replaced = torch.rand(60, generator=g) < fraction
    scores, ids = mixed_topk(query, old, new, replaced, 9, widths="leading")
    expected, order = definition(query, old, new, replaced, 9)
    assert ids.tolist() == order
    torch.testing.assert_close(scores, expected, rtol=0, atol=2**-24)


def test_mixed_topk_of_one_width_is_the_search_of_the_mixed_gallery_to_the_bit() -> None:
    numbers = np.random.default_rng(3)
    # small integers: many rows are equal, within and across versions
    query, old, new = (numbers.integers(-1, 2, (n, 4)).astype(np.float32) for n in (30, 200, 200))
    replaced = numbers.random(200) < 0.5
    mixed = torch.tensor(np.where(replaced[:, None], new, old))
    for k in (1, 13, 200, 203):  # 200 exceeds the old and the new part, 203 the whole gallery
        scores, ids = mixed_topk(query, old, new, replaced, k)
        expected = cosine_topk(torch.tensor(query), mixed, k)
        assert torch.equal(scores, expected[0])
        assert torch.equal(ids, expected[1])
    assert (expected[0][:, :-3].diff(dim=1) == 0).any()  # so that ties occur


def test_mapped_files_and_float16(tmp_path) -> None:
    query, query_labels, old, new, gallery_labels = items()
    for name, rows in (("query", query), ("old", old.half()), ("new", new.double())):
        np.save(tmp_path / f"{name}.npy", rows.numpy())
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("query", "old", "new")]
    labels = query_labels.numpy(), gallery_labels.tolist()
    found = backfill_curve(mapped[0], labels[0], mapped[1], mapped[2], labels[1], steps=4)
    expected = backfill_curve(query, query_labels, old.half().float(), new, gallery_labels, steps=4)
    assert found.scores.tolist() == expected.scores.tolist()
    replaced = np.arange(110) % 3 == 0
    a = mixed_topk(mapped[0], mapped[1], mapped[2], replaced.tolist(), 3)
    b = mixed_topk(query, old.half(), new, torch.tensor(replaced), 3)
    assert torch.equal(a[1], b[1])


def test_a_random_order_is_that_of_its_generator() -> None:
    arguments = items()

    def order(generator: np.random.Generator | None) -> list[int]:
        return backfill_curve(*arguments, steps=1, generator=generator).order.tolist()

    assert order(None) == order(np.random.default_rng(0)) == np.random.default_rng(0).permutation(110).tolist()
    assert order(np.random.default_rng(1)) == np.random.default_rng(1).permutation(110).tolist() != order(None)


def test_as_dict_is_plain_and_results_are_read_only() -> None:
    curve = backfill_curve(*items(), steps=3, order="lowest_margin")
    found = json.loads(json.dumps(curve.as_dict()))
    assert set(found) == {
        *("protocol", "order", "gallery", "queries", "queries_of_classes_not_in_gallery"),
        *("fractions", "scores", "area", "above_line"),
    }
    assert (found["order"], found["protocol"], found["gallery"]) == ("lowest_margin", "nearest_class_mean", 110)
    absent = int((items()[1] == 27 + 2**40).sum())
    assert absent > 0
    assert (found["queries"], found["queries_of_classes_not_in_gallery"]) == (140, absent)
    assert found["scores"] == curve.scores.tolist()
    for array in (curve.fractions, curve.scores, curve.hits, curve.order):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_arguments_stay_as_they_are() -> None:
    arguments = items()
    order = np.arange(110)[::-1].copy()
    copies = [x.clone() for x in arguments]
    curve = backfill_curve(*arguments, order=order, steps=2)
    order[0] = 5
    assert curve.order[0] == 109
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


NAN, INF = torch.eye(3), torch.eye(3)
NAN[1, 1], INF[2, 0] = math.nan, math.inf
BAD = [
    ({"new_gallery": torch.eye(4)[:, :3]}, ValueError, r"gallery has 4 rows, gallery_labels has shape \[3\]"),
    ({"old_gallery": torch.ones(3, 4)}, ValueError, 'new.query has 3 columns, old.gallery has 4: .*widths="leading"'),
    ({"new_gallery": NAN}, ValueError, "new.gallery row 1 holds nan or inf"),
    ({"old_gallery": INF}, ValueError, "old.gallery row 2 holds nan or inf"),
    ({"query": NAN}, ValueError, "new.query row 1 holds nan or inf"),
    ({"widths": "trailing"}, ValueError, "widths must be one of 'equal', 'leading', got 'trailing'"),
]
BAD_CURVE = [
    ({"new_gallery": torch.ones(3, 4)}, ValueError, 'new.query has 3 columns, new.gallery has 4: .*widths="leading"'),
    ({"query": torch.ones(3, 4), "widths": "leading"}, ValueError, "query has 4 columns, new.gallery has 3"),
    ({"query_labels": [1, 2]}, ValueError, r"query has 3 rows, query_labels has shape \[2\]"),
    ({"gallery_labels": [1, 2]}, ValueError, r"gallery has 3 rows, gallery_labels has shape \[2\]"),
    ({"gallery_labels": [1.0, 2.0, 3.0]}, TypeError, "gallery_labels must be integers or names, got float64"),
    ({"order": "hardest"}, ValueError, "'random', 'farthest_from_class_mean', 'lowest_margin', got 'hardest'"),
    ({"order": [0, 1]}, ValueError, r"old.gallery has 3 rows, order has shape \[2\]"),
    ({"order": [0, 1, 1]}, ValueError, "order must hold each id once, got 1 in rows 1 and 2"),
    ({"order": [1, 2, 3]}, ValueError, "order must hold each row from 0 to 2 once, got 3"),
    ({"order": [-1, 0, 1]}, ValueError, "order must hold each row from 0 to 2 once, got -1"),
    ({"order": [0.0, 1.0, 2.0]}, TypeError, "order must be integers, got float64"),
    ({"protocol": "nearest"}, ValueError, "protocol must be one of 'nearest_class_mean', 'instance', or a"),
    (
        {"protocol": Protocol("own", score=lambda version: torch.ones(3))},
        TypeError,
        "the score by own must be a number, got Tensor",
    ),
    ({"protocol": None}, TypeError, "protocol must be a name, .*, or a simplexfix.retrieval.Protocol, got NoneType"),
    (
        {"protocol": Protocol("own", score=lambda version: 0.0), "old_gallery": torch.ones(3, 4), "widths": "leading"},
        ValueError,
        "old.gallery has 4 columns, new.gallery has 3: protocol 'own' cannot score galleries of two widths",
    ),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": 2.0}, TypeError, "steps must be an integer, got float"),
    ({"generator": 0}, TypeError, "generator must be a numpy.random.Generator, got int"),
]
BAD_SEARCH = [
    ({"replaced": [True, False]}, ValueError, r"replaced must have shape \[3\], one per row, got \[2\]"),
    ({"replaced": [0, 1, 2]}, TypeError, "replaced must be bool, true for rows by the new model, got int64"),
    ({"k": 0}, ValueError, "k must lie between 1 and"),
    ({"k": 1.5}, TypeError, "k must be an integer, got float"),
    ({"queries": "both"}, ValueError, "queries must be one of 'new', 'old', got 'both'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD + BAD_CURVE)
def test_bad_input(change, error: type[Exception], message: str) -> None:
    arguments = {
        "query": torch.eye(3),
        "query_labels": [0, 1, 2],
        "old_gallery": torch.eye(3),
        "new_gallery": torch.eye(3),
        "gallery_labels": [0, 1, 2],
    }
    with pytest.raises(error, match=message):
        backfill_curve(**{**arguments, **change})


@pytest.mark.parametrize(("change", "error", "message"), BAD + BAD_SEARCH)
def test_bad_input_of_a_mixed_search(change, error: type[Exception], message: str) -> None:
    arguments = {
        "query": torch.eye(3),
        "old_gallery": torch.eye(3),
        "new_gallery": torch.eye(3),
        "replaced": [True, False, False],
        "k": 2,
    }
    with pytest.raises(error, match=message):
        mixed_topk(**{**arguments, **change})
