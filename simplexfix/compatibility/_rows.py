"""Features and labels as NumPy arrays, checked, and taken in normalised blocks of float64: they may be mapped files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..retrieval._inputs import read_ids, read_labels

__all__ = ["as_ids", "as_labels", "as_rows", "blocks", "unit_rows"]

BLOCK_BYTES = 64 << 20  # of float64, per block of rows


def as_rows(name: str, features: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """[rows, d] of floats; nothing is copied but bfloat16, which NumPy lacks."""
    array = _as_array(name, features)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have shape [rows, d] with at least one row, got {list(array.shape)}")
    return array


def as_ids(name: str, ids: ArrayLike | torch.Tensor, of: str, count: int) -> NDArray[np.int64]:
    """[count] int64 ids of the rows of `of`."""
    return read_ids(name, _as_array(name, ids), of, count, unique=False)


def as_labels(name: str, rows: NDArray[Any], labels: ArrayLike | torch.Tensor) -> NDArray[np.int64]:
    """[rows] int64 labels of the rows that the caller calls `name`."""
    return read_labels(f"{name}_labels", _as_array(f"{name}_labels", labels), name, len(rows))


def blocks(rows: NDArray[Any]) -> Iterator[slice]:
    """Slices of rows, each of at most BLOCK_BYTES as float64, and of one row at least."""
    step = max(1, BLOCK_BYTES // (8 * rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def unit_rows(name: str, rows: NDArray[Any], at: NDArray[np.int64]) -> NDArray[np.float64]:
    """The rows at these places, L2-normalised in float64; a zero row stays zero.

    Raises:
        ValueError: a row holds nan or inf, by name.
    """
    unit = rows[at].astype(np.float64)
    # by the largest number first: squares of float64 may overflow
    largest = np.abs(unit).max(axis=1)
    bad = ~np.isfinite(largest)
    if bad.any():
        raise ValueError(f"{name} row {at[bad.argmax()]} holds nan or inf")
    unit /= np.where(largest > 0, largest, 1)[:, None]
    norm = np.sqrt(np.einsum("ij,ij->i", unit, unit))
    unit /= np.where(norm > 0, norm, 1)[:, None]
    return unit


def _as_array(name: str, values: ArrayLike | torch.Tensor) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {values.device}; pass {name}.cpu()")
        values = values.detach()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asanyarray(values)
