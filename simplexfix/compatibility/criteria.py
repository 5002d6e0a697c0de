"""Criteria of a compatibility matrix, and of the queries of one upgrade.

A compatibility matrix holds `C[i, j] = M(queries by model i, gallery by model j)` for `j <= i`, for any score M where
larger is better.  Entries above the diagonal are never read.  Versions are numbered from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .._checks import check_name, check_number
from ..labelled import read_query_scores

__all__ = [
    "CompatibilityTable",
    "average_accuracy",
    "average_compatibility",
    "backward_compatibility",
    "compatibility_table",
    "compatibility_tax",
    "forward_compatibility",
    "negative_flip_rate",
    "positive_flip_rate",
]

TIES = ("incompatible", "compatible")


class CompatibilityTable(NamedTuple):
    """The empirical compatibility criterion of every upgrade; rows are query models, columns gallery models.

    Attributes:
        compatible: [T, T] bool; false on and above the diagonal, where there is no upgrade.
        margins: [T, T] float64, `C[i, j] - C[j, j]` below the diagonal, nan elsewhere.
    """

    compatible: NDArray[np.bool_]
    margins: NDArray[np.float64]


def average_compatibility(matrix: ArrayLike, *, ties: str = "incompatible") -> float:
    """Returns average compatibility (AC), the fraction of upgrades that satisfy the empirical compatibility criterion.

        AC = 2 / (T (T - 1)) * #{ i > j : C[i, j] > C[j, j] }

    Args:
        matrix: [T, T], or T rows of lengths 1, 2, ..., T.
        ties: "incompatible" or "compatible", the verdict for C[i, j] == C[j, j].

    Returns:
        A number in [0, 1]; nan for T = 1, which has no upgrade.

    Raises:
        ValueError: `matrix` is not a lower triangle of numbers, or `ties` is unknown.

    Reference:
        Biondi et al., arXiv 2405.02581.

    Example:
        >>> from simplexfix.compatibility import average_compatibility
        >>> average_compatibility([[0.5], [0.75, 1.0]])
        1.0
    """
    compatible = compatibility_table(matrix, ties=ties).compatible
    upgrades = np.tril_indices(len(compatible), -1)
    return float(compatible[upgrades].mean()) if len(upgrades[0]) else math.nan


def compatibility_table(matrix: ArrayLike, *, ties: str = "incompatible") -> CompatibilityTable:
    """Returns the empirical compatibility criterion (ECC) of each upgrade, and its margin.

    An upgrade is compatible if the new model's queries score higher in the old gallery than the old model's queries.

        ECC[i, j] = C[i, j] > C[j, j]        margins[i, j] = C[i, j] - C[j, j]        for j < i

    Args:
        matrix: [T, T], or T rows of lengths 1, 2, ..., T.
        ties: "incompatible" or "compatible", the verdict for C[i, j] == C[j, j].

    Raises:
        ValueError: `matrix` is not a lower triangle of numbers, or `ties` is unknown.

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", 2020.

    Example:
        >>> from simplexfix.compatibility import compatibility_table
        >>> table = compatibility_table([[0.5], [0.75, 1.0]])
        >>> bool(table.compatible[1, 0]), float(table.margins[1, 0])
        (True, 0.25)
    """
    check_name("ties", ties, TIES)
    c = lower_triangle(matrix)
    upgrade = np.tri(len(c), k=-1, dtype=bool)
    own = np.broadcast_to(np.diag(c), c.shape)
    better = c >= own if ties == "compatible" else c > own  # comparisons with nan, above the diagonal, are false
    return CompatibilityTable(better & upgrade, np.where(upgrade, c - own, np.nan))


def average_accuracy(matrix: ArrayLike, *, upto: int | None = None) -> float:
    """Returns average accuracy (AA), the mean of the lower triangle with its diagonal, in the unit of the matrix.

        AA_t = 2 / (t (t + 1)) * sum_{j <= i < t} C[i, j]

    Args:
        matrix: [T, T], or T rows of lengths 1, 2, ..., T.
        upto: t of AA_t, the mean over the leading t x t block; None for T.

    Raises:
        ValueError: `matrix` is not a lower triangle of numbers, or `upto` is outside [1, T].

    Example:
        >>> from simplexfix.compatibility import average_accuracy
        >>> average_accuracy([[0.5], [0.75, 1.0]])
        0.75
    """
    c = lower_triangle(matrix)
    size = len(c) if upto is None else upto
    if not 1 <= size <= len(c):
        raise ValueError(f"upto must lie in [1, {len(c)}], got {upto}")
    return float(c[np.tril_indices(size)].mean())


def backward_compatibility(matrix: ArrayLike) -> float:
    """Returns backward compatibility (BC), the mean gain of the last model's queries in the old galleries.

        BC = mean over i < T - 1 of  C[T - 1, i] - C[i, i]                # nan for T = 1

    Args:
        matrix: [T, T], or T rows of lengths 1, 2, ..., T.

    Raises:
        ValueError: `matrix` is not a lower triangle of numbers.

    Example:
        >>> from simplexfix.compatibility import backward_compatibility
        >>> backward_compatibility([[0.5], [0.75, 1.0]])
        0.25
    """
    c = lower_triangle(matrix)
    return float(np.mean(c[-1, :-1] - np.diag(c)[:-1])) if len(c) > 1 else math.nan


def forward_compatibility(matrix: ArrayLike) -> float:
    """Returns forward compatibility (FC): the mean score in the previous gallery minus that in the own gallery.

        FC = mean over i >= 1 of  C[i, i - 1] - C[i, i]                   # nan for T = 1

    Args:
        matrix: [T, T], or T rows of lengths 1, 2, ..., T.

    Raises:
        ValueError: `matrix` is not a lower triangle of numbers.

    Example:
        >>> from simplexfix.compatibility import forward_compatibility
        >>> forward_compatibility([[0.5], [0.75, 1.0]])
        -0.25
    """
    c = lower_triangle(matrix)
    return float(np.mean(np.diag(c, -1) - np.diag(c)[1:])) if len(c) > 1 else math.nan


def negative_flip_rate(before: ArrayLike | torch.Tensor, after: ArrayLike | torch.Tensor) -> float:
    """Returns the negative flip rate (NFR), the fraction of queries that become wrong by the upgrade.

        NFR = mean(before & ~after)             # for scores: mean(after < before)

    Args:
        before: [Q] bool, true for correct queries, such as the hits of `simplexfix.retrieval.nearest_class_mean`; or
            [Q] floating scores in [0, 1], such as the hits of "ndcg@10".  Q >= 1.
        after: [Q] of the same kind, for the same queries after the upgrade.

    Raises:
        TypeError: the values are neither bool nor floating, or their kinds differ.
        ValueError: there is not one value per query, no query, or a score outside [0, 1].

    Reference:
        Yan et al., "Positive-Congruent Training: Towards Regression-Free Model Updates", CVPR 2021.

    Example:
        >>> from simplexfix.compatibility import negative_flip_rate
        >>> negative_flip_rate([True, True, False, False], [True, False, True, False])
        0.25
    """
    _, losses, queries = flips(before, after)
    return losses / queries


def positive_flip_rate(before: ArrayLike | torch.Tensor, after: ArrayLike | torch.Tensor) -> float:
    """Returns the positive flip rate, the fraction of queries that become correct by the upgrade.

        mean(~before & after)                   # for scores: mean(after > before)

    For hits the gain in accuracy is the positive minus the negative flip rate.

    Args:
        before, after: as in `negative_flip_rate`.

    Raises:
        TypeError, ValueError: as in `negative_flip_rate`.

    Example:
        >>> from simplexfix.compatibility import positive_flip_rate
        >>> positive_flip_rate([True, True, False, False], [True, False, True, True])
        0.5
    """
    gains, _, queries = flips(before, after)
    return gains / queries


def compatibility_tax(unconstrained: float, compatible: float) -> float:
    """Returns the cost of compatible training: the score of an unconstrained model minus that of the compatible one.

        tax = M(unconstrained on its own gallery) - M(compatible on its own gallery)

    It is negative if the compatible model is better.

    Args:
        unconstrained, compatible: finite scores M.

    Raises:
        TypeError: a score is not a number.
        ValueError: a score is not finite.

    Example:
        >>> from simplexfix.compatibility import compatibility_tax
        >>> compatibility_tax(0.75, 0.5)
        0.25
    """
    for name, score in (("unconstrained", unconstrained), ("compatible", compatible)):
        check_number(name, score)
        if not math.isfinite(score):
            raise ValueError(f"{name} must be a finite score, got {score}")
    return float(unconstrained) - float(compatible)


def flips(before: ArrayLike | torch.Tensor, after: ArrayLike | torch.Tensor) -> tuple[int, int, int]:
    """Returns the numbers of queries that score higher after the upgrade, that score lower, and of all queries.

    Args:
        before, after: as in `negative_flip_rate`.

    Raises:
        TypeError, ValueError: as in `negative_flip_rate`.
    """
    old, new = read_both(before, after)
    return int((new > old).sum()), int((new < old).sum()), len(old)


def mean_gain(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Returns `mean(after) - mean(before)`; for hits as `(gains - losses) / Q`, which is rounded only once."""
    if after.dtype != np.bool_:
        return float(after.mean() - before.mean())
    gains, losses, queries = flips(before, after)
    return (gains - losses) / queries


