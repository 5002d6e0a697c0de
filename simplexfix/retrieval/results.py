"""The rankings of an exact search with the relevance of each item; every metric is a function of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._checks import check_integer
from ..functional import cosine_topk
from ..labelled import LabelledItems, VersionFeatures, check_versions

__all__ = ["RetrievalResults", "nearest_places", "search_depth"]

# Sizes of one search: at most 200 MB of ranking and 256 MB of queries.  Each search normalises the gallery again, so
# fewer and larger searches are faster.
_BLOCK_PLACES = 2**24
_BLOCK_NUMBERS = 2**26


@dataclass(frozen=True, eq=False)
class RetrievalResults:
    """The ranking of the gallery for each query, in descending order of cosine, then in ascending order of row.

    An item is relevant if it has the query's class, or a judged grade of 1 or more.  All arrays are read-only.  Memory
    is 13 bytes per query and rank, or 21 with grades.

    Attributes:
        positions: [Q, k] int64 gallery rows, best first; -1 past the end of the gallery.
        scores: [Q, k] float32 cosines in descending order; -inf where `positions` is -1.
        relevant: [Q, k] bool.
        num_relevant: [Q] int64, relevant items in the whole gallery, without the excluded row.
        num_candidates: [Q] int64, gallery items, without the excluded row.
        excluded: [Q] int64, the gallery row with the query's own id, which is left out; -1 for none.
        gallery_ids: [N] int64 ids as given (codes for string ids; -1 for ignored items), or None.
        grades: [Q, k] int64 judged grades, 0 without a judgement; None with labels.
        ideal_grades: [Q, M] int64 grades of each query's relevant items, descending, padded with 0; None with labels.

    Example:
        >>> import torch
        >>> from simplexfix.labelled import LabelledItems
        >>> from simplexfix.retrieval import RetrievalResults, metrics
        >>> items = LabelledItems([0, 1], [0, 1, 1])
        >>> version = items.version(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]))
        >>> results = RetrievalResults.search(version)
        >>> results.positions
        array([[0, 2, 1],
               [1, 2, 0]])
        >>> metrics.mean_average_precision(results)
        1.0
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    relevant: NDArray[np.bool_]
    num_relevant: NDArray[np.int64]
    num_candidates: NDArray[np.int64]
    excluded: NDArray[np.int64]
    gallery_ids: NDArray[np.int64] | None = None
    grades: NDArray[np.int64] | None = None
    ideal_grades: NDArray[np.int64] | None = None

    @classmethod
    def search(cls, version: VersionFeatures, *, k: int | None = None) -> RetrievalResults:
        """Searches the gallery exactly for every query.

            scores, positions = cosine_topk(query, gallery, k)      # without the row that has the query's id
            relevant = gallery_labels[positions] == query_labels[:, None]       # or judged grades >= 1

        Args:
            version: queries and gallery; pass `old.searched_by(new)` to search the old gallery with new queries.  If
                the items have ids, the gallery item with the query's id is left out of its ranking and counts.
            k: number of ranks to keep, at least 1.  None for the full ranking of N ranks (N - 1 if every query
                excludes an item).  mAP and other metrics may need it; `simplexfix.retrieval.metrics` lists which.

        Raises:
            TypeError: `version` is not a `VersionFeatures`, or `k` is not an integer.
            ValueError: the widths differ, the gallery is empty, k is below 1, or a row holds nan or inf.
        """
        (version,) = check_versions([version], [""])
        pair = version.pair(version, "equal")
        if k is not None:
            k = check_integer("k", k)
            if k < 1:
                raise ValueError(f"k must be at least 1, or None for the full ranking, got {k}")
        return cls.of_ranking(pair.items, *_search(pair, search_depth(pair.items, k)))

    @classmethod
    def of_ranking(
        cls, items: LabelledItems, scores: NDArray[np.float32], places: NDArray[np.int64]
    ) -> RetrievalResults:
        """Builds results from the ranking of another search.

        Args:
            items: queries and gallery items.
            scores: [Q, depth] float32 in descending order; depth is `search_depth(items, k)`.
            places: [Q, depth] int64 indices of gallery items, the query itself included; -1 past the end.
        """
        excluded = items.excluded
        out = excluded >= 0
        scores, places = _leave_out(scores, places, excluded, places.shape[1] - int(out.any()))
        grades = items.grades(places)
        judged = items.judged
        results = cls(
            positions=_given(places, items.gallery_rows),
            scores=scores,
            relevant=grades > 0,
            num_relevant=items.num_relevant,
            num_candidates=len(items.gallery_rows) - out.astype(np.int64),
            excluded=_given(excluded, items.gallery_rows),
            gallery_ids=_ids_of_given(items),
            grades=None if judged is None else grades,
            ideal_grades=None if judged is None else judged.ideal_grades,
        )
        for array in (*vars(results).values(),):
            if array is not None:
                array.flags.writeable = False
        return results

    def __len__(self) -> int:
        """Number of queries, Q."""
        return len(self.positions)

    @property
    def k(self) -> int:
        return int(self.positions.shape[1])

    @property
    def is_full(self) -> bool:
        """Whether every query's ranking covers the whole gallery."""
        return bool((self.num_candidates <= self.k).all())

    @property
    def ids(self) -> NDArray[np.int64]:
        """Ids [Q, k] of the ranked items, -1 past the end; equal to `positions` if the items have no ids."""
        if self.gallery_ids is None:
            return self.positions
        return np.where(self.positions >= 0, self.gallery_ids[self.positions], -1)

    @property
    def queries_without_match(self) -> NDArray[np.int64]:
        """Indices of queries without a relevant gallery item; every metric gives them the value 0."""
        return np.flatnonzero(self.num_relevant == 0)

    def __repr__(self) -> str:
        without = len(self.queries_without_match)
        return f"RetrievalResults of {len(self)} queries, k={self.k}{' (full)' if self.is_full else ''}" + (
            f", {without} without a match" if without else ""
        )


