"""The protocol "instance": a query is a hit if the nearest gallery item has its class (CMC@1).

    hit = gallery_labels[argmax_n (query . gallery[n])] == query_label

A gallery item with the query's own id is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..functional import cosine_topk
from ..labelled import LabelledItems, VersionFeatures
from .class_means import CellHits
from .index import CosineIndex
from .mixed import Mixture, mixed_search

__all__ = ["hits", "matrix_hits", "mixed_hits", "nearest_other"]

_QUERY_ROWS = 4096
_INDEX_BYTES = 2**30  # most bytes of all indexes in memory at once


def hits(version: VersionFeatures) -> NDArray[np.bool_]:
    """Returns the hits [Q] of one pair of queries and gallery; the search runs on the features' device."""
    items = version.items
    k = _places(items)
    _, found = cosine_topk(version.query.whole(), version.gallery.whole(), k)
    return _right(items, nearest_other(found.cpu().numpy(), items.excluded), slice(None))


def matrix_hits(versions: Sequence[VersionFeatures]) -> CellHits:
    """Yields (query version i, gallery version j, first query, hits of a block of queries) for all cells with j <= i.

    Each gallery is normalised and indexed once per width that it shares with queries.  Indexes are held in groups of
    at most 1 GiB, and queries are read once per group.  A block of queries is normalised again for each index; that
    cost is small against the search.
    """
    items = versions[0].items
    queries, galleries = ([getattr(version, part) for version in versions] for part in ("query", "gallery"))
    k = _places(items)
    shared = [sorted({min(q.width, gallery.width) for q in queries[j:]}) for j, gallery in enumerate(galleries)]
    sizes = [sum(len(items.gallery_labels) * (5 * d + 12) for d in widths) for widths in shared]
    for first, end in _groups(sizes):
        indexes = {(j, d): CosineIndex(d) for j in range(first, end) for d in shared[j]}
        for j in range(first, end):
            for _, block in galleries[j].blocks():
                for d in shared[j]:
                    indexes[j, d].add(block[:, :d])
        for i in range(first, len(queries)):
            for begin, block in queries[i].blocks(_QUERY_ROWS):
                rows = slice(begin, begin + len(block))
                for j in range(first, min(end, i + 1)):
                    d = min(queries[i].width, galleries[j].width)
                    _, found = indexes[j, d].search(block[:, :d], k)
                    yield i, j, begin, _right(items, nearest_other(found, items.excluded[rows]), rows)


def mixed_hits(old: VersionFeatures, new: VersionFeatures) -> Callable[[NDArray[np.bool_]], NDArray[np.bool_]]:
    """Returns a function that maps [N] bool (True: row by the new model) to the hits [Q] of new queries."""
    items, mixture = old.items, Mixture.read(new.query, old.gallery, new.gallery)
    k = _places(items)

    def hits_of(replaced: NDArray[np.bool_]) -> NDArray[np.bool_]:
        at = torch.from_numpy(np.array(replaced)).to(mixture.old.device)
        _, found = mixed_search(*mixture, at, k)
        return _right(items, nearest_other(found.cpu().numpy(), items.excluded), slice(None))

    return hits_of


def nearest_other(found: NDArray[np.int64], excluded: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the best gallery row of each query that is not its excluded row, [Q]; -1 for none.

    Args:
        found: [Q, k] gallery rows, best first; k is 2 if a row may be excluded.
        excluded: [Q] gallery rows, -1 for none.
    """
    itself = (found[:, 0] == excluded) & (excluded >= 0)
    return np.where(itself, found[:, -1] if found.shape[1] > 1 else -1, found[:, 0])


def _places(items: LabelledItems) -> int:
    """Returns the number of ranks to search so that at least one is not excluded."""
    return 2 if (items.excluded >= 0).any() else 1


def _right(items: LabelledItems, nearest: NDArray[np.int64], rows: slice) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (items.gallery_labels[nearest] == items.query_labels[rows]) & (nearest >= 0)
    return found


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Yields ranges [first, end) of consecutive sizes that sum to at most _INDEX_BYTES, with at least one entry."""
    first, taken = 0, 0
    for j, size in enumerate(sizes):
        if j > first and taken + size > _INDEX_BYTES:
            yield first, j
            first, taken = j, 0
        taken += size
    yield first, len(sizes)