def read_both(
    before: ArrayLike | torch.Tensor, after: ArrayLike | torch.Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Checks and returns the hits or scores of the same queries before and after, both bool or both float64.

    Raises:
        TypeError, ValueError: as in `negative_flip_rate`.
    """
    old, new = read_query_scores("before", before), read_query_scores("after", after)
    if old.dtype != new.dtype:
        raise TypeError(f"before and after must be both bool or both floating, got {old.dtype} and {new.dtype}")
    if old.shape != new.shape:
        raise ValueError(f"before and after must be of the same queries, got {len(old)} and {len(new)}")
    return old, new  # type: ignore[return-value]


def lower_triangle(matrix: ArrayLike | Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Returns a compatibility matrix as [T, T] float64 with nan above the diagonal.

    Raises:
        ValueError: `matrix` is neither square nor T rows of lengths 1 to T, or holds nan on or below the diagonal.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in matrix]  # type: ignore[union-attr]
    size = len(rows)
    shapes = [row.shape for row in rows]
    if not size or (shapes != [(size,)] * size and shapes != [(i + 1,) for i in range(size)]):
        raise ValueError(f"matrix must be [T, T] or T rows of lengths 1 to T, got {size} rows of shapes {shapes[:4]}")
    c = np.full((size, size), np.nan)
    for i, row in enumerate(rows):
        c[i, : i + 1] = row[: i + 1]
    bad = np.argwhere(np.isnan(c[np.tril_indices(size)]))
    if len(bad):
        i, j = (int(index[bad[0, 0]]) for index in np.tril_indices(size))
        raise ValueError(f"matrix holds nan at row {i}, column {j}; on and below the diagonal it must hold scores")
    return c
