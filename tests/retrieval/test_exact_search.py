"""Tests that search through 8-bit codes returns the same bits as scoring every row, on difficult galleries.

tests/test_instruction_sets.py compares the results of all instruction-set levels.  tests/native/core/test_search.cpp
tests the C++ search without torch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import needs_library
from exact_search import GALLERIES, SIZES, definition, hard_gallery, queries_for

import simplexfix.functional as SF

pytestmark = needs_library


def topk(query, gallery, k):
    scores, ids = SF.cosine_topk(torch.from_numpy(query), torch.from_numpy(gallery), k)
    return scores.numpy(), ids.numpy()


def assert_same(got, expected, what=""):
    for name, ours, truth in zip(("scores", "ids"), got, expected, strict=True):
        wrong = np.argwhere(ours != truth)
        assert ours.shape == truth.shape
        assert not len(wrong), (
            f"{what} {name} differ at {wrong[0].tolist()} and {len(wrong) - 1} other places: "
            f"{ours[tuple(wrong[0])]!r}, by definition {truth[tuple(wrong[0])]!r}"
        )


@pytest.mark.parametrize("kind", GALLERIES)
@pytest.mark.parametrize(("d", "n"), SIZES)
def test_hard_galleries(kind: str, d: int, n: int) -> None:
    rng = np.random.default_rng(d)
    gallery = hard_gallery(kind, n, d, rng)
    query = queries_for(gallery, 30, rng)  # enough rows for cosine_topk to search through codes
    most = n // 5
    scores, ids = definition(query, gallery, most)
    for k in (1, 10, 100, most):
        assert_same(topk(query, gallery, k), (scores[:, :k], ids[:, :k]), f"k={k}")
    assert_same(topk(query[:5], gallery, 10), (scores[:5, :10], ids[:5, :10]), "without codes")


@pytest.mark.parametrize("kind", ["normal", "clusters 1e-4", "one-hot", "falling"])
def test_batch_and_threads_change_nothing(kind: str) -> None:
    rng = np.random.default_rng(3)
    gallery = hard_gallery(kind, 20_000, 40, rng)
    query = queries_for(gallery, 300, rng)  # more than one block of queries
    expected = topk(query, gallery, 50)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            assert_same(topk(query, gallery, 50), expected, f"{count} threads")
            assert_same(topk(query[7:37], gallery, 50), [e[7:37] for e in expected], f"{count} threads, part")
    finally:
        torch.set_num_threads(threads)
    assert_same([e[:8] for e in expected], definition(query[:8], gallery, 50))


def test_flushed_denormals_change_nothing() -> None:
    """Each thread has its own denormal flushing; unless the search sets it, results would depend on the thread."""
    rng = np.random.default_rng(4)
    gallery = hard_gallery("denormals", 3000, 20, rng)
    query = queries_for(gallery, 30, rng)
    expected = topk(query, gallery, 20)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor always keeps denormals")
    try:
        assert_same(topk(query, gallery, 20), expected)
    finally:
        torch.set_flush_denormal(False)
