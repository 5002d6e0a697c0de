"""Tests CosineIndex: its ids, stored vectors, searches among some ids, and conversion from and to faiss."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_library
from exact_search import GALLERIES, hard_gallery, queries_for
from index_helpers import assert_same, index_of, rows

from simplexfix import CosineIndex

DTYPES = ["float32", "bfloat16"]
ORDERS: dict[str, Callable[[int], np.ndarray]] = {
    "counted": np.arange,
    "ascending": lambda n: np.arange(n) * 7 + 3,
    "any order": lambda n: np.random.default_rng(8).permutation(n) * 5,
}


@pytest.mark.parametrize("order", ORDERS)
def test_ids(kind: str, order: str) -> None:
    names = ORDERS[order](90)
    index = CosineIndex(4)
    assert index.ids.dtype == np.int64
    assert index.ids.shape == (0,)
    added = [index.add(rows(30, 4), None if order == "counted" else names[at : at + 30]) for at in (0, 30, 60)]
    for part, at in zip(added, (0, 30, 60), strict=True):
        assert part.dtype == np.int64
        np.testing.assert_array_equal(part, names[at : at + 30])
    np.testing.assert_array_equal(index.ids, names)
    index.remove(names[10:20])
    left = np.delete(names, np.arange(10, 20))
    np.testing.assert_array_equal(index.ids, left)
    more = index.add(rows(2, 4))
    np.testing.assert_array_equal(more, names.max() + 1 + np.arange(2))
    np.testing.assert_array_equal(index.ids, [*left, *more])
    assert index.add(np.zeros((0, 4))).shape == (0,)


class OtherLibrary:
    """An array of another library, such as JAX, that NumPy can read."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


@pytest.mark.parametrize("columns", ["lists", "masked", "other library", "pandas", "pyarrow", "ml_dtypes"])
def test_vectors_and_ids_of_other_libraries(kind: str, columns: str) -> None:
    """Vectors and ids may have the types of features and ids of other functions, and may be lists of numbers."""
    vectors, names = rows(4, 3).round(1), np.array([7, 5, 2**62, 0])
    given: tuple[Any, Any] = vectors.tolist(), names.tolist()
    if columns == "masked":
        given = np.ma.masked_invalid(vectors), np.ma.masked_equal(names, 1)
    elif columns == "other library":
        given = OtherLibrary(vectors), OtherLibrary(names)
    elif columns == "pandas":
        pandas = pytest.importorskip("pandas")
        given = pandas.DataFrame(vectors), pandas.Series(names)
    elif columns == "pyarrow":
        pyarrow = pytest.importorskip("pyarrow")
        given = pyarrow.array(vectors.tolist()), pyarrow.array(names)
    elif columns == "ml_dtypes":
        given = vectors.astype(pytest.importorskip("ml_dtypes").bfloat16), names
        vectors = given[0].astype(np.float32)
    index, expected = CosineIndex(3), index_of(vectors, names)
    assert index.add(*given).tolist() == names.tolist()
    np.testing.assert_array_equal(index.vectors(given[1]), expected.vectors(names))
    np.testing.assert_array_equal(index.search(given[0], 2)[1], expected.search(vectors, 2)[1])


def test_returned_ids_are_copies(kind: str) -> None:
    names = np.array([3, 1, 2])
    index = CosineIndex(4)
    index.add(rows(3, 4), names)[0] = 99
    index.ids[0] = 98
    assert names.tolist() == index.ids.tolist() == [3, 1, 2]
    assert index.search(rows(1, 4), 1)[1] == 3


