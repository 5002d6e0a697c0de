"""The deployed construction, to sign and order."""

from __future__ import annotations

import math

import pytest
import torch

from simplexfix.polytopes import simplex_constants, simplex_prototypes

BY_HAND = {
    2: [[1.0], [-1.0]],
    # t = (1, 0), (0, 1), (a, a), a = (1 - sqrt 3) / 2: a triangle whose last vertex points down the diagonal
    3: [
        [(math.sqrt(3) + 1) / (2 * math.sqrt(2)), -(math.sqrt(3) - 1) / (2 * math.sqrt(2))],
        [-(math.sqrt(3) - 1) / (2 * math.sqrt(2)), (math.sqrt(3) + 1) / (2 * math.sqrt(2))],
        [-1 / math.sqrt(2), -1 / math.sqrt(2)],
    ],
    # a = -1/3: mean 1/6, norm sqrt(3)/2
    4: [
        [5 / math.sqrt(27), -1 / math.sqrt(27), -1 / math.sqrt(27)],
        [-1 / math.sqrt(27), 5 / math.sqrt(27), -1 / math.sqrt(27)],
        [-1 / math.sqrt(27), -1 / math.sqrt(27), 5 / math.sqrt(27)],
        [-1 / math.sqrt(3)] * 3,
    ],
}


def deployed(num_classes: int) -> torch.Tensor:
    """The construction as deployed models make it, step by step: method.md, section 2."""
    d = num_classes - 1
    t = torch.cat([torch.eye(d), torch.full((1, d), (1 - math.sqrt(1 + d)) / d)]).double()
    t[-1] = (1 - math.sqrt(1 + d)) / d
    t = t - t.mean(0, keepdim=True)
    return t / t.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_worked_by_hand(num_classes: int) -> None:
    expected = torch.tensor(BY_HAND[num_classes], dtype=torch.float64)
    torch.testing.assert_close(simplex_prototypes(num_classes, dtype=torch.float64), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 33, 1024])
def test_equals_the_deployed_construction(num_classes: int) -> None:
    w = simplex_prototypes(num_classes, dtype=torch.float64)
    torch.testing.assert_close(w, deployed(num_classes), rtol=0, atol=1e-14)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 33, 1024])
def test_is_a_regular_simplex(num_classes: int) -> None:
    w = simplex_prototypes(num_classes, dtype=torch.float64)
    cosines = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(w @ w.T, cosines, rtol=0, atol=1e-13)
    torch.testing.assert_close(w.sum(0), torch.zeros(num_classes - 1, dtype=torch.float64), rtol=0, atol=1e-12)


def test_chosen_rows_in_the_order_asked_for() -> None:
    slots = torch.tensor([1023, 0, 5, 5])
    assert torch.equal(simplex_prototypes(1024, slots), simplex_prototypes(1024)[slots])
    assert simplex_prototypes(2**20, torch.tensor([2**20 - 1])).shape == (1, 2**20 - 1)
    assert simplex_prototypes(8, torch.empty(0, dtype=torch.int64)).shape == (0, 7)


def test_constants_do_not_cancel() -> None:
    a, m, r = simplex_constants(2**40)
    assert a == pytest.approx(-1 / (1 + 2.0**20), rel=1e-15)
    assert m == pytest.approx((1 + a) / 2.0**40, rel=1e-15)
    assert r == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simplex_constants(1), "num_classes must be at least 2, got 1"),
        (lambda: simplex_prototypes(0), "num_classes must be at least 2, got 0"),
        (lambda: simplex_prototypes(4, torch.tensor([4])), r"slots must lie in \[0, 3\], got 4 to 4"),
        (lambda: simplex_prototypes(4, torch.tensor([-1, 2])), r"slots must lie in \[0, 3\], got -1 to 2"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
