"""Tests thresholds across an upgrade against loops over all pairs, calibration against scikit-learn, and bad input."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import versions as loose
from sklearn.isotonic import IsotonicRegression

from simplexfix import compatibility
from simplexfix.compatibility import calibrate_scores
from simplexfix.compatibility.thresholds import _accepted
from simplexfix.retrieval import VerificationResults
from simplexfix.retrieval.verification import BINS, STEPS, tar_at_far


def upgrade_threshold(
    old_query,
    new_query,
    query_labels,
    gallery,
    gallery_labels,
    *,
    query_ids=None,
    gallery_ids=None,
    new_gallery=None,
    **options,
):
    """Calls `simplexfix.compatibility.upgrade_threshold` with separate arrays."""
    ids = {} if query_ids is None else {"query_ids": query_ids, "gallery_ids": gallery_ids}
    old, new = loose.upgrade(
        old_query, new_query, query_labels, gallery, gallery_labels, new_gallery=new_gallery, **ids
    )
    return compatibility.upgrade_threshold(old, new, gallery="old" if new_gallery is None else "new", **options)


def compare(*arguments, **ids) -> VerificationResults:
    return VerificationResults.compare(loose.pair(*arguments, **ids))


def upgrade(queries: int = 120, items: int = 80, d: int = 12, seed: int = 0, noise: float = 0.7):
    """Returns old queries, noisier new queries, their labels, the old gallery and its labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(6, size=queries + items)
    centers = rng.standard_normal((6, d)) + 0.4
    x = centers[labels] + 0.8 * rng.standard_normal((queries + items, d))
    new = x[:queries] + noise * rng.standard_normal((queries, d))
    old, new, gallery = (rows.astype(np.float32) for rows in (x[:queries], new, x[queries:]))
    return old, new, labels[:queries], gallery, labels[queries:]


def pairs_of(query, query_labels, gallery, gallery_labels):
    q, g = (F.normalize(torch.tensor(x).double()).float().double() for x in (query, gallery))
    return (q @ g.T).float().numpy(), query_labels[:, None] == gallery_labels


def test_rates_before_and_after_against_all_pairs() -> None:
    old, new, query_labels, gallery, gallery_labels = upgrade()
    move = upgrade_threshold(old, new, query_labels, gallery, gallery_labels, threshold=0.75, resamples=10)
    was, same = pairs_of(old, query_labels, gallery, gallery_labels)
    now, _ = pairs_of(new, query_labels, gallery, gallery_labels)
    assert move.before == (0.75, (was[same] >= 0.75).mean(), (was[~same] >= 0.75).mean())
    assert move.unmoved == (0.75, (now[same] >= 0.75).mean(), (now[~same] >= 0.75).mean())
    t = move.after.threshold
    assert move.after[1:] == ((now[same] >= t).mean(), (now[~same] >= t).mean())
    assert move.after.far <= move.before.far < (now[~same] >= t - 1 / STEPS).mean()
    assert move.unmoved.far != move.before.far
    assert t != 0.75
    by_rate = upgrade_threshold(old, new, query_labels, gallery, gallery_labels, far=move.before.far, resamples=10)
    assert by_rate.before == tar_at_far(compare(old, query_labels, gallery, gallery_labels), move.before.far)
    assert by_rate.after == move.after
    assert json.loads(json.dumps(move.as_dict()))["after"] == dict(
        zip(("threshold", "tar", "far"), move.after, strict=True)
    )


def test_equal_queries_keep_the_threshold() -> None:
    old, _, query_labels, gallery, gallery_labels = upgrade()
    move = upgrade_threshold(old, old, query_labels, gallery, gallery_labels, far=0.05)
    assert move.before == move.unmoved == move.after
    # old and new queries have one distribution: each resample keeps the old threshold, up to the next higher score
    assert 0 <= move.after.threshold - move.interval.low < 0.01
    assert abs(move.after.threshold - move.interval.high) < 0.01
    assert move.far_interval.low < 0.05 < move.far_interval.high


def test_a_re_extracted_gallery_and_excluded_items() -> None:
    old, new, labels, *_ = upgrade()
    ids = np.arange(len(labels)) + 2**40
    given = {"query_ids": ids, "gallery_ids": ids}
    move = upgrade_threshold(old, new, labels, old, labels, far=0.02, new_gallery=new, resamples=10, **given)
    results = compare(new, labels, new, labels, **given)
    assert move.after == tar_at_far(results, move.before.far)
    assert move.after != tar_at_far(compare(new, labels, new, labels), move.before.far)


