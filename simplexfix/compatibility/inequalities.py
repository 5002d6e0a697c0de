"""Exact counts of the pairs that violate the two inequalities of backward compatibility."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..labelled import FeatureRows, VersionFeatures, check_versions, row_slices

__all__ = ["Violations", "inequality_violations"]

# A tile of 256 x 4096 float32 differences is 4 MB and stays in the last-level cache between passes.
TILE_ROWS, TILE_COLUMNS = 256, 4096
SAMPLE = 5_000, 20_000  # queries and gallery items in a report's sample; its fractions are exact within about 0.01


@dataclass(frozen=True)
class Violations:
    """Numbers of same-class and other-class pairs, and of those that violate their inequality."""

    same_pairs: int
    same_violations: int
    other_pairs: int
    other_violations: int

    @property
    def same(self) -> float:
        """Fraction of same-class pairs that violate (1) of `inequality_violations`; nan without such pairs."""
        return self.same_violations / self.same_pairs if self.same_pairs else math.nan

    @property
    def other(self) -> float:
        """Fraction of other-class pairs that violate (2) of `inequality_violations`; nan without such pairs."""
        return self.other_violations / self.other_pairs if self.other_pairs else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Returns counts and fractions for JSON, with None for nan."""
        rates = {"same": self.same, "other": self.other}
        return {**asdict(self), **{name: None if math.isnan(rate) else rate for name, rate in rates.items()}}


def inequality_violations(old: VersionFeatures, new: VersionFeatures) -> Violations:
    """Counts the pairs of a query i and a gallery item j whose similarity the upgrade changes in the wrong direction.

        s_new = new.query @ old.gallery.T,  s_old = old.query @ old.gallery.T       # rows L2-normalised, in float64
        (1)  y_i  = y_j  is violated if  s_new[i, j] < s_old[i, j]
        (2)  y_i != y_j  is violated if  s_new[i, j] > s_old[i, j]

    Differences up to 4 (d + 4) 2^-53 are within the rounding error of float64; they count as ties, and ties violate
    nothing.  Pairs of an item with itself (equal ids) are left out.

    The difference is computed as the product of `new - old` with the gallery, one float32 matrix product instead of
    two.  Its sign is certain above the error bound `(d + 3) 2^-24 |new - old|`.  The other pairs are recomputed in
    float64, so the counts equal those in float64.  The memory is about 250 MB for any number of rows.

    Args:
        old: deployed version, whose gallery is kept.
        new: version that replaces it, of the same items.  Its width equals that of `old`, or `old`'s width is one of
            its prefixes.

    Raises:
        TypeError: an argument is not a `VersionFeatures`.
        ValueError: items or widths differ, or a row holds nan or inf.

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", 2020, equations 1 and 2.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import inequality_violations
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0, 1], [0, 0, 1])
        >>> gallery = np.array([[1.0, 0.1], [0.9, 0.3], [0.2, 1.0]])
        >>> old = items.version(np.array([[1.0, 0.0], [1.0, 0.9]]), gallery)
        >>> new = items.version(np.array([[1.0, 0.1], [0.1, 1.0]]), gallery)
        >>> inequality_violations(old, new)
        Violations(same_pairs=3, same_violations=0, other_pairs=3, other_violations=1)
    """
    old, new = check_versions((old, new), ("old", "new"))
    new, old = old.pair(new, "equal"), old.pair(old, "equal")
    items, gallery = old.items, old.gallery
    labels = items.query_labels, items.gallery_labels

    # After sorting by class, the same-class pairs of a tile are one rectangle per class.
    query_order, gallery_order = (np.argsort(y, kind="stable") for y in labels)
    query_classes, gallery_classes = labels[0][query_order], labels[1][gallery_order]
    counts = np.zeros(2, dtype=np.int64)
    for rows_at in row_slices(len(labels[0]), gallery.width):
        at = query_order[rows_at]
        moves = new.query.unit(at) - old.query.unit(at)
        for columns_at in row_slices(len(labels[1]), gallery.width):
            targets = gallery.unit(gallery_order[columns_at])
            counts += _violations(moves, targets, query_classes[rows_at], gallery_classes[columns_at])

    same_pairs = _same_class_pairs(*labels)
    other_pairs = len(labels[0]) * len(labels[1]) - same_pairs
    in_gallery = np.flatnonzero(items.excluded >= 0)  # queries that are gallery items
    if len(in_gallery):
        self_pairs = np.stack([in_gallery, items.excluded[in_gallery]])
        same_class = labels[0][self_pairs[0]] == labels[1][self_pairs[1]]
        same_pairs -= int(same_class.sum())
        other_pairs -= int((~same_class).sum())
        counts -= _violations_of_pairs(new.query, old.query, gallery, self_pairs, same_class)
    for rows in (new.query, old.query, gallery):
        rows.release()
    return Violations(same_pairs, int(counts[0]), other_pairs, int(counts[1]))


