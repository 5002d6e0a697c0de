"""Tests verification against all pairs in memory, scikit-learn and hand-computed tables, bad input and memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve
from versions import pair

from simplexfix.retrieval import VerificationResults, verification
from simplexfix.retrieval.verification import (
    BINS,
    STEPS,
    cross_validated_accuracy,
    equal_error_rate,
    pair_scores,
    roc_curve,
    score_histogram,
    tar_at_far,
)


def compare(*arguments, **ids) -> VerificationResults:
    return VerificationResults.compare(pair(*arguments, **ids))


def features(queries: int = 150, items: int = 90, d: int = 16, classes: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=queries + items) * 2**40 - 3
    centers = rng.standard_normal((classes, d))
    x = (centers[(labels + 3) >> 40] + 1.5 * rng.standard_normal((queries + items, d))).astype(np.float32)
    return x[:queries], labels[:queries], x[queries:], labels[queries:]


def all_scores(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Returns float64 products of float32 unit rows, rounded to float32: the definition of a search's score."""
    q, g = (F.normalize(torch.tensor(x).double()).float().double() for x in (query, gallery))
    return (q @ g.T).float().numpy()


def dense(query, query_labels, gallery, gallery_labels) -> tuple[np.ndarray, np.ndarray]:
    return all_scores(query, gallery).ravel(), (query_labels[:, None] == gallery_labels).ravel()


def on_grid(scores: np.ndarray) -> np.ndarray:
    return np.floor(scores.astype(np.float64) * STEPS) / STEPS


def test_counts_are_those_of_all_pairs() -> None:
    case = features()
    scores, same = dense(*case)
    results = compare(*case)
    bins = (on_grid(scores) * STEPS + STEPS).astype(np.int64)
    np.testing.assert_array_equal(results.genuine, np.bincount(bins[same], minlength=BINS))
    np.testing.assert_array_equal(results.impostor, np.bincount(bins[~same], minlength=BINS))
    assert (results.num_genuine, results.num_impostor) == (same.sum(), (~same).sum())
    for threshold in (-1.0, -0.25, 0.0, 0.5, 0.875, 1.0):
        point = results.at(threshold)
        assert point == (threshold, (scores[same] >= threshold).mean(), (scores[~same] >= threshold).mean())
    assert results.at(0.3).threshold == np.ceil(0.3 * STEPS) / STEPS
    assert results.at(2.0)[1:] == results.at(np.inf)[1:] == (0, 0)
    assert results.at(-np.inf) == (-1, 1, 1)


