"""Tests feature files: formats give the same arrays, some are memory-mapped, and every kind of damage is an error."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from simplexfix.labelled import FeatureFileError, VersionFeatures, _rows, check_versions

load_features = VersionFeatures.load

KEYS = ("query", "gallery", "query_labels", "gallery_labels")


def arrays(**changes) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    made = {
        "query": numbers.normal(size=(6, 3)).astype(np.float32),
        "gallery": numbers.normal(size=(4, 3)).astype(np.float32),
        "query_labels": np.array([0, 1, 2, 2**40, -5, 0]),
        "gallery_labels": np.arange(4, dtype=np.int32),
        **changes,
    }
    return {key: value for key, value in made.items() if value is not None}


def save(path: Path, made: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **made)
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
        from safetensors.numpy import save_file

        save_file(made, path)
    else:
        path.mkdir()
        for key, value in made.items():
            np.save(path / f"{key}.npy", value)
    return path


def check_holds(found: VersionFeatures, made: dict[str, np.ndarray]) -> None:
    for part in ("query", "gallery"):
        assert np.array_equal(getattr(found, part).tensor().numpy(), made[part])
        assert np.array_equal(getattr(found.items, f"{part}_labels"), made[f"{part}_labels"])


FORMATS = ("f.npz", "f.safetensors", "folder")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_formats(tmp_path, name: str, dtype) -> None:
    made = arrays(query_groups=np.arange(6), prefixes=np.array([2, 1], np.int32))
    made["query"], made["gallery"] = made["query"].astype(dtype), made["gallery"].astype(dtype)
    found = load_features(str(save(tmp_path / name, made)))
    check_holds(found, made)
    assert str(found.query.dtype) == str(found.gallery.dtype) == np.dtype(dtype).name
    assert found.items.query_labels.dtype == found.items.gallery_labels.dtype == np.int64
    assert found.items.query_groups.tolist() == list(range(6))
    assert found.prefixes == (1, 2)
    assert (found.name, found.path) == (Path(name).stem, tmp_path / name)
    bare = load_features(save(tmp_path / ("b" + name), arrays()))
    assert (bare.items.query_groups, bare.prefixes) == (None, ())


def test_bfloat16_from_safetensors(tmp_path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    made = {key: torch.from_numpy(value) for key, value in arrays().items()}
    made["query"], made["gallery"] = made["query"].bfloat16(), made["gallery"].bfloat16()
    torch_files.save_file(made, tmp_path / "b.safetensors")
    assert torch.equal(load_features(tmp_path / "b.safetensors").query.tensor(), made["query"])


def test_compressed_foreign_order_and_fortran(tmp_path) -> None:
    made = arrays(query_groups=np.array(["day", "night"] * 3))
    np.savez_compressed(tmp_path / "c.npz", **made)
    swapped = {**made, "query": made["query"].astype(">f4"), "query_labels": made["query_labels"].astype(">i8")}
    np.savez(tmp_path / "s.npz", **{**swapped, "gallery": np.asfortranarray(made["gallery"])})
    for name in ("c.npz", "s.npz"):
        found = load_features(tmp_path / name)
        check_holds(found, made)
        assert found.items.query_groups.tolist() == ["day", "night"] * 3


@pytest.mark.parametrize("name", ["f.safetensors", "folder"])
def test_features_are_mapped_and_the_file_stays_as_it_is(tmp_path, name: str) -> None:
    big = np.ones((40_000, 64), np.float32)
    path = save(tmp_path / name, arrays(gallery=big, query=big[:6], gallery_labels=np.zeros(40_000, np.int64)))
    tracemalloc.start()
    found = load_features(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < big.nbytes / 4
    found.gallery.tensor()[0] = 7  # the array is writable, but changes stay in this process
    assert load_features(path).gallery.tensor()[0, 0] == 1


def nan_at(row: int) -> np.ndarray:
    rows = arrays()["gallery"]
    rows[row, 1] = np.nan
    return rows


BAD = [
    (
        {"query_labels": None, "gallery": None},
        "no gallery, query_labels; it holds gallery_labels, query; a version",
    ),
    ({"query_labels": np.arange(5)}, r"query has 6 rows, query_labels has shape \[5\]"),
    (
        {"gallery_labels": np.zeros((4, 1), int)},
        r"one value for each row, got shape \[4, 1\]; pass gallery_labels.ravel",
    ),
    ({"query_labels": np.arange(6.0)}, r"query_labels must be integers or names, got float64"),
    ({"query_labels": np.zeros(6, bool)}, "query_labels must be integers or names, got bool"),
    ({"query_labels": np.full(6, 2**63, np.uint64)}, "query_labels must fit into int64, .* got 9223372036854775808"),
    ({"gallery": nan_at(2)}, "gallery row 2 holds nan or inf"),
    ({"gallery": np.full((4, 3), np.inf, np.float32)}, "gallery row 0 holds nan or inf"),
    ({"gallery": arrays()["gallery"].astype(np.float64)}, "query is float32 and gallery is float64: save both alike"),
    (
        {"gallery": np.ones((4, 3), int)},
        "gallery must be float32, float64.* or float16, got (torch.)?int64; (pass|cast)",
    ),
    ({"gallery": np.ones((4, 5), np.float32)}, "query has 3 columns, gallery has 5"),
    ({"gallery": np.ones(4, np.float32)}, r"gallery must have 2 dimensions, \[rows, d\] with d >= 1, got \[4\]"),
    ({"gallery": np.ones((0, 3), np.float32)}, r"gallery has 0 rows, gallery_labels has shape \[4\]"),
    ({"gallery": np.ones((0, 3), np.float32), "gallery_labels": np.arange(0)}, "gallery has no rows"),
    ({"query_groups": np.arange(6.0)}, "query_groups must be integers or names, got float64"),
    ({"query_groups": np.arange(5)}, r"query has 6 rows, query_groups has shape \[5\]"),
    ({"prefixes": np.array([1.0])}, "prefixes must be integers, got float64"),
    ({"prefixes": np.array([2, 3])}, r"prefixes must lie in \[1, 3\): they are widths of older .* the 3 .* got 3"),
    ({"prefixes": np.array([[1]])}, r"prefixes must have one dimension.*\[1, 1\]"),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arrays_are_named_with_their_file(tmp_path, name: str, changes, message: str) -> None:
    path = save(tmp_path / name, arrays(**changes))
    with pytest.raises(FeatureFileError, match=message) as error:
        load_features(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["f.npz", "folder"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(6, "V2"), r"query_labels must be integers or names, got \|V2, raw bytes \(.*; save query_labels"),
        (np.array([b"caf\xe9"] * 6), r"query_labels must be names in UTF-8, .*np.char.decode\(query_labels, enc"),
    ],
)
def test_bytes_that_are_no_labels_are_named_with_their_file(tmp_path, name: str, labels, message: str) -> None:
    path = save(tmp_path / name, arrays(query_labels=labels))
    with pytest.raises(FeatureFileError, match=message) as error:
        load_features(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors", "folder/query.npy", "c.npz"])
def test_files_truncated_anywhere_are_refused(tmp_path, name: str) -> None:
    made = arrays()
    if name == "c.npz":
        np.savez_compressed(tmp_path / name, **made)
    else:
        save(tmp_path / name.split("/")[0], made)
    file = tmp_path / name
    whole = file.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        file.write_bytes(whole[:length])
        with pytest.raises(FeatureFileError, match="cannot be read, it may be truncated or damaged") as error:
            load_features(tmp_path / name.split("/")[0])
        assert str(error.value).startswith(f"{file} cannot")


def test_a_flipped_bit_in_an_archive(tmp_path) -> None:
    path = save(tmp_path / "f.npz", arrays())
    whole = bytearray(path.read_bytes())
    at = whole.index(arrays()["gallery"].tobytes()[:12])
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(FeatureFileError, match=r"Bad CRC-32 for file 'gallery.npy'"):
        load_features(path)


def test_headers_that_declare_too_much_data_are_refused(tmp_path) -> None:
    """An array header in a valid archive declares more data than the file, or than memory, can hold."""
    for shape in ((6, 4), (2**40, 2**40), (2**62, 4)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        content = header.getvalue() + bytes(6 * 3 * 4)
        for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            path = save(tmp_path / "f.npz", {key: value for key, value in arrays().items() if key != "query"})
            with zipfile.ZipFile(path, "a", compression) as archive:
                archive.writestr("query.npy", content)
            with pytest.raises(FeatureFileError, match=r"its header declares shape"):
                load_features(path)
        folder = save(tmp_path / f"f{shape[0]}", arrays())
        (folder / "query.npy").write_bytes(content)
        with pytest.raises(FeatureFileError, match="it may be truncated or damaged"):
            load_features(folder)


def test_an_archive_with_a_wrong_offset_is_refused(tmp_path) -> None:
    path = save(tmp_path / "f.npz", arrays())
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"PK\1\2")  # in the last entry: newer Pythons first reject overlapping entries
    (offset,) = struct.unpack_from("<I", whole, at + 42)
    struct.pack_into("<I", whole, at + 42, offset + 5)
    path.write_bytes(whole)
    with pytest.raises(FeatureFileError, match="Bad magic number for file header"):
        load_features(path)


def test_pickled_objects_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "o.npz", **arrays(query_groups=np.array(["a", None] * 3, object)))
    with pytest.raises(
        FeatureFileError,
        match=r"query_groups is an array of Python objects, which .*astype.str",
    ):
        load_features(tmp_path / "o.npz")


def test_a_row_with_nan_is_named_in_any_block(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_rows, "_BLOCK_BYTES", 2 * 3 * 4)  # the reader compares two rows at a time
    path = save(tmp_path / "folder", arrays(gallery=nan_at(3)))
    with pytest.raises(FeatureFileError, match="gallery row 3 holds nan or inf"):
        load_features(path)


def test_other_files_are_refused(tmp_path) -> None:
    for name in ("no.npz", "no.safetensors", "no", "no.bin"):
        with pytest.raises(FileNotFoundError, match=name):
            load_features(tmp_path / name)
    (tmp_path / "f.bin").write_text("")
    with pytest.raises(FeatureFileError, match=r"must be an .npz, .safetensors or .parquet file or a folder of"):
        load_features(tmp_path / "f.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FeatureFileError, match=r"no query, gallery, query_labels, gallery_labels; it holds nothing"):
        load_features(tmp_path / "empty")


def test_names_as_labels_get_the_same_numbers_in_every_file(tmp_path) -> None:
    names = np.array(["dog", "cat", "é"])
    made = arrays(query_labels=names[[0, 1, 2, 0, 1, 2]], gallery_labels=names[[2, 0, 1, 1]])
    for name in ("f.npz", "folder"):
        items = load_features(save(tmp_path / name, made)).items
        assert items.label_names == ("cat", "dog", "é")
        assert items.query_labels.tolist() == [1, 0, 2, 1, 0, 2]
        assert items.gallery_labels.tolist() == [2, 1, 0, 0]
    numbers = load_features(save(tmp_path / "n.npz", arrays()))
    with pytest.raises(
        ValueError, match=r"f\.npz and .*n\.npz must be of the same items: query_labels are dog, .* and 0"
    ):
        check_versions([load_features(tmp_path / "f.npz"), numbers])
    with pytest.raises(FeatureFileError, match=r"m\.npz: query_labels are names and gallery_labels are integers"):
        load_features(save(tmp_path / "m.npz", arrays(query_labels=names[[0, 1, 2, 0, 1, 2]])))


@pytest.mark.parametrize("name", FORMATS)
def test_ids_of_queries_and_gallery(tmp_path, name: str) -> None:
    made = arrays(query_ids=np.arange(6) * 2**33, gallery_ids=np.arange(4)[::-1] * 2**33)
    items = load_features(save(tmp_path / name, made)).items
    assert items.excluded.tolist() == [3, 2, 1, 0, -1, -1]
    for change, message in (
        ({"gallery_ids": None}, "query_ids without gallery_ids: both say which gallery item is the query"),
        ({"gallery_ids": np.array([4, 8, 4, 9])}, "gallery_ids must hold each id once, got 4 in rows 0 and 2"),
        ({"query_ids": np.arange(5)}, r"query has 6 rows, query_ids has shape \[5\]"),
        ({"query_ids": np.arange(6.0)}, "query_ids must be integers or names, got float64"),
    ):
        bad = {key: value for key, value in {**made, **change}.items() if value is not None}
        path = save(tmp_path / f"{len(list(tmp_path.iterdir()))}{name}", bad)
        with pytest.raises(FeatureFileError, match=message):
            load_features(path)


def test_other_arrays_are_listed(tmp_path) -> None:
    np.savez(tmp_path / "f.npz", embeddings=np.ones((2, 2)), **{f"x{i:02}": np.ones(1) for i in range(20)})
    with pytest.raises(
        FeatureFileError, match=r"it holds embeddings, x00, .*, x10, \.\.\.; a version needs the arrays"
    ):
        load_features(tmp_path / "f.npz")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "v0.npz").write_bytes((tmp_path / "f.npz").read_bytes())
    with pytest.raises(FeatureFileError, match=r"it holds v0\.npz; a version needs"):
        load_features(tmp_path / "folder")


@pytest.mark.parametrize("name", ["f.npz", "folder"])
def test_arrays_of_objects_are_named_with_the_remedy(tmp_path, name: str) -> None:
    vectors = np.empty(6, dtype=object)
    vectors[:] = list(arrays()["query"])
    for key, value, remedy in (
        ("query", vectors, "save np.stack of the vectors, which must be of one length"),
        ("query_labels", np.array(["a"] * 6, object), "save query_labels.astype.str., or the numbers that np.unique"),
    ):
        made, path = arrays(), tmp_path / f"{key}{name}"
        if name == "f.npz":
            np.savez(path, **{**made, key: value})
        else:
            save(path := tmp_path / key, made)
            np.save(path / f"{key}.npy", value)
        with pytest.raises(
            FeatureFileError, match=f"{key} is an array of Python objects, .* pickles are not read; {remedy}"
        ):
            load_features(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_tensors_that_are_no_labels_or_features(tmp_path, dtype) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    made = {key: torch.from_numpy(value) for key, value in arrays().items()}
    torch_files.save_file({**made, "gallery_labels": torch.ones(4).to(dtype)}, tmp_path / "labels.safetensors")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        FeatureFileError, match=rf"labels\.safetensors: gallery_labels must be integers or names, got {kind}"
    ):
        load_features(tmp_path / "labels.safetensors")
    if dtype != torch.bfloat16:
        torch_files.save_file({**made, "gallery": made["gallery"].to(dtype)}, tmp_path / "rows.safetensors")
        with pytest.raises(
            FeatureFileError, match=rf"rows\.safetensors: gallery must be float32, .*got torch.{kind}; cast"
        ):
            load_features(tmp_path / "rows.safetensors")


def test_bfloat16_that_numpy_saved_is_named(tmp_path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    np.savez(tmp_path / "f.npz", **arrays(query=arrays()["query"].astype(ml_dtypes.bfloat16)))
    with pytest.raises(FeatureFileError, match=r"f\.npz: query must be float32, .*got \|V2, raw bytes \(NumPy saves"):
        load_features(tmp_path / "f.npz")
