"""Retrieval metrics as pure functions of `RetrievalResults`.

Notation for one query: rel[r] is 1 if the item at rank r = 1, 2, ... is relevant, else 0.  R = num_relevant is the
number of relevant items in the gallery, and hits(n) = rel[1] + ... + rel[n].  An item is relevant if it has the query's
class, or a judged grade of 1 or more.  The search orders equal scores by ascending gallery row.

All metrics return the mean over all queries, or [Q] float64 values with `per_query=True`.  A query with R = 0 has the
value 0 and counts in the mean; `results.queries_without_match` lists these queries.  If the gallery has fewer than k
items, the missing ranks are not relevant.

Results may hold only the first k ranks (a cut ranking).  A metric that depends on later ranks raises ValueError: any
metric at a rank beyond the cut, mAP if a relevant item is missing, mAP@R and R-precision if R exceeds the cut, MRR if
a query's first relevant item is missing.  mAP and MRR take a last rank `k`, like trec_eval's map_cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .._checks import check_integer
from .results import RetrievalResults

__all__ = [
    "cmc",
    "mean_average_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
    "ndcg",
    "precision",
    "r_precision",
    "recall",
    "summary",
]

_Values = NDArray[np.float64]
_BLOCK_PLACES = 2**22  # ranks per block; each hit in them takes 8 bytes for its rank and 8 for its weight


class _BeyondCutError(ValueError):
    """A metric depends on ranks beyond the cut of the ranking."""


def cmc(results: RetrievalResults, k: int = 1, *, per_query: bool = False) -> float | _Values:
    """Returns CMC@k, the cumulative match characteristic: whether one of the first k items is relevant.

        CMC@k = 1 if hits(k) > 0 else 0

    Args:
        results: results of `RetrievalResults.search`.
        k: last rank, at least 1.
        per_query: whether to return one value per query.

    Returns:
        The mean in [0, 1], or [Q] float64.

    Raises:
        TypeError: `k` is not an integer.
        ValueError: `k` is below 1 or beyond the cut.
    """
    depth = _cut(results, k)
    return _result(np.asarray(results.relevant[:, :depth].any(1), dtype=np.float64), per_query)


def precision(results: RetrievalResults, k: int, *, per_query: bool = False) -> float | _Values:
    """Returns precision@k, the fraction of relevant items among the first k.

        precision@k = hits(k) / k                       # also if the gallery has fewer than k items

    Args:
        results, k, per_query: as in `cmc`.

    Returns:
        The mean in [0, 1], or [Q] float64.

    Raises:
        TypeError, ValueError: as in `cmc`.
    """
    depth = _cut(results, k)
    return _result(np.asarray(_hits(results, depth) / k), per_query)


def recall(results: RetrievalResults, k: int, *, per_query: bool = False) -> float | _Values:
    """Returns recall@k, the fraction of a query's relevant items that are among the first k.

        recall@k = hits(k) / R

    Args:
        results, k, per_query: as in `cmc`.

    Returns:
        The mean in [0, 1], or [Q] float64.

    Raises:
        TypeError, ValueError: as in `cmc`.
    """
    depth = _cut(results, k)
    return _result(_over(_hits(results, depth), results.num_relevant), per_query)


def mean_average_precision(
    results: RetrievalResults, k: int | None = None, *, per_query: bool = False
) -> float | _Values:
    """Returns mAP, the mean average precision.

        AP = 1/R sum_{r <= k} rel[r] hits(r) / r

    Args:
        results: results of `RetrievalResults.search`.
        k: last rank of the sum; R does not depend on it.  None for the whole gallery.
        per_query: whether to return one value per query.

    Returns:
        The mean in [0, 1], or [Q] float64.

    Raises:
        TypeError: `k` is not an integer.
        ValueError: `k` is below 1 or beyond the cut, or `k` is None and the cut ranking lacks a relevant item.
    """
    depth = _cut(results, k) if k is not None else _all_found(results, "mAP")
    values = _sums(results, depth, lambda query, rank, hit: hit / rank)
    return _result(_over(values, results.num_relevant), per_query)


def mean_average_precision_at_r(results: RetrievalResults, *, per_query: bool = False) -> float | _Values:
    """Returns mAP@R, the mean average precision over each query's first R ranks.

        AP@R = 1/R sum_{r <= R} rel[r] hits(r) / r

    Args:
        results, per_query: as in `cmc`.

    Returns:
        The mean in [0, 1], or [Q] float64.

    Raises:
        ValueError: a query's R is beyond the cut.

    Reference:
        Musgrave et al., "A Metric Learning Reality Check", arXiv 2003.08505.
    """
    depth = _up_to_r(results, "mAP@R")
    last = results.num_relevant
    values = _sums(results, depth, lambda query, rank, hit: np.where(rank <= last[query], hit / rank, 0.0))
    return _result(_over(values, last), per_query)


def r_precision(results: RetrievalResults, *, per_query: bool = False) -> float | _Values:
    """Returns R-precision, the precision at each query's own rank R.

        R-precision = hits(R) / R

    Args:
        results, per_query: as in `cmc`.

    Returns:
        The mean in [0, 1], or [Q] float64.

    Raises:
        ValueError: a query's R is beyond the cut.
    """
    depth = _up_to_r(results, "R-precision")
    last = results.num_relevant
    values = _sums(results, depth, lambda query, rank, hit: (rank <= last[query]).astype(np.float64))
    return _result(_over(values, last), per_query)


def ndcg(results: RetrievalResults, k: int, *, per_query: bool = False) -> float | _Values:
    """Returns nDCG@k, the normalised discounted cumulative gain, with linear gains.

        DCG@k = sum_{r <= k} gain[r] / log2(r + 1)      # gain: judged grade, or 1 for the query's class; else 0
        nDCG@k = DCG@k / DCG@k of the R relevant items in descending order of gain

    This equals trec_eval's ndcg_cut, not the variant with gains 2^grade - 1.

    Args:
        results, k, per_query: as in `cmc`.

    Returns:
        The mean in [0, 1], or [Q] float64.

    Raises:
        TypeError, ValueError: as in `cmc`.

    Reference:
        Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002.
    """
    depth = _cut(results, k)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    if results.grades is not None and results.ideal_grades is not None:
        gains = results.grades[:, :depth].clip(min=0)
        best = results.ideal_grades[:, :k]
        values = _over(gains @ discounts[:depth], best @ discounts[: best.shape[1]])
        return _result(np.minimum(values, 1.0), per_query)  # the two sums round differently: the ratio may exceed 1
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(results.num_relevant, k)]
    gained = _sums(results, depth, lambda query, rank, hit: discounts[rank - 1])
    return _result(_over(gained, ideal), per_query)


def mean_reciprocal_rank(
    results: RetrievalResults, k: int | None = None, *, per_query: bool = False
) -> float | _Values:
    """Returns MRR, the mean reciprocal rank of the first relevant item.

        RR = 1 / min { r <= k : rel[r] = 1 },  0 if there is none

    Args:
        results: results of `RetrievalResults.search`.
        k: last rank; None for the whole gallery.
        per_query: whether to return one value per query.

    Returns:
        The mean in [0, 1], or [Q] float64.

    Raises:
        TypeError: `k` is not an integer.
        ValueError: `k` is below 1 or beyond the cut, or `k` is None and the cut ranking lacks a query's first relevant
            item.
    """
    depth = results.k if k is None else _cut(results, k)
    relevant = results.relevant[:, :depth]
    found = relevant.any(1)
    unknown = ~found & (results.num_relevant > 0)
    if k is None and unknown.any():
        raise _BeyondCutError(_beyond(results, "MRR", int(np.flatnonzero(unknown)[0])))
    return _result(np.where(found, 1 / (relevant.argmax(1) + 1.0), 0.0), per_query)


def summary(results: RetrievalResults, *, cutoffs: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Returns the means of all metrics as a dict with stable keys.

    Args:
        results: results of `RetrievalResults.search`.
        cutoffs: ranks k of the metrics with a cutoff.

    Returns:
        "cmc@k", "precision@k", "recall@k" and "ndcg@k" for each cutoff; "map", "map@r", "r_precision" and "mrr"; and
        the counts "queries" and "queries_without_match".  Metrics without a cutoff are left out if a cut ranking does
        not determine them.

    Raises:
        TypeError: a cutoff is not an integer.
        ValueError: a cutoff is below 1 or beyond the cut.
    """
    out: dict[str, float] = {}
    at: dict[str, Callable[..., float | _Values]]
    at = {"cmc": cmc, "precision": precision, "recall": recall, "ndcg": ndcg}
    for name, metric in at.items():
        for k in cutoffs:
            out[f"{name}@{k}"] = float(metric(results, k))
    whole: dict[str, Callable[..., float | _Values]]
    whole = {
        "map": mean_average_precision,
        "map@r": mean_average_precision_at_r,
        "r_precision": r_precision,
        "mrr": mean_reciprocal_rank,
    }
    for name, metric in whole.items():
        try:
            out[name] = float(metric(results))
        except _BeyondCutError:
            continue
    out["queries"] = len(results)
    out["queries_without_match"] = len(results.queries_without_match)
    return out


