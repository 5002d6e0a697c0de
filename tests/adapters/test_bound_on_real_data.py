"""Tests the bounds on score changes (docs/design/math.md, "Adapters of frozen encoders") on real texts and images.

The encoders are simple and need no trained weights.
"""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from numpy.typing import NDArray

from simplexfix.adapters import Procrustes, WhitenedProcrustes, fit_chain

sys.path.insert(0, str(ROOT / "examples"))
from frozen_encoders import Encoded, Items, moves, split

CLASSES, UNSEEN = 12, 5


@pytest.fixture(scope="module", params=["texts", "images"])
def items(request, data_folder) -> Items:
    """Returns three encoders per data set; the first gives the leading 32 dimensions of the second."""
    labels, encoded = {"texts": _texts, "images": _images}[request.param](data_folder)
    asks = np.arange(len(labels)) % 4 == 0
    sides = [Encoded(*(torch.from_numpy(x[at].astype(np.float32)) for at in (~asks, asks))) for x in encoded]
    return Items(sides, torch.from_numpy(labels[~asks]), torch.from_numpy(labels[asks]))


def _texts(folder) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    file = folder / "banking77" / "banking_train.csv"
    if not file.is_file():
        pytest.skip(f"no Banking77 in {folder}")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = sorted({row["category"] for row in rows})[:CLASSES]
    rows = [row for row in rows if row["category"] in names]
    texts = [row["text"] for row in rows]
    words, letters = (
        TfidfVectorizer(**options).fit_transform(texts)
        for options in ({"sublinear_tf": True}, {"analyzer": "char_wb", "ngram_range": (2, 4), "min_df": 3})
    )
    wide = TruncatedSVD(96, random_state=0).fit_transform(words)
    labels = np.array([names.index(row["category"]) for row in rows])
    return labels, [wide[:, :32], wide, TruncatedSVD(128, random_state=0).fit_transform(letters)]


def _images(folder) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Returns principal components of pixels, and histograms of gradient directions on a grid of 4 x 4 cells."""
    image = pytest.importorskip("PIL.Image", reason="pip install 'simplexfix[cli]'")
    sheets = sorted((folder / "cifar" / "cifar100_train").glob("*.webp"))[:CLASSES]
    if len(sheets) < CLASSES:
        pytest.skip(f"fewer than {CLASSES} image sheets in {folder}/cifar/cifar100_train")
    tiles = []
    for sheet in sheets:
        pixels = np.asarray(image.open(sheet).convert("RGB"), dtype=np.float64) / 255
        rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
        tiles.append(pixels.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)[:100])
    labels, pixels = np.repeat(np.arange(CLASSES), 100), np.concatenate(tiles)
    flat = pixels.reshape(len(pixels), -1)
    parts = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    wide = parts.U[:, :96] * parts.S[:96]
    grey = pixels.mean(-1)
    down, across = np.gradient(grey, axis=(1, 2))
    direction = ((np.arctan2(down, across) / np.pi + 1) * 4).astype(int) % 8
    size = np.hypot(down, across)
    cells = [np.where(direction == b, size, 0).reshape(-1, 4, 8, 4, 8).sum((2, 4)).reshape(-1, 16) for b in range(8)]
    return labels, [wide[:, :32], wide, np.concatenate(cells, axis=1)]


@pytest.mark.parametrize("method", [WhitenedProcrustes(0.6), Procrustes()], ids=lambda method: method.name)
def test_a_score_changes_by_at_most_the_distance_its_query_moved(items: Items, method) -> None:
    seen, unseen = split(items.gallery_labels, UNSEEN, 0)
    chain = fit_chain(method, **items.fitted(seen, 100, 0))
    for row in moves(chain, items, unseen, pairs=20_000):
        print(method.name, {name: np.round(value, 3) for name, value in row.items()})
        assert 0.1 < row["largest move"] <= 1 + 1e-9
        # `d times distance` is the tighter bound: it covers every pair that `2 d` covers, and these keep their order
        assert row["order sure by 2 d"] <= row["order sure by d times distance"] < row["order stays"] <= 1
        if row["new"] == 1:  # between similar encoders the bound guarantees some orders
            assert row["order sure by d times distance"] > 0.005
