"""Helpers of the tests of CosineIndex."""

from __future__ import annotations

from typing import Any

import numpy as np

from simplexfix import CosineIndex


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def index_of(vectors: Any, ids: Any = None, **options: Any) -> CosineIndex:
    index = CosineIndex(np.shape(vectors)[1], **options)
    index.add(vectors, ids)
    return index


def assert_same(got: Any, expected: Any) -> None:
    for ours, truth in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, truth)
