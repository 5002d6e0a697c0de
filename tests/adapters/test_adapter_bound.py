"""Tests the bound of docs/design/math.md: |new score - old score| <= |new query - old query|."""

from __future__ import annotations

import numpy as np
import torch
from test_adapter_methods import paired_features

from simplexfix.adapters import SimplexJunction, WhitenedProcrustes, fit_chain


def test_a_junction_keeps_the_scores_within_each_version() -> None:
    old, new, labels = paired_features()
    whitened = fit_chain(WhitenedProcrustes(0.3), [old, new], labels=labels)
    junction = fit_chain(SimplexJunction(0.3), [old, new], labels=labels)
    for version, rows in enumerate((old, new)):
        without, with_junction = (
            chain.gallery(version, torch.from_numpy(rows)).double() for chain in (whitened, junction)
        )
        torch.testing.assert_close(with_junction @ with_junction.T, without @ without.T, rtol=0, atol=1e-5)


def test_a_score_changes_by_at_most_the_distance_its_query_moved() -> None:
    old, new, labels = paired_features()
    fitted = np.arange(len(old)) % 2 == 0
    chain = fit_chain(SimplexJunction(0.3), [old[fitted], new[fitted]], labels=labels[fitted])
    gallery = chain.gallery(0, torch.from_numpy(old[fitted])).double()
    before = chain.gallery(0, torch.from_numpy(old[~fitted])).double()
    after = chain.query(1, 0, [torch.empty(0), torch.from_numpy(new[~fitted])]).double()
    distance = (after - before).norm(dim=1)
    old_scores, new_scores = before @ gallery.T, after @ gallery.T
    ratio = (new_scores - old_scores).abs() / distance[:, None]
    assert ratio.max() <= 1 + 1e-5
    assert ratio.max() > 0.3  # the bound is not much larger than the largest change
    # So the order of two gallery items cannot change if their scores differ by more than twice the distance.
    difference = old_scores[:, :, None] - old_scores[:, None, :]
    same_order = new_scores[:, :, None] - new_scores[:, None, :] > 0
    guaranteed, all_pairs = difference > 2 * distance[:, None, None], difference > 0
    assert same_order[guaranteed].all()
    assert not same_order[all_pairs].all()
    print(
        f"the bound guarantees the order of {guaranteed.sum() / all_pairs.sum():.1%} of pairs, "
        f"{same_order[all_pairs].double().mean():.1%} keep it"
    )
    assert guaranteed.any()
