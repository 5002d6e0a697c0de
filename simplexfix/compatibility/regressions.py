"""Regressions: queries that an upgrade makes wrong, in descending order of confidence, for review before a release."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .._checks import check_integer
from ..functional import cosine_topk
from ..labelled import FeatureRows, VersionFeatures, check_versions, row_slices, unit_rows
from ..retrieval.class_means import class_sums
from ..retrieval.protocols import Protocol, read_scored_protocol
from .criteria import read_both

__all__ = ["Regression", "worst_regressions"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Regression:
    """A query that an upgrade makes wrong in an unchanged gallery; with scores, a query that scores less after it.

    Attributes:
        query: row of the query.
        label: class of the query; None with relevance judgements.
        found_label: class nearest to the new model's query; None with relevance judgements.
        score: cosine of the new query to the nearest class template, or to the nearest item.
        own_score: cosine of the new query to its own class template, or to the nearest relevant item.
        found_item: gallery row of the nearest item, or of the nearest item of class `found_label`.
        own_item: gallery row of the nearest relevant item.
        before, after: scores of the query; 1 and 0 for hits.
    """

    query: int
    label: int | None
    found_label: int | None
    score: float
    own_score: float
    found_item: int
    own_item: int
    before: float
    after: float

    @property
    def margin(self) -> float:
        """Confidence of the error, `score - own_score`, in [0, 2] up to rounding; 0 if the nearest item is relevant."""
        return self.score - self.own_score

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "margin": self.margin}


def worst_regressions(
    old: VersionFeatures,
    new: VersionFeatures,
    before: ArrayLike | torch.Tensor,
    after: ArrayLike | torch.Tensor,
    *,
    protocol: str | Protocol = "nearest_class_mean",
    limit: int = 100,
) -> tuple[Regression, ...]:
    """Returns the queries that lose by an upgrade, in descending order of loss, then of margin, then by row.

        loses[q] = before[q] & ~after[q]                            # for scores: after[q] < before[q]
        loss[q] = before[q] - after[q]                              # 1 for hits
        nearest_class_mean  margin[q] = max_{c != y_q} q . template[c] - q . template[y_q]
        others              margin[q] = max_n q . gallery[n] - max_{n relevant to q} q . gallery[n]

    Rows are normalised, and scores are computed in float64 from float32 features, with the protocol's templates.  A
    gallery item with the query's own id is left out.

    Args:
        old: version whose gallery is searched.
        new: version whose queries search it; if widths differ, the shared leading dimensions are used.
        before: [Q] bool, true for correct queries, or [Q] float64 scores in [0, 1].  A query that loses must have a
            relevant gallery item.
        after: [Q] of the same kind, after the upgrade, by the same protocol.
        protocol: "nearest_class_mean", "instance", or a ranking metric such as "ndcg@10".
        limit: maximum number of queries to return, at least 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: versions or hits do not fit each other, or a query that loses has no relevant gallery item.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import worst_regressions
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0, 1], [0, 0, 1])
        >>> gallery = np.array([[1.0, 0.1], [0.9, 0.3], [0.2, 1.0]])
        >>> old = items.version(np.array([[1.0, 0.0], [0.0, 1.0]]), gallery)
        >>> new = items.version(np.array([[1.0, 0.0], [1.0, 0.3]]), gallery)
        >>> (worst,) = worst_regressions(old, new, [True, True], [True, False])
        >>> worst.query, round(worst.margin, 2)
        (1, 0.53)
    """
    name = read_scored_protocol(protocol).name
    if check_integer("limit", limit) < 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    old, new = check_versions((old, new), ("old", "new"))
    items = old.items
    scored, now = (scores.astype(np.float64) for scores in read_both(before, after))
    if len(scored) != len(items.query_rows):
        raise ValueError(f"before and after must be of the {len(items.query_rows)} queries, got {len(scored)}")
    lost = np.flatnonzero(now < scored)
    lacking = lost[items.num_relevant[lost] == 0]
    if len(lacking):
        raise ValueError(
            f"before marks query {lacking[0]} as correct, but the gallery has no item that is relevant to it"
        )
    if not len(lost) or not limit:
        return ()
    search = _Search(old.pair(new, "leading"))
    if name == "nearest_class_mean":
        found_label, score, own_score = search.templates(lost)
    else:
        found, score, own_score = search.items(lost)
    order = np.lexsort((lost, own_score - score, now[lost] - scored[lost]))[:limit]
    judged = items.judgements is not None
    worst = []
    for at in order:
        query = lost[at : at + 1]
        if name == "nearest_class_mean":
            found_item, label = search.nearest_of_class(query, found_label[at])[1][0], found_label[at]
        else:
            found_item = found[at]
            label = None if judged else items.gallery_labels[found_item]
        worst.append(
            Regression(
                query=int(items.query_rows[lost[at]]),
                label=None if judged else int(items.query_labels[lost[at]]),
                found_label=None if label is None else int(label),
                score=float(score[at]),
                own_score=float(own_score[at]),
                found_item=int(items.gallery_rows[found_item]),
                own_item=int(items.gallery_rows[search.nearest_relevant(lost[at])[1]]),
                before=float(scored[lost[at]]),
                after=float(now[lost[at]]),
            )
        )
    return tuple(worst)


class _Search:
    """Scores of selected queries, in blocks, since the gallery may be a mapped file and one class most of it."""

    def __init__(self, version: VersionFeatures) -> None:
        self.queries, self.gallery = version.query, version.gallery
        self.width = version.query.width
        self.all_items, self.excluded = version.items, version.items.excluded

    @cached_property
    def members(self) -> list[Integers]:
        """Gallery rows of each class."""
        classes = self.all_items.gallery_classes
        return np.split(np.argsort(classes.places, kind="stable"), np.cumsum(classes.sizes)[:-1])

    def templates(self, lost: Integers) -> tuple[Integers, Floats, Floats]:
        """Returns each query's best other class, the score of that class, and the score of the own class."""
        classes = self.all_items.gallery_classes
        sums = class_sums(self.gallery, classes).cpu()
        unit = unit_rows(sums.float().numpy())
        own = classes.find(self.all_items.query_labels[lost])
        found, score, own_score = np.empty_like(own), np.empty(len(lost)), np.empty(len(lost))
        for rows in row_slices(len(lost), len(unit)):
            queries = self._unit(self.queries, lost[rows])
            scores = queries @ unit.T
            self._leave_out(scores, queries, lost[rows], sums)
            at = np.arange(len(scores))
            own_score[rows] = scores[at, own[rows]]
            scores[at, own[rows]] = -np.inf
            found[rows] = scores.argmax(axis=1)
            score[rows] = scores[at, found[rows]]
        return classes.ids[found], score, own_score

    def _leave_out(self, scores: Floats, queries: Floats, at: Integers, sums: torch.Tensor) -> None:
        """Replaces the score of a class that contains the query itself by the score without the query, in place."""
        itself = self.excluded[at]
        some = np.flatnonzero(itself >= 0)
        if not len(some):
            return
        classes = self.all_items.gallery_classes
        of = classes.places[itself[some]]
        rows = self.gallery.take(itself[some]).block(0, len(some)).astype(np.float64)
        rest = unit_rows((sums.numpy()[of] - rows).astype(np.float32))
        alone = classes.sizes[of] == 1
        scores[some, of] = np.where(alone, -np.inf, np.einsum("ij,ij->i", queries[some], rest))

    def items(self, lost: Integers) -> tuple[Integers, Floats, Floats]:
        """Returns each query's nearest item, its score, and the score of the nearest relevant item."""
        found, score, own_score = np.zeros_like(lost), np.full(len(lost), -np.inf), np.empty(len(lost))
        k = 2 if (self.excluded[lost] >= 0).any() else 1
        for block in row_slices(len(self.gallery), self.width):
            items = self.gallery.block_tensor(block.start, block.stop).cpu()
            for rows in row_slices(len(lost), self.width):
                queries = torch.from_numpy(self._unit(self.queries, lost[rows])).float()
                scores, places = (x.numpy() for x in cosine_topk(queries, items, k))
                itself = places[:, 0] + block.start == self.excluded[lost[rows]]
                near, at = (np.where(itself, x[:, -1], x[:, 0]) for x in (scores, places))
                better = (near > score[rows]) & (at >= 0)
                score[rows] = np.where(better, near, score[rows])
                found[rows] = np.where(better, block.start + at, found[rows])
        for rows in row_slices(len(lost), self.width):  # scores in float64 of the items that float32 selected
            unit = self._unit(self.queries, lost[rows])
            score[rows] = np.einsum("ij,ij->i", unit, self._unit(self.gallery, found[rows]))
        if self.all_items.judgements is not None:
            own_score[:] = [self.nearest_relevant(query)[0] for query in lost]
            return found, score, own_score
        labels = self.all_items.query_labels[lost]
        for label in np.unique(labels):
            of = np.flatnonzero(labels == label)
            for rows in row_slices(len(of), self.width):
                own_score[of[rows]], _ = self.nearest_of_class(lost[of[rows]], label)
        return found, score, own_score

    def nearest_relevant(self, query: np.integer[Any]) -> tuple[float, int]:
        """Returns score and gallery row of the nearest item that is relevant to one query."""
        at = np.array([query])
        judged = self.all_items.judged
        if judged is None:
            scores, rows = self.nearest_of_class(at, self.all_items.query_labels[query])
        else:
            scores, rows = self._nearest_among(at, judged.relevant_items(int(query)))
        return float(scores[0]), int(rows[0])

    def nearest_of_class(self, at: Integers, label: np.integer[Any]) -> tuple[Floats, Integers]:
        """Returns score and gallery row of each query's nearest item of a class; ties go to the lower row."""
        return self._nearest_among(at, self.members[int(np.searchsorted(self.all_items.gallery_classes.ids, label))])

    def _nearest_among(self, at: Integers, members: Integers) -> tuple[Floats, Integers]:
        unit = self._unit(self.queries, at)
        best, nearest = np.full(len(unit), -np.inf), np.zeros(len(unit), dtype=np.int64)
        for rows in row_slices(len(members), max(self.width, len(unit))):
            scores = unit @ self._unit(self.gallery, members[rows]).T
            scores[self.excluded[at][:, None] == members[rows]] = -np.inf
            place = scores.argmax(axis=1)
            score = scores[np.arange(len(unit)), place]
            nearest = np.where(score > best, members[rows][place], nearest)
            best = np.maximum(best, score)
        return best, nearest

    def _unit(self, features: FeatureRows, at: Integers) -> Floats:
        return unit_rows(features.take(at).block(0, len(at)))
