"""Tests each adapter method against a naive implementation in NumPy, SciPy or scikit-learn, on small matrices.

Here `y` are features by the old encoder and `x` features of the same items by the new one: a map takes x to y.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from torch.nn.functional import normalize

from simplexfix import functional
from simplexfix.adapters import (
    MLP,
    AdapterMethod,
    GalleryCorrection,
    HOCRefined,
    LambdaOrthogonal,
    LocalCorrection,
    LowRank,
    Procrustes,
    Ridge,
    SimplexJunction,
    Slerp,
    WhitenedProcrustes,
    _paired,
    _training,
    fit_chain,
    local_correction,
    maps,
)
from simplexfix.adapters._moments import Moments
from simplexfix.polytopes import simplex_prototypes

ITEMS, CLASSES = 240, 12
WIDTHS = [(10, 10), (14, 9), (9, 14)]  # feature widths of the old and the new encoder
METHODS = [
    Procrustes(),
    Ridge(),
    Ridge(penalty=0.3, anchor="procrustes"),
    LowRank(rank=4),
    MLP(hidden=16, steps=5, batch=32),
    LambdaOrthogonal(steps=5, batch=32),
    WhitenedProcrustes(),
    SimplexJunction(),
    HOCRefined(steps=5, batch=32),
    LocalCorrection(WhitenedProcrustes(), rows=100),
    GalleryCorrection(WhitenedProcrustes(), rows=100),
    Slerp(WhitenedProcrustes(), 0.5),
]


def method_name(method: AdapterMethod) -> str:
    return method.name


LENGTHS = (1e-30, 1e-15, 1e15, 1e30)  # of rows; the squares of the first and the last leave float32's range


def paired_features(
    old: int = 10, new: int = 10, items: int = ITEMS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns features of the same items by two encoders, [items, old] and [items, new], and the items' classes.

    The variance of the noise differs between the dimensions, and the mean is not 0.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, items)
    latent = rng.standard_normal((CLASSES, 8))[labels] + 0.5 * rng.standard_normal((items, 8))
    features = []
    for width in (old, new):
        noise = 0.2 * rng.standard_normal((items, width)) * np.linspace(0.2, 3, width)
        features.append(np.tanh(latent @ rng.standard_normal((8, width))) + noise + 0.3)
    return features[0].astype(np.float32), features[1].astype(np.float32), labels


def unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def centred(x: np.ndarray) -> np.ndarray:
    return unit(x) - unit(x).mean(0)


def polar(cross: np.ndarray) -> np.ndarray:
    """Returns the orthogonal factor of the polar decomposition."""
    u, _, vt = np.linalg.svd(cross, full_matrices=False)
    return u @ vt


def whitening(x: np.ndarray, labels: np.ndarray | None, g: float) -> np.ndarray:
    rows = centred(x)
    if labels is not None:
        rows = np.stack([row - rows[labels == c].mean(0) for row, c in zip(rows, labels, strict=True)])
    s = rows.T @ rows / len(rows)
    s = (1 - g) * s + g * np.trace(s) / len(s) * np.eye(len(s))
    return np.linalg.inv(scipy.linalg.sqrtm(s).real)


def assert_close(got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(("old", "new"), WIDTHS)
def test_procrustes_is_the_nearest_map_of_orthonormal_rows_or_columns(old, new) -> None:
    y, x, _ = paired_features(old, new)
    adapter = Procrustes().fit(y, x)
    if old == new:
        q, _ = scipy.linalg.orthogonal_procrustes(centred(x), centred(y))
    else:
        q = polar(centred(x).T @ centred(y))
    assert_close(adapter(torch.from_numpy(x)), unit(centred(x) @ q + unit(y).mean(0)))
    assert not adapter.maps_gallery
    stored = torch.from_numpy(y)
    assert adapter.gallery(stored) is stored


@pytest.mark.parametrize(("old", "new"), WIDTHS)
def test_ridge_is_that_of_scikit_learn(old, new) -> None:
    y, x, _ = paired_features(old, new)
    adapter = Ridge(penalty=0.3).fit(y, x)
    r = 0.3 * np.trace(centred(x).T @ centred(x)) / new
    peer = SklearnRidge(alpha=r).fit(unit(x), unit(y))
    assert_close(adapter(torch.from_numpy(x)), unit(peer.predict(unit(x))))


def test_anchored_ridge_is_ridge_on_the_residuals_of_procrustes() -> None:
    y, x, _ = paired_features(9, 14)
    adapter = Ridge(penalty=0.3, anchor="procrustes").fit(y, x)
    q = polar(centred(x).T @ centred(y))
    r = 0.3 * np.trace(centred(x).T @ centred(x)) / 14
    peer = SklearnRidge(alpha=r, fit_intercept=False).fit(centred(x), centred(y) - centred(x) @ q)
    assert_close(adapter(torch.from_numpy(x)), unit(centred(x) @ (q + peer.coef_.T) + unit(y).mean(0)))


def test_low_rank_is_the_best_map_of_at_most_its_rank() -> None:
    y, x, _ = paired_features(9, 14)
    adapter = LowRank(rank=3, penalty=0.2).fit(y, x)
    a, b = centred(x), centred(y)
    r = 0.2 * np.trace(a.T @ a) / 14
    # Ridge is least squares with sqrt(r) * I as further rows; then project on leading singular vectors of the fit.
    rows, targets = np.vstack([a, np.sqrt(r) * np.eye(14)]), np.vstack([b, np.zeros((14, 9))])
    w = np.linalg.lstsq(rows, targets, rcond=None)[0]
    _, _, vt = np.linalg.svd(rows @ w, full_matrices=False)
    assert_close(adapter(torch.from_numpy(x)), unit(a @ w @ vt[:3].T @ vt[:3] + unit(y).mean(0)))
    full = LowRank(rank=99, penalty=0.2).fit(y, x)
    torch.testing.assert_close(full(torch.from_numpy(x)), Ridge(penalty=0.2).fit(y, x)(torch.from_numpy(x)))


@pytest.mark.parametrize(("old", "new"), WIDTHS)
@pytest.mark.parametrize("labelled", [True, False])
def test_whitened_procrustes(old, new, labelled) -> None:
    y, x, classes = paired_features(old, new)
    labels = classes if labelled else None
    adapter = WhitenedProcrustes(g=0.2).fit(y, x, labels=labels)
    a, b = (unit(centred(side) @ whitening(side, labels, 0.2)) for side in (x, y))
    assert_close(adapter(torch.from_numpy(x)), unit(a @ polar(a.T @ b)))
    assert_close(adapter.gallery(torch.from_numpy(y)), b)
    assert adapter.maps_gallery


def test_simplex_junction() -> None:
    y, x, labels = paired_features(9, 11)  # at most the 11 dimensions of 12 vertices, or the map would not be unique
    rng = np.random.default_rng(5)
    more = rng.standard_normal((50, 9)).astype(np.float32), rng.standard_normal((50, 11)).astype(np.float32)
    adapter = SimplexJunction(g=0.2, lam=0.4).fit(y, x, labels=labels, sample=more)
    vertices = simplex_prototypes(12, torch.from_numpy(labels)).double().numpy()
    rows = np.vstack([y, more[0]]), np.vstack([x, more[1]])
    embedded = []
    for side, all_rows in zip((y, x), rows, strict=True):
        w = whitening(side, labels, 0.2)
        a = unit((unit(all_rows) - unit(all_rows).mean(0)) @ w)
        if not embedded:
            embedded.append(a @ polar(a[:ITEMS].T @ vertices))
        else:
            target = 0.6 * embedded[0]
            target[:ITEMS] += 0.4 * vertices
            embedded.append(a @ polar(a.T @ target))
    assert_close(adapter.gallery(torch.from_numpy(y)), embedded[0][:ITEMS])
    assert_close(adapter(torch.from_numpy(x)), embedded[1][:ITEMS])
    assert adapter.embedding_dim == 11


def test_a_third_version_is_rotated_to_the_mean_of_the_older_embeddings() -> None:
    y, x, labels = paired_features(9, 11)
    z = paired_features(9, 10, seed=2)[1]
    chain = fit_chain(SimplexJunction(g=0.2, lam=0.4), (y, x, z), labels=labels)
    older = sum(chain.gallery(i, torch.from_numpy(rows)).double().numpy() for i, rows in enumerate((y, x)))
    a = unit(centred(z) @ whitening(z, labels, 0.2))
    vertices = simplex_prototypes(12, torch.from_numpy(labels)).double().numpy()
    target = 0.4 * vertices + 0.6 * unit(older)
    assert_close(chain.gallery(2, torch.from_numpy(z)), a @ polar(a.T @ target))


def test_moments_of_several_shrinkages_equal_those_of_each() -> None:
    y, x, labels = paired_features(9, 14)
    features = _paired.PairedFeatures.read((y, x), labels, names=("old", "new"))
    together = Moments(features, (0.1, 0.6))
    for g in (0.1, 0.6, 0.3):
        one = Moments(features)
        a, b = (unit(centred(side) @ whitening(side, labels, g)) for side in (x, y))
        for moments in (together, one):
            np.testing.assert_allclose(moments.whitened(1, 0, g), a.T @ b, atol=1e-9)
            for version, rows in enumerate((b, a)):
                sums, norm = moments.whitened_classes(version, g)
                np.testing.assert_allclose(sums, [rows[labels == c].sum(0) for c in range(CLASSES)], atol=1e-9)
                side = (y, x)[version]
                lengths = np.linalg.norm(centred(side) @ whitening(side, labels, g), axis=1)
                assert norm == pytest.approx(lengths.mean())


@pytest.mark.parametrize("method", [MLP(16, steps=5), LambdaOrthogonal(steps=5), HOCRefined(steps=5)], ids=method_name)
def test_training_is_the_same_with_cached_rows_and_rows_read_per_batch(method, monkeypatch) -> None:
    y, x, labels = paired_features(9, 14)
    more = paired_features(9, 14, items=30, seed=1)[:2]
    cached = method.fit(y, x, labels=labels, sample=more)(torch.from_numpy(x))
    monkeypatch.setattr(_training, "CACHE_BYTES", 0)
    torch.testing.assert_close(method.fit(y, x, labels=labels, sample=more)(torch.from_numpy(x)), cached)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_the_gradient_of_lambda_orthogonals_penalty(shape) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    method = LambdaOrthogonal(lambda_=8.0, alpha=0.2)
    distance = (w.T @ w if shape[0] > shape[1] else w @ w.T).sub(torch.eye(9)).norm()
    expected = torch.sigmoid(0.2 * (distance - 8)) * distance
    torch.testing.assert_close(method.penalty(w), expected)
    (got,), (truth,) = (torch.autograd.grad(value, w) for value in (method.penalty(w), expected))
    torch.testing.assert_close(got, truth)


def test_hoc_refined_starts_from_the_junction_and_lowers_its_loss() -> None:
    y, x, labels = paired_features()
    junction = SimplexJunction().fit(y, x, labels=labels)
    start = HOCRefined(steps=0).fit(y, x, labels=labels)
    torch.testing.assert_close(start(torch.from_numpy(x)), junction(torch.from_numpy(x)))
    refined = HOCRefined(steps=40, batch=128, learning_rate=3e-3).fit(y, x, labels=labels)

    def loss(adapter) -> float:
        z, y = adapter(torch.from_numpy(x)), torch.from_numpy(labels)
        return float(functional.simplex_cross_entropy(z, y, normalize=True, scale=32.0))

    assert loss(refined) < 0.8 * loss(junction)


def test_mlp_and_lambda_orthogonal_fit_the_old_features_better_than_procrustes() -> None:
    y, x, _ = paired_features()

    def agreement(method: AdapterMethod) -> float:
        rows = method.fit(y, x)(torch.from_numpy(x))
        return float((rows * normalize(torch.from_numpy(y))).sum(1).mean())

    base = agreement(Procrustes())
    assert agreement(MLP(hidden=32, steps=100, batch=128, learning_rate=3e-3)) > base + 0.005
    assert agreement(LambdaOrthogonal(steps=100, batch=128, learning_rate=3e-3)) > base + 0.005


def test_lambda_orthogonal_penalizes_the_distance_from_orthogonal_maps() -> None:
    y, x, _ = paired_features()
    weak, strong = (
        LambdaOrthogonal(lambda_=lambda_, alpha=10, steps=60, batch=64, learning_rate=3e-3).fit(y, x)
        for lambda_ in (12.0, 0.1)
    )
    distances = [float((a.query_map.weight.T @ a.query_map.weight - torch.eye(10)).norm()) for a in (weak, strong)]
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize(("method", "old", "new"), [
    (WhitenedProcrustes(), 10, 10), (WhitenedProcrustes(), 14, 9),
    (SimplexJunction(), 9, 14), (SimplexJunction(), 14, 9),
])  # fmt: skip
def test_search_within_a_version_equals_that_of_its_whitened_features(method, old, new) -> None:
    y, x, labels = paired_features(old, new)
    adapter = method.fit(y, x, labels=labels)
    whitened = unit(centred(x) @ whitening(x, labels, method.g))
    queries, gallery = slice(0, 40), slice(40, None)
    adapted = adapter(torch.from_numpy(x)).double().numpy()
    expected = np.argsort(-whitened[queries] @ whitened[gallery].T, axis=1, kind="stable")
    found = np.argsort(-adapted[queries] @ adapted[gallery].T, axis=1, kind="stable")
    np.testing.assert_array_equal(found, expected)


def test_procrustes_recovers_a_permutation_of_centred_features() -> None:
    x = np.random.default_rng(0).standard_normal((100, 8))
    x = np.vstack([x, -x]).astype(np.float32)  # mean 0
    adapter = Procrustes().fit(x[:, ::-1].copy(), x)
    torch.testing.assert_close(adapter(torch.from_numpy(x)), normalize(torch.from_numpy(x[:, ::-1].copy())))


@pytest.mark.parametrize("method", METHODS, ids=method_name)
@pytest.mark.parametrize(("old", "new"), WIDTHS[1:])
def test_widths_blocks_and_mapped_files(method, old, new, tmp_path, monkeypatch) -> None:
    y, x, labels = paired_features(old, new)
    more = paired_features(old, new, items=30, seed=1)[:2]
    in_memory = method.fit(y, x, labels=labels, sample=more)
    assert (in_memory.old_features, in_memory.in_features) == (old, new)
    monkeypatch.setattr(_paired, "BLOCK_BYTES", 8 * 14 * 7)  # 7 rows
    mapped = []
    for at, rows in enumerate((y, x)):
        np.save(tmp_path / f"{at}.npy", rows)
        mapped.append(np.load(tmp_path / f"{at}.npy", mmap_mode="r"))
    in_blocks = method.fit(*mapped, labels=[f"class {c}" for c in labels], sample=more)
    queries = (torch.from_numpy(x), torch.from_numpy(y)) if isinstance(method, Slerp) else (torch.from_numpy(x),)
    scores = [adapter(*queries) @ adapter.gallery(torch.from_numpy(y)).T for adapter in (in_memory, in_blocks)]
    # With fewer classes than dimensions the junction is arbitrary outside the span of the classes' vertices, and
    # training starts from it.
    if not isinstance(method, HOCRefined):
        torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=2e-5)
    assert in_memory(*queries).shape == (ITEMS, in_memory.embedding_dim)
    torch.testing.assert_close(in_memory(*queries).norm(dim=1), torch.ones(ITEMS))


@pytest.mark.parametrize("method", METHODS, ids=method_name)
def test_equal_fits_are_equal_to_the_bit(method) -> None:
    y, x, labels = paired_features()
    state = torch.random.get_rng_state()
    first, second = (method.fit(y, x, labels=labels).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("method", [Procrustes(), WhitenedProcrustes(), SimplexJunction()], ids=method_name)
def test_alpha_0_is_the_old_system_and_1_the_adapted_one(method) -> None:
    y, x, labels = paired_features(9, 14)
    old, new = torch.from_numpy(y), torch.from_numpy(x)
    plain = method.fit(y, x, labels=labels)
    before = Slerp(method, 0.0).fit(y, x, labels=labels)
    assert torch.equal(before(new, old), maps.unit(plain.gallery(old), torch.float32))
    assert torch.equal(Slerp(method, 1.0).fit(y, x, labels=labels)(new, old), plain(new))


def test_slerp_divides_the_angle() -> None:
    method = Slerp(Procrustes(), 0.25)
    y, x, _ = paired_features()
    old, new = torch.from_numpy(y), torch.from_numpy(x)
    u, v = normalize(old).double(), Procrustes().fit(y, x)(new).double()
    q = method.fit(y, x)(new, old).double()
    angle = torch.acos((u * v).sum(1))
    torch.testing.assert_close(torch.acos((u * q).sum(1)), 0.25 * angle, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.acos((q * v).sum(1)), 0.75 * angle, rtol=0, atol=1e-4)


def test_slerp_of_parallel_and_opposite_rows_is_finite() -> None:
    from simplexfix.adapters._arc import slerp

    u = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1e-6, 1.0]])
    assert slerp(u, v, 0.3).isfinite().all()
    torch.testing.assert_close(slerp(u, v, 0.3)[0], u[0])


@pytest.mark.parametrize("of", [WhitenedProcrustes(), Procrustes()], ids=method_name)
@pytest.mark.parametrize("block", [7, 1024])
def test_local_correction(of, block, monkeypatch) -> None:
    monkeypatch.setattr(maps, "_ROWS", block)
    monkeypatch.setattr(local_correction, "_ROWS", block)
    y, x, labels = paired_features(9, 14)
    plain = of.fit(y[:200], x[:200], labels=labels[:200])
    p, stored = (np.float64(rows) for rows in (plain(torch.from_numpy(x)), plain.gallery(torch.from_numpy(y))))
    errors = unit(stored[:200]) - p[:200]
    weights = np.exp(10 * p @ p[:200].T)
    expected = unit(p + 0.6 * weights @ errors / weights.sum(1, keepdims=True))
    adapter = LocalCorrection(of, scale=10.0, beta=0.6).fit(y[:200], x[:200], labels=labels[:200])
    assert_close(adapter(torch.from_numpy(x)), expected)
    assert torch.equal(adapter.gallery(torch.from_numpy(y)), plain.gallery(torch.from_numpy(y)))


@pytest.mark.parametrize("of", [WhitenedProcrustes(), Procrustes()], ids=method_name)
@pytest.mark.parametrize("block", [7, 1024])
def test_gallery_correction(of, block, monkeypatch) -> None:
    monkeypatch.setattr(maps, "_ROWS", block)
    monkeypatch.setattr(local_correction, "_ROWS", block)
    y, x, labels = paired_features(9, 14)
    plain = of.fit(y[:200], x[:200], labels=labels[:200])
    p, stored = (np.float64(rows) for rows in (plain(torch.from_numpy(x)), plain.gallery(torch.from_numpy(y))))
    stored = unit(stored)
    weights = np.exp(10 * stored @ stored[:200].T)
    expected = unit(stored + 0.6 * weights @ (p - stored)[:200] / weights.sum(1, keepdims=True))
    adapter = GalleryCorrection(of, scale=10.0, beta=0.6).fit(y[:200], x[:200], labels=labels[:200])
    assert_close(adapter.gallery(torch.from_numpy(y)), expected)
    assert torch.equal(adapter(torch.from_numpy(x)), plain(torch.from_numpy(x)))


CORRECTIONS = [LocalCorrection, GalleryCorrection]


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_nothing_is_corrected_where_the_map_makes_no_error_or_beta_is_0(kind) -> None:
    y, _, _ = paired_features()
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((10, 10)))[0]
    rotated = (y @ rotation).astype(np.float32)
    exact = kind(Procrustes(), beta=1.0).fit(y, rotated)
    assert_close(exact(torch.from_numpy(rotated)), unit(y))
    assert_close(exact.gallery(torch.from_numpy(y)), unit(y) if exact.maps_gallery else y)
    y, x, labels = paired_features(9, 14)
    query, stored = torch.from_numpy(x), torch.from_numpy(y)
    zero, plain = (m.fit(y, x, labels=labels) for m in (kind(WhitenedProcrustes(), beta=0.0), WhitenedProcrustes()))
    torch.testing.assert_close(zero(query), plain(query))
    torch.testing.assert_close(zero.gallery(stored), plain.gallery(stored))


def test_corrections_keep_the_rows_that_their_seed_draws() -> None:
    y, x, _ = paired_features()
    drawn = [LocalCorrection(Procrustes(), rows=30, seed=seed).fit(y, x).query_map.keys for seed in (0, 0, 1)]
    assert len(drawn[0]) == 30
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    all_keys = 40 * Procrustes().fit(y, x)(torch.from_numpy(x))  # keys are multiplied by the default scale, 40
    nearest = (drawn[0][:, None] - all_keys).norm(dim=2).min(1)
    assert (nearest.values < 1e-4).all()
    assert len(nearest.indices.unique()) == 30
    stored = GalleryCorrection(Procrustes(), rows=30, scale=1.0).fit(y, x).gallery_map.keys
    assert_close(stored, unit(y[nearest.indices.numpy()]))


@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize("of", [LowRank(), Slerp(Procrustes()), LocalCorrection(Procrustes())], ids=method_name)
def test_corrections_need_an_affine_map(kind, of) -> None:
    with pytest.raises(TypeError, match=f"affine query map .*, got {type(of).__name__}"):
        kind(of)


def test_shrinkage_1_does_not_whiten() -> None:
    y, x, labels = paired_features()
    a, b = (unit(centred(side)) for side in (x, y))
    adapter = WhitenedProcrustes(g=1.0).fit(y, x, labels=labels)
    assert_close(adapter(torch.from_numpy(x)), unit(a @ polar(a.T @ b)))


Y, X, LABELS = paired_features(items=20)
WITH_NAN = np.where(np.arange(20)[:, None] == 3, np.nan, X)
V, T = ValueError, TypeError
BAD_INPUT = [
    (Procrustes(), (Y, X[:9]), {}, V, "for each of the same items, in the same order, got 20 and 9"),
    (Procrustes(), (Y[:1], X[:1]), {}, V, "old has 1 rows: adapters are fitted on at least 2 items"),
    (Procrustes(), (Y, X.astype(int)), {}, T, "new must be float32"),
    (Procrustes(), (Y, X[0]), {}, V, r"new must have 2 dimensions"),
    (Procrustes(), (Y, WITH_NAN), {}, V, "new row 3 holds nan or inf"),
    (WhitenedProcrustes(), (Y, X), {"labels": LABELS[:5]}, V, "labels must have 20 entries, .* got 5"),
    (WhitenedProcrustes(), (Y, X), {"labels": LABELS + 0.5}, T, "labels must be integers"),
    (SimplexJunction(), (Y, X), {}, V, "simplex_junction needs labels, .*: pass labels, or use Whitened"),
    (HOCRefined(), (Y, X), {}, V, "hoc_refined needs labels"),
    (Slerp(SimplexJunction()), (Y, X), {}, V, "simplex_junction needs labels"),
    (LocalCorrection(SimplexJunction()), (Y, X), {}, V, "simplex_junction needs labels"),
    (GalleryCorrection(SimplexJunction()), (Y, X), {}, V, "simplex_junction needs labels"),
    (SimplexJunction(slots=10), (Y, X), {"labels": LABELS}, V, "slots must be at least 1[12], .* got 10"),
    (Procrustes(), (Y, X), {"sample": (Y,)}, V, "sample must hold rows by each of 2 encoders, .* got 1"),
    (Procrustes(), (Y, X), {"sample": (Y, X[:, :4])}, V, "new's sample has 4 columns, new has 10"),
    (Procrustes(), (Y, X), {"sample": (Y, X[:4])}, V, "old's sample and new's sample must have a row"),
    (WhitenedProcrustes(g=0.0), (Y[:5], X[:5]), {}, V, "is singular; whiten with shrinkage > 0, got 0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "rows", "options", "kind", "message"), BAD_INPUT)
def test_bad_input(method, rows, options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        method.fit(*rows, **options)


BAD_OPTIONS = [
    (Ridge, {"penalty": 0.0}, "penalty must be positive"),
    (Ridge, {"anchor": "identity"}, "anchor must be one of 'zero', 'procrustes', got 'identity'"),
    (LowRank, {"rank": 0}, "rank must be at least 1, got 0"),
    (WhitenedProcrustes, {"g": 1.5}, r"g must lie in \[0, 1\], got 1.5"),
    (SimplexJunction, {"lam": -0.1}, r"lam must lie in \[0, 1\]"),
    (SimplexJunction, {"slots": 1}, "slots must be at least 2, got 1"),
    (HOCRefined, {"steps": -1}, "steps must be 0 or more, got -1"),
    (MLP, {"hidden": 0}, "hidden must be at least 1, got 0"),
    (LambdaOrthogonal, {"lambda_": 0}, "lambda_ must be positive"),
    (LocalCorrection, {"of": Procrustes(), "scale": 0.0}, "scale must be positive"),
    (GalleryCorrection, {"of": Procrustes(), "beta": 2.0}, r"beta must lie in \[0, 1\], got 2.0"),
    (GalleryCorrection, {"of": Procrustes(), "rows": 0}, "rows must be at least 1, got 0"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD_OPTIONS)
def test_bad_options(kind, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_bad_queries() -> None:
    plain = Procrustes().fit(*paired_features(9, 14)[:2])
    slerp = Slerp(Procrustes()).fit(*paired_features(9, 14)[:2])
    x, y = torch.zeros(2, 14), torch.zeros(2, 9)
    for call, message in (
        (lambda: plain(y), "features must have 14 columns, the width that the adapter was fitted on"),
        (lambda: plain(x[0]), "features must have 2 dimensions"),
        (lambda: plain.gallery(x), "stored must have 9 columns"),
        (lambda: plain(x, y), "old must be None"),
        (lambda: slerp(x), "old must be the old encoder's features of the same queries: alpha is 0.5"),
        (lambda: slerp(x, x), "old must have 9 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("method", METHODS, ids=method_name)
def test_lengths_of_rows_change_nothing(method: AdapterMethod) -> None:
    old, new, labels = paired_features()
    expected = method.fit(old, new, labels=labels)
    needs_old = expected.alpha is not None  # a slerp needs features of the query by both encoders
    given = [torch.from_numpy(rows) for rows in (new, old)]
    lengths = torch.tensor(LENGTHS)[torch.arange(ITEMS) % len(LENGTHS), None]
    scaled = [rows * lengths for rows in given]
    # Fit scaled rows: float32 rounds them differently, which also changes Adam's steps.
    adapter = method.fit(*(rows.numpy() for rows in reversed(scaled)), labels=labels)
    tolerance = {"rtol": 0, "atol": 1e-3 if "steps" in method.described() else 1e-4}
    query = expected(given[0], given[1] if needs_old else None)
    torch.testing.assert_close(adapter(given[0], given[1] if needs_old else None), query, **tolerance)
    # Apply the adapter to scaled rows.
    torch.testing.assert_close(expected(scaled[0], scaled[1] if needs_old else None), query, rtol=0, atol=1e-5)
    if expected.maps_gallery:
        torch.testing.assert_close(expected.gallery(scaled[1]), expected.gallery(given[1]), rtol=0, atol=1e-5)
    zero = torch.zeros(1, new.shape[1]), torch.zeros(1, old.shape[1])
    assert expected(zero[0], zero[1] if needs_old else None).isfinite().all()


def test_a_chain_searches_galleries_of_any_length() -> None:
    old, new, _ = paired_features()
    chain = fit_chain(Procrustes(), [old, new])
    rows = torch.from_numpy(old)
    for length in LENGTHS:
        torch.testing.assert_close(chain.gallery(0, rows * length), normalize(rows), rtol=0, atol=1e-6)
