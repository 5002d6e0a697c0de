"""Confidence intervals and paired significance tests for evaluation scores, from the hits or scores of queries.

Queries are resampled; the gallery is fixed.  For hits a resample is one draw: the number of correct queries among Q
resampled ones is binomial, and the numbers of gains and losses of an upgrade are multinomial.  So a resample costs
O(1) instead of O(Q) and has exactly the bootstrap's distribution.  For scores in [0, 1], such as nDCG, queries are
drawn one by one.

Intervals are percentile intervals.  For a fraction of hits they stay in [0, 1], and the estimate is unbiased.  The two
corrections of BCa would only measure that hits are discrete, and are undefined if all queries agree.  If all queries
agree, every resample is the same and the interval has width 0; `exact_interval` and `mcnemar_test` are valid for any
number of queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .._checks import check_integer, check_number
from ..labelled import read_hits, read_query_scores
from .criteria import flips, read_both

__all__ = [
    "Interval",
    "McNemar",
    "bootstrap_cells",
    "bootstrap_gain",
    "bootstrap_interval",
    "exact_interval",
    "mcnemar_test",
    "mcnemar_tests",
    "randomization_test",
]

_BLOCK_NUMBERS = 2**22  # random numbers per block
_EXACT_QUERIES = 13  # up to 13 queries all sign patterns are enumerated: 2^13 is less than 10,000 samples
Hits = ArrayLike | torch.Tensor


class Interval(NamedTuple):
    """Lower and upper end of a two-sided confidence interval."""

    low: float
    high: float


class McNemar(NamedTuple):
    """Result of McNemar's test.

    Attributes:
        gains: number of queries that become correct.
        losses: number of queries that become wrong.
        p_value: two-sided p-value.
    """

    gains: int
    losses: int
    p_value: float


def bootstrap_interval(
    hits: Hits,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    generator: np.random.Generator | None = None,
) -> Interval:
    """Returns the bootstrap percentile interval of a fraction of hits, or of a mean score.

        resampled = [ mean(hits[generator.integers(Q, size=Q)]) for _ in range(resamples) ]
        interval = quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])

    Args:
        hits: [Q] bool, true for correct queries, or [Q] floating scores in [0, 1]; Q >= 1.
        confidence: level of the interval, in (0, 1).
        resamples: number of resamples, at least 1.
        generator: source of random numbers; None for `np.random.default_rng(0)`, the same numbers in every call.

    Raises:
        TypeError: hits are neither bool nor floating, or an option has the wrong type.
        ValueError: there is not one value per query, no query, or an option is out of range.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import bootstrap_interval
        >>> interval = bootstrap_interval(np.arange(100) < 70)
        >>> round(interval.low, 2), round(interval.high, 2)
        (0.61, 0.79)
    """
    scores = read_query_scores("hits", hits)
    numbers = check_options(confidence, resamples, generator)
    if scores.dtype != np.bool_:
        return percentiles(_resampled_means(scores.astype(np.float64), resamples, numbers), confidence)
    return percentiles(numbers.binomial(len(scores), scores.mean(), size=resamples) / len(scores), confidence)


def bootstrap_gain(
    before: Hits,
    after: Hits,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    generator: np.random.Generator | None = None,
) -> Interval:
    """Returns the bootstrap percentile interval of `mean(after) - mean(before)`, with the same resampled queries.

    Args:
        before, after: as in `negative_flip_rate`.
        confidence, resamples, generator: as in `bootstrap_interval`.

    Raises:
        TypeError, ValueError: as in `bootstrap_interval` and `negative_flip_rate`.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import bootstrap_gain
        >>> interval = bootstrap_gain(np.arange(100) < 70, np.arange(100) < 80)
        >>> round(interval.low, 2), round(interval.high, 2)
        (0.05, 0.16)
    """
    old, new = read_both(before, after)
    numbers = check_options(confidence, resamples, generator)
    if old.dtype != np.bool_:
        return percentiles(_resampled_means(np.subtract(new, old), resamples, numbers), confidence)
    gains, losses, queries = flips(old, new)
    probabilities = np.array([gains, losses, queries - gains - losses]) / queries
    drawn = numbers.multinomial(queries, probabilities, size=resamples)
    return percentiles((drawn[:, 0] - drawn[:, 1]) / queries, confidence)


def bootstrap_cells(
    hits: Sequence[Sequence[Hits]],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    generator: np.random.Generator | None = None,
) -> NDArray[np.float64]:
    """Returns the bootstrap percentile interval of each cell of a compatibility matrix.

    Args:
        hits: T rows of lengths 1, 2, ..., T, from `compatibility_hits`.
        confidence, resamples, generator: as in `bootstrap_interval`.

    Returns:
        [T, T, 2] float64, low and high; nan above the diagonal.

    Raises:
        TypeError, ValueError: as in `bootstrap_interval`.
        ValueError: `hits` are not a lower triangle.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import bootstrap_cells
        >>> hits = np.arange(100) < 70
        >>> bootstrap_cells([[hits], [hits, hits]]).shape
        (2, 2, 2)
    """
    rows = _triangle(hits)
    numbers = check_options(confidence, resamples, generator)
    cells = np.full((len(rows), len(rows), 2), np.nan)
    for i, row in enumerate(rows):
        for j, right in enumerate(row):
            cells[i, j] = bootstrap_interval(right, confidence=confidence, resamples=resamples, generator=numbers)
    return cells


def mcnemar_test(before: Hits, after: Hits) -> McNemar:
    """Returns McNemar's exact test of paired hits, with the hypothesis that gains and losses are equally likely.

        n = gains + losses,  m = min(gains, losses)
        p_value = min(1, 2 * sum_{k <= m} binomial(n, k) / 2^n)           # 1 for n = 0

    Args:
        before: [Q] bool, true for correct queries.
        after: [Q] bool, the same queries after the upgrade.

    Raises:
        TypeError, ValueError: as in `negative_flip_rate`.

    Reference:
        McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import mcnemar_test
        >>> test = mcnemar_test(np.arange(9) < 2, np.arange(9) < 8)
        >>> test.gains, test.losses, round(test.p_value, 5)
        (6, 0, 0.03125)
    """
    gains, losses, _ = flips(read_hits("before", before), read_hits("after", after))
    return McNemar(gains, losses, min(1.0, 2 * _at_most(min(gains, losses), gains + losses, 0.5)))


def randomization_test(
    before: Hits, after: Hits, *, resamples: int = 10_000, generator: np.random.Generator | None = None
) -> float:
    """Returns the p-value of the paired randomization test, with the hypothesis that before and after are exchangeable.

        d = after - before
        p_value = fraction of sign patterns s in {-1, 1}^Q with |sum_q s_q d_q| >= |sum_q d_q|

    If at most 13 queries change their score, all patterns are enumerated.  Else `resamples` random patterns are used,
    and the p-value is (1 + count) / (1 + resamples); the test's type I error then does not exceed its level.  For 0/1
    scores with all patterns it equals McNemar's exact test.

    Args:
        before, after: [Q] floating scores in [0, 1] of the same queries; Q >= 1.
        resamples: number of random patterns, at least 1.
        generator: source of random numbers; None for `np.random.default_rng(0)`.

    Returns:
        The two-sided p-value; 1 if no score changes.

    Raises:
        TypeError, ValueError: as in `negative_flip_rate`.
        ValueError: `resamples` is below 1.

    Reference:
        Smucker, Allan and Carterette, "A Comparison of Statistical Significance Tests for Information Retrieval
        Evaluation", CIKM 2007.  Phipson and Smyth, "Permutation P-values Should Never Be Zero", 2010.

    Example:
        >>> from simplexfix.compatibility import randomization_test
        >>> randomization_test([0.2, 0.4, 0.5], [0.6, 0.9, 0.7])
        0.25
    """
    old, new = read_both(before, after)
    numbers = check_options(0.95, resamples, generator)
    moved = np.subtract(new, old, dtype=np.float64)
    moved = moved[moved != 0]
    # rounding depends on the summation order, so sums that differ only by rounding count as equal
    least = abs(moved.sum()) - 1e-12 * np.abs(moved).sum()
    if len(moved) <= _EXACT_QUERIES:
        sums = np.zeros(1)
        for size in moved:
            sums = np.concatenate([sums + size, sums - size])
        return float((np.abs(sums) >= least).mean())
    count, step = 0, max(1, _BLOCK_NUMBERS // len(moved))
    for begin in range(0, resamples, step):
        signs = numbers.integers(2, size=(min(step, resamples - begin), len(moved)), dtype=np.int8)
        count += int((np.abs((2.0 * signs - 1) @ moved) >= least).sum())
    return (1 + count) / (1 + resamples)


def paired_p_value(before: Hits, after: Hits, generator: np.random.Generator) -> float:
    """Returns the p-value of McNemar's exact test for hits, or of the randomization test for scores."""
    if read_both(before, after)[0].dtype == np.bool_:
        return mcnemar_test(before, after).p_value
    return randomization_test(before, after, generator=generator)


