"""Criteria of a compatibility matrix, as plain functions.

A compatibility matrix is `C[i, j] = M(query by model i, gallery by model j)` for `j <= i`, any score M of
which more is better; what stands above the diagonal is never read.  Versions count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["average_accuracy", "average_compatibility", "backward_compatibility", "forward_compatibility"]


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
    if ties not in ("incompatible", "compatible"):
        raise ValueError(f"ties must be 'incompatible' or 'compatible', got {ties!r}")
    c = lower_triangle(matrix)
    rows, columns = np.tril_indices(len(c), -1)
    if not len(rows):
        return float("nan")
    cross, own = c[rows, columns], c[columns, columns]
    return float(np.mean(cross >= own if ties == "compatible" else cross > own))


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
    return float(np.mean(c[-1, :-1] - np.diag(c)[:-1])) if len(c) > 1 else float("nan")


def forward_compatibility(matrix: ArrayLike) -> float:
    """FC: what each model's queries gain on the gallery of the version before over its own gallery.

    FC = mean over i >= 1 of  C[i, i - 1] - C[i, i]                   nan for T = 1
    """
    c = lower_triangle(matrix)
    return float(np.mean(np.diag(c, -1) - np.diag(c)[1:])) if len(c) > 1 else float("nan")


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
