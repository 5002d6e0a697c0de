"""Tests the compatibility matrix: each cell equals its protocol's score, also on difficult features; and bad input."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from versions import pair, versions

from simplexfix import compatibility
from simplexfix._reference import unit_float32
from simplexfix.labelled import FeatureRows
from simplexfix.retrieval import (
    PROTOCOLS,
    Protocol,
    RetrievalResults,
    class_means,
    instance,
    metrics,
    nearest_class_mean,
    nearest_items,
)

both = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)


def compatibility_matrix(queries, galleries, query_labels, gallery_labels, protocol, **options) -> np.ndarray:
    of = versions(queries, galleries, query_labels, gallery_labels)
    return compatibility.compatibility_matrix(of, protocol, **options)


def compatibility_hits(queries, galleries, query_labels, gallery_labels, protocol, **options) -> list[list[np.ndarray]]:
    of = versions(queries, galleries, query_labels, gallery_labels)
    return compatibility.compatibility_hits(of, protocol, **options)


KINDS = ("clear", "noise", "near ties", "one-hot", "zeros", "collapsed", "sizes", "denormals", "signs")


def rows_of(kind: str, labels: np.ndarray, d: int, rng: np.random.Generator) -> np.ndarray:
    """Returns features, among them some for which a float32 product gives wrong results."""
    classes, index = np.unique(labels, return_inverse=True)
    x = rng.standard_normal((len(labels), d))
    centers = np.random.default_rng(99).standard_normal((len(classes), d))
    if kind == "clear":
        x += 0.3 * centers[index]
    elif kind == "near ties":  # all class means are within 1e-7 of each other
        x = centers[0] + 1e-7 * x
    elif kind == "one-hot":
        x = np.eye(d)[rng.integers(d, size=len(labels))]
    elif kind == "zeros":
        x = x * (rng.random(len(labels)) < 0.5)[:, None] + centers[index]
        x[::3] = 0
    elif kind == "collapsed":
        x = centers[index]
    elif kind == "sizes":  # up to 1e38: sums of squares, and products with templates, overflow float32
        x = (x + centers[index]) * 10.0 ** rng.uniform(-38, 37, size=(len(labels), 1))
    elif kind == "denormals":
        x = (x + centers[index]) * 1e-42
    elif kind == "signs":
        x = np.sign(x)
    return x.astype(np.float32)


def versions_of(kind: str, versions: int, d: int = 24, classes: int = 6, queries: int = 90, items: int = 60):
    rng = np.random.default_rng(sum(map(ord, kind)))
    labels = rng.integers(classes, size=queries + items) * 2**33 - 7
    labels[:3] = 2**24 + 1, 2**24, -(2**62)  # not in the gallery; float32 merges the first two
    both = [rows_of(kind, labels, d, rng) for _ in range(versions)]
    return [x[:queries] for x in both], [x[queries:] for x in both], labels[:queries], labels[queries:]


def by_cells(queries, galleries, query_labels, gallery_labels, function) -> list[list[np.ndarray]]:
    """Calls the protocol's function for each cell."""
    q, g = ([torch.tensor(np.asarray(x)) for x in features] for features in (queries, galleries))
    labels = torch.from_numpy(query_labels), torch.from_numpy(gallery_labels)
    out = []
    for i in range(len(q)):
        out.append([])
        for j in range(i + 1):
            d = min(q[i].shape[1], g[j].shape[1])
            out[i].append(np.asarray(function(pair(q[i][:, :d], labels[0], g[j][:, :d], labels[1]))))
    return out