@pytest.mark.parametrize("groups", [np.arange(120), np.arange(120) % 7])
def test_accepted_pairs_of_each_group(groups) -> None:
    old, _, query_labels, gallery, gallery_labels = upgrade()
    scores, same = pairs_of(old, query_labels, gallery, gallery_labels)
    # exactly one impostor pair reaches this edge
    reached = int(np.floor(np.float64(scores[~same].max()) * STEPS)) + STEPS
    edges = np.array([STEPS + 30000, STEPS - 1, reached, STEPS + 30000, BINS, 0])
    ids = {"query_ids": np.arange(120), "gallery_ids": np.arange(80) * 2}
    kept = ids["query_ids"][:, None] != ids["gallery_ids"]
    given = loose.pair(old, query_labels, gallery, gallery_labels, **ids)
    accepted = _accepted(given, edges, groups)
    for kind, of in enumerate((~same & kept, same & kept)):
        for group in np.unique(groups):
            at = groups == group
            expected = [(of[at] & (scores[at] >= (edge - STEPS) / STEPS)).sum() if edge < BINS else 0 for edge in edges]
            assert accepted[kind, group].tolist() == [*expected, of[at].sum()]


def test_the_interval_is_that_of_resampled_queries() -> None:
    """The expected intervals come from a loop that resamples queries and thresholds all of their pairs."""
    old, new, query_labels, gallery, gallery_labels = upgrade(200, 100)
    move = upgrade_threshold(old, new, query_labels, gallery, gallery_labels, threshold=0.7, confidence=0.8)
    was, same = pairs_of(old, query_labels, gallery, gallery_labels)
    now, _ = pairs_of(new, query_labels, gallery, gallery_labels)
    rng = np.random.default_rng(7)
    thresholds, fars, tars = [], [], []
    for _ in range(1000):
        drawn = rng.integers(200, size=200)
        impostor = ~same[drawn]
        far = (was[drawn][impostor] >= 0.7).mean()
        scores = np.sort(now[drawn][impostor])
        allowed = int(far * len(scores) + 1e-9)
        thresholds.append(scores[len(scores) - allowed - 1])
        fars.append((scores >= 0.7).mean())
        friends = now[drawn][~impostor]
        tars.append(((was[drawn][~impostor] >= 0.7).mean(), (friends > thresholds[-1]).mean()))
    np.testing.assert_allclose(move.interval, np.quantile(thresholds, [0.1, 0.9]), atol=0.004)
    np.testing.assert_allclose(move.far_interval, np.quantile(fars, [0.1, 0.9]), atol=0.002)
    expected = np.quantile(tars, [0.1, 0.9], axis=0)
    np.testing.assert_allclose(move.tar_before_interval, expected[:, 0], atol=0.01)
    np.testing.assert_allclose(move.tar_after_interval, expected[:, 1], atol=0.01)
    assert move.tar_after_interval.low < move.after.tar < move.tar_after_interval.high
    assert move.interval.low < move.after.threshold < move.interval.high
    assert move.interval.high - move.interval.low > 0.01


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """The truth comes from 20,000 queries on the gallery. Resampling pairs would miss it in a third of the trials."""
    old, new, query_labels, gallery, gallery_labels = upgrade(20_000, 100, d=6)
    everything = {
        kind: compare(rows, query_labels, gallery, gallery_labels) for kind, rows in (("old", old), ("new", new))
    }
    true = tar_at_far(everything["new"], everything["old"].at(0.8).far).threshold
    covered = 0
    for trial in range(40):
        at = slice(300 * trial, 300 * (trial + 1))
        move = upgrade_threshold(
            old[at], new[at], query_labels[at], gallery, gallery_labels, threshold=0.8, confidence=0.9, resamples=300
        )
        covered += move.interval.low <= true <= move.interval.high
    assert 0.8 <= covered / 40 <= 0.99


def test_the_interval_of_the_unmoved_rate_is_the_new_queries() -> None:
    """If old and new queries are far apart, the interval covers the new rate and not the old one."""
    old, new, *labelled = upgrade(400, 100, noise=3.0)
    move = upgrade_threshold(old, new, *labelled, threshold=0.5)
    assert move.far_interval.low < move.unmoved.far < move.far_interval.high
    assert not move.far_interval.low < move.before.far < move.far_interval.high


def test_a_group_is_resampled_as_a_whole() -> None:
    """Eight copies of each query, resampled as a group, give the same interval as one copy."""
    old, new, query_labels, gallery, gallery_labels = upgrade(60)
    once = upgrade_threshold(old, new, query_labels, gallery, gallery_labels, threshold=0.7)
    many = *(np.repeat(x, 8, axis=0) for x in (old, new, query_labels)), gallery, gallery_labels
    together = upgrade_threshold(*many, threshold=0.7, query_groups=np.repeat(np.arange(60) * 2**40, 8))
    assert together == once
    apart = upgrade_threshold(*many, threshold=0.7)
    assert np.ptp(apart.interval) < 0.6 * np.ptp(once.interval)


