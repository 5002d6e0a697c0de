"""Tests closed-form logits and gradients against the product with the matrix of vertices, also their strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, KINDS, assert_accurate, features
from conftest import assert_same_bits

import simplexfix.functional as SF
from simplexfix import _reference
from simplexfix.polytopes import simplex_prototypes


def dense(z, *, normalize=False, scale=1.0):
    w = simplex_prototypes(z.shape[1] + 1, dtype=z.dtype)
    return scale * (F.normalize(z) if normalize else z) @ w.T


def both(function, z, upstream, **options):
    z = z.clone().requires_grad_()
    logits = function(z, **options)
    return logits.detach(), torch.autograd.grad(logits, z, upstream.to(logits.dtype))[0]


def check(z, truth=dense, naive=dense, **options):
    upstream = torch.randn(len(z), z.shape[1] + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upstream = upstream.to(z.dtype)
    logits, gradient = both(SF.simplex_logits, z, upstream, **options)
    true_logits, true_gradient = both(truth, z.double(), upstream, **options)
    naive_logits, naive_gradient = both(naive, z, upstream, **options)
    assert logits.dtype == gradient.dtype == z.dtype
    assert_accurate(logits, naive_logits, true_logits, what="logits")
    assert_accurate(gradient, naive_gradient, true_gradient, what="gradient")


@pytest.mark.parametrize("num_classes", [2, 3, 4, 17, 33, 66, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(num_classes: int, dtype: torch.dtype) -> None:
    z = features("normal", 6, num_classes - 1, dtype=dtype)
    check(z, scale=3.0)
    if num_classes > 2:  # in one dimension, normalising leaves only the sign, and its gradient is zero
        check(z, normalize=True, scale=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_distributions(kind: str) -> None:
    for dtype in DTYPES:
        check(features(kind, 15, 47, dtype=dtype))
        check(features(kind, 15, 47, dtype=dtype), normalize=True, scale=30.0)


def test_many_classes() -> None:
    check(
        features("normal", 2, 65536, dtype=torch.float32),
        truth=_reference.simplex_logits,
        naive=_reference.simplex_logits,
        normalize=True,
    )


def test_shapes_and_strides() -> None:
    z = torch.randn(2, 3, 7)
    logits = SF.simplex_logits(z)
    assert logits.shape == (2, 3, 8)
    assert_same_bits(SF.simplex_logits(z[1, 2]), logits[1, 2])
    assert SF.simplex_logits(torch.randn(0, 7)).shape == (0, 8)
    wide = torch.randn(9, 40)
    assert_same_bits(SF.simplex_logits(wide[:, 3:30]), SF.simplex_logits(wide[:, 3:30].contiguous()))
    torch.testing.assert_close(SF.simplex_logits(wide.T), SF.simplex_logits(wide.T.contiguous()), rtol=0, atol=1e-6)


def test_zero_row() -> None:
    logits, gradient = both(SF.simplex_logits, torch.zeros(2, 5), torch.randn(2, 6), normalize=True)
    assert not logits.any()
    assert not gradient.any()


def test_rows_sum_to_zero_as_the_vertices_do() -> None:
    logits = SF.simplex_logits(features("offset", 8, 100, dtype=torch.float64))
    torch.testing.assert_close(logits.sum(1), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-10)
