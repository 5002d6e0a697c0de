"""Tests that the report has the numbers of the public functions, and the worst regressions that float64 finds."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import versions as loose

from simplexfix.compatibility import (
    average_accuracy,
    average_compatibility,
    backfill_curve,
    backward_compatibility,
    bootstrap_cells,
    bootstrap_gain,
    compare_pairs,
    compatibility_hits,
    compatibility_matrix,
    compatibility_table,
    forward_compatibility,
    inequalities,
    inequality_violations,
    mcnemar_tests,
    negative_flip_rate,
    positive_flip_rate,
    worst_regressions,
)
from simplexfix.labelled import LabelledItems
from simplexfix.report import evaluate
from simplexfix.retrieval import PROTOCOLS

both = pytest.mark.parametrize("protocol", PROTOCOLS)
CLASSES, QUERIES, ITEMS = 9, 200, 150


def versions(count: int = 3, widths: tuple[int, ...] = ()) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Returns versions with growing class separation, the last one worse: queries, galleries, labels of both."""
    rng = np.random.default_rng(3)
    labels = np.arange(QUERIES + ITEMS) % CLASSES
    clear = [1.6 + 0.3 * t for t in range(count)]
    clear[-1] -= 0.5
    rows = [
        (rng.normal(size=(len(labels), d)) + c * np.eye(d)[labels]).astype(np.float32)
        for c, d in zip(clear, widths or (16,) * count, strict=True)
    ]
    return [x[:QUERIES] for x in rows], [x[QUERIES:] for x in rows], labels


def evaluated(queries, galleries, query_labels, gallery_labels, *, names=None, **options):
    """Calls `evaluate` for separate arrays."""
    of = loose.versions(queries, galleries, query_labels, gallery_labels)
    if names is not None:
        of = [
            version.items.version(*rows, name=name)
            for version, name, *rows in zip(of, names, queries, galleries, strict=True)
        ]
    return evaluate(of, **options)


@both
def test_numbers_are_those_of_the_public_functions(protocol: str) -> None:
    queries, galleries, labels = versions()
    of = labels[:QUERIES], labels[QUERIES:]
    report = evaluated(queries, galleries, *of, protocol=protocol, confidence=0.9, seed=7)
    matrix = compatibility_matrix(loose.versions(queries, galleries, *of), PROTOCOLS[protocol])
    hits = compatibility_hits(loose.versions(queries, galleries, *of), protocol)
    np.testing.assert_array_equal(report.matrix, matrix)
    generator = np.random.default_rng(7)
    np.testing.assert_array_equal(report.intervals, bootstrap_cells(hits, confidence=0.9, generator=generator))
    assert report.criteria.as_dict() == {
        "AC": average_compatibility(matrix),
        "AA": average_accuracy(matrix),
        "AA_t": [average_accuracy(matrix, upto=t) for t in (1, 2, 3)],
        "BC": backward_compatibility(matrix),
        "FC": forward_compatibility(matrix),
    }
    table, p_values = compatibility_table(matrix), mcnemar_tests(hits)
    assert [(u.new, u.old) for u in report.upgrades] == [(1, 0), (2, 0), (2, 1)]
    for u in report.upgrades:
        before, after = hits[u.old][u.old], hits[u.new][u.old]
        assert (u.before, u.after) == (matrix[u.old, u.old], matrix[u.new, u.old])
        assert u.compatible == table.compatible[u.new, u.old]
        assert u.gain == pytest.approx(table.margins[u.new, u.old], abs=1e-15)
        assert u.p_value == p_values[u.new, u.old]
        assert u.negative_flip_rate == negative_flip_rate(before, after)
        assert u.positive_flip_rate == positive_flip_rate(before, after)
        assert (u.low, u.high) == bootstrap_gain(before, after, confidence=0.9, generator=generator)
    assert report.last_upgrade == report.upgrades[-1]
    assert [(u.new, u.old) for u in report.successive_upgrades] == [(1, 0), (2, 1)]
    assert not report.last_upgrade.compatible  # the last version is reported as worse
    old, new = loose.versions(queries[1:], galleries[1:], *of)
    assert report.regressions == worst_regressions(old, new, hits[1][1], hits[2][1], protocol=protocol)


def naive_margins(query, gallery, query_labels, gallery_labels, protocol: str) -> np.ndarray:
    unit = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64), axis=1, keepdims=True)
    classes = np.unique(gallery_labels)
    if protocol == "instance":
        rows, of = gallery.astype(np.float64), gallery_labels
    else:
        rows = np.stack([gallery[gallery_labels == c].astype(np.float64).mean(0) for c in classes])
        of = classes
    scores = unit @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    own = np.array([s[of == label].max() for s, label in zip(scores, query_labels, strict=True)])
    return scores.max(axis=1) - own


