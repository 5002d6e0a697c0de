"""Tests columns of other libraries as features, labels and ids: exact conversion, and errors for bad input."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from simplexfix.labelled import FeatureRows, LabelledItems

ROWS = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


def pandas_column(x):
    return pytest.importorskip("pandas").Series(list(x))


def pandas_lists(x):
    return pytest.importorskip("pandas").Series(x.tolist(), index=range(10, 10 + len(x)))


def pandas_frame(x):
    return pytest.importorskip("pandas").DataFrame(x)


def arrow_lists(x):
    return pytest.importorskip("pyarrow").array(x.tolist())


def arrow_fixed(x):
    pa = pytest.importorskip("pyarrow")
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])


def arrow_chunks(x):
    pa = pytest.importorskip("pyarrow")
    return pa.chunked_array([pa.array(x[:2].tolist()), pa.array(x[2:].tolist())])


def arrow_slice(x):
    return arrow_lists(np.concatenate([x[:1], x, x[:2]])).slice(1, len(x))


def arrow_fixed_slice(x):
    return arrow_fixed(np.concatenate([x[:1], x, x[:2]])).slice(1, len(x))


def hugging_face(x):
    return pytest.importorskip("datasets").Dataset.from_dict({"e": x.tolist(), "other": list(range(len(x)))})["e"]


def hugging_face_torch(x):
    return pytest.importorskip("datasets").Dataset.from_dict({"e": x}).with_format("torch")["e"]


def hugging_face_function(x):
    data = pytest.importorskip("datasets").Dataset.from_dict({"e": x.tolist()})
    return data.with_transform(lambda batch: {"e": [np.array(row) for row in batch["e"]]})["e"]


def hugging_face_chosen(x):
    data = pytest.importorskip("datasets").Dataset.from_dict({"e": np.concatenate([x[:2], x])})
    return data.select(range(2, 2 + len(x)))["e"]


def hugging_face_python(x):
    data = pytest.importorskip("datasets").Dataset.from_dict({"e": x.tolist()})
    return data.with_transform(lambda batch: {"e": batch["e"]})["e"]


def hugging_face_tensors(x):
    data = pytest.importorskip("datasets").Dataset.from_dict({"e": x.tolist()})
    return data.with_transform(lambda batch: {"e": torch.tensor(batch["e"], dtype=torch.float32)})["e"]


def objects(x):
    column = np.empty(len(x), dtype=object)
    column[:] = list(x)
    return column


FEATURES = [
    pandas_column, pandas_lists, pandas_frame, arrow_lists, arrow_fixed, arrow_chunks, arrow_slice, arrow_fixed_slice,
    hugging_face, hugging_face_torch, hugging_face_function, hugging_face_tensors,
    hugging_face_python, hugging_face_chosen, objects,
]  # fmt: skip


@pytest.mark.parametrize("make", FEATURES)
def test_columns_of_vectors(make) -> None:
    rows = FeatureRows("query", make(ROWS))
    np.testing.assert_array_equal(rows.block(0, 5), ROWS)
    assert rows.dtype in ("float32", "float64")


def test_bfloat16_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rows = FeatureRows("query", ROWS.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(rows.block(0, 5), torch.from_numpy(ROWS).bfloat16().float())
    assert torch.equal(rows.tensor(), torch.from_numpy(ROWS).bfloat16())
    np.testing.assert_array_equal(rows.gather(np.array([3])), torch.from_numpy(ROWS[3:4]).bfloat16().float())


def bad_features():
    yield lambda: pandas_lists(np.ones((2, 3), int)), TypeError, "query must be float32.*got int64; pass query.astype"
    yield (
        lambda: objects([np.ones(2), np.ones(3)]),
        ValueError,
        "different lengths, 2 numbers in row 0 and 3 in row 1; all rows must be by one model",
    )
    yield lambda: objects([np.ones(2), None]), ValueError, "query row 1 is missing: drop such rows"
    yield (
        lambda: objects([np.ones(2), "a"]),
        TypeError,
        "query must hold a vector of numbers in each row, got str in row 1",
    )
    yield (
        lambda: pandas_frame(np.array([[1, "a"]], object)),
        TypeError,
        "got Python objects, str; pass the columns of num",
    )
    yield lambda: pytest.importorskip("pandas").Series([1.0, 2.0]), ValueError, "query must have 2 dimensions"
    yield (
        lambda: pytest.importorskip("pyarrow").array([[1.0], [1.0, 2.0]]),
        ValueError,
        "1 numbers in row 0 and 2 in row 1",
    )
    yield (
        lambda: pytest.importorskip("pyarrow").array([[1.0], None]),
        ValueError,
        "query row 1 is missing: drop such rows",
    )
    yield lambda: pytest.importorskip("pyarrow").array([[1.0], [None]]), ValueError, "query row 1 has a missing number"
    yield (
        lambda: pytest.importorskip("pyarrow").array([["a"], ["b"]]),
        TypeError,
        "must hold vectors of numbers, got list",
    )
    yield lambda: pytest.importorskip("pyarrow").table({"e": [[1.0]]}), TypeError, "query must be one column, got Table"
    yield (
        lambda: np.zeros((2, 2), "V2"),
        TypeError,
        r"got \|V2, raw bytes \(NumPy saves bfloat16 and float8",
    )
    yield (
        lambda: np.zeros(2, [("x", "f4")]),
        TypeError,
        r"a structured array with fields x; pass one field, .*query\['x'\]",
    )
    yield lambda: np.ones((2, 2), bool), TypeError, "got bool; pass query.astype"
    yield lambda: np.array([["a"]]), TypeError, "got text$"
    yield lambda: ROWS.astype(np.longdouble), TypeError, r"got float128; pass query.astype\(np.float32\)"
    yield lambda: ROWS.astype(np.complex64), TypeError, "got complex64"
    yield lambda: torch.ones(2, 2).to(torch.float8_e4m3fn), TypeError, r"float8_e4m3fn; cast it, e.g. query.float\(\)"
    yield (
        lambda: ROWS.astype(pytest.importorskip("ml_dtypes").float8_e5m2),
        TypeError,
        "got float8_e5m2; pass query.asty",
    )
    yield lambda: ROWS.tolist(), TypeError, r"got list; np.asarray\(query, dtype=np.float32\) makes one"


@pytest.mark.parametrize(("make", "error", "message"), list(bad_features()))
def test_bad_features_raise_a_clear_error(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureRows("query", make())


def names_of():
    names = ["b", "a", "é"]
    yield lambda: names
    yield lambda: np.array(names)
    yield lambda: np.array(names, object)
    yield lambda: np.char.encode(np.array(names), "utf-8")
    yield lambda: np.array(names, np.dtypes.StringDType())
    yield lambda: ["b", "a", "e\u0301"]  # the same name in another Unicode form
    yield lambda: pytest.importorskip("pandas").Series(names)
    yield lambda: pytest.importorskip("pandas").Series(pytest.importorskip("pandas").Categorical(names))
    yield lambda: pytest.importorskip("pyarrow").array(names)
    yield lambda: pytest.importorskip("pyarrow").array(names).dictionary_encode()
    yield lambda: pytest.importorskip("datasets").Dataset.from_dict({"e": names})["e"]


@pytest.mark.parametrize("make", list(names_of()))
def test_queries_and_gallery_share_one_numbering_of_names(make) -> None:
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("NumPy before 2.0")
    items = LabelledItems(["é", "zz", "a"], make(), query_ids=["i", "j", "é"], gallery_ids=make())
    assert items.label_names == ("a", "b", "zz", "é")
    assert items.query_labels.tolist() == [3, 2, 0]
    assert items.gallery_labels.tolist() == [1, 0, 3]
    assert items.excluded.tolist() == [-1, -1, 2]


def test_integers_of_any_kind() -> None:
    pd, pa = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    big = [2**40, -5, 2**62]
    for labels in (
        big, torch.tensor(big), np.array(big), np.array(big, ">i8"), np.array(big, object), pd.Series(big),
        pa.array(big), pd.Series(big, dtype="Int64"), pa.chunked_array([big[:1], big[1:]]),
    ):  # fmt: skip
        items = LabelledItems(labels, labels)
        assert items.query_labels.tolist() == items.gallery_labels.tolist() == big
        assert items.label_names is None
    small = torch.tensor([1, 2, 3], dtype=torch.uint16)
    assert LabelledItems(small, small.numpy()).query_labels.tolist() == [1, 2, 3]


def bad_labels():
    pd = lambda *a, **k: pytest.importorskip("pandas").Series(*a, **k)  # noqa: E731
    yield (
        lambda: [0.5, 1, 2],
        TypeError,
        r"query_labels must be integers or names, got float64; .* whole, pass query_labels.astype\(np.int64\)",
    )
    yield (
        lambda: torch.ones(3).bfloat16(),
        TypeError,
        r"must be integers or names, got bfloat16; .* whole, pass query_labels.long\(\)",
    )
    yield lambda: torch.ones(3).to(torch.float8_e5m2), TypeError, "must be integers or names, got float8_e5m2"
    yield lambda: np.ones(3, bool), TypeError, r"got bool; pass query_labels.astype\(np.int64\)"
    yield lambda: np.ones((3, 1), int), ValueError, r"got shape \[3, 1\]; pass query_labels.ravel\(\)"
    yield lambda: np.ones((3, 2), int), ValueError, r"got shape \[3, 2\]$"
    yield lambda: pd([1, None, 2]), ValueError, "query_labels row 1 is missing"
    yield lambda: pd(["a", None, "b"]), ValueError, "query_labels row 1 is missing"
    yield lambda: pd([1, 2, None], dtype="Int64"), ValueError, "query_labels row 2 is missing"
    yield lambda: pytest.importorskip("pyarrow").array([1, None, 2]), ValueError, "query_labels row 1 is missing"
    yield (
        lambda: np.array([1, "a", 2], object),
        TypeError,
        r"row 1 str; pass np.unique\(query_labels.astype\(str\), return_inv",
    )
    yield lambda: np.zeros(3, [("x", "i4")]), TypeError, r"structured array with fields x; .* query_labels\['x'\]"
    yield (
        lambda: np.array(["2020-01-01"] * 3, "M8[D]"),
        TypeError,
        r"got datetime64\[D\].*pass np.unique\(query_labels, return",
    )
    yield lambda: np.zeros(3, "V2"), TypeError, r"must be integers or names, got \|V2"
    yield lambda: [[1], [2, 3], [4]], ValueError, "query_labels must hold one value for each row"
    yield lambda: np.array([b"a", b"\xf6", b"c"]), ValueError, "query_labels must be names in UTF-8, got other bytes"
    yield lambda: "abc", TypeError, "must be integers or names, one for each row, got str"
    yield lambda: [0, 1, 2**70], ValueError, "must fit into int64"
    yield (
        lambda: np.ma.masked_array([1, 2, 3], [0, 1, 0]),
        TypeError,
        "no masked numbers; pass only the rows without them",
    )
    yield list, ValueError, "query_labels is empty: there must be at least one query"
    yield (
        lambda: ["a", "b", "c"],
        TypeError,
        "query_labels are names and gallery_labels are integers: both must be names",
    )


@pytest.mark.parametrize(("make", "error", "message"), list(bad_labels()))
def test_bad_labels_raise_a_clear_error(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LabelledItems(make(), [0, 1, 2])


def test_items_are_checked_once_and_cannot_be_changed() -> None:
    labels = np.array([1, 2, 3])
    items = LabelledItems(labels, labels, query_groups=["x", "y", "x"])
    labels[0] = 7
    assert items.query_labels.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        items.query_labels[0] = 5
    for length, message in ((2, "v.query has 2 rows"), (4, "v.query has 4 rows")):
        with pytest.raises(ValueError, match=rf"{message}, query_labels has shape \[3\]"):
            items.version(np.ones((length, 2)), np.ones((3, 2)), name="v")


def test_columns_as_a_version(tmp_path) -> None:
    items = LabelledItems([0, 1, 0, 1, 0], [0, 1, 0, 1, 0])
    version = items.version(pandas_column(ROWS), arrow_fixed(ROWS), name="v0")
    assert version.bit_equal == 5
    assert version.zero_rows == (0, 0)


def test_the_programs_of_the_evaluation_page_run(tmp_path, monkeypatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "evaluation.md").read_text()
    program, judged = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 6
    rows = [rng.standard_normal((120, 8)) + 2 * np.eye(8)[labels] for _ in range(2)]
    of = {
        "query_labels": labels[:60],
        "gallery_labels": labels,
        "query_ids": np.arange(60),
        "gallery_ids": np.arange(120),
    }
    names = dict(of, old_query=rows[0][:60], old_gallery=rows[0], new_query=rows[1][:60], new_gallery=rows[1])
    monkeypatch.chdir(tmp_path)  # the page saves a report
    exec(program, names)
    assert (tmp_path / "report" / "report.html").is_file()
    assert names["report"].names == ("v0", "v1")
    assert names["report"].queries_in_gallery.left_out_by_id == 60
    assert 0 < names["recall"] <= 1
    (tmp_path / "qrels.tsv").write_text("".join(f"{query} 0 {60 + query} 1\n" for query in range(40)))
    exec(judged, names)
    assert names["report"].judgements.queries_left_out == 20
    assert 0 < names["ndcg"].mean() < 1
