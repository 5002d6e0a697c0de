"""Queries that an upgrade breaks, the most confidently wrong first: what a person looks at before a release."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .._checks import check_integer, check_name
from ..functional import cosine_topk
from ..retrieval._inputs import Features, Ids, Rows, read_labels
from ._passes import class_sums
from ._rows import BLOCK_BYTES, unit_rows
from .criteria import as_hits, flips

__all__ = ["Regression", "worst_regressions"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Regression:
    """One query that was right before the upgrade and is wrong after it, on the same gallery.

    Attributes:
        query: its row.
        label: its class.
        found_label: the class that the new model finds.
        score: cosine of the new query and what is found: a class's template, or the item.
        own_score: cosine of the new query and its own class's template, or nearest item.
        found_item: the gallery row that is found, or that is nearest to the query among those of the class found.
        own_item: the gallery row nearest to the query among those of its own class.
    """

    query: int
    label: int
    found_label: int
    score: float
    own_score: float
    found_item: int
    own_item: int

    @property
    def margin(self) -> float:
        """How confidently wrong: `score - own_score`, in [0, 2] but for rounding."""
        return self.score - self.own_score

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "margin": self.margin}


def worst_regressions(
    query: Rows,
    gallery: Rows,
    query_labels: Ids,
    gallery_labels: Ids,
    before: ArrayLike | torch.Tensor,
    after: ArrayLike | torch.Tensor,
    *,
    protocol: str = "nearest_class_mean",
    limit: int = 100,
) -> tuple[Regression, ...]:
    """The queries with `before & ~after`, by falling margin, then by row.

        nearest_class_mean  margin[q] = max_{c != y_q} q . template[c] - q . template[y_q]
        instance            margin[q] = max_n q . gallery[n] - max_{n: label[n] = y_q} q . gallery[n]

    All rows normalised; scores in float64 from features in float32, templates as of `nearest_class_mean_accuracy`.

    Args:
        query: [Q, d] by the new model; wider than the gallery or narrower: the leading dimensions that both have.
        gallery: [N, d] by the old one, as the upgrade leaves it.
        query_labels: [Q] integers.
        gallery_labels: [N] integers.
        before: [Q] bool, which queries were right; each of these must have its class in the gallery.
        after: [Q] bool, which are right after the upgrade, by the same protocol and of this `query` and `gallery`.
        protocol: "nearest_class_mean" or "instance".
        limit: of how many at most; at least 0.

    Raises:
        TypeError, ValueError: features, labels or hits that do not fit each other, by name; a query that was right
            and whose class the gallery lacks.
    """
    check_name("protocol", protocol, ("nearest_class_mean", "instance"))
    if check_integer("limit", limit) < 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    queries, items = Features("query", query), Features("gallery", gallery)
    labels = read_labels("query_labels", query_labels, "query", len(queries))
    item_labels = read_labels("gallery_labels", gallery_labels, "gallery", len(items))
    if flips(before, after)[2] != len(queries):
        raise ValueError(f"before and after must be of the {len(queries)} queries, got {flips(before, after)[2]}")
    lost = np.flatnonzero(as_hits("before", before) & ~as_hits("after", after))
    lacking = lost[np.isin(labels[lost], item_labels, invert=True)]
    if len(lacking):
        raise ValueError(f"before says that query {lacking[0]} was right, whose class the gallery lacks")
    if not len(lost) or not limit:
        return ()
    search = _Search(queries, items, item_labels)
    if protocol == "instance":
        found, score, own_score = search.items(lost, labels[lost])
        found_label = item_labels[found]
    else:
        found_label, score, own_score = search.templates(lost, labels[lost])
    order = np.lexsort((lost, own_score - score))[:limit]
    worst = []
    for at in order:
        row = search.unit_queries(lost[at : at + 1])
        _, of_found = search.nearest_of_class(row, found_label[at])
        _, of_own = search.nearest_of_class(row, labels[lost[at]])
        worst.append(
            Regression(
                query=int(lost[at]),
                label=int(labels[lost[at]]),
                found_label=int(found_label[at]),
                score=float(score[at]),
                own_score=float(own_score[at]),
                found_item=int(found[at] if protocol == "instance" else of_found[0]),
                own_item=int(of_own[0]),
            )
        )
    return tuple(worst)


def take_rows(rows: Rows, at: Integers) -> Rows:
    """A copy of these rows, of a tensor or of a mapped file."""
    return rows[torch.from_numpy(at)] if isinstance(rows, torch.Tensor) else rows[at]


class _Search:
    """Scores of chosen queries, in blocks: the gallery may be a mapped file and one class may be most of it."""

    def __init__(self, queries: Features, gallery: Features, gallery_labels: Integers) -> None:
        self.queries, self.gallery = queries, gallery
        self.width = min(queries.width, gallery.width)
        self.classes, self.index = np.unique(gallery_labels, return_inverse=True)
        order = np.argsort(self.index, kind="stable")
        self.members = np.split(order, np.cumsum(np.bincount(self.index))[:-1])

    def unit_queries(self, at: Integers) -> Floats:
        return self._unit(self.queries, at)

    def templates(self, lost: Integers, labels: Integers) -> tuple[Integers, Floats, Floats]:
        """Each query's best other class, its score, and the own class's."""
        sums = class_sums(self.gallery, self.index, len(self.classes))[:, : self.width]
        unit = unit_rows("gallery", sums, np.arange(len(sums)))
        own = np.searchsorted(self.classes, labels)
        found, score, own_score = np.empty_like(own), np.empty(len(lost)), np.empty(len(lost))
        for rows in self._blocks(len(lost), len(self.classes)):
            scores = self.unit_queries(lost[rows]) @ unit.T
            at = np.arange(len(scores))
            own_score[rows] = scores[at, own[rows]]
            scores[at, own[rows]] = -np.inf
            found[rows] = scores.argmax(axis=1)
            score[rows] = scores[at, found[rows]]
        return self.classes[found], score, own_score

    def items(self, lost: Integers, labels: Integers) -> tuple[Integers, Floats, Floats]:
        """Each query's nearest item, its score, and that of the own class's nearest."""
        found, score, own_score = np.zeros_like(lost), np.full(len(lost), -np.inf), np.empty(len(lost))
        for block in self._blocks(len(self.gallery), self.gallery.width):
            items = self.gallery.block_tensor(block.start, block.stop)[:, : self.width].cpu()
            for rows in self._blocks(len(lost), self.width):
                near, at = cosine_topk(torch.from_numpy(self.unit_queries(lost[rows])).float(), items, 1)
                better = near[:, 0].numpy() > score[rows]
                score[rows] = np.where(better, near[:, 0].numpy(), score[rows])
                found[rows] = np.where(better, block.start + at[:, 0].numpy(), found[rows])
        for rows in self._blocks(len(lost), self.width):  # what float32 chose, as float64 sees it
            unit = self.unit_queries(lost[rows])
            score[rows] = np.einsum("ij,ij->i", unit, self._unit(self.gallery, found[rows]))
        for label in np.unique(labels):
            of = np.flatnonzero(labels == label)
            for rows in self._blocks(len(of), self.width):
                own_score[of[rows]], _ = self.nearest_of_class(self.unit_queries(lost[of[rows]]), label)
        return found, score, own_score

    def nearest_of_class(self, unit: Floats, label: np.integer[Any]) -> tuple[Floats, Integers]:
        """Score and gallery row of each query's nearest item among those of a class, of the first where some tie."""
        members = self.members[int(np.searchsorted(self.classes, label))]
        best, nearest = np.full(len(unit), -np.inf), np.zeros(len(unit), dtype=np.int64)
        for rows in self._blocks(len(members), max(self.width, len(unit))):
            scores = unit @ self._unit(self.gallery, members[rows]).T
            at = scores.argmax(axis=1)
            score = scores[np.arange(len(unit)), at]
            nearest = np.where(score > best, members[rows][at], nearest)
            best = np.maximum(best, score)
        return best, nearest

    def _unit(self, features: Features, at: Integers) -> Floats:
        dense = Features(features.name, take_rows(features.rows, at)).block(0, len(at))[:, : self.width]
        return unit_rows(features.name, dense, np.arange(len(at)))

    @staticmethod
    def _blocks(count: int, width: int) -> Iterator[slice]:
        step = max(1, BLOCK_BYTES // (8 * width))
        for begin in range(0, count, step):
            yield slice(begin, min(count, begin + step))
