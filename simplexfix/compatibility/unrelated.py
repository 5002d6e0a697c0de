"""Whether two models' spaces have nothing to do with each other, by the scores of their searches."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["unrelated_pairs", "unrelated_remark"]


def unrelated_pairs(low: ArrayLike, chance: float) -> list[tuple[int, int]]:
    """Pairs (new, old) whose score is at chance, while both versions score above it in their own galleries.

    Args:
        low: [T, T] low ends of the intervals of a compatibility matrix; those above the diagonal are not read.
        chance: score of queries that find items at random.
    """
    above = np.asarray(low) > chance
    size = len(above)
    return [(i, j) for i in range(size) for j in range(i) if above[i, i] and above[j, j] and not above[i, j]]


def unrelated_remark(pairs: str) -> str:
    """A sentence for those who read a report.

    Args:
        pairs: whose queries in whose gallery.
    """
    return (
        f"The scores of {pairs} are at chance, and those of each version in its own gallery are not: the spaces are "
        "unrelated. simplexfix adapt fits a map between them."
    )
