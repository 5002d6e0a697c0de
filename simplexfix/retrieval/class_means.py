"""The protocol "nearest_class_mean": a query is a hit if the nearest class template is that of its own class.

    template[c] = F.normalize(gallery[gallery_labels == c].mean(0))
    hit = argmax_c (query . template[c]) == query_label

Features are read as float32, and a class's rows are summed in float64, in row order.  If a gallery item has the query's
id, it is left out of its class's template.  Sum minus row has the direction of the mean without that row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._reference import unit_float32
from ..functional import cosine_topk
from ..labelled import FeatureRows, GalleryClasses, LabelledItems, VersionFeatures, row_squares
from .mixed import Mixture, mixed_search

__all__ = ["CellHits", "class_sums", "hits", "matrix_hits", "mixed_hits", "nearest_without", "row_scores"]

CellHits: TypeAlias = Iterator[tuple[int, int, int, NDArray[np.bool_]]]
Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]

_QUERY_ROWS = 4096  # queries per block
_GALLERY_ROWS = 128  # gallery rows per block: in float64 they stay in cache until they are summed
_PRODUCT_COLUMNS = 1024  # templates per matrix product with a block of queries


def hits(version: VersionFeatures) -> NDArray[np.bool_]:
    """Returns the hits [Q] of one pair of queries and gallery; the search runs on the features' device."""
    items = version.items
    sums = class_sums(version.gallery, items.gallery_classes)
    own, templates = items.gallery_classes.find(items.query_labels), sums.float()
    out = np.empty(len(own), dtype=np.bool_)
    for begin in range(0, len(own), _QUERY_ROWS):
        rows = slice(begin, min(len(own), begin + _QUERY_ROWS))
        block = version.query.block_tensor(rows.start, rows.stop)
        _, nearest = cosine_topk(block, templates, 1)
        out[rows] = nearest[:, 0].cpu().numpy() == own[rows]
        left_out = np.flatnonzero(items.excluded[rows] >= 0)
        if len(left_out):
            asked = block[torch.from_numpy(left_out).to(block.device)]
            out[begin + left_out] = _leave_one_out(asked, begin + left_out, sums, version.gallery, items)
    version.query.release()
    version.gallery.release()
    return out