def _result(values: _Values, per_query: bool) -> float | _Values:
    return values if per_query else float(values.mean())


def _hits(results: RetrievalResults, depth: int) -> NDArray[np.int64]:
    hits: NDArray[np.int64] = results.relevant[:, :depth].sum(1, dtype=np.int64)
    return hits


def _over(values: NDArray[np.int64] | _Values, count: NDArray[np.int64] | _Values) -> _Values:
    """values / count, and 0 where count is 0."""
    return np.divide(values, count, out=np.zeros(len(values)), where=count > 0)


def _sums(
    results: RetrievalResults,
    depth: int,
    weight: Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], _Values],
) -> _Values:
    """Sums weight(query, rank, n) over each query's hits up to rank `depth`, [Q]; the hit is the query's n-th, from 1.

    Only hits are visited, since they are few.  A query's terms are added in rank order.
    """
    out = np.zeros(len(results))
    for begin, end in _blocks(len(results), depth):
        query, place = np.nonzero(results.relevant[begin:end, :depth])
        first = np.searchsorted(query, np.arange(end - begin))
        hit = np.arange(1, len(query) + 1) - first[query]
        out[begin:end] = np.bincount(query, weight(query + begin, place + 1, hit), minlength=end - begin)
    return out


def _blocks(queries: int, depth: int) -> Iterator[tuple[int, int]]:
    rows = max(1, _BLOCK_PLACES // depth)
    for begin in range(0, queries, rows):
        yield begin, min(queries, begin + rows)


def _cut(results: RetrievalResults, k: int) -> int:
    """Checks k and returns the number of ranks to read: k, or fewer in a smaller gallery."""
    k = check_integer("k", k)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k > results.k and not results.is_full:
        raise ValueError(f"k must be at most {results.k}, where these results were cut, got {k}; search with k={k}")
    return min(k, results.k)


def _all_found(results: RetrievalResults, metric: str) -> int:
    if not results.is_full:
        missing = np.flatnonzero(_hits(results, results.k) < results.num_relevant)
        if len(missing):
            raise _BeyondCutError(_beyond(results, metric, int(missing[0])))
    return results.k


def _up_to_r(results: RetrievalResults, metric: str) -> int:
    most = int(results.num_relevant.max())
    if most > results.k and not results.is_full:
        raise _BeyondCutError(_beyond(results, metric, int(results.num_relevant.argmax())))
    return max(1, min(most, results.k))


def _beyond(results: RetrievalResults, metric: str, query: int) -> str:
    return (
        f"{metric} needs a longer ranking: these results were cut at {results.k} places, and query {query} has "
        f"{results.num_relevant[query]} relevant items; search with k=None"
    )
