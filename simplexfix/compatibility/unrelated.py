"""Detects unrelated spaces of two models by the scores of their searches."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["unrelated_pairs", "unrelated_remark"]


def unrelated_pairs(low: ArrayLike, chance: float) -> list[tuple[int, int]]:
    """Returns the pairs (new, old) whose score is at chance, while each version scores above chance in its own gallery.

    Args:
        low: [T, T] lower interval ends of a compatibility matrix; entries above the diagonal are not read.
        chance: score of queries that find items at random.
    """
    above = np.asarray(low) > chance
    size = len(above)
    return [(i, j) for i in range(size) for j in range(i) if above[i, i] and above[j, j] and not above[i, j]]


def unrelated_remark(pairs: str) -> str:
    """Returns a remark for reports.

    Args:
        pairs: text that names the queries and galleries, such as "the new queries in the old gallery".
    """
    return (
        f"The scores of {pairs} are at chance, and those of each version in its own gallery are not: the spaces are "
        "unrelated. simplexfix adapt fits a map between them."
    )