def matrix_hits(versions: Sequence[VersionFeatures]) -> CellHits:
    """Yields (query version i, gallery version j, first query, hits of a block of queries) for all cells with j <= i.

    The result equals that of `hits`, at a lower cost.  Templates are computed once per gallery, and each query row is
    read once and compared with the templates of all galleries.  A float32 product decides a query if the gap between
    its own class and the best other class exceeds the error bound; a float64 product decides most of the others.
    `cosine_topk` decides the remaining ones, mostly ties, and all queries with a left-out item.

    Memory beside the blocks: 8 bytes per gallery, class and dimension; 16 if items are left out.
    """
    items = versions[0].items
    own = items.gallery_classes.find(items.query_labels)
    lacking, out = own < 0, items.excluded >= 0
    sums: list[Floats] = []
    exact: list[Tensor] = []
    for version in versions:
        total = class_sums(version.gallery, items.gallery_classes)
        sums.append(total.float().numpy())
        if out.any():
            exact.append(total)
    group = max(1, _PRODUCT_COLUMNS // len(items.gallery_classes.ids))
    made: list[Floats] = []
    for i, version in enumerate(versions):
        query = version.query
        if made and made[0].shape[1] != query.width:
            made = []
        made.extend(_templates(of, query.width) for of in sums[len(made) : i + 1])
        groups = [(j, _stack(made[j : min(j + group, i + 1)])) for j in range(0, i + 1, group)]
        for begin, block in query.blocks(_QUERY_ROWS):
            rows = slice(begin, begin + len(block))
            left_out = np.flatnonzero(out[rows])
            asked = torch.from_numpy(block[left_out])
            for first, templates in groups:
                gaps, sure = _gaps(block, templates, own[rows].clip(min=0))
                sure |= lacking[rows] | out[rows]
                for j, gap, known in zip(range(first, i + 1), gaps, sure, strict=False):
                    found = (gap > 0) & ~lacking[rows]
                    some = np.flatnonzero(~known)
                    if len(some):
                        found[some] = _decide(block[some], made[j], sums[j], own[begin + some])
                    if len(left_out):
                        found[left_out] = _leave_one_out(asked, begin + left_out, exact[j], versions[j].gallery, items)
                    yield i, j, begin, found
        for of in versions[: i + 1]:
            of.gallery.release()  # its rows were read by index


def mixed_hits(old: VersionFeatures, new: VersionFeatures) -> Callable[[NDArray[np.bool_]], NDArray[np.bool_]]:
    """Returns a function that maps [N] bool (True: row by the new model) to the hits [Q] of new queries.

    Features are in float32.  A template is as wide as its widest row: a class with a row by the new model is compared
    on the new model's dimensions.
    """
    items, mixture = old.items, Mixture.read(new.query, old.gallery, new.gallery)
    classes = items.gallery_classes
    own = classes.find(items.query_labels)
    left_out = np.flatnonzero(items.excluded >= 0)
    itself = items.excluded[left_out]

    def hits_of(replaced: NDArray[np.bool_]) -> NDArray[np.bool_]:
        gallery = mixture.gallery(replaced)
        sums = class_sums(FeatureRows("gallery", gallery), classes)
        renewed = np.bincount(classes.places, weights=replaced, minlength=len(classes.ids))
        templates = sums.float()
        shared = mixture.shared_width
        searched = templates[:, :shared], templates, torch.from_numpy(renewed > 0).to(templates.device)
        _, nearest = mixed_search(mixture.query, *searched, 1)
        found: NDArray[np.bool_] = nearest[:, 0].cpu().numpy() == own
        if len(left_out):
            asked, rows = mixture.query[left_out], gallery[torch.from_numpy(itself)]
            others = mixed_search(asked, *searched, 2)
            of = classes.places[itself]
            narrow = renewed[of] - replaced[itself] == 0
            nearest_other = nearest_without(asked, rows, sums, of, classes.sizes[of] == 1, others, (shared, narrow))
            found[left_out] = (nearest_other == own[left_out]) & (own[left_out] >= 0)
        return found

    return hits_of


def class_sums(gallery: FeatureRows, classes: GalleryClasses) -> Tensor:
    """Returns the sum of each class's rows, [C, d] float64 on the gallery's device.

    Rows are added in order, so that the result does not depend on the block size.  A sum has the direction of the
    class mean.

    Raises:
        ValueError: the sum of a class exceeds float32's range.
    """
    device = gallery.rows.device if isinstance(gallery.rows, Tensor) else torch.device("cpu")
    sums = torch.zeros(len(classes.ids), gallery.width, dtype=torch.float64, device=device)
    to = torch.from_numpy(classes.places).to(device)
    if gallery.on_cpu:
        for begin, block in gallery.blocks(_GALLERY_ROWS):
            sums.index_add_(0, to[begin : begin + len(block)], torch.from_numpy(block.astype(np.float64)))
    else:
        sums.index_add_(0, to, gallery.whole().double())
    if not sums.float().isfinite().all():
        raise ValueError(
            f"{gallery.name} has a class whose rows add up to more than float32 holds: scale its features down"
        )
    return sums


def row_scores(query: Tensor, rows: Tensor) -> Floats:
    """Returns the cosine [B] of each pair of rows with the rounding of a search: float64, rounded to float32."""
    q, r = (unit_float32(x).double().cpu().numpy() for x in (query, rows))
    # one dot product per row: the rounding of a matrix product depends on the number of rows
    found: Floats = np.einsum("ij,ij->i", q, r).astype(np.float32)
    return found


def _leave_one_out(asked: Tensor, at: Ids, sums: Tensor, rows: FeatureRows, items: LabelledItems) -> NDArray[np.bool_]:
    """Hits of the queries with indices `at`; each one's gallery item is left out of its class."""
    itself, classes = items.excluded[at], items.gallery_classes
    of, own = classes.places[itself], classes.find(items.query_labels[at])
    width = min(asked.shape[1], rows.width)
    asked, sums = asked[:, :width], sums[:, :width]
    own_rows = rows.take(itself).block_tensor(0, len(itself))[:, :width]
    others = cosine_topk(asked, sums.float(), 2)
    hits: NDArray[np.bool_] = nearest_without(asked, own_rows, sums, of, classes.sizes[of] == 1, others) == own
    return hits & (own >= 0)


def nearest_without(
    asked: Tensor,
    rows: Tensor,
    sums: Tensor,
    of: Ids,
    alone: NDArray[np.bool_],
    others: tuple[Tensor, Tensor],
    narrow: tuple[int, NDArray[np.bool_]] | None = None,
) -> Ids:
    """Returns the index of each query's nearest class, with the query's own item left out of its class; -1 for none.

    Args:
        asked: [B, w] queries.
        rows: [B, w], the gallery row that is the query itself.
        sums: [C, w] float64, class sums with all rows.
        of: [B] class index of each row.
        alone: [B] whether that class has no other row.
        others: scores and indices [B, 2] of the two nearest classes, with all rows.
        narrow: a smaller width, and [B] bool: queries whose class without the item is compared on that width.
    """
    rest = (sums[torch.from_numpy(of).to(sums.device)] - rows.double()).float()
    score = row_scores(asked, rest)
    if narrow is not None and narrow[1].any():
        width, at = narrow
        some = torch.from_numpy(np.flatnonzero(at)).to(asked.device)
        score[at] = row_scores(asked[some, :width], rest[some, :width])
    scores, places = (x.cpu().numpy() for x in others)
    first = places[:, 0] != of
    best, nearest = (np.where(first, x[:, 0], x[:, 1]) for x in (scores, places))
    wins = (score > best) | ((score == best) & (of < nearest)) | (nearest < 0)
    return np.where(wins & ~alone, of, nearest)


def _templates(sums: Floats, width: int) -> Floats:
    """Templates [classes, width], normalised over the dimensions that both versions have and zero in the others."""
    common = min(width, sums.shape[1])
    out = np.zeros((len(sums), width), dtype=np.float32)
    out[:, :common] = unit_float32(torch.from_numpy(np.ascontiguousarray(sums[:, :common]))).numpy()
    return out


def _stack(templates: list[Floats]) -> Floats:
    """Stacks templates to [classes, versions, d]; a single array is returned as a view, since it may be large."""
    return np.stack(templates, axis=1) if len(templates) > 1 else templates[0][:, None]


def _gaps(block: Floats, templates: Floats, own: Ids) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Returns the gap between the score of the own class and the best other score, and where its sign is certain.

    Args:
        block: [rows, d] queries, float32 or float64.
        templates: [classes, versions, d] unit rows.
        own: [rows] class index of each query.

    Returns:
        Gaps [versions, rows], and [versions, rows] bool: |gap| exceeds the error bound.

    By definition a score is rounded three times (normalised row, template, score), each by at most u |q| with
    u = 2^-24.  Here the float32 template may be off by one ulp, and the dot product of d terms adds its own rounding
    in any order.  A gap has twice the error of a score.  The small constant covers underflow in products and in |q|.
    """
    classes, versions, d = templates.shape
    # The product runs in NumPy, always in the dtype of its operands; torch's settings may allow bfloat16.
    unit = 2.0**-24 if block.dtype == np.float32 else 2.0**-53
    relative_error = d * unit / (1 - d * unit) + 8 * 2.0**-24
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow ends as "not certain"
        scores = (templates.reshape(-1, d) @ block.T).reshape(classes, versions, len(block))
        at = (own, np.arange(versions)[:, None], np.arange(len(block)))
        right = scores[at]
        scores[at] = -np.inf
        gaps = right - scores.max(axis=0)
        bound = 2 * relative_error * (1 + relative_error) * (np.sqrt(row_squares(block).astype(np.float64)) + 1e-17)
        sure = np.abs(gaps) > bound
    return gaps, sure & (relative_error < 0.1)


def _decide(block: Floats, templates: Floats, sums: Floats, own: Ids) -> NDArray[np.bool_]:
    """Hits [rows] of one version for rows that the float32 product left undecided; float64 decides almost all."""
    gaps, sure = _gaps(block.astype(np.float64), templates[:, None].astype(np.float64), own)
    found: NDArray[np.bool_] = gaps[0] > 0
    some = np.flatnonzero(~sure[0])
    if len(some):
        common = min(block.shape[1], sums.shape[1])
        rows = torch.from_numpy(np.ascontiguousarray(block[some, :common]))
        _, nearest = cosine_topk(rows, torch.from_numpy(np.ascontiguousarray(sums[:, :common])), 1)
        found[some] = nearest[:, 0].numpy() == own[some]
    return found
