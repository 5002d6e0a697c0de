"""Tests intervals and paired tests against hand-computed values, SciPy and resampled queries, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from simplexfix.compatibility import (
    bootstrap_cells,
    bootstrap_gain,
    bootstrap_interval,
    exact_interval,
    mcnemar_test,
    mcnemar_tests,
    negative_flip_rate,
    positive_flip_rate,
    randomization_test,
)


def flips(gains: int, losses: int, same: int = 3) -> tuple[np.ndarray, np.ndarray]:
    before = np.repeat([False, True, True], [gains, losses, same])
    return before, np.repeat([True, False, True], [gains, losses, same])


def test_mcnemar_by_hand() -> None:
    # 5 gains, 1 loss: 2 (1 + 6) / 2^6
    assert mcnemar_test(*flips(5, 1)) == pytest.approx((5, 1, 14 / 64), rel=1e-12)
    assert mcnemar_test(*(torch.from_numpy(x) for x in flips(1, 5))) == pytest.approx((1, 5, 14 / 64), rel=1e-12)
    assert mcnemar_test(*flips(3, 3)).p_value == 1  # and not twice 0.66
    assert mcnemar_test(*flips(0, 0)).p_value == 1
    assert mcnemar_test(*flips(0, 10)).p_value == pytest.approx(2**-9, rel=1e-12)


@pytest.mark.parametrize("gains", [0, 1, 7, 499, 500, 1_000, 30_000])
@pytest.mark.parametrize("losses", [1, 480, 29_000])
def test_mcnemar_against_scipy(gains: int, losses: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(gains, gains + losses, 0.5).pvalue
    assert mcnemar_test(*flips(gains, losses)).p_value == pytest.approx(expected, rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("trials", [1, 5, 100, 50_000])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_exact_interval_against_scipy(trials: int, fraction: float, confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    successes = round(fraction * trials)
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert exact_interval(successes, trials, confidence=confidence) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_exact_interval_by_hand() -> None:
    low, high = exact_interval(0, 20, confidence=0.9)
    assert low == 0
    assert high == pytest.approx(1 - 0.05 ** (1 / 20), rel=1e-12)  # (1 - p)^20 = 0.05: 0 of 20 does not exclude 10 %
    assert exact_interval(20, 20, confidence=0.9) == pytest.approx((1 - high, 1.0), rel=1e-9)


def test_bootstrap_is_that_of_resampled_queries() -> None:
    """Binomial and multinomial draws have the same quantiles as resampled queries."""
    numbers = np.random.default_rng(0)
    before, after = flips(30, 12, 58)
    at = numbers.integers(100, size=(40_000, 100))
    hits, gain = after[at].mean(axis=1), after[at].mean(axis=1) - before[at].mean(axis=1)
    for confidence in (0.8, 0.95):
        ends = [(1 - confidence) / 2, (1 + confidence) / 2]
        options = {"confidence": confidence, "resamples": 40_000, "generator": np.random.default_rng(1)}
        # the tolerance is one of the 100 queries
        assert bootstrap_interval(after, **options) == pytest.approx(np.quantile(hits, ends), abs=0.011)
        assert bootstrap_gain(before, after, **options) == pytest.approx(np.quantile(gain, ends), abs=0.011)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    numbers = np.random.default_rng(2)
    covered = np.zeros(3)
    for _ in range(400):
        kind = numbers.choice(4, p=[0.5, 0.2, 0.1, 0.2], size=300)  # right, gained, lost, wrong
        before, after = np.isin(kind, [0, 2]), np.isin(kind, [0, 1])
        low, high = bootstrap_interval(after, confidence=0.9, resamples=500, generator=numbers)
        covered[0] += low <= 0.7 <= high
        low, high = bootstrap_gain(before, after, confidence=0.9, resamples=500, generator=numbers)
        covered[1] += low <= 0.1 <= high
        low, high = exact_interval(int(after.sum()), 300, confidence=0.9)
        covered[2] += low <= 0.7 <= high
    assert (covered / 400 > 0.85).all(), covered  # 0.9, minus three standard errors of 400 trials
    assert (covered / 400 < 0.96).all(), covered


def test_a_seed_gives_the_same_numbers_and_no_global_state_changes() -> None:
    hits = np.arange(50) % 3 == 0
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = bootstrap_interval(hits)
    assert first == bootstrap_interval(hits)
    assert first == bootstrap_interval(hits, generator=np.random.default_rng(0))
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    few = [bootstrap_interval(hits, generator=np.random.default_rng(s), resamples=20) for s in range(5)]
    assert len(set(few)) > 1


def test_cells_and_tests_of_a_matrix() -> None:
    before, after = flips(8, 1, 20)
    other = ~before
    hits = [[before], [after, other], [before, after, other]]
    cells = bootstrap_cells(hits, resamples=2000)
    assert cells.shape == (3, 3, 2)
    assert np.isnan(cells[np.triu_indices(3, 1)]).all()
    for i, row in enumerate(hits):
        for j, cell in enumerate(row):
            assert cells[i, j, 0] < cell.mean() < cells[i, j, 1]
    tests = mcnemar_tests(hits)
    assert np.isnan(tests[np.triu_indices(3)]).all()
    assert tests[1, 0] == mcnemar_test(before, after).p_value
    assert tests[2, 0] == 1
    assert tests[2, 1] == mcnemar_test(other, after).p_value < 1


def scores(queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores such as nDCG: about 40 % of the queries keep theirs, and about 30 % begin with 0."""
    draw = np.random.default_rng(seed)
    before = np.where(draw.random(queries) < 0.3, 0.0, draw.random(queries))
    after = np.where(draw.random(queries) < 0.4, before, draw.random(queries))
    return before, after


