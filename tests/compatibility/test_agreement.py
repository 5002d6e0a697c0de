"""Tests the gate without labels: the fraction of a re-extracted ranking that new queries find in the old gallery."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from simplexfix.compatibility import GateResult, Rule, bootstrap_interval, topk_agreement, upgrade_gate
from simplexfix.gallery import Gallery
from simplexfix.labelled import LabelledItems, VersionFeatures
from simplexfix.models import ModelIdentity

QUERIES, GALLERY, WIDTH = 90, 60, 8
ITEMS = LabelledItems.without_labels(QUERIES, GALLERY)
HIDDEN = np.random.default_rng(0).normal(size=(QUERIES + GALLERY, WIDTH))


def version(noise: float, *, seed: int = 1, items: LabelledItems = ITEMS, **options) -> VersionFeatures:
    """Returns the features of an encoder that adds its own noise to the items' hidden features."""
    rows = HIDDEN + noise * np.random.default_rng(seed).normal(size=HIDDEN.shape)
    return items.version(rows[:QUERIES].astype(np.float32), rows[QUERIES:].astype(np.float32), **options)


OLD, NEW = version(1.0), version(0.1, seed=2)


def naive(found: VersionFeatures, reference: VersionFeatures, k: int) -> np.ndarray:
    tops = []
    for searched in (found, reference):
        query, gallery = (normalize(torch.from_numpy(part.gather(np.arange(len(part)))).double()) for part in (
            searched.query, searched.gallery
        ))  # fmt: skip
        scores = query @ gallery.T
        for row, itself in enumerate(searched.items.excluded):
            if itself >= 0:
                scores[row, itself] = -2
        tops.append([set(row) for row in scores.topk(k).indices.tolist()])
    return np.array([len(a & b) / k for a, b in zip(*tops, strict=True)])


def test_agreement_is_the_overlap_of_two_rankings() -> None:
    found = OLD.searched_by(NEW)
    for k in (1, 10, GALLERY - 1):
        np.testing.assert_allclose(topk_agreement(found, NEW, k=k), naive(found, NEW, k))
    ids = np.arange(QUERIES)
    known = LabelledItems.without_labels(QUERIES, GALLERY, query_ids=ids, gallery_ids=ids[:GALLERY] + 40)
    assert (known.excluded >= 0).any()
    assert (known.excluded < 0).any()
    old, new = (version(noise, seed=seed, items=known) for noise, seed in ((1.0, 1), (0.1, 2)))
    np.testing.assert_allclose(topk_agreement(old.searched_by(new), new, k=5), naive(old.searched_by(new), new, 5))


def test_the_gate_compares_new_queries_with_old_ones_by_agreement() -> None:
    rules = [Rule("ecc", confidence=0.95), Rule("min_recall", 0.4, confidence=0.95), Rule("max_nfr", 0.9)]
    result = upgrade_gate(OLD, NEW, rules, protocol="agreement@10")
    before, after = naive(OLD, NEW, 10), naive(OLD.searched_by(NEW), NEW, 10)
    assert result.passed
    assert result.scores == {"old_on_old": pytest.approx(before.mean()), "new_on_old": pytest.approx(after.mean())}
    gain, recall, flips = result.outcomes
    assert gain.value == pytest.approx(after.mean() - before.mean())
    assert gain.p_value is not None
    assert flips.value == (after < before).mean()
    seed = int(np.random.default_rng(0).integers(2**63))  # the seed of each outcome's bootstrap
    expected = bootstrap_interval(after, confidence=0.95, generator=np.random.default_rng(seed))
    assert (recall.low, recall.high) == expected
    assert recall.low < recall.value < recall.high
    assert (result.protocol, result.absent, result.unjudged) == ("agreement@10", 0, None)


def test_a_rotated_space_fails_without_an_adapter() -> None:
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    apart = ITEMS.version(
        *(part.gather(np.arange(len(part))) @ turn for part in (NEW.query, NEW.gallery))
    )  # ranks its own gallery as NEW does
    result = upgrade_gate(OLD, apart, protocol="agreement@10")
    assert not result.passed
    assert result.scores["new_on_old"] < 0.3 < result.scores["old_on_old"]
    back = ITEMS.version(NEW.query.rows, OLD.gallery.rows, fingerprint="of the adapter")
    mended = upgrade_gate(OLD, replace(apart, fingerprint="new"), protocol="agreement@10", adapted=back)
    assert mended.passed
    assert mended.scores == pytest.approx(upgrade_gate(OLD, NEW, protocol="agreement@10").scores)
    assert mended.fingerprints == (None, "of the adapter")


