"""Tests query sets from the gallery: each query's own item is left out of its search and class mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from versions import pair, upgrade, versions

from simplexfix.compatibility import (
    backfill_curve,
    compare_pairs,
    compatibility_hits,
    compatibility_matrix,
    farthest_from_class_mean,
    inequality_violations,
    lowest_margin,
    mixed_topk,
    upgrade_gate,
    upgrade_threshold,
    worst_regressions,
)
from simplexfix.labelled import LabelledItems, VersionFeatures
from simplexfix.report import evaluate
from simplexfix.retrieval import PROTOCOLS, RetrievalResults, VerificationResults, class_means, metrics, nearest_items

both = pytest.mark.parametrize("protocol", PROTOCOLS)


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.where(np.linalg.norm(x, axis=-1, keepdims=True) > 0, np.linalg.norm(x, axis=-1, keepdims=True), 1)


def by_hand(protocol: str, version: VersionFeatures) -> list[bool]:
    """Searches for one query at a time in a gallery without its own item."""
    items, width = version.items, min(version.query.width, version.gallery.width)
    query, gallery = (rows.tensor().double().numpy()[:, :width] for rows in (version.query, version.gallery))
    out = []
    for q, label, itself in zip(query, items.query_labels, items.excluded, strict=True):
        rest = np.arange(len(gallery)) != itself
        rows, labels = gallery[rest], items.gallery_labels[rest]
        if protocol == "nearest_class_mean":
            classes = np.unique(labels)
            rows = np.stack([rows[labels == c].sum(0) for c in classes]) if len(classes) else rows
            labels = classes
        scores = unit(rows) @ unit(q)
        out.append(bool(len(scores)) and labels[scores.argmax()] == label)
    return out


def items_of(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
    """Returns the labels of gallery items, the labels of queries, and the ids of both."""
    if kind == "the same":  # 50 classes of 4
        labels = np.repeat(np.arange(50), 4)
        return labels, labels, {"query_ids": np.arange(200), "gallery_ids": np.arange(200)}
    if kind == "some":  # queries inside and outside of the gallery, in another order; classes of one item
        labels = rng.integers(12, size=90)
        labels[:5] = np.arange(5) + 100
        order = rng.permutation(90)[:70]
        ids = np.concatenate([order, np.arange(1000, 1030)]) * 2**33 - 5
        asked = np.concatenate([labels[order], rng.integers(13, size=30)])
        return labels, asked, {"query_ids": ids, "gallery_ids": np.arange(90) * 2**33 - 5}
    if kind == "one class":
        labels = np.zeros(9, dtype=np.int64)
        return labels, labels, {"query_ids": np.arange(9), "gallery_ids": np.arange(9)}
    if kind == "alone":  # every class has one item: no query has a match
        labels = np.arange(9)
        return labels, labels, {"query_ids": np.arange(9), "gallery_ids": np.arange(9)}
    # each item is a query twice, and every third query has another label than its item
    labels = rng.integers(6, size=80)
    order = np.concatenate([np.arange(40), np.arange(40)])
    return labels, (labels[order] + (np.arange(80) % 3 == 0)) % 6, {"query_ids": order, "gallery_ids": np.arange(80)}


KINDS = ("the same", "some", "one class", "alone", "other labels")


def rows_of(rng: np.random.Generator, labels: np.ndarray, clear: float, d: int = 12) -> np.ndarray:
    centers = np.random.default_rng(5).standard_normal((200, d))
    return (clear * centers[labels] + rng.standard_normal((len(labels), d))).astype(np.float32)


def given(kind: str, count: int = 1, clear: float = 0.6, widths: tuple[int, ...] = ()) -> list[VersionFeatures]:
    rng = np.random.default_rng(3)
    labels, asked, ids = items_of(kind, rng)
    queries, galleries = [], []
    place = {int(i): at for at, i in enumerate(ids["gallery_ids"])}
    for t in range(count):
        d = widths[t] if widths else 12
        gallery = rows_of(rng, labels, clear, d)
        query = rows_of(rng, asked, clear, d)
        for at, i in enumerate(ids["query_ids"]):
            if int(i) in place:
                query[at] = gallery[place[int(i)]]
        queries.append(query)
        galleries.append(gallery)
    return versions(queries, galleries, asked, labels, **ids)


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clear", [0.0, 0.6])
def test_hits_of_one_pair(protocol: str, kind: str, clear: float) -> None:
    (version,) = given(kind, clear=clear)
    found = PROTOCOLS[protocol].hits(version)
    assert found.tolist() == by_hand(protocol, version)
    if kind == "alone":
        assert not found.any()


@both
def test_by_hand(protocol: str) -> None:
    # query 0 is the only item of class 0, so its class has no item left; class 1 points away from it
    rows = np.array([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.5]], dtype=np.float32)
    ids = {"query_ids": [0, 1, 2], "gallery_ids": [0, 1, 2]}
    version = pair(rows, [0, 1, 1], rows, [0, 1, 1], **ids)
    assert PROTOCOLS[protocol].hits(version).tolist() == [False, True, True]
    assert compatibility_hits([version], protocol)[0][0].tolist() == [False, True, True]
    # the query itself is the only gallery item: nothing is left
    for label in (7, 3):
        alone = pair(rows[:1], [label], rows[:1], [3], query_ids=[5], gallery_ids=[5])
        assert PROTOCOLS[protocol].hits(alone).tolist() == [False]
        assert compatibility_hits([alone], protocol)[0][0].tolist() == [False]


@both
def test_pure_noise_scores_near_chance(protocol: str) -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((200, 32)).astype(np.float32), np.repeat(np.arange(50), 4)
    ids = {"query_ids": np.arange(200), "gallery_ids": np.arange(200)}
    score = PROTOCOLS[protocol].score
    assert score(pair(rows, labels, rows, labels)) > 0.7
    assert score(pair(rows, labels, rows, labels, **ids)) < 0.06


@both
@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_of_a_matrix(protocol: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = given(kind, 3)
    hits = compatibility_hits(of, protocol)
    for i, row in enumerate(hits):
        for j, cell in enumerate(row):
            assert cell.tolist() == by_hand(protocol, of[j].searched_by(of[i])), (i, j)
    for module in (class_means, nearest_items):
        monkeypatch.setattr(module, "_QUERY_ROWS", 7)
    for row, again in zip(hits, compatibility_hits(of, protocol), strict=True):
        np.testing.assert_array_equal(row, again)


@both
def test_versions_of_different_width(protocol: str) -> None:
    of = given("some", 3, widths=(12, 9, 15))
    for i, row in enumerate(compatibility_hits(of, protocol, widths="leading")):
        for j, cell in enumerate(row):
            assert cell.tolist() == by_hand(protocol, of[j].searched_by(of[i], widths="leading")), (i, j)


@both
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("widths", [(12, 12), (9, 12), (12, 9)])
def test_every_step_of_a_backfill(protocol: str, kind: str, widths: tuple[int, int]) -> None:
    old, new = given(kind, 2, widths=widths)
    curve = backfill_curve(old, new, protocol=protocol, steps=3, widths="leading")
    assert curve.hits is not None
    shared, count = min(widths), len(old.gallery)
    for fraction, hits in zip(curve.fractions, curve.hits, strict=True):
        replaced = np.zeros(count, dtype=bool)
        replaced[curve.order[: round(fraction * count)]] = True
        expected = []
        for q, label, itself in zip(
            new.query.tensor().double().numpy(), old.items.query_labels, old.items.excluded, strict=True
        ):
            rest = np.flatnonzero(np.arange(count) != itself)
            rows = {n: (new if replaced[n] else old).gallery.tensor()[n].double().numpy() for n in rest}
            rows = {n: row[: widths[1] if replaced[n] else shared] for n, row in rows.items()}
            if protocol == "nearest_class_mean":
                labels = sorted(set(old.items.gallery_labels[rest]))
                vectors = []
                for c in labels:
                    members = [rows[n] for n in rest if old.items.gallery_labels[n] == c]
                    total = np.zeros(max(map(len, members)))
                    for row in members:
                        total[: len(row)] += row
                    vectors.append(total)
            else:
                labels, vectors = old.items.gallery_labels[rest], [rows[n] for n in rest]
            scores = [unit(v) @ unit(q[: len(v)]) for v in vectors]
            expected.append(bool(scores) and labels[int(np.argmax(scores))] == label)
        assert hits.tolist() == expected
    assert curve.absent == sum(n == 0 for n in old.items.num_relevant)


def test_metrics_and_pairs() -> None:
    (version,) = given("the same")
    found = RetrievalResults.search(version)
    assert metrics.cmc(found) == PROTOCOLS["instance"].score(version)
    assert found.num_relevant.tolist() == [3] * 200
    rows = version.query.tensor().numpy()
    scores = unit(rows) @ unit(rows).T
    other = ~np.eye(200, dtype=bool)
    same = version.items.query_labels[:, None] == version.items.gallery_labels
    results = VerificationResults.compare(version)
    assert (results.num_genuine, results.num_impostor) == ((same & other).sum(), (~same).sum())
    assert results.at(0.5).tar == pytest.approx((scores[same & other] >= 0.5).mean())
    report = compare_pairs(version)
    assert report is not None
    assert report.before.results.num_genuine == results.num_genuine


def test_violations_leave_pairs_of_an_item_with_itself_out() -> None:
    old, new = given("some", 2)
    found = inequality_violations(old, new)
    pairs = len(old.query) * len(old.gallery) - int((old.items.excluded >= 0).sum())
    assert found.same_pairs + found.other_pairs == pairs
    s_old, s_new = (unit(v.query.tensor().numpy()) @ unit(old.gallery.tensor().numpy()).T for v in (old, new))
    kept = np.arange(len(old.gallery)) != old.items.excluded[:, None]
    same = old.items.query_labels[:, None] == old.items.gallery_labels
    assert found.same_violations == (kept & same & (s_new < s_old)).sum()
    assert found.other_violations == (kept & ~same & (s_new > s_old)).sum()


@both
def test_worst_regressions_do_not_find_the_query_itself(protocol: str) -> None:
    old, new = given("some", 2, clear=0.9)
    searched = old.searched_by(new)
    before, after = PROTOCOLS[protocol].hits(old), PROTOCOLS[protocol].hits(searched)
    found = worst_regressions(old, new, before, after, protocol=protocol)
    assert found
    for r in found:
        itself = old.items.excluded[r.query]
        assert itself not in (r.found_item, r.own_item)
        rest = np.flatnonzero(np.arange(len(old.gallery)) != itself)
        rows, labels = old.gallery.tensor().double().numpy()[rest], old.items.gallery_labels[rest]
        if protocol == "nearest_class_mean":
            rows = np.stack([rows[labels == c].sum(0) for c in np.unique(labels)])
            labels = np.unique(labels)
        scores = unit(rows) @ unit(new.query.tensor().numpy()[r.query])
        assert r.found_label == labels[scores.argmax()]
        assert r.score == pytest.approx(scores.max(), abs=1e-6)
        assert r.own_score == pytest.approx(scores[labels == r.label].max(), abs=1e-6)


def test_the_report_and_the_gate_count_left_out_queries() -> None:
    of = given("some", 2)
    report = evaluate(of)
    assert report.as_dict()["queries_in_gallery"] == {"left_out_by_id": 70, "bit_equal": [0, 0]}
    assert report.counts.queries_of_classes_not_in_gallery == int((of[0].items.num_relevant == 0).sum()) > 0
    assert any("70 queries are gallery items themselves, by their ids" in remark for remark in report.remarks)
    np.testing.assert_array_equal(report.matrix, compatibility_matrix(of))
    result = upgrade_gate(*of)
    assert (result.excluded, result.bit_equal) == (70, (0, 0))
    assert result.scores["old_on_old"] == report.matrix[0, 0]


def test_rows_of_the_same_bits_are_counted_without_ids() -> None:
    rng = np.random.default_rng(1)
    gallery = rng.standard_normal((50, 8)).astype(np.float32)
    query = rng.standard_normal((20, 8)).astype(np.float32)
    query[:7] = gallery[11:18]
    query[7] = np.nextafter(gallery[30], np.float32(np.inf))  # differs by one ulp
    query[8:10] = gallery[3] = gallery[4] = 0  # zero rows are counted separately
    labels = np.arange(20) % 5, np.arange(50) % 5
    for kind in (np.float32, np.float64, np.float16):
        q, g = query.astype(kind), gallery.astype(kind)
        expected = 7 + (kind == np.float16)  # float16 rounds this ulp away
        old, new = upgrade(q, rng.standard_normal((20, 8)).astype(np.float32), labels[0], g, labels[1])
        assert (old.bit_equal, new.bit_equal) == (expected, 0)
        report = evaluate([old, new])
        assert report.queries_in_gallery.bit_equal == (expected, 0)
        assert f"v0: {expected} of 20 queries have a gallery row of the same bits" in report.remarks[0]
        assert upgrade_gate(old, new).bit_equal == (expected, 0)
    ids = {"query_ids": np.arange(20), "gallery_ids": np.concatenate([np.arange(100, 111), np.arange(39)])}
    (known,) = versions([query], [gallery], *labels, **ids)
    assert known.bit_equal == 0  # by their ids these are the same items
    ids["query_ids"] = np.arange(1000, 1020)
    (unknown,) = versions([query], [gallery], *labels, **ids)
    assert unknown.bit_equal == 7


@both
def test_ignored_labels(protocol: str) -> None:
    """Items of label -1, as in Market-1501, are neither found nor used as queries."""
    rng = np.random.default_rng(2)
    labels, asked = rng.integers(-1, 6, size=80), rng.integers(-1, 7, size=60)
    query, gallery = rows_of(rng, asked, 0.8), rows_of(rng, labels, 0.8)
    q, g = asked != -1, labels != -1
    whole = LabelledItems(asked, labels, ignored_labels=[-1])
    version = whole.version(query, gallery)
    plain = pair(query[q], asked[q], gallery[g], labels[g])
    assert PROTOCOLS[protocol].hits(version).tolist() == PROTOCOLS[protocol].hits(plain).tolist()
    found, expected = RetrievalResults.search(version, k=3), RetrievalResults.search(plain, k=3)
    assert found.positions.tolist() == np.flatnonzero(g)[expected.positions].tolist()  # row numbers count ignored items
    both_versions = [LabelledItems(asked, labels).version(x, gallery) for x in (query, query[:, ::-1].copy())]
    report = evaluate(both_versions, protocol=protocol, ignored_labels=[-1])
    content = report.as_dict()
    assert content["ignored"] == {"labels": [-1], "queries": int((~q).sum()), "gallery": int((~g).sum())}
    clean = evaluate(
        versions([query[q], query[q][:, ::-1].copy()], [gallery[g]] * 2, asked[q], labels[g]), protocol=protocol
    ).as_dict()
    for key in set(content) - {"ignored", "regressions"}:
        assert content[key] == clean[key], key
    for ours, theirs in zip(content["regressions"]["worst"], clean["regressions"]["worst"], strict=True):
        assert ours["query"] == np.flatnonzero(q)[theirs["query"]]
        assert ours["found_item"] == np.flatnonzero(g)[theirs["found_item"]]
        assert ours["own_item"] == np.flatnonzero(g)[theirs["own_item"]]
    with pytest.raises(ValueError, match="ignored_labels holds 77, which is the label of no query and no gallery item"):
        LabelledItems(asked, labels, ignored_labels=[77])
    with pytest.raises(ValueError, match="no query is left without the labels 3"):
        LabelledItems([3, 3], [3, 4], ignored_labels=[3])


def test_ignored_names_and_ids_and_a_torch_tensor() -> None:
    labels = np.array(["a", "junk", "b", "a"])
    items = LabelledItems(labels, labels, query_ids=list("wxyz"), gallery_ids=list("wxyz"), ignored_labels=["junk"])
    assert items.query_rows.tolist() == items.gallery_rows.tolist() == [0, 2, 3]
    assert items.excluded.tolist() == [0, 1, 2]
    assert items.num_relevant.tolist() == [1, 0, 1]
    version = items.version(torch.eye(4), torch.eye(4))
    found = RetrievalResults.search(version)
    assert found.excluded.tolist() == [0, 2, 3]
    assert found.positions.tolist() == [[2, 3], [0, 3], [0, 2]]


def test_row_numbers_count_ignored_items() -> None:
    """Orders, mixed galleries and groups with ignored items equal those without these items."""
    rng = np.random.default_rng(4)
    labels, asked = rng.integers(-1, 6, size=80), rng.integers(-1, 6, size=60)
    rows = [(rows_of(rng, asked, 0.8), rows_of(rng, labels, 0.8)) for _ in range(2)]
    q, g = np.flatnonzero(asked != -1), np.flatnonzero(labels != -1)
    items = LabelledItems(asked, labels, ignored_labels=[-1])
    old, new = (items.version(*x) for x in rows)
    clean = LabelledItems(asked[q], labels[g])
    plain_old, plain_new = (clean.version(x[0][q], x[1][g]) for x in rows)
    for order in (farthest_from_class_mean, lowest_margin):
        assert order(old).tolist() == g[order(plain_old)].tolist()
        found, expected = (backfill_curve(*v, order=order.__name__) for v in ((old, new), (plain_old, plain_new)))
        assert found.order.tolist() == g[expected.order].tolist()
        assert found.scores.tolist() == expected.scores.tolist()
        again = backfill_curve(old, new, order=found.order)
        assert (again.order_name, again.scores.tolist()) == ("given", expected.scores.tolist())
    with pytest.raises(ValueError, match=r"order must hold each row from 0 to .*, except ignored ones, once, got"):
        backfill_curve(old, new, order=np.append(g[1:], np.flatnonzero(labels == -1)[0]))
    replaced = rng.random(80) < 0.5
    scores, ids = mixed_topk(old, new, replaced, 70)
    plain_scores, plain_ids = mixed_topk(plain_old, plain_new, replaced[g], 70)
    assert torch.equal(scores, plain_scores)
    assert ids.tolist() == np.append(g, -1)[plain_ids].tolist()
    groups = rng.integers(8, size=60)
    moved = upgrade_threshold(old, new, far=0.1, query_groups=groups, resamples=50)
    assert moved == upgrade_threshold(plain_old, plain_new, far=0.1, query_groups=groups[q], resamples=50)
