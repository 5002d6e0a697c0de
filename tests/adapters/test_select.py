"""Tests selection on held-out classes and items, and chains of versions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_adapter_methods import METHODS, method_name, paired_features
from torch.nn.functional import normalize

from simplexfix.adapters import (
    MLP,
    GalleryCorrection,
    HOCRefined,
    LambdaOrthogonal,
    LocalCorrection,
    Procrustes,
    Ridge,
    SimplexJunction,
    Slerp,
    WhitenedProcrustes,
    fit_chain,
    select,
    select_adapter,
    select_chain,
)
from simplexfix.adapters.local_correction import AFFINE
from simplexfix.adapters.select import (
    ALPHAS,
    BETAS,
    FITTED,
    GALLERY_BETAS,
    HELD_OUT,
    SHRINKAGE,
    PairedFeatures,
    _splits,
)
from simplexfix.labelled import LabelledItems
from simplexfix.retrieval import nearest_class_mean

LOCAL = LocalCorrection(WhitenedProcrustes())
CORRECTED = GalleryCorrection(WhitenedProcrustes())
QUICK = (Procrustes(), WhitenedProcrustes(0.1), WhitenedProcrustes(0.6))


def paired(labels: np.ndarray | None, items: int = 240) -> PairedFeatures:
    y, x, _ = paired_features(items=items)
    return PairedFeatures.read((y, x), labels, names=("old", "new"))


@pytest.mark.parametrize("seen_fraction", [0, 0.5])
def test_a_third_of_the_classes_is_held_out_and_half_of_their_items_are_queries(seen_fraction) -> None:
    _, _, labels = paired_features()
    splits = list(_splits(paired(labels), 3, 0, seen_fraction))
    held = [set(labels[np.concatenate(s.kinds[HELD_OUT])]) for s in splits]
    assert [len(classes) for classes in held] == [4, 4, 4]
    assert set.union(*held) == set(labels)
    for split, classes in zip(splits, held, strict=True):
        (asking, searched), (asking_of_fitted, _) = split.kinds
        assert not classes & set(labels[split.fitted])
        assert sorted(np.concatenate([split.fitted, asking, searched, asking_of_fitted])) == list(range(240))
        for c in classes:
            assert 0 <= (labels[searched] == c).sum() - (labels[asking] == c).sum() <= 1


def test_a_quarter_of_the_items_of_fitted_classes_are_queries_and_half_is_searched() -> None:
    _, _, labels = paired_features()
    splits = list(_splits(paired(labels), 3, 0, 0.5))
    for split in splits:
        asking, searched = split.kinds[FITTED]
        assert set(searched) <= set(split.fitted)
        for c in set(labels[split.fitted]):
            size = (labels == c).sum()
            assert abs((labels[asking] == c).sum() - size / 4) < 1
            assert abs((labels[searched] == c).sum() - size / 2) < 1
    asked = np.concatenate([split.kinds[FITTED][0] for split in splits])
    assert len(np.unique(asked)) == len(asked)  # no item is a query of two folds
    assert not len(next(_splits(paired(labels), 1, 0, 0.0)).kinds[FITTED][0])


def test_without_labels_a_third_of_the_items_is_held_out() -> None:
    (split,) = _splits(paired(None), 1, 0, 0.5)
    ((asking, searched),) = split.kinds
    assert (len(split.fitted), len(asking), len(searched)) == (160, 40, 40)
    assert sorted(np.concatenate([split.fitted, asking, searched])) == list(range(240))


def test_scores_equal_the_definition() -> None:
    y, x, labels = paired_features(9, 14)
    found = select_adapter(y, x, labels, candidates=[WhitenedProcrustes(0.3)], seen_fraction=0)
    (split,) = _splits(PairedFeatures.read((y, x), labels, names=("old", "new")), 1, 0, 0)
    adapter = WhitenedProcrustes(0.3).fit(y[split.fitted], x[split.fitted], labels=labels[split.fitted])
    asking, searched = split.kinds[HELD_OUT]
    items = LabelledItems(labels[asking], labels[searched])
    old, new = ([torch.from_numpy(side[at]) for at in (asking, searched)] for side in (y, x))
    own = adapter.gallery(old[0]), adapter.gallery(old[1])
    cross = nearest_class_mean.score(items.version(adapter(new[0]), own[1]))
    (row,) = found.table
    assert row.matrix[1, 0] == cross
    assert row.matrix[0, 0] == nearest_class_mean.score(items.version(*own))
    assert np.isnan(row.matrix[0, 1])
    alone = nearest_class_mean.score(items.version(*map(normalize, old)))
    assert row.score == pytest.approx(np.nanmean(row.matrix[np.tril_indices(2)]))
    assert (found.old, row.gain) == (pytest.approx(alone), pytest.approx(cross - alone))
    assert row.interval.low <= row.score <= row.interval.high
    assert row.gain_interval.low <= row.gain <= row.gain_interval.high
    assert 0 <= row.losses <= 1
    assert row.kept == pytest.approx(cross / nearest_class_mean.score(items.version(*map(normalize, new))))
    # the returned adapter is fitted on all items
    whole = WhitenedProcrustes(0.3).fit(y, x, labels=labels)
    assert torch.equal(found.adapter(new[0]), whole(new[0]))
    json.dumps(row.as_dict(), allow_nan=False)


@pytest.mark.parametrize("fraction", [0.25, 1])
def test_the_score_weighs_held_out_classes_and_held_out_items_of_fitted_ones(fraction) -> None:
    y, x, labels = paired_features(14, 9)
    found = select_adapter(y, x, labels, candidates=[WhitenedProcrustes(0.3)], seen_fraction=fraction, folds=2)
    matrices, alone = np.zeros((2, 2, 2)), np.zeros(2)
    splits = list(_splits(PairedFeatures.read((y, x), labels, names=("old", "new")), 2, 0, fraction))
    for kind in (HELD_OUT, FITTED):
        hits = []
        for split in splits:
            adapter = WhitenedProcrustes(0.3).fit(y[split.fitted], x[split.fitted], labels=labels[split.fitted])
            asking, searched = split.kinds[kind]
            items = LabelledItems(labels[asking], labels[searched])
            old, new = ([torch.from_numpy(side[at]) for at in (asking, searched)] for side in (y, x))
            own = [adapter.gallery(rows) for rows in old]
            pairs = own, (adapter(new[0]), own[1]), (adapter(new[0]), adapter.query_map(new[1]))
            hits.append([nearest_class_mean.hits(items.version(*pair)) for pair in (*pairs, map(normalize, old))])
        means = [np.concatenate(cell).mean() for cell in zip(*hits, strict=True)]
        matrices[kind] = [[means[0], np.nan], means[1:3]]
        alone[kind] = means[3]
    (row,) = found.table
    expected = (1 - fraction) * matrices[HELD_OUT] + fraction * matrices[FITTED]
    np.testing.assert_allclose(row.matrix, expected, rtol=1e-12)
    assert row.score == pytest.approx(np.nanmean(expected))
    assert found.old == pytest.approx((1 - fraction) * alone[HELD_OUT] + fraction * alone[FITTED])
    assert row.gain == pytest.approx(expected[1, 0] - found.old)
    assert row.interval.low <= row.score <= row.interval.high
    assert row.gain_interval.low <= row.gain <= row.gain_interval.high


def test_slerp_is_tried_from_the_two_best_of_given_candidates() -> None:
    y, x, labels = paired_features()
    given = [*QUICK, Slerp(Procrustes(), 0.5)]
    found = select_adapter(y, x, labels, candidates=given, query_encoders="both")
    assert len(found.table) == len(given) + 2 * len(ALPHAS)
    assert not any(isinstance(row.method.of, Slerp) for row in found.table if isinstance(row.method, Slerp))


def test_candidates_with_the_same_stored_vectors_have_the_scores_of_their_adapters() -> None:
    y, x, labels = paired_features(9, 14)
    of = [CORRECTED, CORRECTED.of, Procrustes()]
    found = select_adapter(
        y, x, labels, candidates=[*of, LOCAL, *(Slerp(m, a) for m in (LOCAL, *of) for a in (0.3, 0.7))]
    )
    (split,) = _splits(PairedFeatures.read((y, x), labels, names=("old", "new")), 1, 0, 0)
    asking, searched = split.kinds[HELD_OUT]
    items = LabelledItems(labels[asking], labels[searched])
    for row in found.table:
        adapter = row.method.fit(y[split.fitted], x[split.fitted], labels=labels[split.fitted])
        query, old = (torch.from_numpy(side[asking]) for side in (x, y))
        gallery = normalize(adapter.gallery(torch.from_numpy(y[searched])))
        asked = adapter(query) if adapter.alpha is None else adapter(query, old)
        assert row.matrix[1, 0] == nearest_class_mean.score(items.version(asked, gallery))
        assert row.matrix[0, 0] == nearest_class_mean.score(items.version(normalize(adapter.gallery(old)), gallery))


def test_without_labels_the_score_is_agreement_with_the_new_encoder() -> None:
    y, _, _ = paired_features()
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((10, 10)))[0]
    same = (y @ turn).astype(np.float32)  # the same encoder in rotated axes
    found = select_adapter(y, same, candidates=QUICK)
    assert found.winner.method == Procrustes()
    assert found.winner.score == pytest.approx(1)
    assert found.old == pytest.approx(1)  # nothing to gain
    assert not found.better
    assert found.winner.agreement_with_old == pytest.approx(1)


def test_better_is_true_only_if_the_new_encoder_finds_more() -> None:
    y, x, labels = paired_features(items=600)
    noise = np.random.default_rng(3).standard_normal(y.shape).astype(np.float32)
    assert select_adapter(y + noise, x, labels, candidates=QUICK, folds=3).better
    assert not select_adapter(y, x + 2 * noise, labels, candidates=QUICK, folds=3).better


def test_the_grid_of_labelled_items(monkeypatch) -> None:
    monkeypatch.setattr(select, "MLP", lambda: MLP(steps=2, batch=32))
    monkeypatch.setattr(select, "LambdaOrthogonal", lambda: LambdaOrthogonal(steps=2, batch=32))
    monkeypatch.setattr(select, "STEPS", (1, 2))
    y, x, labels = paired_features()
    found = select_adapter(y, x, labels, query_encoders="both")
    methods = [row.method for row in found.table]
    assert {m.g for m in methods if isinstance(m, SimplexJunction)} == set(SHRINKAGE)
    assert sorted(m.steps for m in methods if isinstance(m, HOCRefined)) == [1, 2]
    corrected = [m for m in methods if isinstance(m, GalleryCorrection)]
    assert {m.beta for m in corrected} == set(GALLERY_BETAS)
    assert {m.of for m in corrected} == {next(m for m in methods if isinstance(m, AFFINE))}
    assert {m.alpha for m in methods if isinstance(m, Slerp)} == set(ALPHAS)
    scores = [row.score for row in found.table]
    assert scores == sorted(scores, reverse=True)
    again = select_adapter(y, x, labels, query_encoders="both")
    assert [(row.method, row.score, row.interval) for row in again.table] == [
        (row.method, row.score, row.interval) for row in found.table
    ]


def test_sampled_rows_that_are_held_out_queries_are_left_out_of_the_fit() -> None:
    y, x, labels = paired_features()
    rng = np.random.default_rng(7)
    more = rng.standard_normal((2, 40, 10)).astype(np.float32)
    (split,) = _splits(paired(labels), 1, 0, 0.5)
    asking = np.concatenate([at for at, _ in split.kinds])
    leaking = [np.vstack([side[asking], rows]) for side, rows in zip((y, x), more, strict=True)]
    clean, leaked = (
        select_adapter(y, x, labels, sample=s, candidates=QUICK, seen_fraction=0.5)
        for s in (tuple(more), tuple(leaking))
    )
    assert [row.score for row in clean.table] == [row.score for row in leaked.table]


@pytest.mark.parametrize(
    "method",
    [Procrustes(), Ridge(), WhitenedProcrustes(), SimplexJunction(), HOCRefined(steps=3), LOCAL, CORRECTED],
    ids=method_name,
)
def test_a_chain_of_three_has_the_adapters_of_its_pairs(method) -> None:
    y, x, labels = paired_features(9, 14)
    z = paired_features(9, 11)[1]
    chain = fit_chain(method, (y, x, z), labels=labels)
    features = [torch.from_numpy(rows) for rows in (y, x, z)]
    assert set(chain.adapters) == {(1, 0), (2, 0), (2, 1)}
    for (new, old), adapter in chain.adapters.items():
        torch.testing.assert_close(chain.query(new, old, features), adapter(features[new]))
        torch.testing.assert_close(chain.gallery(old, features[old]), normalize(adapter.gallery(features[old])))
    if isinstance(method, (SimplexJunction, HOCRefined)):  # one map per version: one embedding for all galleries
        assert torch.equal(chain.query(2, 0, features), chain.query(2, 1, features))
        assert torch.equal(chain.query(2, 2, features), chain.query(2, 1, features))
    else:
        pair = method.fit(x, z, labels=labels)
        torch.testing.assert_close(chain.query(2, 1, features), pair(features[2]))


def test_local_correction_does_not_change_search_within_a_version() -> None:
    features = [torch.from_numpy(rows) for rows in paired_features(9, 14)[:2]]
    corrected, plain = (fit_chain(method, features) for method in (LOCAL, LOCAL.of))
    for version in (0, 1):
        assert torch.equal(corrected.query(version, version, features), plain.query(version, version, features))
        assert torch.equal(corrected.gallery(version, features[version]), plain.gallery(version, features[version]))
    assert not torch.allclose(corrected.query(1, 0, features), plain.query(1, 0, features), atol=1e-3)


@pytest.mark.parametrize("of", [WhitenedProcrustes(), SimplexJunction()], ids=method_name)
def test_gallery_correction_moves_older_galleries_towards_the_newest_version(of) -> None:
    (y, x, labels), z = paired_features(9, 14), paired_features(9, 11)[1]
    features = [torch.from_numpy(rows) for rows in (y, x, z)]
    chain, plain = (fit_chain(method, (y, x, z), labels=labels) for method in (GalleryCorrection(of), of))
    for new in (1, 2):
        assert torch.equal(chain.query(new, 0, features), plain.query(new, 0, features))
        moved, before = (c.gallery(0, features[0]) for c in (chain, plain))
        assert torch.equal(moved, chain.adapters[new, 0].gallery(features[0]))
    assert (moved * plain.query(2, 0, features)).sum(1).mean() > (before * plain.query(2, 0, features)).sum(1).mean()
    stored = [plain.gallery(0, features[0]), plain.query(2, 0, features)]
    weights = torch.softmax(20 * stored[0] @ stored[0].T, 1)
    torch.testing.assert_close(moved, normalize(stored[0] + 0.5 * weights @ (stored[1] - stored[0])))
    assert torch.equal(chain.gallery(2, features[2]), plain.gallery(2, features[2]))  # not corrected
    assert torch.equal(chain.query(0, 0, features), moved)


@pytest.mark.parametrize("method", METHODS, ids=method_name)
def test_maps_gallery_of_a_method_equals_that_of_its_adapter(method) -> None:
    y, x, labels = paired_features()
    assert method.maps_gallery == method.fit(y, x, labels=labels).maps_gallery


def test_stored_vectors_may_be_kept(monkeypatch) -> None:
    y, x, labels = paired_features()
    monkeypatch.setattr(select, "first_candidates", lambda _: [*QUICK, Ridge(), SimplexJunction()])
    monkeypatch.setattr(select, "STEPS", (1,))
    options = {"query_encoders": "both", "folds": 1}
    kept = select_adapter(y, x, labels, stored_vectors="keep", **options)
    tried = {row.method for row in kept.table if not isinstance(row.method, (Slerp, LocalCorrection))}
    assert tried == {Procrustes(), Ridge()}
    assert {row.method.beta for row in kept.table if isinstance(row.method, LocalCorrection)} == set(BETAS)
    assert not any(row.method.maps_gallery for row in kept.table)
    assert not kept.adapter.maps_gallery
    mapped = select_adapter(y, x, labels, **options)
    assert {"whitened_procrustes", "simplex_junction", "hoc_refined"} <= {row.method.name for row in mapped.table}


def test_a_chain_with_slerp_reads_both_encoders() -> None:
    y, x, _ = paired_features(9, 14)
    features = [torch.from_numpy(rows) for rows in (y, x)]
    chain = fit_chain(Slerp(Procrustes(), 0.5), (y, x))
    torch.testing.assert_close(chain.query(1, 0, features), chain.adapters[1, 0](features[1], features[0]))
    torch.testing.assert_close(chain.query(1, 1, features), normalize(features[1]))


def test_a_chain_is_selected_as_a_pair_is() -> None:
    y, x, labels = paired_features(9, 14)
    z = paired_features(9, 11)[1]
    found = select_chain((y, x, z), labels, candidates=QUICK)
    assert found.winner.matrix.shape == (3, 3)
    assert set(found.chain.adapters) == {(1, 0), (2, 0), (2, 1)}
    pair = select_chain((y, x), labels, candidates=QUICK)
    assert [row.score for row in pair.table] == [
        row.score for row in select_adapter(y, x, labels, candidates=QUICK).table
    ]


Y, X, LABELS = paired_features(items=60)
BAD_INPUT = [
    ({"seen_fraction": 1.5}, r"seen_fraction must lie in \[0, 1\], got 1.5"),
    ({"folds": 4}, r"folds must lie in \[1, 3\], got 4"),
    ({"query_encoders": "old"}, "query_encoders must be one of 'new', 'both', got 'old'"),
    ({"stored_vectors": "all"}, "stored_vectors must be one of 'map', 'keep', got 'all'"),
    ({"stored_vectors": "keep"}, "excludes whitened_procrustes, which maps stored vectors: remove it"),
    ({"protocol": "maps"}, "protocol must be one of"),
    ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
    ({"candidates": []}, "candidates must hold at least one method"),
    ({"labels": np.arange(60) // 12}, "labels have 5 classes of at least 2 items, at least 6 are needed"),
    ({"labels": None, "candidates": [SimplexJunction()]}, "simplex_junction needs labels"),
]


@pytest.mark.parametrize(("options", "message"), BAD_INPUT)
def test_bad_input_of_selection(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        select_adapter(Y, X, **{"labels": LABELS, "candidates": QUICK, **options})


def test_too_few_items_or_versions() -> None:
    with pytest.raises(ValueError, match="11 items are too few to hold out a third"):
        select_adapter(Y[:11], X[:11])
    with pytest.raises(ValueError, match="versions must hold at least two encoders' features, oldest first, got 1"):
        select_chain((Y,))