def check(found: list[list[np.ndarray]], expected: list[list[np.ndarray]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected] == list(range(1, len(found) + 1))
    for i, row in enumerate(expected):
        for j, cell in enumerate(row):
            np.testing.assert_array_equal(found[i][j], cell, err_msg=f"cell {i}, {j}")


@both
@pytest.mark.parametrize("kind", KINDS)
def test_each_cell_is_the_score_of_the_protocol(protocol, kind: str) -> None:
    arguments = versions_of(kind, 4)
    expected = by_cells(*arguments, protocol.hits)
    hits = compatibility_hits(*arguments, protocol)
    check(hits, expected)
    matrix = compatibility_matrix(*arguments, protocol)
    check([list(row[: i + 1]) for i, row in enumerate(matrix)], [[cell.mean() for cell in row] for row in expected])
    check([list(row[: i + 1]) for i, row in enumerate(matrix)], by_cells(*arguments, protocol.score))
    assert np.isnan(matrix[np.triu_indices(4, 1)]).all()
    assert matrix.dtype == np.float64


@both
@pytest.mark.parametrize("classes", [1, 2, 40])
def test_blocks_and_groups_change_nothing(protocol, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = versions_of("clear", 5, classes=classes)
    expected = compatibility_matrix(*arguments, protocol)
    for module in (class_means, nearest_items):
        monkeypatch.setattr(module, "_QUERY_ROWS", 7)
    monkeypatch.setattr("simplexfix.labelled._rows._BLOCK_BYTES", 4 * 24 * 11)
    for columns, taken in ((1, 1), (2 * classes, 3 * 60 * (5 * 24 + 12) - 1)):  # groups of one version; of two
        monkeypatch.setattr(class_means, "_PRODUCT_COLUMNS", columns)
        monkeypatch.setattr(nearest_items, "_INDEX_BYTES", taken)
        np.testing.assert_array_equal(compatibility_matrix(*arguments, protocol), expected)
    assert len(np.unique(expected[np.tril_indices(5)])) >= (1 if classes == 1 else 4)


@pytest.mark.parametrize("kind", ["clear", "noise"])
def test_few_queries_are_left_to_the_search(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = versions_of(kind, 3, d=512, queries=4000, items=300)
    left = {"_decide": 0, "cosine_topk": 0}
    functions = {name: getattr(class_means, name) for name in left}

    def counting(name: str):
        def call(rows, *others):
            left[name] += len(rows)
            return functions[name](rows, *others)

        return call

    for name in left:
        monkeypatch.setattr(class_means, name, counting(name))
    compatibility_matrix(*arguments, nearest_class_mean)
    cells = 4000 * 6
    assert (kind == "noise") <= left["_decide"] < 0.01 * cells
    assert left["cosine_topk"] < 0.0001 * cells


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 24, 1500])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sure_decisions_agree_with_the_definition(kind: str, d: int, dtype: type) -> None:
    """The definition decides by float32 scores; the templates are off by one or two ulp."""
    rng = np.random.default_rng(d)
    own = np.arange(300) % 5
    block = rows_of(kind, own, d, rng)
    sums = torch.from_numpy(rows_of("near ties" if kind == "near ties" else "noise", np.arange(5), d, rng))
    exact = unit_float32(sums)
    off = exact * (1 + 2**-23 * torch.from_numpy(rng.integers(-1, 2, size=exact.shape)).float())
    templates = off.numpy()[:, None].astype(dtype)
    gaps, sure = (x[0] for x in class_means._gaps(block.astype(dtype), templates, own))
    scores = (unit_float32(torch.from_numpy(block)).double() @ exact.double().T).float().numpy()
    right = scores[np.arange(300), own]
    scores[np.arange(300), own] = -np.inf
    difference = right - scores.max(1)
    assert (np.sign(gaps) == np.sign(difference))[sure].all()
    if kind in ("clear", "noise") and d > 1:
        assert sure.mean() > 0.95
    if kind == "collapsed" and d > 1:
        assert sure.all()


@both
def test_each_row_is_read_once(protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, galleries, *labels = versions_of("noise", 6)
    read: dict[str, int] = {}
    block = FeatureRows.block

    def counting(self: FeatureRows, begin: int, end: int) -> np.ndarray:
        read[self.name] = read.get(self.name, 0) + end - begin
        return block(self, begin, end)

    monkeypatch.setattr(FeatureRows, "block", counting)
    compatibility_matrix(queries, galleries, *labels, protocol)
    assert read == {f"v{i}.{name}": n for name, n in (("query", 90), ("gallery", 60)) for i in range(6)}


@both
def test_mapped_files(protocol, tmp_path: Path) -> None:
    queries, galleries, *labels = versions_of("clear", 3)
    mapped = []
    for name, features in (("q", queries), ("g", galleries)):
        for i, rows in enumerate(features):
            np.save(tmp_path / f"{name}{i}.npy", rows)
        mapped.append([np.load(tmp_path / f"{name}{i}.npy", mmap_mode="r") for i in range(3)])
    expected = compatibility_matrix(queries, galleries, *labels, protocol)
    np.testing.assert_array_equal(compatibility_matrix(*mapped, *labels, protocol), expected)
    sliced = [x[::2] for x in mapped[0]]
    np.testing.assert_array_equal(
        compatibility_matrix(sliced, mapped[1], labels[0][::2], labels[1], protocol),
        compatibility_matrix([x[::2] for x in queries], galleries, labels[0][::2], labels[1], protocol),
    )


def resident(path: Path) -> int:
    """Returns the KiB of a file that are resident in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="no /proc/self/smaps")
def test_mapped_pages_are_released_and_private_changes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.ones((4000, 64), dtype=np.float32))
    labels = np.arange(4000)
    rows = np.load(path, mmap_mode="r")
    rows.sum()
    assert resident(path) > 900
    compatibility_matrix([rows], [rows], labels, labels, nearest_class_mean)
    assert resident(path) < 100
    ids = {"query_ids": labels, "gallery_ids": labels}
    for protocol in PROTOCOLS:  # excluded rows are read by their indices in the gallery's own map
        other = np.load(path, mmap_mode="r")
        compatibility.compatibility_matrix(versions([rows] * 2, [other] * 2, labels, labels, **ids), protocol)
        assert resident(path) < 100
    changed = np.load(path, mmap_mode="c")
    changed[:] = -1
    compatibility_matrix([changed], [changed], labels, labels, nearest_class_mean)
    assert (changed == -1).all()


@both
def test_dtypes_may_be_mixed(protocol) -> None:
    queries, galleries, query_labels, gallery_labels = versions_of("clear", 4)
    half_q, half_g = ([x.astype(np.float16).astype(np.float32) for x in f] for f in (queries, galleries))
    expected = compatibility_matrix(half_q, half_g, query_labels, gallery_labels, protocol)
    mixed = [half_q[0].astype(np.float16), torch.from_numpy(half_q[1]), half_q[2].astype(">f8"), half_q[3]]
    other = [torch.from_numpy(half_g[0]).half(), np.asfortranarray(half_g[1]), half_g[2].astype(np.float64), half_g[3]]
    for gallery_ids in (gallery_labels, torch.from_numpy(gallery_labels), gallery_labels.tolist()):
        np.testing.assert_array_equal(compatibility_matrix(mixed, other, query_labels, gallery_ids, protocol), expected)
    small = query_labels % 5
    np.testing.assert_array_equal(
        compatibility_matrix(
            queries, galleries, small.astype(np.uint8), torch.from_numpy(gallery_labels % 5), protocol
        ),
        compatibility_matrix(queries, galleries, small, gallery_labels % 5, protocol),
    )


@both
def test_versions_of_different_width(protocol) -> None:
    queries, galleries, *labels = versions_of("clear", 5)
    widths = (24, 10, 17, 17, 3)
    queries = [x[:, :d] for x, d in zip(queries, widths, strict=True)]
    galleries = [x[:, :d] for x, d in zip(galleries, widths, strict=True)]
    with pytest.raises(ValueError, match=r'v1.query has 10 columns, v0.gallery has 24.*widths="leading"'):
        compatibility_matrix(queries, galleries, *labels, protocol)
    hits = compatibility_hits(queries, galleries, *labels, protocol, widths="leading")
    check(hits, by_cells(queries, galleries, *labels, protocol.hits))
    matrix = compatibility_matrix(queries, galleries, *labels, protocol, widths="leading")
    asked = compatibility_matrix(queries, galleries, *labels, Protocol("own", score=protocol.score), widths="leading")
    np.testing.assert_array_equal(matrix, asked)


def test_one_version_and_one_row() -> None:
    one = np.ones((1, 4), dtype=np.float32)
    for protocol in PROTOCOLS:
        assert compatibility_matrix([one], [one], [3], [3], protocol).tolist() == [[1.0]]
        assert compatibility_matrix([one], [one], [3], [2**40], protocol).tolist() == [[0.0]]


def test_a_protocol_of_ones_own() -> None:
    queries, galleries, *labels = versions_of("clear", 3)

    def mean_average_precision(version) -> float:
        return float(metrics.mean_average_precision(RetrievalResults.search(version)))

    own = Protocol("mean_ap", score=mean_average_precision)
    matrix = compatibility_matrix(queries, galleries, *labels, own)
    for i in range(3):
        for j in range(i + 1):
            assert matrix[i, j] == mean_average_precision(pair(queries[i], labels[0], galleries[j], labels[1]))
    assert matrix[0, 0] != matrix[1, 0] != matrix[1, 1]
    with pytest.raises(ValueError, match="protocol 'mean_ap' must have the function hits; pass Protocol"):
        compatibility_hits(queries, galleries, *labels, own)
    hits = Protocol("own hits", hits=instance.hits)
    check(compatibility_hits(queries, galleries, *labels, hits), by_cells(queries, galleries, *labels, instance.hits))
    with pytest.raises(TypeError, match=r"protocol must be a name, 'nearest_class_mean' or 'instance', or"):
        compatibility_matrix(queries, galleries, *labels, mean_average_precision)
    with pytest.raises(ValueError, match="protocol must be one of 'nearest_class_mean', 'instance', or a metric"):
        compatibility_matrix(queries, galleries, *labels, "nearest")
    with pytest.raises(TypeError, match="a Protocol needs score or hits"):
        Protocol("none")


def bad_cases() -> Iterator[tuple[dict, type[Exception], str]]:
    x = np.eye(4, dtype=np.float32)
    nan = x.copy()
    nan[2, 1] = np.nan
    inf = torch.eye(4)
    inf[3, 3] = -np.inf
    yield {"widths": "common"}, ValueError, "widths must be .*equal.*leading.* got 'common'"
    yield {"queries": [], "galleries": []}, ValueError, "versions must hold at least one version"
    yield {"queries": [x, nan]}, ValueError, r"v1.query row 2 holds nan or inf"
    yield {"galleries": [x, nan]}, ValueError, r"v1.gallery row 2 holds nan or inf"
    yield {"galleries": [inf, x]}, ValueError, r"v0.gallery row 3 holds nan or inf"
    yield {"queries": [x, x[:3]]}, ValueError, r"query has 3 rows, query_labels has shape \[4\]"
    yield {"galleries": [x, x[:3]]}, ValueError, r"gallery has 3 rows, gallery_labels has shape \[4\]"
    yield (
        {"galleries": [x, x[:, :3]]},
        ValueError,
        r"v1.query has 4 columns, v1.gallery has 3: features of different width",
    )
    yield {"queries": [x, x.astype(int)]}, TypeError, r"query must be float32, float64 or float16, got int64"
    yield {"queries": [x, x.tolist()]}, TypeError, r"query must be a torch.Tensor or a NumPy array, got list"
    yield {"queries": [x[0], x]}, ValueError, r"query must have 2 dimensions"
    yield {"galleries": [x[:0], x[:0]], "gallery_labels": []}, ValueError, r"v0.gallery has no rows"
    yield {"query_labels": [0, 1, 2]}, ValueError, r"query has 4 rows, query_labels has shape \[3\]"
    yield {"gallery_labels": np.arange(5)}, ValueError, r"gallery has 4 rows, gallery_labels has shape \[5\]"
    yield {"query_labels": np.arange(4.0)}, TypeError, "query_labels must be integers or names, got float64"


@pytest.mark.parametrize("protocol", [*PROTOCOLS, Protocol("own", score=instance.score)])
@pytest.mark.parametrize(("changes", "error", "message"), list(bad_cases()))
def test_bad_input(protocol, changes, error: type[Exception], message: str) -> None:
    x = np.eye(4, dtype=np.float32)
    good = {"queries": [x, x], "galleries": [x, x], "query_labels": range(4), "gallery_labels": range(4)}
    with pytest.raises(error, match=message):
        compatibility_matrix(**{**good, **changes}, protocol=protocol)


def test_versions_must_be_of_the_same_items() -> None:
    x, labels = np.eye(4, dtype=np.float32), [0, 1, 2, 3]
    one = pair(x, labels, x, labels)
    for other, message in (
        (
            pair(x, [0, 1, 2, 4], x, labels),
            "v0 and v1 must be of the same items in the same order: query_labels at 3",
        ),
        (pair(x, labels, x[:3], labels[:3]), "v0 and v1 must be of the same items: gallery_labels has 4 and 3 entries"),
        (
            pair(x, list("abcd"), x, list("abcd")),
            r"query_labels are 0, \.\.\. and a, \.\.\., integers in one and",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            compatibility.compatibility_matrix([one, other])
    with pytest.raises(TypeError, match="v1 must be a VersionFeatures, got ndarray"):
        compatibility.compatibility_matrix([one, x])
    names = pair(x, list("abcd"), x, list("abcd"))
    with pytest.raises(ValueError, match="query_labels at 3 is d and e"):
        compatibility.compatibility_matrix([names, pair(x, list("abce"), x, list("abce"))])
