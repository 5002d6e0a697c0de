"""Converts rows to and from flat faiss indexes; faiss is optional (the extra `faiss`) and imported on first use."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-3  # largest deviation of a row's norm from 1; float32 rounding is far smaller


def to_flat(ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> Any:
    """Returns an IndexIDMap2 of an IndexFlatIP with these rows and ids."""
    faiss = _import()
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    index.add_with_ids(vectors, ids)
    return index


def from_flat(index: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns (ids, rows) of an IndexFlat, or of an IndexIDMap of one."""
    faiss = _import()
    flat, ids = index, None
    if isinstance(index, faiss.IndexIDMap):
        flat, ids = faiss.downcast_index(index.index), faiss.vector_to_array(index.id_map)
    if not isinstance(flat, faiss.IndexFlat):
        got = type(index).__name__ + (f" of {type(flat).__name__}" if flat is not index else "")
        remedy = "; faiss.index_gpu_to_cpu(index) copies it" if "Gpu" in got else ""
        raise TypeError(f"index must be a flat faiss index, or an IndexIDMap of one, got {got}{remedy}")
    if flat.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise ValueError(f"index must rank by inner product or L2, got metric_type {flat.metric_type}")
    rows = flat.reconstruct_n(0, flat.ntotal)
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    wrong = np.flatnonzero(~((length == 0) | (np.abs(length - 1) <= _TOLERANCE)))
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} has length {length[wrong[0]]:.6g}, expected 1: cosine would rank rows of other lengths "
            "otherwise than faiss did; to search them by cosine, CosineIndex.add(index.reconstruct_n(0, index.ntotal))"
        )
    return np.arange(flat.ntotal) if ids is None else ids, rows


def _import() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise ModuleNotFoundError("it needs faiss: pip install 'simplexfix[faiss]'", name="faiss") from None
    return faiss