def test_intervals_repeat_and_depend_on_the_generator() -> None:
    arguments = upgrade(40, 40)
    first = upgrade_threshold(*arguments, far=0.1, resamples=200)
    assert upgrade_threshold(*arguments, far=0.1, resamples=200) == first
    other = upgrade_threshold(*arguments, far=0.1, resamples=200, generator=np.random.default_rng(5))
    assert other.after == first.after
    assert (other.interval, other.far_interval) != (first.interval, first.far_interval)


def test_calibration_against_scikit_learn() -> None:
    old, _, query_labels, gallery, gallery_labels = upgrade()
    results = compare(old, query_labels, gallery, gallery_labels)
    scores, same = (x.ravel() for x in pairs_of(old, query_labels, gallery, gallery_labels))
    fit = IsotonicRegression(out_of_bounds="clip").fit(scores, same)
    at = np.linspace(-1, 1, 301)
    found = calibrate_scores(results)
    np.testing.assert_allclose(found(at), fit.predict(at), atol=0.02)
    assert found.prior == pytest.approx(same.mean())
    # calibrated on average: the probabilities sum to the number of genuine pairs
    assert found(scores).sum() == pytest.approx(same.sum(), rel=0.01)
    assert (np.diff(found.probabilities) >= 0).all()
    assert found(0.5).shape == ()
    assert found([[2.0, -2.0]]).tolist() == [[found.probabilities[-1], found.probabilities[0]]]


def test_calibration_for_another_fraction_of_genuine_pairs() -> None:
    """By Bayes the odds are multiplied by the ratio of the prior odds."""
    old, _, query_labels, gallery, gallery_labels = upgrade()
    results = compare(old, query_labels, gallery, gallery_labels)
    as_found, half = calibrate_scores(results), calibrate_scores(results, prior=0.5)
    at = np.linspace(0.2, 0.8, 50)
    p, prior = as_found(at), as_found.prior
    odds = p / (1 - p) * (1 - prior) / prior
    np.testing.assert_allclose(half(at), odds / (1 + odds), atol=0.05)
    assert half(0.5) > as_found(0.5)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.isotonic", None)
    results = compare(np.eye(3), [0, 1, 2], np.eye(3), [0, 1, 2])
    with pytest.raises(ModuleNotFoundError, match="sklearn"):
        calibrate_scores(results)


OLD, NEW, LABELS, GALLERY, GALLERY_LABELS = upgrade(20, 10)
GOOD = {
    "old_query": OLD,
    "new_query": NEW,
    "query_labels": LABELS,
    "gallery": GALLERY,
    "gallery_labels": GALLERY_LABELS,
    "threshold": 0.1,
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"far": 0.1}, ValueError, "give one of threshold and far"),
        ({"threshold": None}, ValueError, "give one of threshold and far"),
        ({"threshold": 0.9999}, ValueError, "no impostor pair is accepted at the threshold 0.99991"),
        ({"threshold": None, "far": 0.0}, ValueError, "no impostor pair is accepted"),
        ({"threshold": None, "far": 2.0}, ValueError, "far is a fraction of impostor pairs"),
        ({"new_query": NEW[:5]}, ValueError, "query has 5 rows, query_labels has shape"),
        ({"new_query": NEW[:, :5]}, ValueError, "new.query has 5 columns, old.gallery has 12"),
        ({"query_labels": LABELS + 0.5}, TypeError, "query_labels must be integers"),
        ({"query_groups": [1, 2]}, ValueError, r"old.query has 20 rows, query_groups has shape \[2\]"),
        ({"query_groups": LABELS + 0.5}, TypeError, "query_groups must be integers"),
        ({"query_groups": LABELS * 0}, ValueError, "query_groups must hold at least 2 different groups"),
        ({"confidence": 1.0}, ValueError, "confidence must lie between 0 and 1"),
        ({"resamples": 0}, ValueError, "resamples must be at least 1"),
        ({"generator": 0}, TypeError, "generator must be a numpy.random.Generator"),
        ({"gallery_labels": GALLERY_LABELS * 0 + 77}, ValueError, "no pair of items of one class"),
    ],
)
def test_bad_input(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        upgrade_threshold(**{**GOOD, **changes})


def test_bad_calibrations() -> None:
    results = compare(np.eye(3), [0, 1, 2], np.eye(3), [0, 1, 2])
    for prior in (0, 1, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"prior is a fraction of genuine pairs and must lie in \(0, 1\)"):
            calibrate_scores(results, prior=prior)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="scores hold nan or inf"):
            calibrate_scores(results)([0.5, bad])
    with pytest.raises(ValueError, match="no pair of items of one class"):
        calibrate_scores(compare(np.eye(3), [0, 1, 2], np.eye(3), [7, 7, 7]))