@both
def test_worst_regressions_by_falling_margin(protocol: str) -> None:
    queries, galleries, labels = versions()
    of = labels[:QUERIES], labels[QUERIES:]
    hits = compatibility_hits(loose.versions(queries, galleries, *of), protocol)
    before, after = hits[1][1], hits[2][1]
    lost = np.flatnonzero(before & ~after)
    assert len(lost) > 12
    margins = naive_margins(queries[2], galleries[1], *of, protocol)
    expected = lost[np.argsort(-margins[lost], kind="stable")]
    of_last = loose.versions(queries[1:], galleries[1:], *of)
    found = worst_regressions(*of_last, before, after, protocol=protocol)
    assert [r.query for r in found] == expected.tolist()
    np.testing.assert_allclose([r.margin for r in found], margins[expected], atol=1e-6)
    unit = galleries[1] / np.linalg.norm(galleries[1], axis=1, keepdims=True)
    for r in found:
        assert r.margin > 0
        assert r.label == of[0][r.query] == of[1][r.own_item] != r.found_label == of[1][r.found_item]
        scores = unit @ queries[2][r.query]
        for item, label in ((r.own_item, r.label), (r.found_item, r.found_label)):
            members = np.flatnonzero(of[1] == label)
            assert item == members[scores[members].argmax()]
    assert worst_regressions(*of_last, before, after, protocol=protocol, limit=3) == found[:3]
    assert worst_regressions(*of_last, after, after, protocol=protocol) == ()
    assert worst_regressions(*of_last, before, after, protocol=protocol, limit=0) == ()
    assert json.loads(json.dumps(found[0].as_dict()))["margin"] == found[0].margin


@both
def test_backfill_of_the_last_upgrade(protocol: str, monkeypatch) -> None:
    queries, galleries, labels = versions()
    of = labels[:QUERIES], labels[QUERIES:]
    report = evaluated(queries, galleries, *of, protocol=protocol)
    assert [curve.order_name for curve in report.backfill] == ["random", "farthest_from_class_mean", "lowest_margin"]
    content = report.as_dict()["backfill"]
    assert (content["old"], content["new"]) == (1, 2)
    for curve, written in zip(report.backfill, content["curves"], strict=True):
        assert curve.scores[0] == report.matrix[2, 1]
        assert curve.scores[-1] == report.matrix[2, 2]
        assert written == curve.as_dict()
        if curve.order_name != "random":
            last = loose.versions(queries[1:], galleries[1:], *of)
            expected = backfill_curve(*last, order=curve.order_name, protocol=protocol)
            assert written == expected.as_dict()

    from simplexfix.report import evaluation as module

    monkeypatch.setattr(module, "BACKFILL_QUERIES", 40)
    drawn = evaluated(queries, galleries, *of, protocol=protocol)
    assert {curve.queries for curve in drawn.backfill} == {40}
    ends = {(curve.scores[0], curve.scores[-1]) for curve in drawn.backfill}
    assert len(ends) == 1  # all curves have the same queries
    np.testing.assert_array_equal(drawn.matrix, report.matrix)
    monkeypatch.setattr(module, "BACKFILL_BYTES", 2 * ITEMS * 16 * 4 - 1)
    assert evaluated(queries, galleries, *of, protocol=protocol).as_dict()["backfill"] is None


def test_pairs_of_the_last_upgrade() -> None:
    queries, galleries, labels = versions()
    of = labels[:QUERIES], labels[QUERIES:]
    report = evaluated(queries, galleries, *of)
    pairs = compare_pairs(*loose.versions(queries[1:], galleries[1:], *of))
    written = report.as_dict()["pairs"]
    for part in ("before", "after"):
        assert written[part] == pairs.as_dict()[part]
    assert written["threshold"]["before"] == pairs.as_dict()["threshold"]["before"]
    one = evaluated(queries[:1], galleries[:1], *of).as_dict()["pairs"]
    assert one == compare_pairs(*loose.versions(queries[:1], galleries[:1], *of)).as_dict()
    assert one["after"] is None
    assert one["threshold"] is None


