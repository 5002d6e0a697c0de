"""Tests retrieval metrics against hand-computed values, a loop, pytrec_eval and scikit-learn, also on cut rankings."""

from __future__ import annotations

from fractions import Fraction
from math import log2

import numpy as np
import pytest
from versions import pair

from simplexfix.retrieval import RetrievalResults, metrics

RNG = np.random.default_rng(1)


def ranked(rows: list[str], missing: tuple[int, ...] = (), full: bool = True) -> RetrievalResults:
    """Returns results for rankings such as "10.": 1 for a relevant item, 0 for another, "." past the gallery's end.

    `missing` relevant items of each query are below the ranking, which is the whole gallery if `full`.
    """
    table = np.array([list(row) for row in rows])
    relevant = table == "1"
    positions = np.where(table == ".", -1, np.arange(table.shape[1]))
    scores = np.where(table == ".", -np.inf, -np.arange(table.shape[1])).astype(np.float32)
    extra = np.array(missing or [0] * len(rows))
    total = relevant.sum(1) + extra
    candidates = (positions >= 0).sum(1) + (extra if full is False else 0) + (not full)
    return RetrievalResults(positions, scores, relevant, total, candidates, np.full(len(rows), -1))


def test_by_hand() -> None:
    # number R of relevant items: 3, at ranks 1, 3 and 6; 1, at rank 4; none
    found = ranked(["101001", "000100", "000000"])
    third, log = Fraction(1, 3), log2

    def check(values, *expected) -> None:
        np.testing.assert_allclose(values, [float(x) for x in expected], rtol=1e-15)
        assert values.dtype == np.float64

    check(metrics.cmc(found, per_query=True), 1, 0, 0)
    check(metrics.cmc(found, 4, per_query=True), 1, 1, 0)
    check(metrics.precision(found, 4, per_query=True), 0.5, 0.25, 0)
    check(metrics.recall(found, 4, per_query=True), 2 * third, 1, 0)
    ap = third * (1 + Fraction(2, 3) + Fraction(1, 2))
    check(metrics.mean_average_precision(found, per_query=True), ap, 0.25, 0)
    check(metrics.mean_average_precision(found, 3, per_query=True), third * (1 + Fraction(2, 3)), 0, 0)
    check(metrics.mean_average_precision_at_r(found, per_query=True), third * (1 + Fraction(2, 3)), 0, 0)
    check(metrics.r_precision(found, per_query=True), 2 * third, 0, 0)
    check(metrics.mean_reciprocal_rank(found, per_query=True), 1, 0.25, 0)
    check(metrics.mean_reciprocal_rank(found, 3, per_query=True), 1, 0, 0)
    ideal = 1 + 1 / log(3) + 1 / log(4)
    check(metrics.ndcg(found, 4, per_query=True), (1 + 1 / log(4)) / ideal, 1 / log(5), 0)
    check(metrics.ndcg(found, 1, per_query=True), 1, 0, 0)
    check(metrics.ndcg(found, 2, per_query=True), 1 / (1 + 1 / log(3)), 0, 0)
    assert metrics.mean_average_precision(found) == pytest.approx(float((ap + Fraction(1, 4)) / 3), rel=1e-15)
    assert isinstance(metrics.cmc(found), float)


def test_a_gallery_shorter_than_k() -> None:
    found = ranked(["11.", "010"])  # the first query's own item is left out of its ranking
    assert metrics.precision(found, 5, per_query=True).tolist() == [0.4, 0.2]
    assert metrics.recall(found, 5, per_query=True).tolist() == [1.0, 1.0]
    assert metrics.cmc(found, 100) == 1.0
    assert metrics.ndcg(found, 100, per_query=True).tolist() == [1.0, pytest.approx(1 / log2(3))]


def searched(queries: int = 60, rows: int = 300, noise: float = 1.0, **options) -> RetrievalResults:
    labels = RNG.integers(25, size=queries + rows) ** 2
    x = RNG.standard_normal((queries + rows, 12)) * noise + RNG.standard_normal((625, 12))[labels]
    x[queries : queries + 40] = x[queries + 40 : queries + 80]  # ties
    labels[0] = 10**6  # no relevant item
    return RetrievalResults.search(pair(x[:queries], labels[:queries], x[queries:], labels[queries:]), **options)


def loop(found: RetrievalResults, i: int, k: int) -> dict[str, float]:
    rel, total = found.relevant[i].tolist(), int(found.num_relevant[i])
    hits = np.cumsum(rel).tolist()
    ranks = [r for r, x in enumerate(rel, 1) if x]
    fraction = (lambda x: x / total) if total else lambda x: 0.0
    return {
        "cmc": float(any(rel[:k])),
        "precision": sum(rel[:k]) / k,
        "recall": fraction(sum(rel[:k])),
        "ndcg": sum(1 / log2(r + 1) for r in ranks if r <= k)
        / (sum(1 / log2(r + 1) for r in range(1, min(k, total) + 1)) or 1),
        "mean_average_precision": fraction(sum(hits[r - 1] / r for r in ranks)),
        "mean_average_precision_at_r": fraction(sum(hits[r - 1] / r for r in ranks if r <= total)),
        "r_precision": fraction(sum(rel[:total])),
        "mean_reciprocal_rank": 1 / ranks[0] if ranks else 0.0,
    }


@pytest.mark.parametrize("block", [1, 1000, 2**22])
def test_against_a_loop_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_PLACES", block)
    found = searched()
    for k in (1, 7, 300):
        for name in loop(found, 0, k):
            metric = getattr(metrics, name)
            options = {"k": k} if name in ("cmc", "precision", "recall", "ndcg") else {}
            expected = [loop(found, i, k)[name] for i in range(len(found))]
            np.testing.assert_allclose(metric(found, per_query=True, **options), expected, rtol=1e-13, atol=0)
            assert metric(found, **options) == pytest.approx(np.mean(expected), rel=1e-13)
            assert len(set(expected)) >= (2 if name == "cmc" and k < 300 else 1)


