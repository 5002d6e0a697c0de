"""How sure one may be of a cell and of an upgrade: intervals and paired tests, from what each query scores.

What is resampled are queries; the gallery is taken as it is.  Resampling Q queries with replacement and counting the
right ones *is* a binomial draw, and counting gains and losses of an upgrade a multinomial one, so that a resample costs
O(1) and not O(Q), with exactly the distribution of the bootstrap.  Queries whose scores are numbers in [0, 1], as those
of nDCG, are drawn one by one.

Intervals are percentile intervals: a fraction of hits is its own binomial maximum-likelihood estimate, without bias,
its interval stays in [0, 1], and BCa's two corrections are differences of lattice points here, undefined where all
queries agree.  Where they do all agree, every resample is the same and the interval has no width:
`exact_interval` and `mcnemar_test` hold for any number of queries.
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

_BLOCK_NUMBERS = 2**22  # drawn at a time
_EXACT_QUERIES = 13  # 2^13 sign patterns are fewer than 10,000 samples of them
Hits = ArrayLike | torch.Tensor


class Interval(NamedTuple):
    """Ends of a two-sided interval."""

    low: float
    high: float


class McNemar(NamedTuple):
    """Attributes: gains: queries wrong before and right after; losses: the other way; p_value: two-sided."""

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
    """The percentile interval of a fraction of hits, or of a mean score.

        resampled = [ mean(hits[generator.integers(Q, size=Q)]) for _ in range(resamples) ]
        interval = quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])

    Args:
        hits: [Q] bool, which queries were right, or floating in [0, 1], what each query scored; Q >= 1.
        confidence: in (0, 1).
        resamples: at least 1.
        generator: None: `np.random.default_rng(0)`, the same numbers at every call.

    Raises:
        TypeError: hits are neither bool nor floating, or an option is not a number.
        ValueError: not one value per query, no query, or an option out of its range.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
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
    """The percentile interval of `mean(after) - mean(before)`, both of the same resampled queries.

    Arguments and errors as of `bootstrap_interval` and `negative_flip_rate`.
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
    """The interval of each cell of a compatibility matrix.

    Args:
        hits: T rows of lengths 1, 2, ..., T, as of the matrix: `hits[i][j]`, [Q] bool or floating, of queries by model i
            on the gallery by model j.
        confidence, resamples, generator: as of `bootstrap_interval`.

    Returns:
        [T, T, 2] float64, low and high; nan above the diagonal.

    Raises:
        TypeError, ValueError: as `bootstrap_interval`; not a lower triangle.
    """
    rows = _triangle(hits)
    numbers = check_options(confidence, resamples, generator)
    cells = np.full((len(rows), len(rows), 2), np.nan)
    for i, row in enumerate(rows):
        for j, right in enumerate(row):
            cells[i, j] = bootstrap_interval(right, confidence=confidence, resamples=resamples, generator=numbers)
    return cells


def mcnemar_test(before: Hits, after: Hits) -> McNemar:
    """McNemar's exact test, the sign test of paired hits: might gains and losses be a fair coin's?

        n = gains + losses,  m = min(gains, losses)
        p_value = min(1, 2 * sum_{k <= m} binomial(n, k) / 2^n)           1 where n = 0

    Args:
        before: [Q] bool, which queries were right.
        after: [Q] bool, the same queries after the upgrade.

    Raises:
        TypeError, ValueError: as `negative_flip_rate`.

    Reference:
        McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    gains, losses, _ = flips(read_hits("before", before), read_hits("after", after))
    return McNemar(gains, losses, min(1.0, 2 * _at_most(min(gains, losses), gains + losses, 0.5)))


