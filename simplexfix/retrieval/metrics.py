"""Metrics of an exact search, as pure functions of its results.

Of a query: rel[r] in {0, 1} says whether the item at rank r = 1, 2, ... is relevant, R = num_relevant how many items of
the gallery are, hits(n) = rel[1] + ... + rel[n].  Relevant are items of the query's class, or those that were judged
with a grade of 1 or more.  Ties were settled by the search: by score, then by lower gallery row.

Everywhere `per_query=True` gives [Q] float64 instead of the mean over all queries.  A query with R = 0 (a class that
the gallery lacks) counts 0 in every metric and is part of every mean: `results.queries_without_match` names them.
Where a gallery has fewer than k items, the ranks after its end are not relevant.

Results that were cut at k places cannot tell what lies beyond.  A metric that would have to know raises ValueError:
a rank k beyond the cut, mAP while a relevant item is missing, mAP@R and R-precision while R is beyond the cut, MRR
while a query's first relevant item is missing.  With `k` they end at that rank, as trec_eval's map_cut does.
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
_BLOCK_PLACES = 2**22  # ranking places looked at at a time: their hits' ranks and weights are 8 bytes each


class _BeyondCutError(ValueError):
    """What a metric must know lies after the last place that was kept."""


def cmc(results: RetrievalResults, k: int = 1, *, per_query: bool = False) -> float | _Values:
    """CMC@k, cumulative match characteristic: whether a relevant item is among the first k.

    CMC@k = [ hits(k) > 0 ]
    """
    depth = _cut(results, k)
    return _result(np.asarray(results.relevant[:, :depth].any(1), dtype=np.float64), per_query)


def precision(results: RetrievalResults, k: int, *, per_query: bool = False) -> float | _Values:
    """precision@k = hits(k) / k, also where the gallery has fewer than k items."""
    depth = _cut(results, k)
    return _result(np.asarray(_hits(results, depth) / k), per_query)


def recall(results: RetrievalResults, k: int, *, per_query: bool = False) -> float | _Values:
    """recall@k = hits(k) / R."""
    depth = _cut(results, k)
    return _result(_over(_hits(results, depth), results.num_relevant), per_query)


def mean_average_precision(
    results: RetrievalResults, k: int | None = None, *, per_query: bool = False
) -> float | _Values:
    """mAP: the mean over a query's relevant items of the precision at their rank.

        AP = 1/R sum_{r <= k} rel[r] hits(r) / r

    Args:
        k: the last rank that counts; items after it add 0, R stays.  None: the whole gallery.
    """
    depth = _cut(results, k) if k is not None else _all_found(results, "mAP")
    values = _sums(results, depth, lambda query, rank, hit: hit / rank)
    return _result(_over(values, results.num_relevant), per_query)


def mean_average_precision_at_r(results: RetrievalResults, *, per_query: bool = False) -> float | _Values:
    """mAP@R: AP of each query's first R places.

        AP@R = 1/R sum_{r <= R} rel[r] hits(r) / r

    Reference:
        Musgrave et al., "A Metric Learning Reality Check", arXiv 2003.08505.
    """
    depth = _up_to_r(results, "mAP@R")
    last = results.num_relevant
    values = _sums(results, depth, lambda query, rank, hit: np.where(rank <= last[query], hit / rank, 0.0))
    return _result(_over(values, last), per_query)


def r_precision(results: RetrievalResults, *, per_query: bool = False) -> float | _Values:
    """R-precision = hits(R) / R."""
    depth = _up_to_r(results, "R-precision")
    last = results.num_relevant
    values = _sums(results, depth, lambda query, rank, hit: (rank <= last[query]).astype(np.float64))
    return _result(_over(values, last), per_query)


def ndcg(results: RetrievalResults, k: int, *, per_query: bool = False) -> float | _Values:
    """nDCG@k with linear gains: the judged grade, or 1 for an item of the query's class; 0 for all others.

        nDCG@k = sum_{r <= k} gain[r] / log2(r + 1)  /  the same sum with the gains of all R items in falling order

    That is trec_eval's ndcg_cut, and not the variant of gains 2^grade - 1.

    Reference:
        Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002.
    """
    depth = _cut(results, k)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    if results.grades is not None and results.ideal_grades is not None:
        gains = results.grades[:, :depth].clip(min=0)
        best = results.ideal_grades[:, :k]
        values = _over(gains @ discounts[:depth], best @ discounts[: best.shape[1]])
        return _result(np.minimum(values, 1.0), per_query)  # sums of unlike lengths round differently
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(results.num_relevant, k)]
    gained = _sums(results, depth, lambda query, rank, hit: discounts[rank - 1])
    return _result(_over(gained, ideal), per_query)


def mean_reciprocal_rank(
    results: RetrievalResults, k: int | None = None, *, per_query: bool = False
) -> float | _Values:
    """MRR: one over the rank of the first relevant item.

        RR = 1 / min { r <= k : rel[r] = 1 },  0 if there is none

    Args:
        k: the last rank that counts.  None: the whole gallery.
    """
    depth = results.k if k is None else _cut(results, k)
    relevant = results.relevant[:, :depth]
    found = relevant.any(1)
    unknown = ~found & (results.num_relevant > 0)
    if k is None and unknown.any():
        raise _BeyondCutError(_beyond(results, "MRR", int(np.flatnonzero(unknown)[0])))
    return _result(np.where(found, 1 / (relevant.argmax(1) + 1.0), 0.0), per_query)


def summary(results: RetrievalResults, *, cutoffs: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The means of all metrics, under keys that stay as they are.

    Returns:
        "cmc@k", "precision@k", "recall@k", "ndcg@k" for each cutoff k; "map", "map@r", "r_precision", "mrr"; and the
        counts "queries" and "queries_without_match".  Of the four without a cutoff, those that results cut at k
        places cannot tell are missing.

    Raises:
        ValueError: a cutoff below 1, or beyond the cut.
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
    """values / count, 0 where the count is."""
    return np.divide(values, count, out=np.zeros(len(values)), where=count > 0)


def _sums(
    results: RetrievalResults,
    depth: int,
    weight: Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], _Values],
) -> _Values:
    """[Q] the sum over each query's hits up to rank `depth` of weight(query, rank, which hit it is, from 1).

    Works on the hits alone, of which there are few, and adds a query's in the order of their ranks.
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
    """The places to look at for rank k."""
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
