"""Tests AC, AA, BC and FC against published cells and hand-computed tables, and known mistakes of other code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from versions import pair, versions

from simplexfix.compatibility import (
    average_accuracy,
    average_compatibility,
    backward_compatibility,
    compatibility_matrix,
    compatibility_table,
    compatibility_tax,
    forward_compatibility,
    negative_flip_rate,
    positive_flip_rate,
)
from simplexfix.retrieval import instance, nearest_class_mean

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("method", ["d_simplex_hoc", "er"])
def test_published_cells_of_7_tasks(method: str) -> None:
    published = json.loads((FIXTURES / "published_matrices_7_tasks.json").read_text())[method]
    matrix = published["matrix"]
    assert round(average_compatibility(matrix), 4) == published["AC"]
    assert round(average_accuracy(matrix), 2) == published["AA"]
    assert round(backward_compatibility(matrix), 2) == published["BC"]
    assert round(forward_compatibility(matrix), 2) == published["FC"]
    if "AA_t" in published:
        assert [round(average_accuracy(matrix, upto=t + 1), 2) for t in range(7)] == published["AA_t"]


def test_published_cells_of_31_tasks() -> None:
    published = json.loads((FIXTURES / "published_matrix_31_tasks_er.json").read_text())["er"]
    matrix = published["matrix"]
    assert len(matrix) == 31
    assert round(average_compatibility(matrix), 4) == published["AC"]
    percent = 100 * average_accuracy(matrix)
    assert round(percent, 3) == published["AA_percent"]
    assert math.floor(100 * percent) / 100 == 30.32  # the paper truncates to two digits


def test_by_hand() -> None:
    #       gallery 0   1    2       upgrades: 1 on 0 gains, 2 on 0 ties, 2 on 1 loses
    matrix = [[0.5], [0.6, 0.7], [0.5, 0.6, 0.9]]
    assert average_compatibility(matrix) == pytest.approx(1 / 3)
    assert average_compatibility(matrix, ties="compatible") == pytest.approx(2 / 3)
    assert average_accuracy(matrix) == pytest.approx(3.8 / 6)
    assert average_accuracy(matrix, upto=2) == pytest.approx(0.6)
    assert backward_compatibility(matrix) == pytest.approx((0.0 - 0.1) / 2)
    assert forward_compatibility(matrix) == pytest.approx((-0.1 - 0.3) / 2)


def test_table_by_hand() -> None:
    matrix = [[0.5], [0.6, 0.7], [0.5, 0.6, 0.9]]
    compatible, margins = compatibility_table(matrix)
    assert compatible.tolist() == [[False, False, False], [True, False, False], [False, False, False]]
    assert compatibility_table(matrix, ties="compatible").compatible[2].tolist() == [True, False, False]
    assert np.isnan(margins[np.triu_indices(3)]).all()
    assert margins[np.tril_indices(3, -1)] == pytest.approx([0.1, 0.0, -0.1])


def test_table_of_published_matrices() -> None:
    hoc = json.loads((FIXTURES / "published_matrices_7_tasks.json").read_text())["d_simplex_hoc"]
    compatible, margins = compatibility_table(hoc["matrix"])
    # AC 0.95 is 20 of 21 upgrades: only the replacement at task 4 loses, on the gallery just before it
    assert compatible[np.tril_indices(7, -1)].sum() == 20
    assert np.argwhere(margins <= 0).tolist() == [[4, 3]]
    assert round(margins[4, 3], 2) == -0.26
    er = json.loads((FIXTURES / "published_matrix_31_tasks_er.json").read_text())["er"]["matrix"]
    compatible, margins = compatibility_table(er)
    assert not compatible.any()
    assert np.count_nonzero(~np.isnan(margins)) == 31 * 30 // 2


def test_flips_and_tax_by_hand() -> None:
    before = [True, True, True, False, False]
    after = np.array([True, False, False, True, False])
    assert negative_flip_rate(before, after) == 2 / 5
    assert positive_flip_rate(torch.tensor(before), torch.tensor(after)) == 1 / 5
    assert compatibility_tax(0.75, 0.5) == 0.25
    assert compatibility_tax(0.5, 0.75) == -0.25


@pytest.mark.parametrize("flips", [negative_flip_rate, positive_flip_rate])
def test_bad_hits(flips) -> None:
    with pytest.raises(
        TypeError, match="after must be bool, right or wrong for each query, or floating scores, got int64"
    ):
        flips([True, False], [1, 0])
    with pytest.raises(ValueError, match="before and after must be of the same queries, got 2 and 3"):
        flips([True, False], [True] * 3)
    for before in ([], [[True]]):
        with pytest.raises(ValueError, match=r"before must have shape \[Q\] with Q >= 1"):
            flips(before, [True])
    with pytest.raises(ValueError, match="compatible must be a finite score, got nan"):
        compatibility_tax(0.5, float("nan"))
    with pytest.raises(TypeError, match="unconstrained must be a number, got str"):
        compatibility_tax("0.5", 0.5)


def test_ones_and_zeros_average_like_any_other_number() -> None:
    assert average_accuracy([[0.0], [0.0, 1.0], [1.0, 1.0, 1.0]]) == pytest.approx(4 / 6)
    assert average_compatibility([[0.0], [0.0, 1.0], [1.0, 1.0, 1.0]]) == pytest.approx(1 / 3)


def test_one_version_has_no_upgrade() -> None:
    assert math.isnan(average_compatibility([[0.4]]))
    assert math.isnan(backward_compatibility([[0.4]]))
    assert math.isnan(forward_compatibility([[0.4]]))
    assert average_accuracy([[0.4]]) == 0.4


def test_cells_above_the_diagonal_are_ignored() -> None:
    square = np.array([[0.5, np.nan], [0.7, 0.6]])
    for matrix in (square, torch.tensor(square), np.where(np.isnan(square), 99.0, square)):
        assert average_compatibility(matrix) == 1.0
        assert average_accuracy(matrix) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], r"matrix must be \[T, T\] or T rows"),
        ([[1.0, 2.0]], r"matrix must be \[T, T\] or T rows of lengths 1 to T, got 1 rows of shapes \[\(2,\)\]"),
        ([[1.0], [1.0]], "got 2 rows"),
        ([[1.0], [float("nan"), 1.0]], "matrix holds nan at row 1, column 0"),
    ],
)
def test_bad_matrices(matrix, message: str) -> None:
    for criterion in (
        average_compatibility,
        average_accuracy,
        backward_compatibility,
        forward_compatibility,
        compatibility_table,
    ):
        with pytest.raises(ValueError, match=message):
            criterion(matrix)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="ties must be one of 'incompatible', 'compatible', got 'both'"):
        average_compatibility([[1.0]], ties="both")
    for upto in (0, 3):
        with pytest.raises(ValueError, match=r"upto must lie in \[1, 2\]"):
            average_accuracy([[1.0], [1.0, 1.0]], upto=upto)


@pytest.mark.parametrize("protocol", [nearest_class_mean, instance])
def test_matrix_of_versions(protocol) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 6
    clear = (0.5, 1.0, 3.0)  # every version separates the classes better than the one before
    rows = [torch.randn(60, 8, generator=generator) + c * torch.eye(8)[labels] for c in clear]
    queries, galleries = [v[:30] for v in rows], [v[30:] for v in rows]
    matrix = compatibility_matrix(versions(queries, galleries, labels[:30], labels[30:]), protocol)
    assert matrix.dtype == np.float64
    assert np.isnan(matrix[np.triu_indices(3, 1)]).all()
    for i in range(3):
        for j in range(i + 1):
            assert matrix[i, j] == protocol.score(pair(queries[i], labels[:30], galleries[j], labels[30:]))
    assert len(np.unique(matrix[np.tril_indices(3)])) >= 4  # so that a transposed cell is detected


def test_versions_of_another_width_are_refused_by_name() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"v1.query has 5 columns, v0.gallery has 4"):
        compatibility_matrix(
            versions([torch.randn(2, 4), torch.randn(2, 5)], [torch.randn(2, 4)] * 2, labels, labels), instance
        )