@both
def test_blocks_do_not_change_regressions(protocol: str, monkeypatch) -> None:
    from simplexfix.labelled import _rows

    queries, galleries, labels = versions()
    of = labels[:QUERIES], labels[QUERIES:]
    hits = compatibility_hits(loose.versions(queries, galleries, *of), protocol)
    arguments = *loose.versions(queries[1:], galleries[1:], *of), hits[1][1], hits[2][1]
    whole = worst_regressions(*arguments, protocol=protocol)
    monkeypatch.setattr(_rows, "SLICE_BYTES", 8 * 16 * 3)
    blocks = worst_regressions(*arguments, protocol=protocol)
    assert [(r.query, r.found_item, r.own_item) for r in whole] == [(r.query, r.found_item, r.own_item) for r in blocks]
    np.testing.assert_allclose([r.margin for r in whole], [r.margin for r in blocks], atol=1e-12)


@both
def test_one_version_has_no_upgrade(protocol: str) -> None:
    queries, galleries, labels = versions(1)
    report = evaluated(queries, galleries, labels[:QUERIES], labels[QUERIES:], protocol=protocol)
    assert report.upgrades == ()
    assert report.regressions == ()
    assert report.last_upgrade is None
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert content["criteria"] == {
        "AC": None, "AA": report.matrix[0, 0], "AA_t": [report.matrix[0, 0]], "BC": None, "FC": None,
    }  # fmt: skip
    assert content["regressions"] is None
    assert content["backfill"] is None
    assert content["violations"] is None
    assert content["compatible"] == content["margins"] == content["p_values"] == [[None]]


def test_violations_of_the_last_upgrade_are_sampled_if_there_are_many_pairs(monkeypatch) -> None:
    queries, galleries, labels = versions()
    of = labels[:QUERIES], labels[QUERIES:]
    found = evaluated(queries, galleries, *of).violations
    assert found == inequality_violations(*loose.versions(queries[1:], galleries[1:], *of))
    content = evaluated(queries, galleries, *of, protocol="instance").as_dict()["violations"]
    assert content == {"old": 1, "new": 2, **asdict(found), "same": found.same, "other": found.other}

    monkeypatch.setattr(inequalities, "SAMPLE", (120, 90))
    sample = evaluated(queries, galleries, *of).violations
    assert sample.same_pairs + sample.other_pairs == 120 * 90
    assert abs(sample.same - found.same) < 0.1
    assert abs(sample.other - found.other) < 0.1
    assert evaluated(queries, galleries, *of, protocol="instance").violations == sample
    others = evaluated(*versions(2, (16, 20))[:2], *of, widths="leading")
    assert others.violations is None
    apart = evaluated(queries, galleries, of[0] + 100, of[1]).as_dict()["violations"]
    assert (apart["same_pairs"], apart["same"]) == (0, None)


def test_thirty_one_versions_with_stable_keys() -> None:
    queries, galleries, labels = versions(31)
    report = evaluated(queries, galleries, labels[:QUERIES], labels[QUERIES:])
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert list(content) == [
        "versions", "protocol", "widths", "confidence", "counts", "judgements",
        "label_names", "queries_in_gallery", "ignored", "matrix", "intervals", "criteria", "compatible",
        "margins", "p_values", "upgrades", "regressions", "backfill", "pairs", "violations",
    ]  # fmt: skip
    assert len(content["upgrades"]) == 31 * 30 // 2
    assert [sum(x is not None for x in row) for row in content["matrix"]] == list(range(1, 32))
    assert [sum(x is not None for x in row) for row in content["p_values"]] == list(range(31))
    assert content["regressions"]["count"] == content["upgrades"][-1]["losses"]


def test_classes_are_counted_and_ids_are_any_int64() -> None:
    """Class ids are above 2^24, where float32 would merge them; some are only in the queries or in the gallery."""
    queries, galleries, labels = versions(2)
    ids = 2**24 + np.array([1, 2, 3, 4, 5, 6, 2**40, 2**40 + 1, -7])
    query_labels, gallery_labels = ids[labels[:QUERIES]], ids[labels[QUERIES:]].copy()
    plain = evaluated(queries, galleries, labels[:QUERIES], labels[QUERIES:])
    named = evaluated(queries, galleries, query_labels, gallery_labels)
    np.testing.assert_array_equal(named.matrix, plain.matrix)
    assert named.counts == plain.counts
    gallery_labels[gallery_labels == ids[0]] = 5  # one class without gallery items, one without queries
    counts = evaluated(queries, galleries, query_labels, gallery_labels).counts
    asked = int((query_labels == ids[0]).sum())
    assert counts.classes_not_in_gallery == 1
    assert counts.queries_of_classes_not_in_gallery == asked > 0
    assert counts.classes_without_queries == 1
    assert counts.classes == CLASSES