@pytest.mark.parametrize("order", ORDERS)
def test_membership(kind: str, order: str) -> None:
    names = ORDERS[order](50)
    index = index_of(rows(50, 4), names)
    index.remove(names[20:30])
    held = set(index.ids.tolist())
    assert held == {int(name) for name in np.delete(names, np.arange(20, 30))}
    for id in (-(2**70), -1, *range(300), 2**63 - 2, 2**63 - 1, 2**63, 2**70):
        assert (id in index) == (id in held), id
    assert np.int32(names[0]) in index
    assert torch.tensor(names[0]) in index
    for wrong in (1.0, "1", None, True):
        with pytest.raises(TypeError, match="id must be an integer, got"):
            wrong in index  # noqa: B015


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_vectors(kind: str, order: str, dtype: str) -> None:
    names, given = ORDERS[order](700), rows(700, 37) * 5
    given[3] = 0
    index = index_of(given, names, dtype=dtype)
    stored = torch.nn.functional.normalize(torch.from_numpy(given).double(), dim=1).float()
    if dtype == "bfloat16":
        stored = stored.bfloat16().float()
    at = np.random.default_rng(0).integers(0, 700, 90)  # some ids twice
    vectors = index.vectors(names[at])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, stored[at], rtol=2**-23 if dtype == "float32" else 2**-7, atol=0)
    np.testing.assert_array_equal(index.vectors(list(names[at])), vectors)
    np.testing.assert_array_equal(index.vectors(torch.from_numpy(names[at])), vectors)
    assert index.vectors([]).shape == (0, 37)
    # stored vectors are those that are searched, and can be added again
    again = index_of(index.vectors(index.ids), index.ids, dtype=dtype)
    if dtype == "bfloat16":
        np.testing.assert_array_equal(again.vectors(names), index.vectors(names))
    vectors[:] = 7
    assert abs(index.vectors(names)).max() <= 1


