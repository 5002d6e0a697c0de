"""The exact order of the candidates that a store has found by arithmetic of its own."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ...functional import cosine_topk

__all__ = ["Ranking", "rerank"]

Ranking: TypeAlias = "tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]"


def rerank(
    query: NDArray[np.float32],
    k: int,
    ids: NDArray[np.int64],
    versions: NDArray[np.int64],
    vectors: NDArray[np.float32],
) -> Ranking:
    """[1, k] scores, ids and versions, with the bits that an index in memory of these rows gives.

    Args:
        query: [d]; narrower vectors are compared on its leading dimensions.
        ids, versions: [n] of the candidates.
        vectors: [n, w] as they were given, w at most d.
    """
    order = np.argsort(ids)  # equal scores come by row
    narrow = torch.from_numpy(query[None, : vectors.shape[1]])
    scores, at = cosine_topk(narrow, torch.from_numpy(vectors[order]), k)
    rows = order[at.numpy()]
    there = at.numpy() >= 0
    return scores.numpy(), np.where(there, ids[rows], -1), np.where(there, versions[rows], -1)
