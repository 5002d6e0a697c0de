"""Tests feature files in Parquet as pandas, pyarrow and Hugging Face datasets write them, in one file or two."""

from __future__ import annotations

import numpy as np
import pytest

from simplexfix.labelled import FeatureFileError, LabelledItems, VersionFeatures
from simplexfix.report import evaluate

pa = pytest.importorskip("pyarrow", reason="pip install 'simplexfix[parquet]'")
pq = pytest.importorskip("pyarrow.parquet")

RNG = np.random.default_rng(0)
QUERY, GALLERY = (RNG.standard_normal((n, 4)).astype(np.float32) for n in (6, 9))
LABELS = {"query": np.arange(6) % 3, "gallery": np.arange(9) % 3}
IDS = {"query": np.arange(6) + 2**40, "gallery": np.arange(9) * 2 + 2**40}
NAMES = np.array(["cat", "dog", "é"])


def columns(part: str, **other_columns) -> dict:
    rows = {"query": QUERY, "gallery": GALLERY}[part]
    content = {"vector": list(rows), "label": LABELS[part], "item_id": IDS[part], "note": ["x"] * len(rows)}
    return {**content, **other_columns}


def with_pandas(path, content) -> None:
    pytest.importorskip("pandas").DataFrame(content).to_parquet(path)


def with_arrow(path, content) -> None:
    pq.write_table(pa.table({key: list(value) for key, value in content.items()}), path)


def with_arrow_fixed(path, content) -> None:
    rows = np.stack(content["vector"])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    table = pa.table({**{key: list(value) for key, value in content.items() if key != "vector"}, "vector": vectors})
    pq.write_table(table, path, row_group_size=2)


def with_datasets(path, content) -> None:
    pytest.importorskip("datasets").Dataset.from_dict({k: list(v) for k, v in content.items()}).to_parquet(path)


WRITERS = [with_pandas, with_arrow, with_arrow_fixed, with_datasets]


def assert_content(version: VersionFeatures) -> None:
    for part, rows in (("query", QUERY), ("gallery", GALLERY)):
        features = getattr(version, part)
        np.testing.assert_array_equal(features.block(0, len(rows)), rows)
        assert getattr(version.items, f"{part}_labels").tolist() == LABELS[part].tolist()
        assert getattr(version.items, f"{part}_ids").tolist() == IDS[part].tolist()


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_of_two_files(tmp_path, write) -> None:
    folder = tmp_path / "v0"
    folder.mkdir()
    write(folder / "query.parquet", columns("query", group=["day", "night"] * 3))
    write(folder / "gallery.parquet", columns("gallery"))
    version = VersionFeatures.load(folder)
    assert_content(version)
    assert version.items.query_groups.tolist() == ["day", "night"] * 3
    assert version.name == "v0"
    expected = LabelledItems(*LABELS.values(), query_ids=IDS["query"], gallery_ids=IDS["gallery"]).version(
        QUERY, GALLERY, name="v0"
    )
    np.testing.assert_array_equal(evaluate([version]).matrix, evaluate([expected]).matrix)


@pytest.mark.parametrize("write", WRITERS)
def test_one_file_with_a_column_of_splits(tmp_path, write) -> None:
    parts = columns("gallery"), columns("query")
    both = {key: [*parts[0][key], *parts[1][key]] for key in parts[0]}
    # rows of both splits alternate; each split has its rows in the order of the file
    order = [*np.stack([np.arange(6), np.arange(9, 15)], 1).ravel(), 6, 7, 8]
    split = ["query" if i >= 9 else "gallery" for i in order]
    content = {key: [values[i] for i in order] for key, values in both.items()}
    write(tmp_path / "v1.parquet", {**content, "split": split})
    assert_content(VersionFeatures.load(tmp_path / "v1.parquet"))


@pytest.mark.parametrize("write", WRITERS)
def test_labels_may_be_strings(tmp_path, write) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    for part in ("query", "gallery"):
        write(folder / f"{part}.parquet", columns(part, label=NAMES[LABELS[part]].tolist()))
    found = VersionFeatures.load(folder)
    assert found.items.label_names == ("cat", "dog", "é")
    assert found.items.query_labels.tolist() == LABELS["query"].tolist()


def bad_tables():
    for name, change, message in (
        ("no label", {"label": None}, "query has no column label; it has item_id, note, vector"),
        ("no vector", {"vector": None}, "query has no column of lists of numbers, .*; it has item_id, label, note"),
        ("two lists", {"other": [[1.0]] * 6}, "query has several columns of lists, other, vector: call one embedding"),
        ("missing", {"vector": [*QUERY[:5], None]}, "query row 5 is missing"),
        ("ragged", {"vector": [*QUERY[:5], QUERY[5][:2]]}, "different lengths, 4 numbers in row 0 and 2 in row 5"),
        ("integers", {"vector": [[1, 2, 3, 4]] * 6}, "query must be float32, float64 or float16, got int64"),
        ("label gap", {"label": [0, 1, 2, None, 1, 2]}, "query_labels row 3 is missing"),
        ("float label", {"label": [0.0, 1.5, 2, 0, 1, 2]}, "query_labels must be integers or names, got float64"),
        ("nan", {"vector": [*QUERY[:5], np.full(4, np.nan, np.float32)]}, "query row 5 holds nan or inf"),
    ):
        yield pytest.param(change, message, id=name)


@pytest.mark.parametrize(("change", "message"), list(bad_tables()))
def test_errors_name_the_bad_column_or_row(tmp_path, change: dict, message: str) -> None:
    content = {key: value for key, value in {**columns("query"), **change}.items() if value is not None}
    with_arrow(tmp_path / "query.parquet", content)
    with_arrow(tmp_path / "gallery.parquet", columns("gallery"))
    with pytest.raises(FeatureFileError, match=message) as error:
        VersionFeatures.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")


def test_the_column_embedding_is_read_if_there_are_several_lists(tmp_path) -> None:
    for part, rows in (("query", QUERY), ("gallery", GALLERY)):
        content = columns(part, embedding=list(rows), vector=[[0.5]] * len(rows))
        with_arrow(tmp_path / f"{part}.parquet", content)
    assert_content(VersionFeatures.load(tmp_path))


def test_missing_incomplete_and_truncated_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.parquet"):
        VersionFeatures.load(tmp_path / "no.parquet")
    with_arrow(tmp_path / "one.parquet", columns("query"))
    with pytest.raises(
        FeatureFileError, match="no column split, which says query or gallery of each row; it has item_id"
    ):
        VersionFeatures.load(tmp_path / "one.parquet")
    with_arrow(tmp_path / "odd.parquet", columns("query", split=["query", "train"] * 3))
    with pytest.raises(FeatureFileError, match="column split must be query or gallery in each row, got train"):
        VersionFeatures.load(tmp_path / "odd.parquet")
    (tmp_path / "half").mkdir()
    with_arrow(tmp_path / "half" / "query.parquet", columns("query"))
    with pytest.raises(FeatureFileError, match=r"no gallery\.parquet; it holds query\.parquet"):
        VersionFeatures.load(tmp_path / "half")
    whole = (tmp_path / "one.parquet").read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "cut.parquet").write_bytes(whole[:length])
        with pytest.raises(FeatureFileError, match=r"cut\.parquet cannot be read, it may be truncated or damaged"):
            VersionFeatures.load(tmp_path / "cut.parquet")
