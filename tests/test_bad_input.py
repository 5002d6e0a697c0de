"""Tests bad input to every public function of `functional`, with the expected message."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import needs_library

import simplexfix.functional as SF

Z = torch.zeros(3, 4)
T = torch.tensor([0, 4, 2])


def loss(z=Z, target=T, **options):
    return lambda: SF.simplex_cross_entropy(z, target, **options)


def orthoplex(z=Z, target=T, **options):
    return lambda: SF.orthoplex_cross_entropy(z, target, **options)


def cube(z=Z, target=T, **options):
    return lambda: SF.cube_cross_entropy(z, target, **options)


CODES = torch.arange(5)[:, None]


def contrast(new=Z, old=Z, target=T, **options):
    return lambda: SF.old_new_contrast(new, old, target, **options)


def topk(query=Z, gallery=Z, k=1):
    return lambda: SF.cosine_topk(query, gallery, k)


NAN = Z.clone()
NAN[2, 1] = math.nan

CASES = [
    (loss(z=[1.0]), TypeError, "z must be a torch.Tensor, got list"),
    (loss(z=Z.long()), TypeError, r"z must be float32, float64, bfloat16 or float16, got torch.int64; cast it"),
    (loss(z=torch.zeros(3, 0)), ValueError, r"z must have shape \[..., d\] with d >= 1, got \[3, 0\]"),
    (loss(z=torch.tensor(1.0)), ValueError, r"z must have shape \[..., d\] with d >= 1, got \[\]"),
    (loss(target=T.int()), TypeError, "target must be int64, got torch.int32"),
    (loss(target=T.float()), TypeError, "target must be int64, got torch.float32"),
    (loss(target=[0, 1, 2]), TypeError, "target must be a torch.Tensor, got list"),
    (loss(target=T[:2]), ValueError, r"target must have shape \[3\] to go with features \[3, 4\], got \[2\]"),
    (loss(target=T[:, None]), ValueError, r"target must have shape \[3\] to go with features \[3, 4\], got \[3, 1\]"),
    (
        loss(target=torch.tensor([0, 5, 1])),
        ValueError,
        "target out of range: row 1 has slot 5, expected 0 to 4 or ignore_index -100",
    ),
    (
        loss(target=torch.tensor([0, 1, -1])),
        ValueError,
        "target out of range: row 2 has slot -1, expected 0 to 4 or ignore_index -100",
    ),
    (
        loss(target=torch.tensor([0, 2**40, 1]), ignore_index=9),
        ValueError,
        "row 1 has slot 1099511627776, .* ignore_index 9",
    ),
    (loss(target=T.to("meta")), ValueError, "target must be on cpu like the features, got meta"),
    (loss(scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
    (loss(scale=math.inf), ValueError, "scale must be positive and finite, got inf"),
    (loss(scale=math.nan), ValueError, "scale must be positive and finite, got nan"),
    (loss(scale=torch.tensor(2.0)), TypeError, "scale must be a number, got Tensor"),
    (
        lambda: SF.hoc_loss(Z, Z, torch.tensor([0, -1, 1])),
        ValueError,
        "target out of range: row 1 has slot -1, expected",
    ),
    (loss(scale=1e39), ValueError, "scale must lie between .* and .*, the range of float32, got 1e\\+39"),
    (loss(scale=1e-39), ValueError, "scale must lie between .* and .*, the range of float32, got 1e-39"),
    (loss(scale="2"), TypeError, "scale must be a number, got str"),
    (loss(z=Z.to_sparse()), TypeError, r"z must be dense, got torch.sparse_coo; pass z.to_dense\(\)"),
    (loss(target=T.to_sparse()), TypeError, r"target must be dense, got torch.sparse_coo; pass target.to_dense\(\)"),
    (loss(ignore_index=None), TypeError, "ignore_index must be an integer, got NoneType"),
    (loss(ignore_index=1.0), TypeError, "ignore_index must be an integer, got float"),
    (loss(ignore_index=True), TypeError, "ignore_index must be an integer, got bool"),
    (loss(label_smoothing=None), TypeError, "label_smoothing must be a number, got NoneType"),
    (loss(margin=("cosine", None), normalize=True), TypeError, "margin's size must be a number, got NoneType"),
    (loss(weight=[1.0] * 5), TypeError, "weight must be a torch.Tensor, got list"),
    (loss(weight=torch.ones(5).to_sparse()), TypeError, "weight must be dense, got torch.sparse_coo"),
    (loss(reduction="avg"), ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
    (loss(label_smoothing=1.5), ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
    (loss(margin=("cosine", 0.3)), ValueError, "margin needs normalize=True"),
    (loss(margin=0.3, normalize=True), TypeError, "margin must be None or a pair such as"),
    (loss(margin=("arc", 0.3), normalize=True), ValueError, "margin must be one of 'cosine', 'angular', got 'arc'"),
    (
        loss(margin=("angular", 4.0), normalize=True),
        ValueError,
        r"margin of kind 'angular' must lie in \[0, pi\], got 4.0",
    ),
    (
        loss(margin=("cosine", -0.1), normalize=True),
        ValueError,
        r"margin of kind 'cosine' must lie in \[0, 2\], got -0.1",
    ),
    (loss(weight=torch.ones(4)), ValueError, r"weight must have shape \[5\], one factor per slot, got \[4\]"),
    (loss(weight=torch.ones(5).long()), TypeError, "weight must be floating, got torch.int64"),
    (loss(weight=torch.ones(5, device="meta")), ValueError, "weight must be on cpu like the features, got meta"),
    (orthoplex(z=Z.long()), TypeError, "z must be float32"),
    (orthoplex(target=T + 4), ValueError, "target out of range: row 1 has slot 8, expected 0 to 7 or ignore_index"),
    (orthoplex(weight=torch.ones(5)), ValueError, r"weight must have shape \[8\], one factor per slot, got \[5\]"),
    (orthoplex(margin=("cosine", 0.3)), ValueError, "margin needs normalize=True"),
    (orthoplex(scale=-1.0), ValueError, "scale must be positive and finite, got -1.0"),
    (cube(z=[1.0]), TypeError, "z must be a torch.Tensor, got list"),
    (cube(target=T + 12), ValueError, "target out of range: row 1 has slot 16, expected 0 to 15 or ignore_index -100"),
    (cube(codes=CODES, target=T + 1), ValueError, "target out of range: row 1 has slot 5, expected 0 to 4"),
    (cube(codes=[0, 1]), TypeError, "codes must be a torch.Tensor, got list"),
    (cube(codes=CODES.int()), TypeError, "codes must be int64, got torch.int32; .*cube_codes makes them"),
    (cube(codes=CODES[:, 0]), ValueError, r"codes must have shape \[C, 1\] for d = 4, C >= 1, got \[5\]"),
    (cube(codes=CODES.expand(5, 2)), ValueError, r"codes must have shape \[C, 1\] for d = 4, C >= 1, got \[5, 2\]"),
    (cube(codes=CODES[:0]), ValueError, r"codes must have shape \[C, 1\] for d = 4, C >= 1, got \[0, 1\]"),
    (cube(codes=CODES + 12), ValueError, r"row 4 of codes has bits beyond d = 4: make the codes with cube_codes"),
    (cube(codes=-CODES), ValueError, r"row 4 of codes has bits beyond d = 4"),
    (cube(codes=CODES.to_sparse()), TypeError, "codes must be dense"),
    (cube(codes=CODES.to("meta")), ValueError, "codes must be on cpu like the features, got meta"),
    (cube(z=torch.zeros(3, 63)), ValueError, "without codes d must be at most 62, .* got 63; pass codes="),
    (cube(weight=torch.ones(5)), ValueError, r"weight must have shape \[16\], one factor per slot, got \[5\]"),
    (
        cube(codes=CODES, weight=torch.ones(5), label_smoothing=0.1),
        ValueError,
        r"weight and label_smoothing exclude each other: smoothing is over all 2\^d vertices",
    ),
    (lambda: SF.cube_logits(Z, CODES.int()), TypeError, "codes must be int64"),
    (lambda: SF.cube_logits(Z, CODES + 12), ValueError, "row 4 of codes has bits beyond d = 4"),
    (lambda: SF.cube_logits(Z, CODES, scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
    (lambda: SF.orthoplex_logits(Z.int()), TypeError, "z must be float32"),
    (lambda: SF.orthoplex_logits(Z, scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
    (lambda: SF.simplex_logits(Z.int()), TypeError, "z must be float32"),
    (
        lambda: SF.simplex_logits(torch.zeros(2, 0)),
        ValueError,
        r"z must have shape \[..., d\] with d >= 1, got \[2, 0\]",
    ),
    (lambda: SF.simplex_logits(Z, scale=-1.0), ValueError, "scale must be positive and finite, got -1.0"),
    (contrast(new=Z.int()), TypeError, "new must be float32"),
    (contrast(old=Z.double()), TypeError, "new and old must have the same dtype, got torch.float32 and torch.float64"),
    (contrast(old=torch.zeros(3, 5)), ValueError, r"new and old must have the same shape, got \[3, 4\] and \[3, 5\]"),
    (contrast(new=Z[0], old=Z[0], target=T[0]), ValueError, r"new must have 2 dimensions, got \[4\]"),
    (contrast(new=Z[None], old=Z[None], target=T[None]), ValueError, r"new must have 2 dimensions, got \[1, 3, 4\]"),
    (contrast(old=Z[0]), ValueError, r"old must have 2 dimensions, got \[4\]"),
    (contrast(new=Z.to_sparse()), TypeError, "new must be dense"),
    (contrast(target=T[:2]), ValueError, r"target must have shape \[3\]"),
    (contrast(target=T.float()), TypeError, "target must be int64"),
    (contrast(mu=0.0), ValueError, "mu must be positive and finite, got 0.0"),
    (contrast(mu=1e39), ValueError, "mu must lie between .* and .*, the range of float32, got 1e\\+39"),
    (contrast(negatives="none"), ValueError, "negatives must be one of 'zero_mask', 'remove', 'infonce', got 'none'"),
    (contrast(anchor="both"), ValueError, "anchor must be one of 'old', 'new', 'symmetric', got 'both'"),
    (contrast(reduction=None), ValueError, "reduction must be one of 'none', 'mean', 'sum', got None"),
    (lambda: SF.hoc_loss(Z, Z, T, lambda_=1.1), ValueError, r"lambda_ must lie in \[0, 1\], got 1.1"),
    (lambda: SF.hoc_loss(Z, Z, T, lambda_=None), TypeError, "lambda_ must be a number, got NoneType"),
    (lambda: SF.hoc_loss(Z[None], Z[None], T[None]), ValueError, r"z must have 2 dimensions, got \[1, 3, 4\]"),
    (lambda: SF.hoc_loss(Z, Z[:2], T), ValueError, r"z and old must have the same shape, got \[3, 4\] and \[2, 4\]"),
    (lambda: SF.hoc_loss(Z, Z.double(), T), TypeError, "z and old must have the same dtype"),
    (topk(k=1.0), TypeError, "k must be an integer, got float"),
    (topk(k=0), ValueError, r"k must lie between 1 and 2\^31 - 1, got 0"),
    (topk(k=2**31), ValueError, r"k must lie between 1 and 2\^31 - 1, got 2147483648"),
    (topk(query=Z[0]), ValueError, r"query must have 2 dimensions, got \[4\]"),
    (
        topk(gallery=torch.zeros(3, 5)),
        ValueError,
        "query and gallery must have the same number of columns, got 4 and 5",
    ),
    (topk(gallery=Z.double()), TypeError, "query and gallery must have the same dtype"),
    (topk(query=Z.long()), TypeError, "query must be float32"),
    (topk(query=NAN), ValueError, "query row 2 holds nan or inf"),
    (topk(gallery=-NAN), ValueError, "gallery row 2 holds nan or inf"),
    (topk(gallery=Z + math.inf), ValueError, "gallery row 0 holds nan or inf"),
    (
        topk(query=torch.full((3, 4), 1e300, dtype=torch.float64), gallery=Z.double()),
        ValueError,
        "query row 0 holds nan or inf",
    ),
]


@needs_library
def test_out_of_memory_has_torchs_message() -> None:
    """The message has no path of torch's headers on the build machine."""
    one = torch.zeros(2**12, 1)
    with pytest.raises(RuntimeError, match=r"allocate|lack of memory") as raised:
        SF.cosine_topk(one, one, 2**30)
    assert "API call" not in str(raised.value)


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message[:50] for _, _, message in CASES])
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