def sampled_violations(old: VersionFeatures, new: VersionFeatures) -> Violations:
    """Returns `inequality_violations` of a fixed random sample of `SAMPLE` queries and gallery items."""
    generator = np.random.default_rng(0)
    drawn = [
        np.sort(generator.choice(count, limit, replace=False)) if count > limit else None
        for count, limit in zip((len(old.query), len(old.gallery)), SAMPLE, strict=True)
    ]
    return inequality_violations(old.take(*drawn), new.take(*drawn))


def _tie_tolerance(d: int) -> float:
    """Returns the error bound of s_new - s_old in float64: of both unit rows, their difference and the product."""
    return 4 * (d + 4) * 2.0**-53


def _violations(
    moves: NDArray[np.float64],
    targets: NDArray[np.float64],
    move_classes: NDArray[np.int64],
    target_classes: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Returns counts [2] of same-class pairs with a negative product, and of other-class pairs with a positive one.

    `moves` are differences between new and old queries, and `targets` gallery rows.  Both are sorted by class.
    """
    d = moves.shape[1]
    tie = _tie_tolerance(d)
    length = np.sqrt(np.einsum("ij,ij->i", moves, moves))
    moved = length > tie  # an unchanged query has only ties
    if not moved.all():
        moves, move_classes, length = moves[moved], move_classes[moved], length[moved]
    small_moves, small_targets = moves.astype(np.float32), targets.astype(np.float32)
    # Error bound of d products and sums and of the rounding of both factors; 1.01 covers products of rounding errors,
    # 1e-30 flushed denormals.  It holds for np.matmul; torch's settings may allow bfloat16 in float32 products.
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
            same_class = _rectangles(move_classes[rows], target_classes[columns])
            counts[0] += sum(np.count_nonzero(farther[rectangle]) for rectangle in same_class)
            counts[1] += near - sum(np.count_nonzero(nearer[rectangle]) for rectangle in same_class)
    return counts


def _exact_products(
    moves: NDArray[np.float64], targets: NDArray[np.float64], i: NDArray[Any], j: NDArray[Any]
) -> NDArray[np.float64]:
    """Returns moves[i] . targets[j]: single dot products if they are few, else entries of the whole matrix product."""
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
    """Returns the rectangles of equal class for rows and columns that are sorted by class."""
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


def _violations_of_pairs(
    new: FeatureRows, old: FeatureRows, gallery: FeatureRows, pairs: NDArray[np.int64], same_class: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Returns the counts [2] of `_violations` for a list of pairs."""
    tie = _tie_tolerance(new.width)
    counts = np.zeros(2, dtype=np.int64)
    for part in row_slices(pairs.shape[1], new.width):
        i, j = pairs[:, part]
        moves = new.unit(i) - old.unit(i)
        exact = np.einsum("ij,ij->i", moves, gallery.unit(j))
        same = same_class[part]
        counts += [np.count_nonzero(same & (exact < -tie)), np.count_nonzero(~same & (exact > tie))]
    return counts
