"""How many pairs break the two inequalities of compatibility: all pairs, in blocks, exactly."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..retrieval._inputs import Rows
from ._rows import as_ids, as_labels, as_rows, blocks, unit_rows
from .regressions import Integers, take_rows

__all__ = ["Violations", "inequality_violations"]

# A tile of 256 x 4096 float32 differences is 4 MB, and stays in the last level of cache between its passes.
TILE_ROWS, TILE_COLUMNS = 256, 4096
SAMPLE = 5_000, 20_000  # queries and gallery items that a report looks at: seconds, for shares that err by 0.01 or so


@dataclass(frozen=True)
class Violations:
    """Counts of pairs, and of those that break their inequality."""

    same_pairs: int
    same_violations: int
    other_pairs: int
    other_violations: int

    @property
    def same(self) -> float:
        """The share of same-class pairs that break (1); nan where there is none."""
        return self.same_violations / self.same_pairs if self.same_pairs else math.nan

    @property
    def other(self) -> float:
        """The share of other-class pairs that break (2); nan where there is none."""
        return self.other_violations / self.other_pairs if self.other_pairs else math.nan

    def as_dict(self) -> dict[str, Any]:
        """None for nan."""
        shares = {"same": self.same, "other": self.other}
        return {**asdict(self), **{name: None if math.isnan(share) else share for name, share in shares.items()}}


def inequality_violations(
    new_query: ArrayLike | torch.Tensor,
    old_query: ArrayLike | torch.Tensor,
    old_gallery: ArrayLike | torch.Tensor,
    query_labels: ArrayLike | torch.Tensor,
    gallery_labels: ArrayLike | torch.Tensor,
    *,
    query_ids: ArrayLike | torch.Tensor | None = None,
    gallery_ids: ArrayLike | torch.Tensor | None = None,
) -> Violations:
    """Counts the pairs of query i and gallery item j that the upgrade moves the wrong way.

        s_new = new_query @ old_gallery.T,  s_old = old_query @ old_gallery.T       rows L2-normalised, in float64
        (1)  y_i  = y_j  is broken where  s_new[i, j] < s_old[i, j]
        (2)  y_i != y_j  is broken where  s_new[i, j] > s_old[i, j]

    Differences up to 4 (d + 4) 2^-53, which float64 cannot tell from 0, are ties, and ties break nothing.

    The difference is the product of `new - old` with the gallery: one float32 matrix product in place of two, its sign
    certain where it exceeds the bound of its error, `(d + 3) 2^-24 |new - old|`.  All other pairs are done again in
    float64, so the counts are those of float64 throughout.  Memory beside the arguments: about 250 MB, whatever their
    length.

    Args:
        new_query: [Q, d] floating, finite, on the CPU; may be a mapped file.
        old_query: [Q, d], the same queries by the old model.
        old_gallery: [N, d], by the old model.
        query_labels: [Q] integers.
        gallery_labels: [N] integers.
        query_ids: [Q] integers; a pair of the same id is one item with itself, and left out.
        gallery_ids: [N] integers; both or neither.

    Raises:
        TypeError: features are not floating, or labels or ids not integers.
        ValueError: shapes that do not fit, features of different width, a row with nan or inf, by name.

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", 2020, equations 1 and 2.
    """
    features = {
        "new_query": as_rows("new_query", new_query),
        "old_query": as_rows("old_query", old_query),
        "old_gallery": as_rows("old_gallery", old_gallery),
    }
    new, old, gallery = features.values()
    for name, rows in features.items():
        if rows.shape[1] != old.shape[1]:
            raise ValueError(
                f"{name} has {rows.shape[1]} columns, old_query has {old.shape[1]}: "
                "features of different width cannot be compared"
            )
    if len(new) != len(old):
        raise ValueError(f"new_query and old_query must be of the same queries, got {len(new)} and {len(old)} rows")
    labels = as_labels("query", old, query_labels), as_labels("gallery", gallery, gallery_labels)
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("query_ids and gallery_ids must both be given, or neither")
    self_pairs = np.empty((2, 0), dtype=np.int64)
    if query_ids is not None and gallery_ids is not None:
        self_pairs = _equal_pairs(
            as_ids("query_ids", query_ids, "new_query", len(new)),
            as_ids("gallery_ids", gallery_ids, "old_gallery", len(gallery)),
        )

    # Sorted by class, the same-class pairs of a tile are a rectangle per class.
    query_order, gallery_order = (np.argsort(y, kind="stable") for y in labels)
    query_classes, gallery_classes = labels[0][query_order], labels[1][gallery_order]
    counts = np.zeros(2, dtype=np.int64)
    for rows_at in blocks(new):
        at = query_order[rows_at]
        moves = unit_rows("new_query", new, at) - unit_rows("old_query", old, at)
        for columns_at in blocks(gallery):
            targets = unit_rows("old_gallery", gallery, gallery_order[columns_at])
            counts += _violations(moves, targets, query_classes[rows_at], gallery_classes[columns_at])

    same_pairs = _same_class_pairs(*labels)
    other_pairs = len(new) * len(gallery) - same_pairs
    if self_pairs.size:
        alike = labels[0][self_pairs[0]] == labels[1][self_pairs[1]]
        same_pairs -= int(alike.sum())
        other_pairs -= int((~alike).sum())
        counts -= _violations_of_pairs(new, old, gallery, self_pairs, alike)
    return Violations(same_pairs, int(counts[0]), other_pairs, int(counts[1]))


def sampled_violations(
    new_query: Rows, old_query: Rows, old_gallery: Rows, query_labels: Integers, gallery_labels: Integers
) -> Violations:
    """`inequality_violations` of all pairs of `SAMPLE` queries and items, the same ones in every call."""
    generator = np.random.default_rng(0)
    asked, found = (
        np.sort(generator.choice(len(labels), most, replace=False)) if len(labels) > most else np.arange(len(labels))
        for labels, most in zip((query_labels, gallery_labels), SAMPLE, strict=True)
    )
    return inequality_violations(
        take_rows(new_query, asked),
        take_rows(old_query, asked),
        take_rows(old_gallery, found),
        query_labels[asked],
        gallery_labels[found],
    )


def _tie(d: int) -> float:
    """Both unit rows, their difference and the float64 product err by less than this."""
    return 4 * (d + 4) * 2.0**-53


def _violations(
    moves: NDArray[np.float64],
    targets: NDArray[np.float64],
    move_classes: NDArray[np.int64],
    target_classes: NDArray[np.int64],
) -> NDArray[np.int64]:
    """[2]: same-class pairs of negative product, other-class pairs of positive product.  Classes ascend."""
    d = moves.shape[1]
    tie = _tie(d)
    length = np.sqrt(np.einsum("ij,ij->i", moves, moves))
    moved = length > tie  # a query that stays where it was is all ties
    if not moved.all():
        moves, move_classes, length = moves[moved], move_classes[moved], length[moved]
    small_moves, small_targets = moves.astype(np.float32), targets.astype(np.float32)
    # d products and sums and the rounding of both factors; 1.01 for the products of roundings, 1e-30 for flushed
    # denormals.  np.matmul, and not torch, whose float32 products may be told to run in bfloat16.
    bounds = (1.01 * (d + 3) * 2.0**-24 * length + tie + 1e-30).astype(np.float32)[:, None]
    counts = np.zeros(2, dtype=np.int64)
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), dtype=np.float32)
    for top in range(0, len(moves), TILE_ROWS):
        rows = slice(top, min(top + TILE_ROWS, len(moves)))
        for left in range(0, len(targets), TILE_COLUMNS):
            columns = slice(left, min(left + TILE_COLUMNS, len(targets)))
            products = tile[: rows.stop - top, : columns.stop - left]
            np.matmul(small_moves[rows], small_targets[columns].T, out=products)
            nearer, farther = products > bounds[rows], products < -bounds[rows]
            near = np.count_nonzero(nearer)
            if near + np.count_nonzero(farther) < products.size:
                undecided = np.nonzero(~(nearer | farther))
                exact = _exact_products(moves[rows], targets[columns], *undecided)
                nearer[undecided], farther[undecided] = exact > tie, exact < -tie
                near = np.count_nonzero(nearer)
            alike = _rectangles(move_classes[rows], target_classes[columns])
            counts[0] += sum(np.count_nonzero(farther[box]) for box in alike)
            counts[1] += near - sum(np.count_nonzero(nearer[box]) for box in alike)
    return counts


def _exact_products(
    moves: NDArray[np.float64], targets: NDArray[np.float64], i: NDArray[Any], j: NDArray[Any]
) -> NDArray[np.float64]:
    """moves[i] . targets[j]: gathered where they are few, else from the whole product."""
    if len(i) > moves.shape[0] * targets.shape[0] // 32:
        product: NDArray[np.float64] = (moves @ targets.T)[i, j]
        return product
    exact = np.empty(len(i))
    step = max(1, (8 << 20) // (8 * moves.shape[1]))
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        exact[part] = np.einsum("ij,ij->i", moves[i[part]], targets[j[part]])
    return exact


def _rectangles(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> list[tuple[slice, slice]]:
    """Where ascending classes of rows meet the same of columns."""
    classes, first = np.unique(rows, return_index=True)
    ends = [*first[1:].tolist(), len(rows)]
    left, right = (np.searchsorted(columns, classes, side).tolist() for side in ("left", "right"))
    corners = zip(first.tolist(), ends, left, right, strict=True)
    return [(slice(a, b), slice(c, e)) for a, b, c, e in corners if e > c]


def _same_class_pairs(query_labels: NDArray[np.int64], gallery_labels: NDArray[np.int64]) -> int:
    classes, queries = np.unique(query_labels, return_counts=True)
    ordered = np.sort(gallery_labels)
    items = np.searchsorted(ordered, classes, "right") - np.searchsorted(ordered, classes, "left")
    return int(queries @ items)


def _equal_pairs(query_ids: NDArray[np.int64], gallery_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """[2, pairs]: places of the queries and gallery items of the same id.

    Raises:
        ValueError: an id stands twice in one of them.
    """
    for name, ids in (("query_ids", query_ids), ("gallery_ids", gallery_ids)):
        values, times = np.unique(ids, return_counts=True)
        if (times > 1).any():
            raise ValueError(f"{name} holds {values[times.argmax()]} more than once")
    _, i, j = np.intersect1d(query_ids, gallery_ids, assume_unique=True, return_indices=True)
    return np.stack([i, j]).astype(np.int64)


def _violations_of_pairs(
    new: NDArray[Any], old: NDArray[Any], gallery: NDArray[Any], pairs: NDArray[np.int64], alike: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """[2] as `_violations`, of pairs alone."""
    tie = _tie(new.shape[1])
    counts = np.zeros(2, dtype=np.int64)
    for part in blocks(np.broadcast_to(np.empty(1), (pairs.shape[1], new.shape[1]))):
        i, j = pairs[:, part]
        moves = unit_rows("new_query", new, i) - unit_rows("old_query", old, i)
        exact = np.einsum("ij,ij->i", moves, unit_rows("old_gallery", gallery, j))
        counts += [np.count_nonzero(alike[part] & (exact < -tie)), np.count_nonzero(~alike[part] & (exact > tie))]
    return counts