def randomization_test(
    before: Hits, after: Hits, *, resamples: int = 10_000, generator: np.random.Generator | None = None
) -> float:
    """The paired randomization test of a difference of means: might before and after be exchanged, query by query?

        d = after - before
        p_value = fraction of sign patterns s in {-1, 1}^Q with |sum_q s_q d_q| >= |sum_q d_q|

    Over all patterns where at most 13 queries change their score; else over `resamples` drawn ones, with
    (1 + count) / (1 + resamples), which rejects a true hypothesis no more often than it says.  Of 0/1 scores it is
    McNemar's exact test.

    Args:
        before, after: [Q] floating in [0, 1], what the same queries score; Q >= 1.
        resamples: at least 1.
        generator: None: `np.random.default_rng(0)`.

    Returns:
        Two-sided; 1 where no score changes.

    Raises:
        TypeError, ValueError: as `negative_flip_rate`; resamples below 1.

    Reference:
        Smucker, Allan and Carterette, "A Comparison of Statistical Significance Tests for Information Retrieval
        Evaluation", CIKM 2007; for the drawn ones Phipson and Smyth, "Permutation P-values Should Never Be Zero", 2010.
    """
    old, new = read_both(before, after)
    numbers = check_options(0.95, resamples, generator)
    moved = np.subtract(new, old, dtype=np.float64)
    moved = moved[moved != 0]
    # sums of another order differ by rounding, and count as equal
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
    """Of McNemar's exact test where queries are right or wrong; of the randomization test where they have scores."""
    if read_both(before, after)[0].dtype == np.bool_:
        return mcnemar_test(before, after).p_value
    return randomization_test(before, after, generator=generator)


def mcnemar_tests(hits: Sequence[Sequence[Hits]]) -> NDArray[np.float64]:
    """[T, T] p-values, `mcnemar_test(hits[j][j], hits[i][j])` for i > j, nan elsewhere.

    Arguments and errors as of `bootstrap_cells`.
    """
    rows = _triangle(hits)
    tests = np.full((len(rows), len(rows)), np.nan)
    for i, row in enumerate(rows):
        for j in range(i):
            tests[i, j] = mcnemar_test(rows[j][j], row[j]).p_value
    return tests


def exact_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """The interval of a fraction by Clopper and Pearson, which covers the true one at least as often as it says.

        low:  the p with P(X >= successes) = (1 - confidence) / 2       0 where successes = 0
        high: the p with P(X <= successes) = (1 - confidence) / 2       1 where successes = trials
        X of the binomial distribution of `trials` and p

    Args:
        successes: 0 to trials.
        trials: at least 1.
        confidence: in (0, 1).

    Raises:
        TypeError, ValueError: not such numbers.

    Reference:
        Clopper and Pearson, "The use of confidence or fiducial limits", 1934.
    """
    trials, successes = check_integer("trials", trials), check_integer("successes", successes)
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes of trials must be 0 to trials, trials >= 1, got {successes} of {trials}")
    tail = (1 - check_confidence(confidence)) / 2
    # P(X <= k) falls with p, from 1 to 0; the low end counts failures
    high = 1.0 if successes == trials else _solve(successes, trials, tail)
    low = 0.0 if successes == 0 else 1.0 - _solve(trials - successes, trials, tail)
    return Interval(low, high)


def _solve(k: int, n: int, tail: float) -> float:
    """The p with P(X <= k) = tail, by bisection to the last bits."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(k, n, middle) > tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _at_most(k: int, n: int, p: float) -> float:
    """P(X <= k), X binomial of n and p."""
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    if k > n * p:  # the other tail is the smaller one: fewer terms, and no cancellation in it
        return 1.0 - _at_most(n - k - 1, n, 1 - p)
    # from the largest term down, each from the one before, until they no longer count
    log_binomial = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    term = math.exp(log_binomial + k * math.log(p) + (n - k) * math.log1p(-p))
    total, odds = 0.0, (1 - p) / p
    while term > total * 2.0**-60:
        total += term
        term *= k / (n - k + 1) * odds
        k -= 1
    return min(total, 1.0)


def _resampled_means(values: NDArray[np.float64], resamples: int, numbers: np.random.Generator) -> NDArray[np.float64]:
    """[resamples] means of as many values, drawn with replacement."""
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
    """The generator; for None one that gives the same numbers at every call."""
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
                raise ValueError(f"hits[{i}][{j}] is of {len(cell)} queries, hits[0][0] of {len(rows[0][0])}")
    return rows
