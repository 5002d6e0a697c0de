"""Tests exact search: the definition, the order of results, and edge cases."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from accuracy import features

import simplexfix.functional as SF
from simplexfix import _reference


def exact(query: torch.Tensor, gallery: torch.Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Computes the definition: float32 unit rows, and dot products in rational arithmetic that are rounded once."""

    def unit(rows):
        rows = rows.double()
        norm = rows.square().sum(1, keepdim=True).sqrt()
        return torch.where(norm > 0, rows / norm, 0.0).float()

    q, g = unit(query).tolist(), unit(gallery).tolist()
    all_scores, all_ids = [], []
    for a in q:
        scores = [
            float(np.float32(float(sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True))))) for b in g
        ]
        order = sorted(range(len(g)), key=lambda i: (-scores[i], i))[:k]
        all_scores.append([scores[i] for i in order] + [-math.inf] * (k - len(order)))
        all_ids.append(order + [-1] * (k - len(order)))
    return all_scores, all_ids


@pytest.mark.parametrize("kind", ["normal", "heavy tail", "one-hot", "near-duplicates"])
@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 31])
def test_definition(kind: str, d: int) -> None:
    query, gallery = features(kind, 6, d, dtype=torch.float32, seed=1), features(kind, 40, d, dtype=torch.float32)
    scores, ids = SF.cosine_topk(query, gallery, 10)
    expected_scores, expected_ids = exact(query, gallery, 10)
    assert scores.tolist() == expected_scores
    assert ids.tolist() == expected_ids


# one query and several blocks of queries; galleries of a few panels of 64 rows, and enough rows for several tasks
@pytest.mark.parametrize(
    ("queries", "rows", "d", "k"), [(1, 20000, 33, 7), (70, 3000, 129, 50), (33, 9001, 16, 1), (5, 600, 1023, 600)]
)
def test_against_the_reference(queries: int, rows: int, d: int, k: int) -> None:
    query, gallery = (
        features("normal", queries, d, dtype=torch.float32, seed=1),
        features("normal", rows, d, dtype=torch.float32),
    )
    scores, ids = SF.cosine_topk(query, gallery, k)
    expected_scores, expected_ids = _reference.cosine_topk(query, gallery, k)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(ids, expected_ids)


def test_ties_go_to_the_lower_id_across_all_blocks() -> None:
    row = torch.randn(1, 24)
    gallery = row.repeat(9000, 1)
    for query in (row, row.repeat(40, 1)):
        scores, ids = SF.cosine_topk(query, gallery, 300)
        assert torch.equal(ids, torch.arange(300).expand(len(query), -1))
        assert (scores == scores[0, 0]).all()


def test_a_query_is_the_same_alone_and_on_any_number_of_threads() -> None:
    query, gallery = (
        features("normal", 65, 50, dtype=torch.float32, seed=2),
        features("near-duplicates", 9000, 50, dtype=torch.float32),
    )
    scores, ids = SF.cosine_topk(query, gallery, 20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = SF.cosine_topk(query, gallery, 20)
        assert torch.equal(scores, again[0])
        assert torch.equal(ids, again[1])
    finally:
        torch.set_num_threads(threads)
    for i in (0, 31, 64):
        alone = SF.cosine_topk(query[i : i + 1], gallery, 20)
        assert torch.equal(alone[0][0], scores[i])
        assert torch.equal(alone[1][0], ids[i])


def test_zero_rows_score_zero() -> None:
    gallery = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    scores, ids = SF.cosine_topk(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), gallery, 3)
    assert scores.tolist() == [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    assert ids.tolist() == [[1, 0, 2], [0, 1, 2]]


def test_short_and_empty_galleries_pad() -> None:
    query = torch.randn(2, 3)
    scores, ids = SF.cosine_topk(query, torch.randn(2, 3), 4)
    assert ids[:, 2:].tolist() == [[-1, -1]] * 2
    assert (scores[:, 2:] == -math.inf).all()
    scores, ids = SF.cosine_topk(query, torch.empty(0, 3), 2)
    assert ids.tolist() == [[-1, -1]] * 2
    assert SF.cosine_topk(torch.empty(0, 3), torch.randn(2, 3), 2)[0].shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_searched_as_float32(dtype: torch.dtype) -> None:
    query, gallery = torch.randn(4, 20).to(dtype), torch.randn(50, 20).to(dtype)
    for ours, expected in zip(
        SF.cosine_topk(query, gallery, 5), SF.cosine_topk(query.float(), gallery.float(), 5), strict=True
    ):
        assert torch.equal(ours, expected)


def test_huge_dynamic_range_and_denormals() -> None:
    gallery = torch.tensor([[1e38, 1e38], [1e-42, 0.0], [1e-30, -1e-30], [3e38, 1e-45]])
    scores, ids = SF.cosine_topk(torch.tensor([[1e-44, 1e-44], [1e30, 0.0]]), gallery, 4)
    assert ids.tolist() == [[0, 3, 1, 2], [1, 3, 0, 2]] or ids.tolist() == [[0, 1, 3, 2], [1, 3, 0, 2]]
    assert scores[0, 0] == pytest.approx(1.0, abs=1e-7)
    assert scores.isfinite().all()


def test_strided_rows() -> None:
    rows = torch.randn(300, 300)
    for view in (rows[:, 3:30], rows[::2, :30], rows.T[:50]):
        ours, expected = SF.cosine_topk(view[:5], view, 3), SF.cosine_topk(view[:5].contiguous(), view.contiguous(), 3)
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])


def test_scores_are_differentiable() -> None:
    query, gallery = (features("normal", n, 12, dtype=torch.float32, seed=n).requires_grad_() for n in (4, 30))
    upstream = torch.randn(4, 5)
    gradients = torch.autograd.grad(SF.cosine_topk(query, gallery, 5)[0], (query, gallery), upstream)
    expected = torch.autograd.grad(_reference.cosine_topk(query, gallery, 5)[0], (query, gallery), upstream)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
