"""The compatibility matrix of model versions, from features and labels alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["compatibility_matrix"]

Protocol = Callable[[Tensor, Tensor, Tensor, Tensor], float]


def compatibility_matrix(
    queries: Sequence[Tensor],
    galleries: Sequence[Tensor],
    query_labels: Tensor,
    gallery_labels: Tensor,
    protocol: Protocol,
) -> NDArray[np.float64]:
    """Scores every version's queries on its own gallery and on those of the versions before.

        C[i, j] = protocol(queries[i], query_labels, galleries[j], gallery_labels)    for j <= i, else nan

    Args:
        queries: T tensors [Q, d], the same queries by each version.
        galleries: T tensors [N, d], the same gallery by each version, extracted once and kept.
        query_labels: [Q] int64.
        gallery_labels: [N] int64.
        protocol: of `simplexfix.retrieval`, or a function with the same arguments.

    Returns:
        [T, T] float64, nan above the diagonal.

    Raises:
        ValueError: no version, unlike numbers of versions, or versions of different width, by name.
    """
    if not queries or len(queries) != len(galleries):
        raise ValueError(f"queries and galleries must be of the same versions, got {len(queries)} and {len(galleries)}")
    width = queries[0].shape[-1]
    for name, features in (("queries", queries), ("galleries", galleries)):
        for version, rows in enumerate(features):
            if rows.shape[-1] != width:
                raise ValueError(
                    f"{name}[{version}] has {rows.shape[-1]} columns, version 0 has {width}: "
                    "features of different width cannot be compared"
                )
    size = len(queries)
    matrix = np.full((size, size), np.nan)
    for i in range(size):
        for j in range(i + 1):
            matrix[i, j] = protocol(queries[i], query_labels, galleries[j], gallery_labels)
    return matrix
