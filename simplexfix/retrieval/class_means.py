"""The protocol "nearest_class_mean": is a query nearest to the template of its own class?

    template[c] = F.normalize(gallery[gallery_labels == c].mean(0))
    hit = argmax_c (query . template[c]) == query_label

Features are compared in float32 and added in float64, row after row.  Where a gallery item is the query itself, by its
id, the template of the item's class is made without it: the sum minus the row, which points where that mean does.
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

_QUERY_ROWS = 4096  # a block of them is past L2, and so are its products with some versions' templates
_GALLERY_ROWS = 128  # as float64 they stay in caches on their way into the sums
_PRODUCT_COLUMNS = 1024  # templates of so many versions meet a block in one product


def hits(version: VersionFeatures) -> NDArray[np.bool_]:
    """[Q] the hits of one pair of queries and gallery: the definition, on the device of the features."""
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
    """(query version, gallery version, first query, hits of a block of queries) of every cell with j <= i.

    Templates are made once per gallery; each query row is read once, against all galleries' templates.  A product in
    float32 decides where the own class's score is further from the best other's than it can err, then one in float64.
    The rest, ties above all, is searched by `cosine_topk`, and so are queries that leave an item out: the answer is
    that of `hits`.  Memory: 8 bytes per gallery, class and dimension, beside blocks; 16 where items are left out.
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
            of.gallery.release()  # whose rows were read by their numbers


def mixed_hits(old: VersionFeatures, new: VersionFeatures) -> Callable[[NDArray[np.bool_]], NDArray[np.bool_]]:
    """[N] which rows are by the new model -> [Q] hits of the new queries in that gallery, of float32 features.

    A template is as wide as its widest row: a class that has a row of the new model is compared on its dimensions.
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
    """[C, d] float64, on the device of the gallery: added row by row, in blocks as in one go.

    Each points where the class's mean does.

    Raises:
        ValueError: a class whose sum float32 does not hold.
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
    """[B] the score that a search gives each pair of rows: float64, rounded to float32."""
    q, r = (unit_float32(x).double().cpu().numpy() for x in (query, rows))
    # row by row: a matrix product rounds differently with the number of rows
    found: Floats = np.einsum("ij,ij->i", q, r).astype(np.float32)
    return found


def _leave_one_out(asked: Tensor, at: Ids, sums: Tensor, rows: FeatureRows, items: LabelledItems) -> NDArray[np.bool_]:
    """Hits of the queries with these numbers, whose item is left out of its class."""
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
    """[B] the place of each query's nearest class, where its own item is left out of the item's class; -1 for none.

    Args:
        asked: [B, w] queries.
        rows: [B, w] the gallery rows that are the queries themselves.
        sums: [C, w] float64 sums of classes, with all rows.
        of: [B] the place of each row's class.
        alone: [B] whether that class has no other row.
        others: scores and places of each query's two nearest classes, with all rows.
        narrow: a smaller width, and [B] of which queries the class without the item is compared on it.
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
    u = 2^-24; this product takes a template that may be off by one ulp in float32, and adds the rounding of d products
    and sums in any order.  A gap is of two scores.  The small constant covers what underflows in products or in |q|
    itself.
    """
    classes, versions, d = templates.shape
    # Of float32 whatever torch's settings, which may allow products in bfloat16: NumPy's.
    unit = 2.0**-24 if block.dtype == np.float32 else 2.0**-53
    relative_error = d * unit / (1 - d * unit) + 8 * 2.0**-24
    with np.errstate(over="ignore", invalid="ignore"):  # ends as not sure
        scores = (templates.reshape(-1, d) @ block.T).reshape(classes, versions, len(block))
        at = (own, np.arange(versions)[:, None], np.arange(len(block)))
        right = scores[at]
        scores[at] = -np.inf
        gaps = right - scores.max(axis=0)
        bound = 2 * relative_error * (1 + relative_error) * (np.sqrt(row_squares(block).astype(np.float64)) + 1e-17)
        sure = np.abs(gaps) > bound
    return gaps, sure & (relative_error < 0.1)


def _decide(block: Floats, templates: Floats, sums: Floats, own: Ids) -> NDArray[np.bool_]:
    """[rows] hits of one version for rows that a product in float32 left open: one in float64 leaves next to none."""
    gaps, sure = _gaps(block.astype(np.float64), templates[:, None].astype(np.float64), own)
    found: NDArray[np.bool_] = gaps[0] > 0
    some = np.flatnonzero(~sure[0])
    if len(some):
        common = min(block.shape[1], sums.shape[1])
        rows = torch.from_numpy(np.ascontiguousarray(block[some, :common]))
        _, nearest = cosine_topk(rows, torch.from_numpy(np.ascontiguousarray(sums[:, :common])), 1)
        found[some] = nearest[:, 0].numpy() == own[some]
    return found
