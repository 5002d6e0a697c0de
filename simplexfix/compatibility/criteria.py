"""Criteria of a compatibility matrix, and of one upgrade's queries, as plain functions.

A compatibility matrix is `C[i, j] = M(query by model i, gallery by model j)` for `j <= i`, any score M of
which more is better; what stands above the diagonal is never read.  Versions count from 0.
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
    """The empirical compatibility criterion of every upgrade, row = query model, column = gallery model.

    Attributes:
        compatible: [T, T] bool; False on and above the diagonal, where there is no upgrade.
        margins: [T, T] float64, `C[i, j] - C[j, j]` below the diagonal, nan elsewhere.
    """

    compatible: NDArray[np.bool_]
    margins: NDArray[np.float64]


def average_compatibility(matrix: ArrayLike, *, ties: str = "incompatible") -> float:
    """AC: the share of upgrades that satisfy the empirical compatibility criterion.

        AC = 2 / (T (T - 1)) * #{ i > j : C[i, j] > C[j, j] }

    Args:
        matrix: [T, T], or T rows of lengths 1, 2, ..., T.
        ties: what C[i, j] == C[j, j] counts as, "incompatible" or "compatible".

    Returns:
        In [0, 1]; nan for T = 1, which has no upgrade.

    Raises:
        ValueError: not a lower triangle of numbers, or an unknown `ties`.

    Reference:
        Biondi et al., arXiv 2405.02581.
    """
    compatible = compatibility_table(matrix, ties=ties).compatible
    upgrades = np.tril_indices(len(compatible), -1)
    return float(compatible[upgrades].mean()) if len(upgrades[0]) else math.nan


def compatibility_table(matrix: ArrayLike, *, ties: str = "incompatible") -> CompatibilityTable:
    """ECC: which upgrades find more in an old gallery than the model that made it, and by how much.

        ECC[i, j] = C[i, j] > C[j, j]        margins[i, j] = C[i, j] - C[j, j]        for j < i

    Args:
        matrix: [T, T], or T rows of lengths 1, 2, ..., T.
        ties: what C[i, j] == C[j, j] counts as, "incompatible" or "compatible".

    Raises:
        ValueError: not a lower triangle of numbers, or an unknown `ties`.

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", 2020.
    """
    check_name("ties", ties, TIES)
    c = lower_triangle(matrix)
    upgrade = np.tri(len(c), k=-1, dtype=bool)
    own = np.broadcast_to(np.diag(c), c.shape)
    better = c >= own if ties == "compatible" else c > own  # never where c is nan, above the diagonal
    return CompatibilityTable(better & upgrade, np.where(upgrade, c - own, np.nan))


def average_accuracy(matrix: ArrayLike, *, upto: int | None = None) -> float:
    """AA: the mean of the lower triangle with its diagonal, in the unit of the matrix.

    Args:
        matrix: [T, T], or T rows of lengths 1, 2, ..., T.
        upto: t for AA_t, the mean over the leading t x t block; T if None.

    Raises:
        ValueError: not a lower triangle of numbers, or `upto` outside [1, T].
    """
    c = lower_triangle(matrix)
    size = len(c) if upto is None else upto
    if not 1 <= size <= len(c):
        raise ValueError(f"upto must lie in [1, {len(c)}], got {upto}")
    return float(c[np.tril_indices(size)].mean())


def backward_compatibility(matrix: ArrayLike) -> float:
    """BC: what the last model's queries gain on the old galleries over the models that made them.

    BC = mean over i < T - 1 of  C[T - 1, i] - C[i, i]                nan for T = 1
    """
    c = lower_triangle(matrix)
    return float(np.mean(c[-1, :-1] - np.diag(c)[:-1])) if len(c) > 1 else math.nan


def forward_compatibility(matrix: ArrayLike) -> float:
    """FC: what each model's queries gain on the gallery of the version before over its own gallery.

    FC = mean over i >= 1 of  C[i, i - 1] - C[i, i]                   nan for T = 1
    """
    c = lower_triangle(matrix)
    return float(np.mean(np.diag(c, -1) - np.diag(c)[1:])) if len(c) > 1 else math.nan


def negative_flip_rate(before: ArrayLike | torch.Tensor, after: ArrayLike | torch.Tensor) -> float:
    """NFR: the share of queries that the upgrade breaks.

        NFR = mean( before & ~after )           of scores in [0, 1]: mean( after < before )

    Args:
        before: [Q] bool, which queries were right, as `simplexfix.retrieval.nearest_class_mean.hits` gives; or floating
            in [0, 1], what each query scored, as the hits of "ndcg@10"; Q >= 1.
        after: [Q] of the same kind, the same queries after the upgrade.

    Raises:
        TypeError: neither booleans nor floating numbers, or one of each.
        ValueError: not one value per query, no query, or a score outside [0, 1].

    Reference:
        Yan et al., "Positive-Congruent Training: Towards Regression-Free Model Updates", CVPR 2021.
    """
    _, losses, queries = flips(before, after)
    return losses / queries


def positive_flip_rate(before: ArrayLike | torch.Tensor, after: ArrayLike | torch.Tensor) -> float:
    """The share of queries that the upgrade mends: `mean( ~before & after )`, of scores `mean( after > before )`.

    Arguments and errors as of `negative_flip_rate`; of hits, this minus that is the gain in accuracy.
    """
    gains, _, queries = flips(before, after)
    return gains / queries


def compatibility_tax(unconstrained: float, compatible: float) -> float:
    """What compatibility costs: the score of a new model trained without it, minus that of the compatible one.

        tax = M(unconstrained on its own gallery) - M(compatible on its own gallery)

    Negative where the compatible model is the better one.

    Raises:
        TypeError, ValueError: a score is not a finite number.
    """
    for name, score in (("unconstrained", unconstrained), ("compatible", compatible)):
        check_number(name, score)
        if not math.isfinite(score):
            raise ValueError(f"{name} must be a finite score, got {score}")
    return float(unconstrained) - float(compatible)


def flips(before: ArrayLike | torch.Tensor, after: ArrayLike | torch.Tensor) -> tuple[int, int, int]:
    """How many queries score more after the upgrade, how many score less, and how many there are.

    Raises:
        TypeError, ValueError: as `negative_flip_rate`.
    """
    old, new = read_both(before, after)
    return int((new > old).sum()), int((new < old).sum()), len(old)


def mean_gain(before: NDArray[Any], after: NDArray[Any]) -> float:
    """`mean(after) - mean(before)`; of hits, the difference of the counts over Q, which is rounded once."""
    if after.dtype != np.bool_:
        return float(after.mean() - before.mean())
    gains, losses, queries = flips(before, after)
    return (gains - losses) / queries


def read_both(
    before: ArrayLike | torch.Tensor, after: ArrayLike | torch.Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the same queries score before and after, both bool or both float64.

    Raises:
        TypeError, ValueError: as `negative_flip_rate`.
    """
    old, new = read_query_scores("before", before), read_query_scores("after", after)
    if old.dtype != new.dtype:
        raise TypeError(f"before and after must be both bool or both floating, got {old.dtype} and {new.dtype}")
    if old.shape != new.shape:
        raise ValueError(f"before and after must be of the same queries, got {len(old)} and {len(new)}")
    return old, new  # type: ignore[return-value]


def lower_triangle(matrix: ArrayLike | Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """[T, T] float64 with nan above the diagonal.

    Raises:
        ValueError: neither square nor T rows of lengths 1 .. T, or a nan on or below the diagonal.
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
