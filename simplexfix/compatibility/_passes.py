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
from ..retrieval._inputs import Features, row_squares
from ..retrieval.protocols import check_sums

__all__ = ["CellHits", "class_mean_hits", "class_sums", "nearest_item_hits"]

CellHits: TypeAlias = Iterator[tuple[int, int, int, NDArray[np.bool_]]]
Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]

_QUERY_ROWS = 4096  # a block of them is past L2, and so are its products with some versions' templates
_GALLERY_ROWS = 128  # as float64 they stay in caches on their way into the sums
_PRODUCT_COLUMNS = 1024  # templates of so many versions meet a block in one product
_INDEX_BYTES = 2**30  # of indexes that are held at a time


def class_mean_hits(
    queries: list[Features], galleries: list[Features], query_labels: Ids, gallery_labels: Ids
) -> CellHits:
    """Nearest class mean: templates once per gallery; each query row is read once, against all galleries' templates.

    A product in float32 decides where the own class's score is further from the best other's than it can err, then one
    in float64.  What is left, ties above all, is searched by `cosine_topk`, whose answer is the protocol's own.
    Memory: 8 bytes per gallery, class and dimension, beside blocks.
    """
    classes, index = np.unique(gallery_labels, return_inverse=True)
    own = np.searchsorted(classes, query_labels).clip(max=len(classes) - 1)
    lacking = classes[own] != query_labels
    sums = [class_sums(gallery, index, len(classes)) for gallery in galleries]
    group = max(1, _PRODUCT_COLUMNS // len(classes))
    made: list[Floats] = []
    for i, query in enumerate(queries):
        if made and made[0].shape[1] != query.width:
            made = []
        made.extend(_templates(total, query.width) for total in sums[len(made) : i + 1])
        groups = [(j, _stack(made[j : min(j + group, i + 1)])) for j in range(0, i + 1, group)]
        for begin, block in query.blocks(_QUERY_ROWS):
            rows = slice(begin, begin + len(block))
            for first, templates in groups:
                gaps, sure = _gaps(block, templates, own[rows])
                sure |= lacking[rows]
                for j, gap, known in zip(range(first, i + 1), gaps, sure, strict=False):
                    hits = (gap > 0) & ~lacking[rows]
                    some = np.flatnonzero(~known)
                    if len(some):
                        hits[some] = _decide(block[some], made[j], sums[j], own[begin + some])
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


def class_sums(gallery: Features, index: Ids, classes: int) -> Floats:
    """[classes, d]: added in float64 row by row, in blocks as in one go; a sum points where the mean does."""
    sums = torch.zeros(classes, gallery.width, dtype=torch.float64)
    to = torch.from_numpy(index)
    for begin, block in gallery.blocks(_GALLERY_ROWS):
        rows = torch.from_numpy(block.astype(np.float64))
        sums.index_add_(0, to[begin : begin + len(block)], rows)
    return check_sums(gallery.name, sums.float()).numpy()


def _templates(sums: Floats, width: int) -> Floats:
    """[classes, width] normalised over the dimensions that the two versions share, zero in the others."""
    common = min(width, sums.shape[1])
    out = np.zeros((len(sums), width), dtype=np.float32)
    out[:, :common] = unit_float32(torch.from_numpy(np.ascontiguousarray(sums[:, :common]))).numpy()
    return out


def _stack(templates: list[Floats]) -> Floats:
    """[classes, versions, d]; no copy of a single one, which may be large."""
    return np.stack(templates, axis=1) if len(templates) > 1 else templates[0][:, None]


def _gaps(block: Floats, templates: Floats, own: Ids) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """[versions, rows] own class's score less the best other's, and where its sign is sure.

    Args:
        block: [rows, d].
        templates: [classes, versions, d] unit rows in float32.
        own: [rows] each row's class.

    The scores' definition normalises a row, rounds that and the template, and the score, each by u |q| at most for
    u = 2^-24; what is computed here takes a template that may be another's neighbour in float32, and adds the rounding
    of d products and sums in any order.  A gap is of two scores.  The small constant covers what underflows in
    products or in |q| itself.
    """
    classes, versions, d = templates.shape
    # Of float32 whatever torch's settings, which may allow products in bfloat16: NumPy's.
    unit = 2.0**-24 if block.dtype == np.float32 else 2.0**-53
    share = d * unit / (1 - d * unit) + 8 * 2.0**-24
    with np.errstate(over="ignore", invalid="ignore"):  # ends as not sure
        scores = (templates.reshape(-1, d) @ block.T).reshape(classes, versions, len(block))
        at = (own, np.arange(versions)[:, None], np.arange(len(block)))
        right = scores[at]
        scores[at] = -np.inf
        gaps = right - scores.max(axis=0)
        bound = 2 * share * (1 + share) * (np.sqrt(row_squares(block).astype(np.float64)) + 1e-17)
        sure = np.abs(gaps) > bound
    return gaps, sure & (share < 0.1)


def _decide(block: Floats, templates: Floats, sums: Floats, own: Ids) -> NDArray[np.bool_]:
    """[rows] hits of one version for rows that a product in float32 left open: one in float64 leaves next to none."""
    gaps, sure = _gaps(block.astype(np.float64), templates[:, None].astype(np.float64), own)
    hits: NDArray[np.bool_] = gaps[0] > 0
    some = np.flatnonzero(~sure[0])
    if len(some):
        common = min(block.shape[1], sums.shape[1])
        rows = torch.from_numpy(np.ascontiguousarray(block[some, :common]))
        _, nearest = cosine_topk(rows, torch.from_numpy(np.ascontiguousarray(sums[:, :common])), 1)
        hits[some] = nearest[:, 0].numpy() == own[some]
    return hits
