"""Metrics of a ranking as protocols: each query scores its value of nDCG, MAP, MRR, recall or precision, in [0, 1].

They need relevance judgements, or labels, of which each item of the query's class has the grade 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..labelled import VersionFeatures
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
_NAME = re.compile(rf"({'|'.join(_METRICS)})(?:@([1-9][0-9]{{0,8}}))?")


@dataclass(frozen=True)
class RankingMetric:
    """The columns of a protocol that scores a query by a metric of its ranking.

    Attributes:
        metric: of `simplexfix.retrieval.metrics`.
        k: the last rank that counts; None: the whole ranking.
    """

    metric: Callable[..., float | Scores]
    k: int | None

    def hits(self, version: VersionFeatures) -> Scores:
        """[Q] float64 of one pair of queries and gallery."""
        return self._of(RetrievalResults.search(version, k=self.k))

    def mixed_hits(self, old: VersionFeatures, new: VersionFeatures) -> Callable[[NDArray[np.bool_]], Scores]:
        """[N] which rows are by the new model -> [Q] float64 of the new queries in that gallery."""
        items, mixture = old.items, Mixture.read(new.query, old.gallery, new.gallery)
        depth = search_depth(items, self.k)

        def hits_of(replaced: NDArray[np.bool_]) -> Scores:
            at = torch.from_numpy(np.array(replaced)).to(mixture.old.device)
            scores, places = (x.cpu().numpy() for x in mixed_search(*mixture, at, depth))
            return self._of(RetrievalResults.of_ranking(items, scores, places))

        return hits_of

    def _of(self, results: RetrievalResults) -> Scores:
        values = self.metric(results, self.k, per_query=True)
        assert isinstance(values, np.ndarray)
        return values


def read_metric(name: str) -> RankingMetric | None:
    """The metric of a name, such as "ndcg@10" or "map"; None where there is none."""
    found = _NAME.fullmatch(name)
    if found is None or (found[2] is None and found[1] not in _OF_WHOLE_RANKING):
        return None
    return RankingMetric(_METRICS[found[1]], None if found[2] is None else int(found[2]))