def test_ends_of_the_scale() -> None:
    """Equal and opposite rows, whose cosines may round to beyond 1 and -1, and zero rows."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 3)).astype(np.float32)
    rows[0] = 0
    results = compare(rows, np.arange(40), np.concatenate([rows, -rows]), np.arange(80) % 40)
    assert results.at(1 - 2 / STEPS).tar == pytest.approx(39 / 80)
    assert results.at(-1 + 2 / STEPS).tar == pytest.approx(41 / 80)
    assert results.genuine[STEPS] == 2  # the zero row with the two zero rows of its class


def test_roc_against_scikit_learn() -> None:
    case = features()
    scores, same = dense(*case)
    ours = roc_curve(compare(*case))
    far, tar, thresholds = sklearn_roc_curve(same, on_grid(scores), drop_intermediate=False)
    np.testing.assert_array_equal(ours.thresholds, thresholds)
    np.testing.assert_allclose(ours.far, far, rtol=1e-12, atol=0)
    np.testing.assert_allclose(ours.tar, tar, rtol=1e-12, atol=0)
    assert ours.area == pytest.approx(roc_auc_score(same, on_grid(scores)), abs=1e-12)
    assert ours.area == pytest.approx(roc_auc_score(same, scores), abs=1e-4)


def test_tar_at_far_takes_the_lowest_threshold() -> None:
    case = features()
    scores, same = dense(*case)
    results = compare(*case)
    impostors = on_grid(scores[~same])
    for far in (0.0, 1 / len(impostors), 1e-3, 0.01, 0.1, 0.5, 1.0):
        point = tar_at_far(results, far)
        assert point.far == (impostors >= point.threshold).mean() <= far
        assert point.tar == (scores[same] >= point.threshold).mean()
        if point.threshold > -1:
            assert (impostors >= point.threshold - 1 / STEPS).mean() > far


def test_equal_error_rate() -> None:
    case = features()
    scores, same = dense(*case)
    point = equal_error_rate(compare(*case))
    grid = np.arange(-STEPS, STEPS + 1) / STEPS
    gap = [abs((scores[~same] >= t).mean() - (scores[same] < t).mean()) for t in grid[::16]]
    assert abs(point.far - (1 - point.tar)) <= min(gap)
    assert abs(point.far - (1 - point.tar)) < 2e-3


def test_by_hand() -> None:
    """The cosines of one query are 1, 0.6, 0 and -0.8; the two in the middle are genuine."""
    gallery = torch.tensor([[1.0, 0], [3, 4], [0, 1], [-4, 3]])
    results = compare(torch.tensor([[2.0, 0]]), [5], gallery, [1, 5, 5, 1])
    curve = roc_curve(results)
    np.testing.assert_allclose(curve.thresholds[1:], [1, 0.6, 0, -0.8], atol=2**-16)
    assert curve.thresholds[0] == np.inf
    assert curve.tar.tolist() == [0, 0, 0.5, 1, 1]
    assert curve.far.tolist() == [0, 0.5, 0.5, 0.5, 1]
    assert curve.area == 0.5
    assert tar_at_far(results, 0)[1:] == (0, 0)
    assert tar_at_far(results, 0.5)[1:] == (1, 0.5)
    assert equal_error_rate(results)[1:] == (0.5, 0.5)
    histogram = score_histogram(results, 4)
    assert histogram.edges.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert histogram.genuine.tolist() == [0, 0, 1, 1]
    assert histogram.impostor.tolist() == [1, 0, 0, 1]
    assert repr(results) == "VerificationResults of 2 genuine and 2 impostor pairs"


def test_an_item_is_not_compared_with_itself() -> None:
    query, labels, *_ = features()
    ids = np.random.default_rng(1).permutation(len(labels)) * 3
    shuffled = np.random.default_rng(2).permutation(len(labels))[:100]
    results = compare(query, labels, query[shuffled], labels[shuffled], query_ids=ids, gallery_ids=ids[shuffled])
    scores, same = all_scores(query, query[shuffled]), labels[:, None] == labels[shuffled]
    other = ids[:, None] != ids[shuffled]
    assert results.excluded == 100
    assert results.num_genuine == (same & other).sum()
    assert results.num_impostor == (~same).sum()
    assert results.at(0.999).tar == (scores[same & other] >= on_grid(np.array(0.999)) + 1 / STEPS).mean() == 0


def test_blocks_change_nothing_and_pairs_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    case = features(2500, 2000, d=4)
    ids = {"query_ids": np.arange(2500), "gallery_ids": np.arange(2100, 4100)}
    expected = compare(*case, **ids)
    monkeypatch.setattr(verification, "_QUERY_ROWS", 500)
    monkeypatch.setattr(verification, "_GALLERY_ROWS", 333)
    tracemalloc.start()
    found = compare(*case, **ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found.genuine, expected.genuine)
    np.testing.assert_array_equal(found.impostor, expected.impostor)
    assert found.excluded == expected.excluded == 400
    assert peak < 16e6  # a few arrays of counts and one block; the bins of all pairs would be 40 MB
    assert not found.genuine.flags.writeable


def test_cosines_that_cancel_pass_the_threshold_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of rows cancel: every cosine is 0, and float64 rounds it up or down depending on the product's shape."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((rows, 96)).astype(np.float32) for rows in (70, 90))
    query, gallery = np.concatenate([a, a], axis=1), np.concatenate([b, -b], axis=1)
    for rows, items in ((1024, 4096), (64, 64), (1, 90), (70, 1)):
        monkeypatch.setattr(verification, "_QUERY_ROWS", rows)
        monkeypatch.setattr(verification, "_GALLERY_ROWS", items)
        results = compare(query, np.arange(70) % 7, gallery, np.arange(90) % 7)
        assert results.at(0.0)[1:] == (1, 1)
        assert results.at(2**-16)[1:] == (0, 0)


def test_dtypes_and_kinds_of_arrays() -> None:
    query, query_labels, gallery, gallery_labels = features()
    half = [x.astype(np.float16) for x in (query, gallery)]
    expected = compare(half[0].astype(np.float32), query_labels, half[1].astype(np.float32), gallery_labels)
    found = compare(
        torch.from_numpy(half[0]), query_labels.tolist(), half[1].astype(np.float64), torch.from_numpy(gallery_labels)
    )
    np.testing.assert_array_equal(found.genuine, expected.genuine)
    np.testing.assert_array_equal(found.impostor, expected.impostor)


def test_pair_scores() -> None:
    first, _, second, _ = features(90, 90)
    np.testing.assert_array_equal(pair_scores(first, second), np.diagonal(all_scores(first, second)))


def test_cross_validation_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    same = rng.random(203) < 0.5
    scores = np.round(rng.standard_normal(203) + 1.2 * same, 1)  # ties
    folds = np.arange(203) * 10 // 203
    found = cross_validated_accuracy(scores, same)
    for fold in range(10):
        train, test = folds != fold, folds == fold
        candidates = np.append(np.unique(scores[train]), np.inf)
        accuracy = [((scores[train] >= t) == same[train]).mean() for t in candidates]
        assert found.thresholds[fold] == candidates[int(np.argmax(accuracy))]
        assert found.accuracies[fold] == ((scores[test] >= found.thresholds[fold]) == same[test]).mean()
    assert found.accuracy == pytest.approx(found.accuracies.mean())
    assert found.standard_error == pytest.approx(found.accuracies.std(ddof=1) / 10**0.5)
    again = cross_validated_accuracy(torch.from_numpy(scores), torch.from_numpy(same), folds=folds * 7 - 2**40)
    np.testing.assert_array_equal(again.accuracies, found.accuracies)


def test_cross_validation_by_hand() -> None:
    """Each fold gets the threshold of the other, 0.5: it is right on 4 of 4 pairs of the first and 3 of the second."""
    found = cross_validated_accuracy(
        [0.9, 0.5, 0.1, 0.2, 0.7, 0.5, 0.4, 0.6], np.array([1, 1, 0, 0, 1, 1, 0, 0], dtype=bool), folds=2
    )
    assert found.thresholds.tolist() == [0.5, 0.5]
    assert found.accuracies.tolist() == [1.0, 0.75]
    assert found.accuracy == 0.875
    assert found.standard_error == pytest.approx(0.125)
    nothing = cross_validated_accuracy([0.1, 0.2], np.array([False, False]), folds=2)
    assert nothing.thresholds.tolist() == [np.inf, np.inf]


X, L = np.eye(3, dtype=np.float32), [0, 1, 2]
NAN = X.copy()
NAN[1, 1] = np.nan
GOOD = compare(X, L, X, L)
SAME = np.array([True, False, True])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compare(NAN, L, X, L), ValueError, "query row 1 holds nan"),
        (lambda: compare(X, L, NAN, L), ValueError, "gallery row 1 holds nan"),
        (lambda: compare(X, L[:2], X, L), ValueError, "query has 3 rows, query_labels has shape"),
        (lambda: compare(X, L, X[:, :2], L), ValueError, "query has 3 columns, gallery has 2"),
        (lambda: compare(X, [0.5, 1, 2], X, L), TypeError, "query_labels must be integers"),
        (lambda: compare(X, L, X, L, query_ids=L), ValueError, "query_ids without gallery_ids"),
        (lambda: compare(X, [5] * 3, X, L).at(0), ValueError, "no pair of items of one class"),
        (lambda: roc_curve(compare(X, [5] * 3, X, L)), ValueError, "no pair of items of one class"),
        (lambda: tar_at_far(compare(X, [5] * 3, X, [5] * 3), 0), ValueError, "of two classes"),
        (lambda: GOOD.at(np.nan), ValueError, "threshold must be a number, got nan"),
        (lambda: GOOD.at("0.5"), TypeError, "threshold must be a number, got str"),
        (lambda: tar_at_far(GOOD, 1.5), ValueError, r"far is a fraction of impostor pairs, in \[0, 1\], got 1.5"),
        (lambda: tar_at_far(GOOD, 0.1), ValueError, "far = 0.1 of 6 impostor pairs is less than one of them"),
        (lambda: score_histogram(GOOD, 0), ValueError, "bins must lie between 1 and 131072, got 0"),
        (lambda: pair_scores(X, X[:2]), ValueError, r"the same shape, got \[3, 3\] and \[2, 3\]"),
        (lambda: cross_validated_accuracy([1, 2, 3], SAME[:2], folds=2), ValueError, r"got \[3\] and \[2\]"),
        (lambda: cross_validated_accuracy([1, np.nan, 3], SAME, folds=2), ValueError, "scores row 1 holds nan"),
        (lambda: cross_validated_accuracy([1, 2, 3], SAME.astype(int), folds=2), TypeError, "same must be bool"),
        (lambda: cross_validated_accuracy([1, 2, 3], SAME), ValueError, "between 2 and the number of pairs, 3, got 10"),
        (lambda: cross_validated_accuracy([1, 2, 3], SAME, folds=[4, 4, 4]), ValueError, "folds must be at least 2"),
        (lambda: cross_validated_accuracy([1, 2, 3], SAME, folds=[0, 1]), ValueError, "folds has shape"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
