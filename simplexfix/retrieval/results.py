"""What an exact search found, with what was relevant: retrieved once, then every metric is a function of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._checks import check_integer
from ..functional import cosine_topk
from ..labelled import LabelledItems, VersionFeatures, check_versions

__all__ = ["RetrievalResults", "nearest_places", "search_depth"]

# Of one search: 200 MB of ranking and 256 MB of queries, against the gallery's being normalised anew for each.
_BLOCK_PLACES = 2**24
_BLOCK_NUMBERS = 2**26


@dataclass(frozen=True, eq=False)
class RetrievalResults:
    """The ranking of a gallery for each query, by `cosine_topk`: by score, then by lower gallery row.

    An item is relevant to a query of its class, or with a judged grade of 1 or more.  All arrays are read-only.  Memory
    is 13 bytes per query and place, and 21 where there are grades.

    Attributes:
        positions: [Q, k] int64 gallery rows as they were given, best first; -1 where the gallery has no more.
        scores: [Q, k] float32 cosines, descending; -inf where positions is -1.
        relevant: [Q, k] bool.
        num_relevant: [Q] int64, relevant items in the whole gallery, without what was excluded.
        num_candidates: [Q] int64, gallery items in all, without what was excluded.
        excluded: [Q] int64, the gallery row that is the query itself, by id, and was left out; -1 if none was.
        gallery_ids: [N] int64 as given (numbers of names; -1 for ignored items), or None.
        grades: [Q, k] int64 judged grades, 0 without a judgement; None where there are labels.
        ideal_grades: [Q, M] int64 grades of all relevant items of each query, descending, then 0; or None.
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
        """Searches every query in the gallery, exactly.

            scores, positions = cosine_topk(query, gallery, k)      # without the row whose id is the query's
            relevant = gallery_labels[positions] == query_labels[:, None]       # or judged grades >= 1

        Args:
            version: queries and gallery; `old.searched_by(new)` for the new queries in the old gallery.  Where its
                items have ids, the gallery item with the id of the query is left out of its ranking and of every count.
            k: places to keep.  None: the full ranking, N places (N - 1 if every query excludes an item), which mAP
                and the like need; metrics say which of them a cut ranking still allows.

        Raises:
            TypeError: not a version.
            ValueError: query and gallery of different width, no gallery, k below 1, nan or inf (by row).
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
        """The results of a search that was made elsewhere.

        Args:
            items: queries and gallery.
            scores: [Q, depth] descending, of `search_depth(items, k)` places.
            places: [Q, depth] of the gallery items that count, a query itself among them; -1 after the last.
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
        """Q."""
        return len(self.positions)

    @property
    def k(self) -> int:
        return int(self.positions.shape[1])

    @property
    def is_full(self) -> bool:
        """Whether every query's ranking goes to the end of the gallery."""
        return bool((self.num_candidates <= self.k).all())

    @property
    def ids(self) -> NDArray[np.int64]:
        """[Q, k] the given ids of what was found, -1 where there is nothing more; `positions` without given ids."""
        if self.gallery_ids is None:
            return self.positions
        return np.where(self.positions >= 0, self.gallery_ids[self.positions], -1)

    @property
    def queries_without_match(self) -> NDArray[np.int64]:
        """Numbers of the queries with nothing relevant in the gallery.  Every metric gives them 0 and counts them."""
        return np.flatnonzero(self.num_relevant == 0)

    def __repr__(self) -> str:
        without = len(self.queries_without_match)
        return f"RetrievalResults of {len(self)} queries, k={self.k}{' (full)' if self.is_full else ''}" + (
            f", {without} without a match" if without else ""
        )


def nearest_places(pair: VersionFeatures, k: int) -> NDArray[np.int64]:
    """[Q, k] places of the gallery items nearest to each query, without the query itself; -1 after the last."""
    scores, places = _search(pair, search_depth(pair.items, k))
    excluded = pair.items.excluded
    return _leave_out(scores, places, excluded, places.shape[1] - int((excluded >= 0).any()))[1]


def _search(pair: VersionFeatures, depth: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """[Q, depth] scores and places of a search by blocks of queries."""
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
    """Places to search for the first k, or all, that are no query itself.

    A gallery of nothing but the query itself leaves one place, which stays empty.
    """
    out, gallery = items.excluded >= 0, len(items.gallery_rows)
    candidates = gallery - int(out.all())
    return max(1, min(candidates, k or gallery)) + int(out.any())


def _given(places: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows that were given, of places among those that count; -1 stays."""
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
    """The first k places without the excluded row."""
    if positions.shape[1] == k:
        return scores, positions
    gone = (positions == excluded[:, None]) & (excluded >= 0)[:, None]
    gone[~gone.any(1), -1] = True  # the last place, which was fetched in its stead
    keep = ~gone
    return scores[keep].reshape(-1, k), positions[keep].reshape(-1, k)
