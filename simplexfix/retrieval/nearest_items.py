"""The protocol "instance": is a query's nearest gallery item of its class (CMC@1)?

    hit = gallery_labels[argmax_n (query . gallery[n])] == query_label

Where a gallery item is the query itself, by its id, the nearest of the others counts.
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
_INDEX_BYTES = 2**30  # of indexes that are held at a time


def hits(version: VersionFeatures) -> NDArray[np.bool_]:
    """[Q] the hits of one pair of queries and gallery: the definition, on the device of the features."""
    items = version.items
    k = _places(items)
    _, found = cosine_topk(version.query.whole(), version.gallery.whole(), k)
    return _right(items, nearest_other(found.cpu().numpy(), items.excluded), slice(None))


def matrix_hits(versions: Sequence[VersionFeatures]) -> CellHits:
    """(query version, gallery version, first query, hits of a block of queries) of every cell with j <= i.

    Each gallery is normalised and encoded once, into one index for each width shared with queries.  Of galleries whose
    indexes take more than 1 GiB, as many as fit are held at a time, and queries are read once for each such group.  A
    block of queries is normalised for each index, which is nothing beside its search.
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
    """[N] which rows are by the new model -> [Q] hits of the new queries in that gallery, of float32 features."""
    items, mixture = old.items, Mixture.read(new.query, old.gallery, new.gallery)
    k = _places(items)

    def hits_of(replaced: NDArray[np.bool_]) -> NDArray[np.bool_]:
        at = torch.from_numpy(np.array(replaced)).to(mixture.old.device)
        _, found = mixed_search(*mixture, at, k)
        return _right(items, nearest_other(found.cpu().numpy(), items.excluded), slice(None))

    return hits_of


def nearest_other(found: NDArray[np.int64], excluded: NDArray[np.int64]) -> NDArray[np.int64]:
    """[Q] the first of each query's places that is not the one left out; -1 where there is none.

    Args:
        found: [Q, k] gallery rows, best first; k is 2 where a row may be left out.
        excluded: [Q] gallery rows, -1 for none.
    """
    itself = (found[:, 0] == excluded) & (excluded >= 0)
    return np.where(itself, found[:, -1] if found.shape[1] > 1 else -1, found[:, 0])


def _places(items: LabelledItems) -> int:
    """How many places must be searched for one that is not left out."""
    return 2 if (items.excluded >= 0).any() else 1


def _right(items: LabelledItems, nearest: NDArray[np.int64], rows: slice) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (items.gallery_labels[nearest] == items.query_labels[rows]) & (nearest >= 0)
    return found


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """[first, end) of neighbours that take _INDEX_BYTES together at most, of one at least."""
    first, taken = 0, 0
    for j, size in enumerate(sizes):
        if j > first and taken + size > _INDEX_BYTES:
            yield first, j
            first, taken = j, 0
        taken += size
    yield first, len(sizes)
