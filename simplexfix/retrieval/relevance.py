"""Ranking metrics as protocols: the score of a query is its nDCG, MAP, MRR, recall or precision, in [0, 1].

They work with relevance judgements and with labels; with labels each item of the query's class has grade 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..labelled import LabelledItems, VersionFeatures
from . import metrics
from .mixed import Mixture, mixed_search
from .results import RetrievalResults, search_depth

__all__ = ["METRIC_NAMES", "RankingMetric", "read_metric"]

Scores = NDArray[np.float64]

METRIC_NAMES = "ndcg@K, map, map@K, mrr, mrr@K, recall@K, precision@K"
_METRICS: dict[str, Callable[..., float | Scores]] = {
    "ndcg": metrics.ndcg,
    "map": metrics.mean_average_precision,
    "mrr": metrics.mean_reciprocal_rank,
    "recall": metrics.recall,
    "precision": metrics.precision,
}
_OF_WHOLE_RANKING = ("map", "mrr")
_BLOCK_PLACES = 2**24  # ranks per block: 350 MB with grades
_NAME = re.compile(rf"({'|'.join(_METRICS)})(?:@([1-9][0-9]{{0,8}}))?")


@dataclass(frozen=True)
class RankingMetric:
    """Scores each query by a ranking metric; `hits` and `mixed_hits` are arguments for a `Protocol`.

    Attributes:
        metric: a function of `simplexfix.retrieval.metrics`.
        k: last rank of the metric; None for the whole ranking.
    """

    metric: Callable[..., float | Scores]
    k: int | None

    def hits(self, version: VersionFeatures) -> Scores:
        """Returns the scores [Q] float64 of a version's queries on its gallery."""
        return np.concatenate(
            [self._of(RetrievalResults.search(version.take(block), k=self.k)) for block in self._blocks(version.items)]
        )

    def mixed_hits(self, old: VersionFeatures, new: VersionFeatures) -> Callable[[NDArray[np.bool_]], Scores]:
        """Returns a function that maps [N] bool (True: row by the new model) to the scores [Q] of new queries."""
        items, mixture = old.items, Mixture.read(new.query, old.gallery, new.gallery)
        galleries = mixture.old, mixture.new

        def hits_of(replaced: NDArray[np.bool_]) -> Scores:
            at, found = torch.from_numpy(np.array(replaced)).to(mixture.old.device), []
            for block in self._blocks(items):
                some = items.take(block)
                query = mixture.query[block[0] : block[-1] + 1]
                scores, places = mixed_search(query, *galleries, at, search_depth(some, self.k))
                results = RetrievalResults.of_ranking(some, scores.cpu().numpy(), places.cpu().numpy())
                found.append(self._of(results))
            return np.concatenate(found)

        return hits_of

    def _blocks(self, items: LabelledItems) -> Iterator[NDArray[np.int64]]:
        """Yields blocks of query indices whose rankings fit into memory together."""
        count = len(items.query_rows)
        size = max(1, _BLOCK_PLACES // search_depth(items, self.k))
        for begin in range(0, count, size):
            yield np.arange(begin, min(count, begin + size))

    def _of(self, results: RetrievalResults) -> Scores:
        values = self.metric(results, self.k, per_query=True)
        assert isinstance(values, np.ndarray)
        return values


def read_metric(name: str) -> RankingMetric | None:
    """Returns the metric of a name, such as "ndcg@10" or "map"; None for an unknown name."""
    found = _NAME.fullmatch(name)
    if found is None or (found[2] is None and found[1] not in _OF_WHOLE_RANKING):
        return None
    return RankingMetric(_METRICS[found[1]], None if found[2] is None else int(found[2]))
