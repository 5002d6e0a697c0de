"""Tests that `compare_pairs` agrees with the verification functions, also on a sample of queries and items."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import versions as loose

from simplexfix import compatibility
from simplexfix.compatibility import pairs, upgrade_threshold
from simplexfix.retrieval import VerificationResults
from simplexfix.retrieval.verification import equal_error_rate, roc_curve, score_histogram, tar_at_far

QUERIES, ITEMS, WIDTH = 150, 120, 12


def compare_pairs(old, new, labels, gallery, item_labels, **options):
    """`simplexfix.compatibility.compare_pairs` of separate arrays."""
    given = loose.upgrade(old, old if new is None else new, labels, gallery, item_labels)
    return compatibility.compare_pairs(*given[: 1 if new is None else 2], **options)


def compare(*arguments) -> VerificationResults:
    return VerificationResults.compare(loose.pair(*arguments))


def upgrade(width: int = WIDTH) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns old queries, new ones of this width (with more noise), labels, and the old gallery with its labels."""
    rng = np.random.default_rng(2)
    labels = rng.integers(5, size=QUERIES + ITEMS)
    rows = rng.normal(size=(QUERIES + ITEMS, WIDTH)) + 2 * np.eye(WIDTH)[labels]
    new = np.zeros((QUERIES, width))
    common = min(width, WIDTH)
    new[:, :common] = rows[:QUERIES, :common]
    new += rng.normal(size=new.shape)
    old, new, gallery = (x.astype(np.float32) for x in (rows[:QUERIES], new, rows[QUERIES:]))
    return old, new, labels[:QUERIES], gallery, labels[QUERIES:]


def test_numbers_are_those_of_the_verification_functions() -> None:
    old, new, labels, gallery, item_labels = upgrade()
    found = compare_pairs(old, new, labels, gallery, item_labels, confidence=0.9, generator=np.random.default_rng(4))
    assert (found.queries, found.gallery) == (QUERIES, ITEMS)
    for version, query in ((found.before, old), (found.after, new)):
        results = compare(query, labels, gallery, item_labels)
        np.testing.assert_array_equal(version.results.genuine, results.genuine)
        np.testing.assert_array_equal(version.results.impostor, results.impostor)
        assert version.equal_error == equal_error_rate(results)
        assert version.area == roc_curve(results).area
        assert version.fars == (0.1, 0.01, 0.001)  # 1e-4 of 14,000 impostor pairs is one pair; a rate needs ten
        assert version.points == tuple(tar_at_far(results, far) for far in version.fars)
        for far, tar in zip(version.curve_far, version.curve_tar, strict=True):
            assert tar == tar_at_far(results, min(1.0, far * (1 + 1e-12))).tar
        assert version.as_dict()["histogram"]["genuine"] == score_histogram(results, 100).genuine.tolist()
    move = upgrade_threshold(
        *loose.upgrade(old, new, labels, gallery, item_labels),
        far=1e-3,
        confidence=0.9,
        generator=np.random.default_rng(4),
    )
    assert found.threshold == move
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert list(content) == ["queries", "gallery", "before", "after", "threshold"]
    assert list(content["before"]) == [
        "genuine", "impostor", "area", "equal_error_rate", "tar_at_far", "roc", "histogram",
    ]  # fmt: skip
    assert content["threshold"] == json.loads(json.dumps(move.as_dict()))


@pytest.mark.parametrize("width", [8, 20])
def test_different_widths_use_the_shared_leading_dimensions(width: int) -> None:
    old, new, labels, gallery, item_labels = upgrade(width)
    found = compare_pairs(old, new, labels, gallery, item_labels)
    common = min(width, WIDTH)
    results = compare(new[:, :common], labels, gallery[:, :common], item_labels)
    np.testing.assert_array_equal(found.after.results.genuine, results.genuine)
    whole = compare(old, labels, gallery, item_labels)
    np.testing.assert_array_equal(found.before.results.impostor, whole.impostor)
    assert found.threshold.unmoved == results.at(found.threshold.before.threshold)


def test_many_items_are_drawn_by_the_generator(monkeypatch) -> None:
    monkeypatch.setattr(pairs, "QUERIES", 60)
    monkeypatch.setattr(pairs, "ITEMS", 50)
    old, new, labels, gallery, item_labels = upgrade()
    found = compare_pairs(old, new, labels, gallery, item_labels, generator=np.random.default_rng(1))
    assert (found.queries, found.gallery) == (60, 50)
    rng = np.random.default_rng(1)
    at, items = (np.sort(rng.choice(count, most, replace=False)) for count, most in ((QUERIES, 60), (ITEMS, 50)))
    expected = compare(new[at], labels[at], gallery[items], item_labels[items])
    np.testing.assert_array_equal(found.after.results.genuine, expected.genuine)
    tensors = (torch.from_numpy(x) for x in (old, new, gallery))
    first, second, third = tensors
    again = compare_pairs(first, second, labels, third, item_labels, generator=np.random.default_rng(1))
    assert again.as_dict() == found.as_dict()


def test_too_few_pairs_give_none() -> None:
    old, new, labels, gallery, item_labels = upgrade()
    assert compare_pairs(old, new, labels * 0, gallery, item_labels * 0) is None
    assert compare_pairs(old, new, labels, gallery, item_labels + 100) is None
    few = compare_pairs(old[:20], new[:20], labels[:20], gallery[:20], item_labels[:20])
    assert few.before.fars == (0.1,)  # about 300 impostor pairs
    assert few.threshold is None
    assert compare_pairs(old, None, labels, gallery, item_labels).after is None


def test_bad_input() -> None:
    old, new, labels, gallery, item_labels = upgrade()
    with pytest.raises(ValueError, match="query has 150 rows, query_labels has shape"):
        compare_pairs(old, new, labels[:-1], gallery, item_labels)
    with pytest.raises(TypeError, match="gallery_labels must be integers"):
        compare_pairs(old, new, labels, gallery, item_labels.astype(float))
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        compare_pairs(old, new, labels, gallery, item_labels, confidence=2.0)
