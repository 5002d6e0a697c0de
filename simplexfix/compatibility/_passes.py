"""The cells of a compatibility matrix from T passes over galleries and T over queries, whatever T.

Every function here yields (query version, gallery version, first query, hits of a block of queries), and each of these
hits is what the protocol's function in `simplexfix.retrieval` says of the same features in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .._reference import unit_float32
from ..functional import cosine_topk
from ..retrieval import CosineIndex
from ..retrieval._inputs import Features

__all__ = ["CellHits", "class_mean_hits", "nearest_item_hits"]

CellHits: TypeAlias = Iterator[tuple[int, int, int, NDArray[np.bool_]]]
Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]

_UNIT = 2.0**-24  # of rounding to float32
_QUERY_ROWS = 4096  # a block of them is past L2, and so are its products with some versions' templates
_PRODUCT_COLUMNS = 1024  # templates of so many versions meet a block in one product
_INDEX_BYTES = 2**30  # of indexes that are held at a time


def class_mean_hits(
    queries: list[Features], galleries: list[Features], query_labels: Ids, gallery_labels: Ids
) -> CellHits:
    """Nearest class mean: templates once per gallery; each query row is read once, against all galleries' templates.

    A product in float32 decides where the own class's score is further from the best other's than the product can
    err.  The few other queries are searched by `cosine_topk`, whose answer is the protocol's by definition.
    Memory: 8 bytes per gallery, class and dimension, beside blocks.
    """
    classes, index = np.unique(gallery_labels, return_inverse=True)
    own = np.searchsorted(classes, query_labels).clip(max=len(classes) - 1)
    lacking = classes[own] != query_labels
    sums = [_class_sums(gallery, index, len(classes)) for gallery in galleries]
    group = max(1, _PRODUCT_COLUMNS // len(classes))
    stacks: tuple[int, list[Floats]] = (0, [])  # of the width of the query version before
    for i, query in enumerate(queries):
        width, made = stacks
        if query.width != width:
            made = []
        made.extend(_templates(total, query.width) for total in sums[len(made) : i + 1])
        stacks = query.width, made
        groups = [(j, _stack(made[j : min(j + group, i + 1)])) for j in range(0, i + 1, group)]
        for begin, block in query.blocks(_QUERY_ROWS):
            rows = slice(begin, begin + len(block))
            bound = _error_bound(block)
            for first, templates in groups:
                for v, (hits, sure) in enumerate(_decide(block, bound, templates, own[rows])):
                    j = first + v
                    hits[lacking[rows]] = False
                    open_rows = np.flatnonzero(~(sure | lacking[rows]))
                    if len(open_rows):
                        common = min(query.width, sums[j].shape[1])
                        some = torch.from_numpy(block[open_rows, :common])
                        _, nearest = cosine_topk(some, torch.from_numpy(sums[j][:, :common]), 1)
                        hits[open_rows] = nearest[:, 0].numpy() == own[begin + open_rows]
                    yield i, j, begin, hits


def nearest_item_hits(
    queries: list[Features], galleries: list[Features], query_labels: Ids, gallery_labels: Ids
) -> CellHits:
    """Nearest item: each gallery is normalised and encoded once, into one index for each width shared with queries.

    Of galleries whose indexes take more than 1 GiB, as many as fit are held at a time, and queries are read once for
    each such group.  A block of queries is normalised for each index, which is nothing beside its search.
    """
    shared = [sorted({min(q.width, gallery.width) for q in queries[j:]}) for j, gallery in enumerate(galleries)]
    for first, end in _groups([sum(len(gallery_labels) * (5 * d + 12) for d in widths) for widths in shared]):
        indexes = {(j, d): CosineIndex(d) for j in range(first, end) for d in shared[j]}
        for j in range(first, end):
            for _, block in galleries[j].blocks():
                for d in shared[j]:
                    indexes[j, d].add(block[:, :d])
        for i in range(first, len(queries)):
            for begin, block in queries[i].blocks(_QUERY_ROWS):
                labels = query_labels[begin : begin + len(block)]
                for j in range(first, min(end, i + 1)):
                    d = min(queries[i].width, galleries[j].width)
                    _, nearest = indexes[j, d].search(block[:, :d], 1)
                    yield i, j, begin, gallery_labels[nearest[:, 0]] == labels


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """[first, end) of neighbours that take _INDEX_BYTES together at most, of one at least."""
    first, taken = 0, 0
    for j, size in enumerate(sizes):
        if j > first and taken + size > _INDEX_BYTES:
            yield first, j
            first, taken = j, 0
        taken += size
    yield first, len(sizes)


def _class_sums(gallery: Features, index: Ids, classes: int) -> Floats:
    """[classes, d]: added in float64 row by row, in blocks as in one go; a sum points where the mean does."""
    sums = torch.zeros(classes, gallery.width, dtype=torch.float64)
    to = torch.from_numpy(index)
    for begin, block in gallery.blocks():
        rows = torch.from_numpy(block.astype(np.float64))
        sums.index_add_(0, to[begin : begin + len(block)], rows)
    return sums.float().numpy()


def _templates(sums: Floats, width: int) -> Floats:
    """[classes, width] normalised over the dimensions that the two versions share, zero in the others."""
    common = min(width, sums.shape[1])
    out = np.zeros((len(sums), width), dtype=np.float32)
    out[:, :common] = unit_float32(torch.from_numpy(np.ascontiguousarray(sums[:, :common]))).numpy()
    return out


def _stack(templates: list[Floats]) -> Floats:
    """[classes, versions, d]; no copy of a single one, which may be large."""
    return np.stack(templates, axis=1) if len(templates) > 1 else templates[0][:, None]


def _error_bound(block: Floats) -> NDArray[np.float64]:
    """[rows] by how much two scores of a row, as products in float32, can be further apart than their definition says.

    Rounding: of d products and sums in any order d u |q|, of the normalised row, template and score 4 u |q|.  The
    bound holds for |q| and more in proportion.  The constant covers what underflows in products or in |q| itself.
    """
    units = (block.shape[1] + 8) * _UNIT
    if units > 0.1:
        return np.full(len(block), np.inf)
    share = units / (1 - units)
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", block, block).astype(np.float64))
    bound: NDArray[np.float64] = 2 * share * (1 + share) * (norms + 1e-17)
    return bound


def _decide(
    block: Floats, bound: NDArray[np.float64], templates: Floats, own: Ids
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """For each version of `templates` [classes, versions, d]: which rows are right, and of which that is sure."""
    classes, versions, width = templates.shape
    columns = np.arange(len(block))
    with np.errstate(over="ignore", invalid="ignore"):  # such rows end as not sure
        # NumPy's product is of float32 whatever torch's settings, which may allow bfloat16.
        scores = (templates.reshape(-1, width) @ block.T).reshape(classes, versions, len(block))
        for v in range(versions):
            of_version = scores[:, v]
            right = of_version[own, columns]
            of_version[own, columns] = -np.inf
            gap = right.astype(np.float64) - of_version.max(axis=0)
            yield gap > 0, np.abs(gap) > bound