def test_against_pytrec_eval() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    found = searched()
    size = found.k
    # trec_eval orders by score and then by document name; distinct scores make its order ours.
    run = {str(i): {str(p): float(size - r) for r, p in enumerate(found.positions[i])} for i in range(len(found))}
    judged = {
        str(i): {str(p): 1 for p in found.positions[i][found.relevant[i]]}
        for i in range(len(found))
        if found.num_relevant[i]
    }
    names = {"map", "Rprec", "recip_rank", "P_5,10", "recall_5,10", "ndcg_cut_5,10", "success_5,10", "map_cut_5,10"}
    truth = pytrec_eval.RelevanceEvaluator(judged, {n.replace("_5,10", ".5,10") for n in names}).evaluate(run)
    ours = {
        "map": metrics.mean_average_precision(found, per_query=True),
        "Rprec": metrics.r_precision(found, per_query=True),
        "recip_rank": metrics.mean_reciprocal_rank(found, per_query=True),
    }
    for k in (5, 10):
        ours[f"P_{k}"] = metrics.precision(found, k, per_query=True)
        ours[f"recall_{k}"] = metrics.recall(found, k, per_query=True)
        ours[f"ndcg_cut_{k}"] = metrics.ndcg(found, k, per_query=True)
        ours[f"success_{k}"] = metrics.cmc(found, k, per_query=True)
        ours[f"map_cut_{k}"] = metrics.mean_average_precision(found, k, per_query=True)
    assert len(truth) == (found.num_relevant > 0).sum() < len(found)
    for i, values in truth.items():
        assert values == pytest.approx({name: ours[name][int(i)] for name in ours}, rel=1e-12)
    unmatched = found.queries_without_match
    assert all((values[unmatched] == 0).all() for values in ours.values())


def test_against_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    found = searched()
    matched = np.flatnonzero(found.num_relevant)
    places = -np.arange(found.k, dtype=float)[None]
    ap = metrics.mean_average_precision(found, per_query=True)
    for i in matched:
        assert ap[i] == pytest.approx(sklearn.average_precision_score(found.relevant[i], places[0]), rel=1e-12)
        for k in (1, 4, 300):
            ndcg = metrics.ndcg(found, k, per_query=True)
            expected = sklearn.ndcg_score(found.relevant[i : i + 1].astype(float), places, k=k, ignore_ties=True)
            assert ndcg[i] == pytest.approx(expected, rel=1e-12)


def test_a_cut_ranking_gives_the_same_values_or_none() -> None:
    state = RNG.bit_generator.state
    whole = metrics.summary(searched(noise=0.6), cutoffs=(1, 5, 30))
    told = {}
    for k in (30, 100, 299, 300):
        RNG.bit_generator.state = state
        cut = searched(noise=0.6, k=k)
        told[k] = metrics.summary(cut, cutoffs=(1, 5, 30))
        assert told[k] == {name: whole[name] for name in told[k]}
    assert "map" not in told[30]  # some relevant items are below rank 30
    assert {"map@r", "r_precision"} <= set(told[30])  # at most 30 per class
    assert set(told[300]) == set(whole)
    assert list(whole) == [
        *(f"{name}@{k}" for name in ("cmc", "precision", "recall", "ndcg") for k in (1, 5, 30)),
        "map",
        "map@r",
        "r_precision",
        "mrr",
        "queries",
        "queries_without_match",
    ]
    assert whole["queries_without_match"] == 1
    assert whole["queries"] == 60


BEYOND = ranked(["010", "000"], missing=(3, 1), full=False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.cmc(BEYOND, 4), ValueError, "k must be at most 3, where these results were cut, got 4"),
        (lambda: metrics.precision(BEYOND, 0), ValueError, "k must be at least 1, got 0"),
        (lambda: metrics.recall(BEYOND, 2.0), TypeError, "k must be an integer, got float"),
        (lambda: metrics.ndcg(BEYOND, True), TypeError, "k must be an integer, got bool"),
        (
            lambda: metrics.mean_average_precision(BEYOND),
            ValueError,
            "mAP needs a longer ranking: these results were cut at 3 places, and query 0 has 4 relevant items; "
            "search with k=None",
        ),
        (lambda: metrics.mean_average_precision(BEYOND, 4), ValueError, "k must be at most 3"),
        (lambda: metrics.mean_average_precision_at_r(BEYOND), ValueError, "mAP@R needs .* query 0 has 4"),
        (lambda: metrics.r_precision(BEYOND), ValueError, "R-precision needs .* query 0 has 4 relevant"),
        (lambda: metrics.mean_reciprocal_rank(BEYOND), ValueError, "MRR needs .* query 1 has 1 relevant"),
        (lambda: metrics.summary(BEYOND), ValueError, "k must be at most 3, .* got 5"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_cut_below_all_relevant_items_is_accepted() -> None:
    found = ranked(["010", "000"], missing=(0, 0), full=False)
    assert metrics.mean_average_precision(found, per_query=True).tolist() == [0.5, 0.0]
    assert metrics.mean_average_precision_at_r(found) == 0.0
    assert metrics.mean_reciprocal_rank(found) == 0.25
    assert metrics.mean_average_precision(BEYOND, 3) == 0.5 / 4 / 2
    assert metrics.mean_reciprocal_rank(BEYOND, 3) == 0.25