def selections(n: int) -> dict[str, np.ndarray]:
    """Returns selections of rows, in several positions, that reach every code path of a search with a mask."""
    rng = np.random.default_rng(4)
    return {
        "none": np.array([], np.int64),
        "one": np.array([n - 1]),
        "a few": rng.choice(n, 30, replace=False),
        "one in forty": rng.choice(n, n // 40, replace=False),  # each row is scored
        "a sixth": rng.choice(n, n // 6, replace=False),  # codes with a mask; then candidates are scored
        # all rows are scored, and the mask is applied afterwards
        "most": rng.choice(n, 3 * n // 4, replace=False),
        "side by side": np.arange(n // 3, n // 3 + n // 5),
        "outside the sample": np.flatnonzero(np.arange(n) % 1024 >= 64),
        "the sample": np.flatnonzero(np.arange(n) % 1024 < 64),
        "all but three": rng.permutation(n)[3:],
        "all": np.arange(n),
    }


def check_searches_of_some(vectors: np.ndarray, query: np.ndarray, dtype: str) -> None:
    n = len(vectors)
    for name, at in selections(n).items():
        rest = np.setdiff1d(np.arange(n), at)
        for order in ORDERS.values():
            names = order(n)
            index = index_of(vectors, names, dtype=dtype, threads=2)
            small = CosineIndex(vectors.shape[1], dtype=dtype)
            small.add(vectors[at], names[at])
            for k in (1, 10, 700):
                scores, ids = small.search(query, k)
                for got in (
                    index.search(query, k, include=names[at]),
                    index.search(query, k, exclude=names[rest]),
                    [
                        np.concatenate(parts)
                        for parts in zip(*(index.search(q[None], k, include=names[at]) for q in query[:2]), strict=True)
                    ],
                ):
                    np.testing.assert_array_equal(got[1], ids[: len(got[1])], err_msg=f"{name}, k = {k}")
                    np.testing.assert_array_equal(got[0], scores[: len(got[0])], err_msg=f"{name}, k = {k}")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gallery", GALLERIES)
def test_a_search_of_some_ids_equals_an_index_with_only_these(gallery: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    vectors = hard_gallery(gallery, 5000, 19, rng)
    check_searches_of_some(vectors, queries_for(vectors, 15, rng), dtype)


def test_a_search_of_some_ids_by_both_implementations(kind: str) -> None:
    check_searches_of_some(rows(3000, 19), rows(5, 19, 1), "float32")


@needs_library
def test_many_queries_on_many_threads_search_some_ids() -> None:
    vectors, query = rows(40_000, 32), rows(600, 32, 1)
    at = np.random.default_rng(0).permutation(40_000)[:25_000]
    index = index_of(vectors, threads=5)
    expected = index_of(vectors[at], at, threads=1).search(query, 20)
    assert_same(index.search(query, 20, include=at), expected)
    assert_same(index.search(query, 20, exclude=np.setdiff1d(np.arange(40_000), at)), expected)


@needs_library
def test_rows_too_long_for_codes_are_searched_by_id() -> None:
    vectors, query = rows(70, (1 << 17) + 5), rows(3, (1 << 17) + 5, 1)
    index = index_of(vectors)
    for at in (np.arange(5, 60), np.arange(0, 70, 9)):
        assert_same(index.search(query, 4, include=at), index_of(vectors[at], at).search(query, 4))


def test_searched_ids_may_repeat_and_have_any_type(kind: str) -> None:
    index = index_of(rows(9, 4))
    expected = index.search(rows(2, 4, 1), 3, include=np.array([2, 4, 7]))
    for ids in ([7, 2, 4, 4, 2], torch.tensor([4, 2, 7]), np.array([7, 4, 2], np.uint8), range(2, 8, 1)):
        if isinstance(ids, range):
            ids = [id for id in ids if id in (2, 4, 7)]
        assert_same(index.search(rows(2, 4, 1), 3, include=ids), expected)
    unknown = [0, 1, 3, 5, 6, 8, 77, -1, 2**63 - 1, 8]
    assert_same(index.search(rows(2, 4, 1), 3, exclude=unknown), expected)
    assert_same(index.search(rows(2, 4, 1), 3, exclude=[]), index.search(rows(2, 4, 1), 3))
    scores, ids = index.search(rows(2, 4, 1), 3, include=[5])
    assert ids.tolist() == [[5, -1, -1]] * 2
    assert (scores[:, 1:] == -np.inf).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i, q: i.search(q, 1, include=[1, 77]), KeyError, "id 77 is not in the index"),
        (lambda i, q: i.search(q, 1, include=[-1]), KeyError, "id -1 is not in the index"),
        (lambda i, q: i.search(q, 1, include=[1], exclude=[2]), ValueError, "give include or exclude, not both"),
        (lambda i, q: i.search(q, 1, include=[1.0]), TypeError, "include must be integers, got float64"),
        (lambda i, q: i.search(q, 1, exclude=[True]), TypeError, "exclude must be integers, got bool"),
        (lambda i, q: i.search(q, 1, exclude=[[1]]), ValueError, r"exclude must have one dim.* got shape \[1, 1\]"),
        (lambda i, q: i.search(q, 1, include=3), ValueError, r"include must have one dim.* got shape \[\]"),
        (lambda i, q: i.vectors([0, 9]), KeyError, "id 9 is not in the index"),
        (lambda i, q: i.vectors([-1]), KeyError, "id -1 is not in the index"),
        (lambda i, q: i.vectors(2), ValueError, r"ids must have one dimension, .* got shape \[\]"),
        (lambda i, q: i.vectors(["a"]), TypeError, "ids must be integers, got text"),
        (lambda i, q: i.vectors(np.array([2**64 - 1], np.uint64)), ValueError, "ids must .* got 18446744073709551615"),
    ],
)
def test_ids_that_are_refused(kind: str, call: Any, error: type[Exception], message: str) -> None:
    index = index_of(rows(5, 3))
    with pytest.raises(error, match=message):
        call(index, rows(1, 3))
    assert index.ids.tolist() == [0, 1, 2, 3, 4]


# ---- faiss


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="the extra faiss is not installed")


@pytest.mark.parametrize("order", ORDERS)
def test_to_faiss_and_back(kind: str, faiss: Any, order: str) -> None:
    names = ORDERS[order](500)
    index = index_of(rows(500, 24), names)
    index.remove(names[:50])
    flat = index.to_faiss()
    query = rows(9, 24, 1)
    faiss.normalize_L2(query)
    scores, found = flat.search(query, 10)
    expected = index.search(query, 10)
    np.testing.assert_array_equal(found, expected[1])
    np.testing.assert_allclose(scores, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(flat.reconstruct(int(names[60])), index.vectors(names[60:61])[0])
    again = CosineIndex.from_faiss(faiss.deserialize_index(faiss.serialize_index(flat)), threads=2)
    assert again.threads == 2
    np.testing.assert_array_equal(again.ids, index.ids)
    np.testing.assert_array_equal(again.search(query, 10)[1], expected[1])
    assert CosineIndex.from_faiss(CosineIndex(5).to_faiss()).dim == 5


def test_from_faiss_of_each_flat_index(kind: str, faiss: Any) -> None:
    vectors, query = rows(200, 12), rows(5, 12, 1)
    faiss.normalize_L2(vectors)
    vectors[7] = 0
    expected = index_of(vectors).search(query, 9)
    for flat in (
        faiss.IndexFlatIP(12), faiss.IndexFlatL2(12), faiss.IndexFlat(12), faiss.IndexFlat(12, faiss.METRIC_L2)
    ):  # fmt: skip
        flat.add(vectors)
        assert_same(CosineIndex.from_faiss(flat).search(query, 9), expected)
    for named in (faiss.IndexIDMap(faiss.IndexFlatIP(12)), faiss.IndexIDMap2(faiss.IndexFlatL2(12))):
        named.add_with_ids(vectors, np.arange(200) * 3 + 1)
        made = CosineIndex.from_faiss(named, dtype="bfloat16")
        assert made.dtype == "bfloat16"
        np.testing.assert_array_equal(made.ids, np.arange(200) * 3 + 1)


def test_from_faiss_refuses_other_indexes_and_rows_that_are_not_unit(kind: str, faiss: Any) -> None:
    vectors = rows(300, 8)
    for wrong, message in (
        (faiss.IndexHNSWFlat(8, 4), "flat faiss index, or an IndexIDMap of one, got IndexHNSWFlat$"),
        (faiss.IndexIDMap(faiss.IndexHNSWFlat(8, 4)), "got IndexIDMap of IndexHNSWFlat$"),
        (faiss.IndexScalarQuantizer(8, faiss.ScalarQuantizer.QT_fp16), "got IndexScalarQuantizer"),
        (faiss.IndexPreTransform(faiss.IndexFlatIP(8)), "got IndexPreTransform"),
        (faiss.IndexRefineFlat(faiss.IndexFlatIP(8)), "got IndexRefineFlat"),
        (vectors, "got ndarray"),
        (None, "got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            CosineIndex.from_faiss(wrong)
    with pytest.raises(ValueError, match="index must rank by inner product or L2, got metric_type 2"):
        CosineIndex.from_faiss(faiss.IndexFlat(8, faiss.METRIC_L1))
    for flat in (faiss.IndexFlatIP(8), faiss.IndexFlatL2(8)):
        faiss.normalize_L2(vectors)
        vectors[5] *= 1.5
        flat.add(vectors)
        with pytest.raises(ValueError, match=r"row 5 has length 1\.5, expected 1: .*CosineIndex\.add\(index\.recon"):
            CosineIndex.from_faiss(flat)
    vectors[5] = np.nan
    flat = faiss.IndexFlatIP(8)
    flat.add(vectors)
    with pytest.raises(ValueError, match="row 5 has length nan, expected 1"):
        CosineIndex.from_faiss(flat)
    faiss.normalize_L2(vectors[:3])
    for ids, message in (([4, 4, 5], "id 4 is given twice"), ([4, -4, 5], "ids must lie between 0 and .* got -4")):
        named = faiss.IndexIDMap(faiss.IndexFlatIP(8))
        named.add_with_ids(vectors[:3], np.array(ids))
        with pytest.raises(ValueError, match=message):
            CosineIndex.from_faiss(named)


def test_conversions_without_faiss_name_the_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = index_of(rows(3, 4))
    for call in (index.to_faiss, lambda: CosineIndex.from_faiss(None)):
        with pytest.raises(ModuleNotFoundError, match=r"needs faiss: pip install 'simplexfix\[faiss\]'"):
            call()