def nearest_places(pair: VersionFeatures, k: int) -> NDArray[np.int64]:
    """Returns gallery indices [Q, k]: each query's nearest items, without the query itself; -1 past the end."""
    scores, places = _search(pair, search_depth(pair.items, k))
    excluded = pair.items.excluded
    return _leave_out(scores, places, excluded, places.shape[1] - int((excluded >= 0).any()))[1]


def _search(pair: VersionFeatures, depth: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns scores and gallery indices, [Q, depth] each; queries are searched in blocks."""
    queries = pair.query
    found = np.empty((len(queries), depth), dtype=np.float32)
    places = np.empty((len(queries), depth), dtype=np.int64)
    everything = pair.gallery.whole()
    rows = max(1, min(_BLOCK_PLACES // depth, _BLOCK_NUMBERS // queries.width))
    for begin in range(0, len(queries), rows):
        block = slice(begin, min(len(queries), begin + rows))
        nearest = cosine_topk(queries.block_tensor(block.start, block.stop), everything, depth)
        found[block], places[block] = (x.cpu().numpy() for x in nearest)
    return found, places


def search_depth(items: LabelledItems, k: int | None) -> int:
    """Returns the number of ranks to search so that k (None: all) remain after each query's own item is left out.

    It is at least 1: if the gallery holds only the query itself, the one remaining rank is empty.
    """
    out, gallery = items.excluded >= 0, len(items.gallery_rows)
    candidates = gallery - int(out.all())
    return max(1, min(candidates, k or gallery)) + int(out.any())


def _given(places: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Maps indices of items that are not ignored to rows of the given array; -1 stays -1."""
    return np.where(places >= 0, rows[places], -1)


def _ids_of_given(items: LabelledItems) -> NDArray[np.int64] | None:
    if items.gallery_ids is None:
        return None
    ids = np.full(items.given[1], -1, dtype=np.int64)
    ids[items.gallery_rows] = items.gallery_ids
    return ids


def _leave_out(
    scores: NDArray[np.float32], positions: NDArray[np.int64], excluded: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns the first k ranks without the excluded row."""
    if positions.shape[1] == k:
        return scores, positions
    gone = (positions == excluded[:, None]) & (excluded >= 0)[:, None]
    gone[~gone.any(1), -1] = True  # rows without an excluded item drop the extra last rank
    keep = ~gone
    return scores[keep].reshape(-1, k), positions[keep].reshape(-1, k)