def test_an_adapter_is_judged_by_labels_too() -> None:
    labels = np.arange(QUERIES) % 3, np.arange(GALLERY) % 3
    items = LabelledItems(*labels)
    right = np.eye(3, dtype=np.float32)
    old = items.version(np.roll(right, 1, axis=1)[labels[0]], right[labels[1]])
    new = items.version(np.tile([1, 0], (QUERIES, 1)).astype(np.float32), np.ones((GALLERY, 2), dtype=np.float32))
    adapted = items.version(right[labels[0]][:, :2] + 1, right[labels[1]][:, :2] + 1)
    result = upgrade_gate(old, new, adapted=adapted)
    assert result.scores == {"old_on_old": 0.0, "new_on_old": 1.0}


def test_agreement_ignores_labels() -> None:
    plain = upgrade_gate(OLD, NEW, protocol="agreement@3").as_dict()
    labelled = LabelledItems(np.arange(QUERIES) % 2, np.zeros(GALLERY, dtype=np.int64))
    old, new = (version(noise, seed=seed, items=labelled) for noise, seed in ((1.0, 1), (0.1, 2)))
    assert upgrade_gate(old, new, protocol="agreement@3").as_dict() == plain
    mixed = upgrade_gate(OLD, new, [Rule("ecc")], protocol="agreement@3")
    assert mixed.scores == plain["scores"]


def test_groups_are_judged_separately() -> None:
    groups = np.where(np.arange(QUERIES) < 30, "a", "b")
    items = LabelledItems.without_labels(QUERIES, GALLERY, query_groups=groups)
    old, new = (version(noise, seed=seed, items=items) for noise, seed in ((1.0, 1), (0.1, 2)))
    result = upgrade_gate(old, new, [Rule("min_recall", 0.1, group="*")], protocol="agreement@5")
    after = naive(OLD.searched_by(NEW), NEW, 5)
    assert [outcome.value for outcome in result.outcomes] == pytest.approx([after[:30].mean(), after[30:].mean()])


def test_a_gallery_admits_by_agreement(tmp_path) -> None:
    served = ModelIdentity.external("vendor/embed", "1", WIDTH)
    adapter = ModelIdentity.external("vendor/embed", "2", WIDTH, version=1, adapter="a map", space=served)
    old, new = (replace(v, fingerprint=m.fingerprint) for v, m in ((OLD, served), (NEW, adapter)))
    result = upgrade_gate(old, new, protocol="agreement@10")
    saved = json.loads(json.dumps(result.as_dict()))
    assert GateResult.from_dict(saved) == result
    gallery = Gallery.create(str(tmp_path / "shop"), model=served)
    gallery.admit(adapter, GateResult.from_dict(saved))
    assert gallery.model == adapter
    assert gallery.history()[-1]["gate"]["protocol"] == "agreement@10"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"protocol": "agreement@0"}, ValueError, "agreement@0 needs k of at least 1"),
        ({"protocol": "agreement@60"}, ValueError, "more than k gallery items beside the query, got 60"),
        ({"protocol": "agreement"}, ValueError, "protocol must be one of"),
        ({"rules": [Rule("max_tax", 0.1)]}, ValueError, "only: remove the rule of kind 'max_tax'"),
        ({"rules": [Rule("min_recall", 0.1, gallery="new")]}, ValueError, "'min_recall' for the new gallery"),
        ({"rules": [Rule("ecc", group="*")]}, ValueError, "needs query_groups: items have no classes"),
        ({"protocol": "instance"}, ValueError, "have no labels: pass labels"),
        ({"new": LabelledItems.without_labels(1, 2).version(np.ones((1, 8)), np.ones((2, 8)))}, ValueError,
         "old and new must be of the same items, got 90 and 1 queries"),
        ({"adapted": NEW.query}, TypeError, "adapted must be a VersionFeatures"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message) -> None:
    with pytest.raises(error, match=message):
        upgrade_gate(**{"old": OLD, "new": NEW, "protocol": "agreement@10", **change})


def test_bad_items() -> None:
    for call, error, message in (
        (lambda: topk_agreement(OLD, NEW, k=GALLERY), ValueError, "agreement@60 needs"),
        (lambda: topk_agreement(OLD, NEW.query), TypeError, "reference must be a VersionFeatures"),
        (lambda: LabelledItems.without_labels(0, 3), ValueError, "num_queries must be at least 1, got 0"),
        (lambda: LabelledItems.without_labels(2, 3, query_ids=[1, 2]), ValueError, "query_ids without gallery_ids"),
        (lambda: ITEMS.version(np.ones((3, 2)), np.ones((60, 2))), ValueError, "3 rows, there are 90 such items"),
        (lambda: ITEMS.ignoring([1]), ValueError, "these items have none"),
        (lambda: ITEMS.query_labels, ValueError, "these items have no labels"),
    ):
        with pytest.raises(error, match=message):
            call()