def test_widths_tensors_and_names() -> None:
    queries, galleries, labels = versions(3, widths=(12, 16, 16))
    of = labels[:QUERIES], labels[QUERIES:]
    arrays = evaluated(queries, galleries, *of, widths="leading", names=("a", "b", "c"))
    tensors = evaluated(
        [torch.from_numpy(x) for x in queries], [torch.from_numpy(x) for x in galleries], *of, widths="leading"
    )
    np.testing.assert_array_equal(arrays.matrix, tensors.matrix)
    assert arrays.dimensions == (12, 16, 16)
    assert arrays.names == ("a", "b", "c")
    assert tensors.names == ("v0", "v1", "v2")
    assert arrays.regressions == tensors.regressions
    everything = np.ones(QUERIES, bool)
    narrow, _, last = loose.versions(queries, galleries, *of)  # the last version's queries are wider than v0's gallery
    wide = worst_regressions(narrow, last, everything, ~everything, limit=QUERIES)
    margins = naive_margins(queries[2][:, :12], galleries[0], *of, "nearest_class_mean")
    of_wrong = [r for r in wide if margins[r.query] > 0]
    np.testing.assert_allclose([r.margin for r in of_wrong], [margins[r.query] for r in of_wrong], atol=1e-6)


BAD = [
    ({"protocol": "nearest"}, ValueError, "protocol must be one of 'nearest_class_mean', 'instance'"),
    ({"confidence": 1.0}, ValueError, "confidence must lie between 0 and 1"),
    ({"names": ("a", "a")}, ValueError, "names must be 2 different ones"),
    ({"widths": "any"}, ValueError, "widths must be one of"),
    ({"seed": 3.5}, TypeError, "seed must be an integer"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options, error, message: str) -> None:
    queries, galleries, labels = versions(2)
    with pytest.raises(error, match=message):
        evaluated(queries, galleries, labels[:QUERIES], labels[QUERIES:], **options)


@both
def test_given_hits_replace_the_search(protocol: str) -> None:
    queries, galleries, labels = versions()
    of = labels[:QUERIES], labels[QUERIES:]
    hits = compatibility_hits(loose.versions(queries, galleries, *of), protocol)
    given = evaluated(queries, galleries, *of, protocol=protocol, hits=hits)
    assert given.as_dict() == evaluated(queries, galleries, *of, protocol=protocol).as_dict()
    with pytest.raises(ValueError, match="hits must be of 3 versions and 200 queries, got 2 and 200"):
        evaluated(queries, galleries, *of, protocol=protocol, hits=hits[:2])
    with pytest.raises(ValueError, match="hits must be T rows of lengths 1 to T"):
        evaluated(queries, galleries, *of, protocol=protocol, hits=[*hits[:2], hits[2][:2]])


BAD_REGRESSIONS = [
    ({"limit": -1}, ValueError, "limit must be at least 0, got -1"),
    ({"limit": 2.5}, TypeError, "limit must be an integer"),
    ({"protocol": "nearest"}, ValueError, "protocol must be one of"),
    ({"before": np.ones(3, bool), "after": np.ones(3, bool)}, ValueError, "of the 200 queries, got 3"),
    ({"before": np.ones(QUERIES)}, TypeError, "both bool or both floating, got float64 and bool"),
    (
        {"query_labels": np.full(QUERIES, 77)},
        ValueError,
        "before marks query 0 as correct, but the gallery has no item",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_REGRESSIONS)
def test_bad_regressions(changes, error, message: str) -> None:
    queries, galleries, labels = versions(2)
    given = {"before": np.ones(QUERIES, bool), "after": np.zeros(QUERIES, bool)} | changes
    of = given.pop("query_labels", labels[:QUERIES])
    with pytest.raises(error, match=message):
        worst_regressions(*loose.versions(queries, galleries, of, labels[QUERIES:]), **given)


def test_unrelated_spaces_are_named_and_related_ones_are_not() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(400) % 20
    rows = np.eye(20)[labels] + 0.1 * draw.standard_normal((400, 20))
    turn = np.linalg.qr(draw.standard_normal((20, 20)))[0]
    items = LabelledItems(labels[:200], labels[200:])
    old, turned, better = (
        items.version(x[:200].astype(np.float32), x[200:].astype(np.float32), name=name)
        for name, x in (("v0", rows), ("v1", rows @ turn), ("v2", rows * 2))
    )
    assert evaluate([old, better]).remarks == ()
    (remark,) = evaluate([old, turned]).remarks
    assert remark.startswith("The scores of v1 in the gallery of v0 are at chance")
    assert "simplexfix adapt" in remark
