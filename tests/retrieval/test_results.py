"""Tests RetrievalResults against `cosine_topk` and hand-computed values; left-out items, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from versions import pair

from simplexfix import cosine_topk
from simplexfix.retrieval import RetrievalResults


def search(query, query_labels, gallery, gallery_labels, *, k: int | None = None, **ids) -> RetrievalResults:
    return RetrievalResults.search(pair(query, query_labels, gallery, gallery_labels, **ids), k=k)


RNG = np.random.default_rng(0)


def some(queries: int = 40, rows: int = 90, d: int = 8, classes: int = 7):
    query, gallery = (RNG.standard_normal((n, d)).astype(np.float32) for n in (queries, rows))
    gallery[rows // 2 :: 3] = gallery[: len(gallery[rows // 2 :: 3])]  # ties, also between classes
    return query, RNG.integers(classes, size=queries) * 5 - 9, gallery, RNG.integers(classes, size=rows) * 5 - 9


def test_by_hand() -> None:
    gallery = np.array([[1.0, 0], [0, 2], [0, 1], [-3, 0]], dtype=np.float32)
    query = np.array([[2.0, 1], [-1, 0]], dtype=np.float32)
    found = search(query, [5, 2**60], gallery, [5, 2**60, 5, 2**60])
    assert found.positions.tolist() == [[0, 1, 2, 3], [3, 1, 2, 0]]  # rows 1 and 2 are tied; the lower row comes first
    assert found.relevant.tolist() == [[True, False, True, False], [True, True, False, False]]
    assert found.num_relevant.tolist() == [2, 2]
    assert found.num_candidates.tolist() == [4, 4]
    np.testing.assert_allclose(found.scores[0], [2 / 5**0.5, 1 / 5**0.5, 1 / 5**0.5, -2 / 5**0.5], rtol=1e-6)
    assert found.is_full
    assert len(found) == 2
    assert found.ids is found.positions


def test_results_equal_cosine_topk_with_labels() -> None:
    query, query_labels, gallery, gallery_labels = some()
    for k in (1, 5, 90, 500, None):
        found = search(query, query_labels, gallery, gallery_labels, k=k)
        width = min(k or 90, 90)
        scores, ids = cosine_topk(torch.from_numpy(query), torch.from_numpy(gallery), width)
        np.testing.assert_array_equal(found.scores, scores)
        np.testing.assert_array_equal(found.positions, ids)
        np.testing.assert_array_equal(found.relevant, gallery_labels[ids] == query_labels[:, None])
        np.testing.assert_array_equal(found.num_relevant, (gallery_labels == query_labels[:, None]).sum(1))
        assert found.is_full == (width == 90)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = some()
    whole = search(*arguments, query_ids=np.arange(40), gallery_ids=np.arange(90))
    for name in ("_BLOCK_PLACES", "_BLOCK_NUMBERS"):
        monkeypatch.setattr(f"simplexfix.retrieval.results.{name}", 700)
        part = search(*arguments, query_ids=np.arange(40), gallery_ids=np.arange(90))
        np.testing.assert_array_equal(part.positions, whole.positions)
        np.testing.assert_array_equal(part.scores, whole.scores)


@pytest.mark.parametrize("k", [1, 4, 89, 90, None])
def test_the_query_itself_is_left_out(k: int | None) -> None:
    query, query_labels, gallery, gallery_labels = some()
    gallery_ids = RNG.permutation(90) * 3 + 2**40
    row = RNG.permutation(90)[:40]
    query, query_labels = gallery[row].copy(), gallery_labels[row].copy()
    query_ids = gallery_ids[row]
    # ids that no gallery row has: among, before and after its ids
    query_ids[:7] = 1, 2, 2**40 + 1, 2**62, -5, 2**40 - 1, 2**41
    found = search(query, query_labels, gallery, gallery_labels, k=k, query_ids=query_ids, gallery_ids=gallery_ids)
    assert found.excluded.tolist() == [-1] * 7 + row[7:].tolist()
    assert found.num_candidates.tolist() == [90] * 7 + [89] * 33
    _, everything = cosine_topk(torch.from_numpy(query), torch.from_numpy(gallery), 90)
    for i, ranking in enumerate(everything.tolist()):
        rest = [r for r in ranking if r != found.excluded[i]]
        expected = (rest + [-1])[: found.k]
        assert found.positions[i].tolist() == expected
        assert found.ids[i].tolist() == [gallery_ids[r] if r >= 0 else -1 for r in expected]
        assert found.relevant[i].tolist() == [r >= 0 and gallery_labels[r] == query_labels[i] for r in expected]
        assert found.num_relevant[i] == (gallery_labels[rest] == query_labels[i]).sum()
    assert found.is_full == (k in (90, None))
    assert np.isneginf(found.scores[found.positions < 0]).all()


def test_a_gallery_of_only_the_query_gives_no_result() -> None:
    found = search(np.eye(1, 3), [4], np.eye(1, 3), [4], query_ids=[9], gallery_ids=[9])
    assert found.positions.tolist() == [[-1]]
    assert found.num_relevant.tolist() == [0]
    assert found.relevant.tolist() == [[False]]
    assert found.is_full


def test_queries_without_a_match_are_counted() -> None:
    rows = np.eye(4, dtype=np.float32)
    found = search(rows, [7, 99, 8, -1], rows, [7, 7, 8, 9])
    assert found.queries_without_match.tolist() == [1, 3]
    assert found.num_relevant.tolist() == [2, 0, 1, 0]
    assert repr(found) == "RetrievalResults of 4 queries, k=4 (full), 2 without a match"


def test_all_kinds_of_input_give_the_same_result(tmp_path) -> None:
    query, query_labels, gallery, gallery_labels = some()
    expected = search(query, query_labels, gallery, gallery_labels)
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    read_only = query.copy()
    read_only.flags.writeable = False
    for arguments in (
        (torch.from_numpy(query), torch.from_numpy(query_labels), torch.from_numpy(gallery), gallery_labels.tolist()),
        (read_only, query_labels.astype(np.int16), mapped, gallery_labels.astype(">i4")),
        (query.astype(np.float64), query_labels, np.asfortranarray(gallery), gallery_labels),
        (query.astype(">f4"), query_labels, torch.from_numpy(gallery).requires_grad_(), gallery_labels),
    ):
        found = search(*arguments)
        np.testing.assert_array_equal(found.positions, expected.positions)
        np.testing.assert_array_equal(found.relevant, expected.relevant)
    half = search(query.astype(np.float16), query_labels, gallery.astype(np.float16), gallery_labels)
    brain = [torch.from_numpy(x).half().bfloat16() for x in (query, gallery)]
    other = search(brain[0], query_labels, brain[1].float(), gallery_labels)
    assert (half.positions == other.positions).mean() > 0.5


def test_results_cannot_be_changed() -> None:
    query_labels, ids = np.array([0, 1, 2]), np.array([7, 8, 9])
    found = search(np.eye(3), query_labels, np.eye(3), [0, 1, 2], query_ids=ids, gallery_ids=ids)
    with pytest.raises(AttributeError):
        found.positions = found.positions.copy()
    for name in ("positions", "scores", "relevant", "num_relevant", "num_candidates", "excluded", "gallery_ids"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(found, name)[0] = 0
    ids[0] = 100  # arrays of the caller stay writable and are not shared
    assert found.gallery_ids.tolist() == [7, 8, 9]


ROWS, LABELS = np.eye(3, dtype=np.float32), [0, 1, 2]
NAN = ROWS.copy()
NAN[1, 2] = np.nan
HUGE = ROWS.astype(np.float64)
HUGE[2, 0] = 1e300
LARGE = np.full((3, 3), 1e25, dtype=np.float32)

BAD = [
    ({"query": ROWS.tolist()}, TypeError, "query must be a torch.Tensor or a NumPy array, got list"),
    ({"query": ROWS.astype(int)}, TypeError, "query must be float32, float64 or float16, got int64"),
    ({"gallery": torch.eye(3).long()}, TypeError, "gallery must be float32, float64, bfloat16 or float16"),
    ({"gallery": np.ma.masked_array(ROWS, ROWS > 0)}, TypeError, "gallery must have no masked numbers"),
    ({"query": ROWS[0]}, ValueError, r"query must have 2 dimensions, \[rows, d\] with d >= 1, got \[3\]"),
    ({"query": ROWS[:, :0]}, ValueError, r"with d >= 1, got \[3, 0\]"),
    ({"query": ROWS[:0], "query_labels": []}, ValueError, "query_labels is empty"),
    ({"gallery": ROWS[:0], "gallery_labels": []}, ValueError, "gallery has no rows"),
    ({"gallery": ROWS[:, :2]}, ValueError, "query has 3 columns, gallery has 2"),
    ({"query": NAN}, ValueError, "query row 1 holds nan or inf"),
    ({"gallery": torch.from_numpy(NAN)}, ValueError, "gallery row 1 holds nan or inf"),
    ({"gallery": HUGE}, ValueError, "gallery row 2 holds a number past float32's range"),
    ({"query_labels": [0, 1]}, ValueError, r"query has 3 rows, query_labels has shape \[2\]"),
    (
        {"gallery_labels": [[0], [1], [2]]},
        ValueError,
        r"one value for each row, got shape \[3, 1\]; pass gallery_",
    ),
    ({"query_labels": [0.0, 1, 2]}, TypeError, "query_labels must be integers or names, got float64"),
    ({"query_labels": torch.rand(3)}, TypeError, "query_labels must be integers or names, got float32"),
    ({"query_labels": [True, False, True]}, TypeError, "query_labels must be integers or names, got bool"),
    ({"gallery_labels": np.array([1, 2, 2**63], dtype=np.uint64)}, ValueError, r"at most 2\^63 - 1, got 92233720368"),
    ({"k": 0}, ValueError, "k must be at least 1, or None for the full ranking, got 0"),
    ({"k": 1.5}, TypeError, "k must be an integer"),
    ({"query_ids": [1, 2, 3]}, ValueError, "query_ids without gallery_ids"),
    ({"gallery_ids": [1, 2, 3]}, ValueError, "gallery_ids without query_ids"),
    ({"query_ids": [1, 2], "gallery_ids": [1, 2, 3]}, ValueError, r"query has 3 rows, query_ids has shape \[2\]"),
    (
        {"query_ids": [1, 2, 3], "gallery_ids": [4, 8, 4]},
        ValueError,
        "gallery_ids must hold each id once, got 4 in rows 0 and 2",
    ),
    (
        {"query_ids": ["a", "b", "c"], "gallery_ids": [1, 2, 3]},
        TypeError,
        "query_ids are names and gallery_ids are integers: both must be names, or both integers",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(changes, error: type[Exception], message: str) -> None:
    arguments = {"query": ROWS, "query_labels": LABELS, "gallery": ROWS, "gallery_labels": LABELS, **changes}
    with pytest.raises(error, match=message):
        search(**arguments)


def test_large_finite_rows_are_no_bad_input() -> None:
    assert search(LARGE, LABELS, ROWS, LABELS).scores[0] == pytest.approx([3**-0.5] * 3)