def mcnemar_tests(hits: Sequence[Sequence[Hits]]) -> NDArray[np.float64]:
    """Returns the p-values [T, T] of McNemar's test for all upgrades.

        mcnemar_test(hits[j][j], hits[i][j]).p_value        # for i > j, else nan

    Args:
        hits: T rows of lengths 1, 2, ..., T of [Q] bool, from `compatibility_hits`.

    Raises:
        TypeError, ValueError: as in `bootstrap_cells`.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import mcnemar_tests
        >>> worse, better = np.arange(9) < 2, np.arange(9) < 8
        >>> mcnemar_tests([[worse], [better, better]])
        array([[    nan,     nan],
               [0.03125,     nan]])
    """
    rows = _triangle(hits)
    tests = np.full((len(rows), len(rows)), np.nan)
    for i, row in enumerate(rows):
        for j in range(i):
            tests[i, j] = mcnemar_test(rows[j][j], row[j]).p_value
    return tests


def exact_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Returns the Clopper-Pearson interval of a fraction; its coverage is at least the confidence level.

        low:  the p with P(X >= successes) = (1 - confidence) / 2       # 0 for successes = 0
        high: the p with P(X <= successes) = (1 - confidence) / 2       # 1 for successes = trials
        X ~ Binomial(trials, p)

    Args:
        successes: from 0 to `trials`.
        trials: at least 1.
        confidence: level of the interval, in (0, 1).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Reference:
        Clopper and Pearson, "The use of confidence or fiducial limits", 1934.

    Example:
        >>> from simplexfix.compatibility import exact_interval
        >>> interval = exact_interval(5, 100)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.016, 0.113)
    """
    trials, successes = check_integer("trials", trials), check_integer("successes", successes)
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes of trials must be 0 to trials, trials >= 1, got {successes} of {trials}")
    tail = (1 - check_confidence(confidence)) / 2
    # P(X <= k) decreases with p from 1 to 0; the low end follows from the number of failures
    high = 1.0 if successes == trials else _solve(successes, trials, tail)
    low = 0.0 if successes == 0 else 1.0 - _solve(trials - successes, trials, tail)
    return Interval(low, high)


def _solve(k: int, n: int, tail: float) -> float:
    """Solves P(X <= k) = tail for p by bisection, to float64 precision."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(k, n, middle) > tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _at_most(k: int, n: int, p: float) -> float:
    """Returns P(X <= k) for X ~ Binomial(n, p)."""
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    if k > n * p:  # the upper tail is smaller: fewer terms and no cancellation
        return 1.0 - _at_most(n - k - 1, n, 1 - p)
    # add terms in descending order, each computed from the previous one, until they are below rounding
    log_binomial = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    term = math.exp(log_binomial + k * math.log(p) + (n - k) * math.log1p(-p))
    total, odds = 0.0, (1 - p) / p
    while term > total * 2.0**-60:
        total += term
        term *= k / (n - k + 1) * odds
        k -= 1
    return min(total, 1.0)


