"""Tests that simplex vertices equal those of the published code in sign and order; tests the orthoplex and the cube."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from simplexfix.polytopes import (
    cube_codes,
    cube_prototypes,
    cube_signs,
    orthoplex_prototypes,
    simplex_constants,
    simplex_prototypes,
)

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
    """Computes the vertices step by step, like the published code that existing models were trained with."""
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


def test_orthoplex_vertices_are_the_axes_and_their_opposites() -> None:
    w = orthoplex_prototypes(6, dtype=torch.float64)
    assert torch.equal(w, torch.cat([torch.eye(3), -torch.eye(3)]).double())
    assert torch.equal(orthoplex_prototypes(6, torch.tensor([5, 0, 0])), w[[5, 0, 0]].float())
    assert orthoplex_prototypes(2**20, torch.tensor([2**20 - 1])).shape == (1, 2**19)


def distances(codes: torch.Tensor, d: int) -> torch.Tensor:
    """Returns Hamming distances of all pairs."""
    signs = cube_signs(codes, d, torch.float64)
    return (d - signs @ signs.T) / 2


def griesmer(bits: int, d: int) -> int:
    """Returns the largest distance that the Griesmer bound allows for a linear code of this many bits and length d."""
    distance = 0
    while sum(-(-(distance + 1) // 2**i) for i in range(bits)) <= d:
        distance += 1
    return distance


@pytest.mark.parametrize(
    ("classes", "d", "least"),
    [
        (2, 1, 1),
        (2, 5, 5),
        (8, 3, 1),
        (8, 7, 4),  # 2^k classes in 2^k - 1 dimensions: a regular simplex, cosine -1 / 7
        (8, 14, 8),
        (16, 15, 8),
        (32, 31, 16),
        (64, 63, 32),
        (100, 64, 30),
        (256, 128, 60),
        (1000, 64, 25),
        (1024, 128, 56),
        (4096, 64, 23),
        (5, 200, 114),
    ],
)
def test_codes_keep_their_distance(classes: int, d: int, least: int) -> None:
    codes = cube_codes(classes, d)
    found = distances(codes, d)
    reached = int(found[~torch.eye(classes, dtype=torch.bool)].min())
    bits = (classes - 1).bit_length()
    print(f"{classes} classes in {d} dimensions: distance {reached}, Griesmer bound {griesmer(bits, d)}")
    assert reached >= least
    if classes == 2**bits:  # fewer classes are a subset of the codewords, which may have a larger distance
        assert reached <= griesmer(bits, d)
        assert reached <= d * classes / (2 * (classes - 1))  # Plotkin's bound: the mean distance
    w = cube_prototypes(codes, d, dtype=torch.float64)
    torch.testing.assert_close(w @ w.T, 1 - 2 * found / d, rtol=0, atol=1e-12)
    assert torch.equal(cube_codes(2**bits, d)[:classes], codes)


def test_a_cubes_codes_can_be_a_regular_simplex() -> None:
    w = cube_prototypes(cube_codes(64, 63), 63, dtype=torch.float64)
    cosines = torch.full((64, 64), -1 / 63, dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(w @ w.T, cosines, rtol=0, atol=1e-12)


def test_codes_of_a_million_classes_are_all_different() -> None:
    codes = cube_codes(2**20, 70)
    assert codes.shape == (2**20, 2)
    assert codes.unique(dim=0).shape == codes.shape
    weights = sum(((codes >> j) & 1).sum(1) for j in range(64))
    assert int(weights[1:].min()) >= 17  # the code is linear: the minimum weight is the minimum distance


def test_every_bit_of_a_word_is_a_coordinate() -> None:
    codes = torch.tensor([[-(2**63), 5], [2**62, 7]])
    signs = cube_signs(codes, 67)
    assert (signs > 0).nonzero().tolist() == [[0, 63], [0, 64], [0, 66], [1, 62], [1, 64], [1, 65], [1, 66]]
    assert torch.equal(cube_prototypes(codes, 67, torch.tensor([1, 0])) > 0, signs[[1, 0]] > 0)


@pytest.mark.parametrize(
    "call",
    [
        simplex_constants,
        simplex_prototypes,
        orthoplex_prototypes,
        lambda n: cube_codes(n, 9),
        lambda d: cube_codes(9, d),
        lambda d: cube_prototypes(cube_codes(8, 5), d),
    ],
)
@pytest.mark.parametrize("number", [np.int64(8), np.uint8(8), torch.tensor(8)], ids=repr)
def test_any_integer_is_a_count(call, number) -> None:
    ours, expected = call(number), call(8)
    assert torch.equal(ours, expected) if isinstance(expected, torch.Tensor) else ours == expected
    for other in (8.0, "8", None, True, torch.tensor(8.0)):
        with pytest.raises(TypeError, match=f"(num_classes|d) must be an integer, got {type(other).__name__}"):
            call(other)


def test_codes_are_made_for_a_device() -> None:
    expected = cube_codes(8, 70)
    assert cube_codes(8, 70, device="meta").is_meta
    with torch.device("meta"):
        assert cube_codes(8, 70).is_meta
        assert cube_codes(8, 70, device="cpu").tolist() == expected.tolist()


@pytest.mark.parametrize(
    "call",
    [
        lambda slots: simplex_prototypes(8, slots),
        lambda slots: orthoplex_prototypes(8, slots),
        lambda slots: cube_prototypes(cube_codes(8, 5), 5, slots),
    ],
)
def test_slots_are_a_tensor_of_int64(call) -> None:
    for slots, error, message in (
        ([0, 1], TypeError, "slots must be a torch.Tensor, got list"),
        (torch.tensor([0.0]), TypeError, "slots must be int64, got torch.float32"),
        (torch.tensor([True]), TypeError, "slots must be int64, got torch.bool"),
        (torch.tensor([[0]]), ValueError, r"slots must have shape \[n\], got \[1, 1\]"),
    ):
        with pytest.raises(error, match=message):
            call(slots)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simplex_constants(1), "num_classes must be at least 2, got 1"),
        (lambda: orthoplex_prototypes(5), "num_classes must be even and at least 2, got 5"),
        (lambda: orthoplex_prototypes(0), "num_classes must be even and at least 2, got 0"),
        (lambda: orthoplex_prototypes(4, torch.tensor([4])), r"slots must lie in \[0, 3\], got values from 4 to 4"),
        (lambda: cube_codes(0, 4), r"num_classes must lie in \[1, 16777216\], got 0"),
        (lambda: cube_codes(2**24 + 1, 64), r"num_classes must lie in \[1, 16777216\]"),
        (lambda: cube_codes(17, 4), "d must be at least 5 for 17 classes, got 4"),
        (lambda: cube_codes(1, 0), "d must be at least 1 for 1 classes, got 0"),
        (lambda: cube_prototypes(torch.zeros(2, 2, dtype=torch.int64), 64), r"codes must have shape \[C, 1\]"),
        (
            lambda: cube_prototypes(cube_codes(9, 40), 4),
            r"row . of codes has bits beyond d = 4: make the codes with cube_codes\(num_classes, 4\)",
        ),
        (lambda: cube_prototypes(cube_codes(3, 4), 0), "d must be at least 1, got 0"),
        (
            lambda: cube_prototypes(cube_codes(3, 4), 4, torch.tensor([3])),
            r"slots must lie in \[0, 2\], got values from 3 to 3",
        ),
        (lambda: simplex_prototypes(0), "num_classes must be at least 2, got 0"),
        (lambda: simplex_prototypes(4, torch.tensor([4])), r"slots must lie in \[0, 3\], got values from 4 to 4"),
        (lambda: simplex_prototypes(4, torch.tensor([-1, 2])), r"slots must lie in \[0, 3\], got values from -1 to 2"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
