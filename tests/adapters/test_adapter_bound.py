"""Tests the bound of docs/design/math.md: an upgrade changes no score by more than the query itself moves."""

from __future__ import annotations

import numpy as np
import torch
from test_adapter_methods import world

from simplexfix.adapters import SimplexJunction, WhitenedProcrustes, fit_chain


def test_a_junction_leaves_the_search_of_a_version_as_it_is() -> None:
    old, new, labels = world()
    whitened = fit_chain(WhitenedProcrustes(0.3), [old, new], labels=labels)
    common = fit_chain(SimplexJunction(0.3), [old, new], labels=labels)
    for version, rows in enumerate((old, new)):
        a, b = (chain.gallery(version, torch.from_numpy(rows)).double() for chain in (whitened, common))
        torch.testing.assert_close(b @ b.T, a @ a.T, rtol=0, atol=1e-5)


def test_no_score_moves_by_more_than_its_query() -> None:
    old, new, labels = world()
    fitted = np.arange(len(old)) % 2 == 0
    chain = fit_chain(SimplexJunction(0.3), [old[fitted], new[fitted]], labels=labels[fitted])
    gallery = chain.gallery(0, torch.from_numpy(old[fitted])).double()
    before = chain.gallery(0, torch.from_numpy(old[~fitted])).double()
    after = chain.query(1, 0, [torch.empty(0), torch.from_numpy(new[~fitted])]).double()
    d = (after - before).norm(dim=1)
    scores, moved = before @ gallery.T, after @ gallery.T
    ratio = (moved - scores).abs() / d[:, None]
    assert ratio.max() <= 1 + 1e-5
    assert ratio.max() > 0.3  # the bound has the magnitude of the moves
    margin = scores[:, :, None] - scores[:, None, :]
    kept = moved[:, :, None] - moved[:, None, :] > 0
    sure, all_pairs = margin > 2 * d[:, None, None], margin > 0
    assert kept[sure].all()
    assert not kept[all_pairs].all()
    print(
        f"order is sure of {sure.sum() / all_pairs.sum():.1%} of pairs, kept of {kept[all_pairs].double().mean():.1%}"
    )
    assert sure.any()