def _resampled_means(values: NDArray[np.float64], resamples: int, numbers: np.random.Generator) -> NDArray[np.float64]:
    """Returns means [resamples] of bootstrap samples: len(values) values drawn with replacement."""
    means = np.empty(resamples)
    step = max(1, _BLOCK_NUMBERS // len(values))
    for begin in range(0, resamples, step):
        block = slice(begin, min(resamples, begin + step))
        means[block] = values[numbers.integers(len(values), size=(block.stop - begin, len(values)))].mean(axis=1)
    return means


def percentiles(values: NDArray[np.float64], confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def check_confidence(confidence: float) -> float:
    check_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, both excluded, got {confidence}")
    return confidence


def check_generator(generator: np.random.Generator | None) -> np.random.Generator:
    """Returns the generator, or for None a new one with seed 0, so that every call gives the same numbers."""
    if generator is None:
        return np.random.default_rng(0)
    if not isinstance(generator, np.random.Generator):
        raise TypeError(f"generator must be a numpy.random.Generator, got {type(generator).__name__}")
    return generator


def check_options(confidence: float, resamples: int, generator: np.random.Generator | None) -> np.random.Generator:
    check_confidence(confidence)
    if check_integer("resamples", resamples) < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    return check_generator(generator)


def _triangle(hits: Sequence[Sequence[Hits]]) -> list[list[NDArray[Any]]]:
    lengths = [len(row) for row in hits]
    if not lengths or lengths != list(range(1, len(lengths) + 1)):
        raise ValueError(f"hits must be T rows of lengths 1 to T, got lengths {lengths[:8]}")
    rows = [[read_query_scores(f"hits[{i}][{j}]", cell) for j, cell in enumerate(row)] for i, row in enumerate(hits)]
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            if cell.shape != rows[0][0].shape:
                raise ValueError(f"hits[{i}][{j}] must have {len(rows[0][0])} queries like hits[0][0], got {len(cell)}")
    return rows