def test_bootstrap_of_scores_is_that_of_resampled_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = scores(120, 0)
    at = np.random.default_rng(0).integers(120, size=(20_000, 120))
    options = {"resamples": 20_000, "generator": np.random.default_rng(1)}
    expected = np.quantile(after[at].mean(1), [0.025, 0.975])
    assert bootstrap_interval(after, **options) == pytest.approx(expected, abs=0.003)
    expected = np.quantile((after - before)[at].mean(1), [0.025, 0.975])
    assert bootstrap_gain(before, after, **options) == pytest.approx(expected, abs=0.003)
    whole = bootstrap_interval(after)
    monkeypatch.setattr("simplexfix.compatibility.statistics._BLOCK_NUMBERS", 1000)
    assert bootstrap_interval(after) == whole  # blocks change nothing
    # scores of 0 and 1 have the same distribution as hits
    hits = after > 0.5
    exact = bootstrap_interval(hits, resamples=20_000)
    assert bootstrap_interval(hits.astype(np.float32), resamples=20_000) == pytest.approx(exact, abs=0.01)


def test_randomization_of_hits_is_mcnemars_test() -> None:
    for gains, losses in ((5, 1), (0, 10), (3, 3), (0, 0), (12, 1)):
        before, after = flips(gains, losses)
        expected = mcnemar_test(before, after).p_value
        assert randomization_test(before, after) == pytest.approx(expected, rel=1e-12)
        assert randomization_test(before * 1.0, after * 1.0) == pytest.approx(expected, rel=1e-12)
    before, after = flips(60, 35)  # random sign patterns: three standard errors of 10,000
    expected = mcnemar_test(before, after).p_value
    assert randomization_test(before * 1.0, after * 1.0) == pytest.approx(expected, abs=3 * (expected / 10_000) ** 0.5)
    assert randomization_test(*(x * 1.0 for x in flips(0, 300))) == 1 / 10_001  # and never 0


@pytest.mark.parametrize("queries", [12, 200])
def test_randomization_against_scipy(queries: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    before, after = scores(queries, 3)

    def gain(x, y, axis):
        return np.mean(y - x, axis=axis)

    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": 20_000}
    expected = stats.permutation_test((before, after), gain, **options, rng=np.random.default_rng(0)).pvalue
    assert randomization_test(before, after) == pytest.approx(expected, abs=1e-12 if queries == 12 else 0.02)
    assert randomization_test(before, after) == randomization_test(after, before)


def test_flips_of_scores_are_those_that_rise_and_fall() -> None:
    before, after = [0.5, 0.2, 1.0, 0.0], [0.5, 0.3, 0.9, 0.0]
    assert (negative_flip_rate(before, after), positive_flip_rate(before, after)) == (1 / 4, 1 / 4)


def test_queries_that_all_agree() -> None:
    assert bootstrap_interval([True] * 9) == (1.0, 1.0)
    assert bootstrap_gain([False] * 9, [True] * 9) == (1.0, 1.0)
    assert mcnemar_test([False] * 4, [True] * 4).p_value == 0.125  # four queries prove nothing at 95 %
    assert math.isclose(exact_interval(9, 9).low, 0.025 ** (1 / 9), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bootstrap_interval([1, 0]), TypeError, "hits must be bool, right or wrong .* or floating scores, got"),
        (lambda: bootstrap_interval([1.0, -0.1]), ValueError, r"hits must lie in \[0, 1\], got -0.1 for query 1"),
        (lambda: bootstrap_interval([1.0, math.nan]), ValueError, r"hits must lie in \[0, 1\], got nan for query 1"),
        (lambda: bootstrap_gain([1.0], [True]), TypeError, "both bool or both floating, got float64 and bool"),
        (lambda: mcnemar_test([1.0], [0.5]), TypeError, "before must be bool, right or wrong"),
        (lambda: randomization_test([0.5], [0.5, 1]), ValueError, "must be of the same queries, got 1 and 2"),
        (lambda: randomization_test([0.5], [1.0], resamples=0), ValueError, "resamples must be at least 1"),
        (lambda: bootstrap_interval([]), ValueError, "Q >= 1"),
        (lambda: bootstrap_interval([True], confidence=1.0), ValueError, "confidence must lie between 0 and 1"),
        (lambda: bootstrap_interval([True], confidence=95), ValueError, "confidence must lie between 0 and 1"),
        (lambda: bootstrap_interval([True], confidence="95"), TypeError, "confidence must be a number"),
        (lambda: bootstrap_interval([True], resamples=0), ValueError, "resamples must be at least 1"),
        (lambda: bootstrap_interval([True], generator=3), TypeError, "generator must be a numpy.random.Generator"),
        (lambda: bootstrap_gain([True], [True, True]), ValueError, "must be of the same queries, got 1 and 2"),
        (lambda: mcnemar_test([True], [1]), TypeError, "after must be bool"),
        (lambda: bootstrap_cells([[[True]], [[True]]]), ValueError, r"lengths 1 to T, got lengths \[1, 1\]"),
        (lambda: mcnemar_tests([]), ValueError, r"lengths 1 to T, got lengths \[\]"),
        (
            lambda: mcnemar_tests([[[True]], [[True], [True, False]]]),
            ValueError,
            r"hits\[1\]\[1\] must have 1 queries like hits\[0\]\[0\], got 2",
        ),
        (lambda: exact_interval(3, 2), ValueError, "got 3 of 2"),
        (lambda: exact_interval(0, 0), ValueError, "got 0 of 0"),
        (lambda: exact_interval(0.5, 2), TypeError, "successes must be an integer"),
    ],
)
def test_bad_input(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
