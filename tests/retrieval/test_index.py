"""Tests CosineIndex: the definition in exact_search.py, additions and removals, its file, threads, and bad input."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_library
from exact_search import GALLERIES, definition, hard_gallery, queries_for
from index_helpers import assert_same, index_of, rows

import simplexfix
from simplexfix import CosineIndex, _native
from simplexfix.retrieval._plain_index import PlainIndex

DTYPES = ["float32", "bfloat16"]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind_of_rows", GALLERIES)
def test_definition(kind_of_rows: str, dtype: str) -> None:
    """Adds rows in pieces, with ids in three orders; panels fill gradually, and the center of the codes moves."""
    rng = np.random.default_rng(1)
    n, d = 3000, 37
    vectors = hard_gallery(kind_of_rows, n, d, rng)
    query = queries_for(vectors, 15, rng)
    shuffled = rng.permutation(n) * 3 + 5
    for ids in (None, np.sort(shuffled), shuffled):
        index = CosineIndex(d, dtype=dtype, threads=2)
        at = 0
        for piece in (1, 2, 61, 130, 1000, n):
            part = slice(at, min(n, at + piece))
            index.add(vectors[part], None if ids is None else ids[part])
            at = part.stop
        scores, found = definition(query, vectors, 700, ids, dtype)
        for k in (1, 10, 700):
            assert_same(index.search(query, k), (scores[:, :k], found[:, :k]))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_equal_cosine_topk_on_any_number_of_threads(dtype: str) -> None:
    vectors, query = rows(30_000, 64), rows(70, 64, 1)
    expected = index_of(vectors, dtype=dtype, threads=1).search(query, 20)
    if dtype == "float32":
        found = simplexfix.cosine_topk(torch.from_numpy(query), torch.from_numpy(vectors), 20)
        assert_same(expected, [tensor.numpy() for tensor in found])
    for threads in (2, 7):
        index = index_of(vectors, dtype=dtype, threads=threads)
        assert_same(index.search(query, 20), expected)
        assert_same(index.search(query[5:6], 20), [e[5:6] for e in expected])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_implementation(dtype: str) -> None:
    vectors, query = rows(500, 24), rows(9, 24, 1)
    ids = np.random.default_rng(2).permutation(500)
    index = CosineIndex(24, dtype=dtype)
    plain = PlainIndex(24, dtype, 1)
    for each in (index, plain):
        each.add(vectors, ids)
        each.remove(ids[100:200])
    assert len(index) == len(plain) == 400
    ours, theirs = index.search(query, 30), plain.search(query, 30)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [None, "ascending", "any order"])
def test_removal_is_as_if_never_added(kind: str, ids: str | None, dtype: str) -> None:
    rng = np.random.default_rng(5)
    vectors, query = rows(2500, 19), rows(11, 19, 1)
    names = np.arange(2500) if ids is None else rng.permutation(2500) * 7 if ids == "any order" else np.arange(2500) * 7
    index = index_of(vectors, None if ids is None else names, dtype=dtype)
    left = np.ones(2500, bool)
    for gone in (rng.choice(2500, 400, replace=False), np.arange(1190, 1300), np.arange(2400, 2500), np.arange(0, 70)):
        gone = gone[left[gone]]
        left[gone] = False
        assert index.remove(names[rng.permutation(gone)]) == len(gone)
        assert len(index) == left.sum()
        assert_same(index.search(query, 40), index_of(vectors[left], names[left], dtype=dtype).search(query, 40))
    more = rows(300, 19, 9)
    index.add(more)  # new ids follow the highest id ever assigned
    every = np.concatenate([names[left], names.max() + 1 + np.arange(300)])
    expected = index_of(np.concatenate([vectors[left], more]), every, dtype=dtype)
    assert_same(index.search(query, 40), expected.search(query, 40))
    index.remove(every)
    assert len(index) == 0
    assert (index.search(query, 2)[1] == -1).all()
    index.add(more[:1])
    assert index.search(more[:1], 1)[1] == every.max() + 1


def test_rows_one_by_one(kind: str) -> None:
    vectors = rows(300, 8) + 3
    index = CosineIndex(8)
    for row in vectors:
        index.add(row[None])
    assert_same(index.search(vectors[:20], 9), index_of(vectors).search(vectors[:20], 9))


def test_padding_and_empty_input(kind: str) -> None:
    index = CosineIndex(3)
    scores, ids = index.search(np.zeros((2, 3)), 2)
    assert ids.tolist() == [[-1, -1]] * 2
    assert (scores == -np.inf).all()
    index.add(np.zeros((0, 3)))
    index.add(np.zeros((0, 3)), [])
    assert index.remove([]) == 0
    index.add([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [7, 3])
    scores, ids = index.search([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], 3)
    assert ids.tolist() == [[3, 7, -1], [3, 7, -1]]
    assert scores.tolist() == [[1.0, 0.0, -np.inf], [0.0, 0.0, -np.inf]]
    assert scores.dtype == np.float32
    assert ids.dtype == np.int64
    assert index.search(np.zeros((0, 3)), 5)[1].shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_arrays_and_tensors_of_all_formats(kind: str, dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(rows(40, 5)).to(dtype)
    expected = index_of(tensor.float().numpy()).search(tensor.float().numpy(), 3)
    assert_same(index_of(tensor.requires_grad_()).search(tensor, 3), expected)
    if dtype != torch.bfloat16:
        array = tensor.detach().numpy()
        assert_same(index_of(np.asfortranarray(array), torch.arange(40)).search(array[::-1][::-1], 3), expected)


def test_lazy_negatives_and_empty_masks_are_accepted(kind: str) -> None:
    vectors = rows(4, 3)
    negative = torch.from_numpy(-vectors)._neg_view()
    assert negative.is_neg()
    assert_same(index_of(negative).search(negative, 2), index_of(vectors).search(vectors, 2))
    assert_same(index_of(np.ma.masked_array(vectors)).search(vectors, 2), index_of(vectors).search(vectors, 2))


def test_properties(kind: str) -> None:
    index = index_of(rows(5, 4), dtype="bfloat16", threads=3)
    assert (len(index), index.dim, index.dtype, index.threads) == (5, 4, "bfloat16", 3)
    assert repr(index) == "CosineIndex(dim=4, dtype='bfloat16', threads=3) with 5 rows"
    assert CosineIndex(4).threads == torch.get_num_threads()


@needs_library
def test_memory() -> None:
    """An index takes at most 1.3 times the bytes of float32 vectors, in bfloat16 0.8 times. Removal frees them."""
    for d, n in ((64, 1 << 17), (128, 1 << 16), (1023, 20_000)):
        for dtype, most in (("float32", 1.3), ("bfloat16", 0.8)):
            index = index_of(rows(n, d), dtype=dtype)
            assert index.nbytes <= most * 4 * n * d + (1 << 18 if d == 64 else 0), (
                d,
                dtype,
                index.nbytes / (4 * n * d),
            )
    index.remove(range(100, n))
    assert index.nbytes < 3 << 20


NAN = rows(4, 3)
NAN[2, 1] = np.nan
BAD = [
    (lambda _: CosineIndex(0), ValueError, "dim must lie between 1 and 2147483646, got 0"),
    (lambda _: CosineIndex(2.0), TypeError, "dim must be an integer, got float"),
    (lambda _: CosineIndex(2, dtype="int8"), ValueError, "dtype must be one of 'float32', 'bfloat16', got 'int8'"),
    (lambda _: CosineIndex(2, threads=0), ValueError, "threads must lie between 1 and 1024, got 0"),
    (lambda i: i.add(rows(2, 4)), ValueError, r"vectors must have shape \[n, 3\], got \[2, 4\]"),
    (lambda i: i.add(rows(1, 3)[0]), ValueError, r"vectors must have 2 dimensions, .* got \[3\]"),
    (lambda i: i.add([[1, 2, 3]]), TypeError, "vectors must be float32, float64 or float16, got int64"),
    (lambda i: i.add(np.zeros((1, 3), np.longdouble)), TypeError, "vectors must .* got (longdouble|float128)"),
    (lambda i: i.add(torch.zeros(1, 3, device="meta")), ValueError, "vectors must be on the CPU, got meta; pass"),
    (lambda i: i.add(torch.zeros(1, 3).to_sparse()), TypeError, "vectors must be dense, got torch.sparse_coo; pass"),
    (lambda i: i.add(torch.zeros(1, 3, dtype=torch.complex64).conj()), TypeError, "vectors .* got torch.complex64"),
    (lambda i: i.add(np.ma.masked_less(rows(2, 3), 0)), TypeError, "vectors must have no masked numbers; pass"),
    (lambda i: i.add(rows(2, 3), np.ma.masked_equal([7, 8], 8)), TypeError, "ids must have no masked numbers"),
    (lambda i: i.search(np.ma.masked_less(rows(2, 3), 0), 1), TypeError, "query must have no masked numbers"),
    (copy.copy, TypeError, r"a CosineIndex is neither copied nor pickled: save\(path\) and .*load\(path\)"),
    (copy.deepcopy, TypeError, "a CosineIndex is neither copied nor pickled"),
    (pickle.dumps, TypeError, "a CosineIndex is neither copied nor pickled"),
    (lambda i: i.add(NAN), ValueError, "vectors row 2 holds nan or inf"),
    (lambda i: i.add([[0.0, 0.0, 0.0], [0.0, 1e300, 0.0]]), ValueError, "vectors row 1 holds nan or inf"),
    (lambda i: i.add(rows(2, 3), [8]), ValueError, r"vectors has 2 rows, ids has shape \[1\]"),
    (lambda i: i.add(rows(2, 3), [[8, 9]]), ValueError, r"ids must have one dim.* \[1, 2\]; pass ids.ravel\(\)"),
    (lambda i: i.add(rows(2, 3), [8.0, 9.0]), TypeError, "ids must be integers, got float64"),
    (lambda i: i.add(rows(2, 3), [8, -1]), ValueError, r"ids must lie between 0 and 2\^63 - 2, got -1"),
    (lambda i: i.add(rows(1, 3), [2**63 - 1]), ValueError, r"ids must lie .* got 9223372036854775807"),
    (lambda i: i.add(rows(1, 3), np.array([2**64 - 1], np.uint64)), ValueError, "ids must .* got 18446744073709551615"),
    (lambda i: i.add(rows(2, 3), [8, 1]), ValueError, "id 1 is in the index already"),
    (lambda i: i.add(rows(3, 3), [8, 9, 8]), ValueError, "id 8 is given twice"),
    (lambda i: i.search(rows(1, 2), 1), ValueError, r"query must have shape \[n, 3\], got \[1, 2\]"),
    (lambda i: i.search(NAN, 1), ValueError, "query row 2 holds nan or inf"),
    (lambda i: i.search(rows(1, 3), 0), ValueError, "k must lie between 1 and 2147483647, got 0"),
    (lambda i: i.search(rows(1, 3), 2**31), ValueError, "k must lie between 1 and 2147483647, got 2147483648"),
    (lambda i: i.search(rows(1, 3), 1.0), TypeError, "k must be an integer, got float"),
    (lambda i: i.search(rows(1, 3), True), TypeError, "k must be an integer, got bool"),
    (lambda i: i.remove([1, 77]), KeyError, "id 77 is not in the index"),
    (lambda i: i.remove([1, -1]), KeyError, "id -1 is not in the index"),
    (lambda i: i.remove([1, 2, 1]), ValueError, "id 1 is given twice"),
    (lambda i: i.remove([[1]]), ValueError, r"ids must have one dimension, .* got shape \[1, 1\]"),
    (lambda i: i.save("/nowhere/at/all"), FileNotFoundError, "No such file or directory: '/nowhere/at/all'"),
    (lambda i: CosineIndex.load("/nowhere/at/all"), FileNotFoundError, "No such file or directory: '/nowhere/at/all'"),
    (lambda i: CosineIndex.load(os.curdir), ValueError, r"\. is not an index, or damaged: it is not a regular file"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
@pytest.mark.parametrize("ids", [None, [4, 1, 2]], ids=["counted", "any order"])
def test_refused_calls_leave_the_index_unchanged(kind: str, call, error, message, ids) -> None:
    index = index_of(rows(3, 3), ids)
    before = index.search(rows(2, 3, 1), 5)
    with pytest.raises(error, match=message):
        call(index)
    assert len(index) == 3
    assert_same(index.search(rows(2, 3, 1), 5), before)
    index.add(rows(1, 3, 2))
    assert index.search(rows(1, 3, 2), 1)[1] == (3 if ids is None else 5)


def test_the_last_id(kind: str) -> None:
    index = index_of(rows(1, 3), [2**63 - 2])
    with pytest.raises(ValueError, match="no ids are left above 9223372036854775806"):
        index.add(rows(1, 3))
    assert len(index) == 1


# ---- files


@pytest.fixture(params=[(dtype, order) for dtype in DTYPES for order in ("counted", "any order")], ids=str)
def saved(request, kind: str, tmp_path: Path) -> tuple[CosineIndex, Path]:
    dtype, order = request.param
    ids = None if order == "counted" else np.random.default_rng(3).permutation(700) * 11
    index = index_of(rows(700, 21), ids, dtype=dtype)
    index.remove([0, 110])
    index.save(tmp_path / "index")
    return index, tmp_path / "index"


def test_round_trip(saved, kind: str) -> None:
    index, path = saved
    again = CosineIndex.load(path, threads=2)
    assert (len(again), again.dim, again.dtype, again.threads) == (698, 21, index.dtype, 2)
    query = rows(8, 21, 1)
    assert_same(again.search(query, 30), index.search(query, 30))
    before = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == before
    more = rows(1, 21, 2)
    again.add(more)
    index.add(more)
    assert_same(again.search(more, 3), index.search(more, 3))
    assert os.listdir(path.parent) == ["index"]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_library_and_reference_write_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    vectors = np.sign(rows(300, 16))  # normalised rows without rounding, in either dtype
    paths = [os.fsencode(tmp_path / name) for name in ("library", "plain")]
    for kind, path in zip((_native.library.CosineIndex, PlainIndex), paths, strict=True):
        index = kind(16, dtype, 1)
        index.add(vectors, np.random.default_rng(3).permutation(300) * 5)
        index.save(path)
    assert (tmp_path / "library").read_bytes() == (tmp_path / "plain").read_bytes()
    ours, theirs = _native.library.CosineIndex.load(paths[1], 1), PlainIndex.load(paths[0], 1)
    assert_same(ours.search(vectors[:9], 7), theirs.search(vectors[:9], 7))


def test_every_damage_is_detected(saved) -> None:
    _, path = saved
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(64), *rng.integers(64, len(whole), 60)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not an index, or damaged: "):
            CosineIndex.load(path)
    for size in [0, 1, 63, 64, 65, *rng.integers(66, len(whole), 20), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not an index, or damaged: "):
            CosineIndex.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="bytes, which its header contradicts"):
        CosineIndex.load(path)


FIELDS = {"version": (8, "<I"), "type": (12, "<I"), "dim": (16, "<q"), "rows": (24, "<q"), "next": (32, "<q")}


def forge(whole: bytes, *changes: tuple[int, str, float]) -> bytes:
    """Returns the bytes of a file with changed fields and matching checksums, as an attacker would write them."""
    data = bytearray(whole)
    for at, form, value in changes:
        struct.pack_into(form, data, at, value)
    struct.pack_into("<I", data, 40, zlib.crc32(data[64:]))
    struct.pack_into("<I", data, 60, zlib.crc32(data[:60]))
    return bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version", 2), "it is of version 2, expected 1"),
        (("type", 2), "its row type must be 0"),
        (("type", 1), "which its header contradicts"),
        (("dim", 0), "its dim must lie in"),
        (("dim", 2**40), "its dim must lie in"),
        (("dim", 22), "which its header contradicts"),
        (("rows", -1), "its number of rows or its next id is out of range"),
        (("rows", 2**62), "its number of rows or its next id is out of range"),
        (("rows", 2**40), "which its header contradicts"),
        (("rows", 3), "which its header contradicts"),
        (("next", -1), "its number of rows or its next id is out of range"),
        (("next", 3), "its next id must be above all of its ids"),
        ((44, "<I", 1), "a reserved field of the header is not 0"),
        ((64, "<q", -1), r"ids must lie between 0 and 2\^63 - 2, got -1"),
        ((64, "<q", 2**63 - 1), "ids must lie .* got 9223372036854775807"),
        ((64, "<q", 2), "id 2 is (given twice|in the index already)"),
        ((64 + 5 * 8, "<f", 2.0), "row 0 must have length 1 or 0"),
        ((64 + 5 * 8, "<f", float("nan")), "row 0 must have length 1 or 0"),
        ((64 + 5 * 8 + 4 * 21 + 4, "<f", float("inf")), "row 1 must have length 1 or 0"),
        ((64 + 5 * 8 + 4 * 21, "<f", 3e38), "row 1 must have length 1 or 0"),
    ],
    ids=str,
)
def test_forged_files(kind: str, tmp_path: Path, change: tuple[object, ...], message: str) -> None:
    path = tmp_path / "index"
    index_of(rows(5, 21)).save(path)
    if len(change) == 2:
        change = (*FIELDS[str(change[0])], change[1])
    path.write_bytes(forge(path.read_bytes(), change))
    with pytest.raises(ValueError, match=message):
        CosineIndex.load(path)


def test_loading_a_pipe_does_not_block(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is not a regular file"):
        CosineIndex.load(tmp_path / "pipe")


def test_a_failed_save_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "index"
    index_of(rows(3, 4)).save(path)
    before = path.read_bytes()
    native = "1" if kind == "library" else "0"
    code = (
        "import numpy as np, resource, sys, simplexfix\n"
        "index = simplexfix.CosineIndex(64); index.add(np.ones((1000, 64), np.float32))\n"
        # Python ignores SIGXFSZ, so write fails with an error
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: index.save(sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    environment = {**os.environ, "SIMPLEXFIX_NATIVE": native}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n", done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["index"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        index_of(rows(3, 4)).save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "index"]


def test_saving_keeps_the_mode_and_the_links_of_the_file_it_replaces(kind: str, tmp_path: Path) -> None:
    path, links = tmp_path / "index", tmp_path / "links"
    links.mkdir()
    index = index_of(rows(3, 4))
    umask = os.umask(0o022)
    try:
        for mode in (0o600, 0o666):  # narrower and wider than the mode of a new file
            path.touch()
            path.chmod(mode)
            index.save(path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
        index.save(tmp_path / "new")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o644
    finally:
        os.umask(umask)
    (links / "first").symlink_to("second")
    (links / "second").symlink_to("../index")
    (links / "to be").symlink_to("../later")
    index_of(rows(5, 4)).save(links / "first")
    index_of(rows(7, 4)).save(links / "to be")
    assert len(CosineIndex.load(path)) == 5
    assert len(CosineIndex.load(tmp_path / "later")) == 7
    assert sorted(os.listdir(links)) == ["first", "second", "to be"]
    assert all(link.is_symlink() for link in links.iterdir())
    assert sorted(os.listdir(tmp_path)) == ["index", "later", "links", "new"]


def special(kind_of_file: str, path: Path) -> None:
    """Creates a special file; the character device has the numbers of /dev/null."""
    if kind_of_file == "directory":
        path.mkdir()
    elif kind_of_file == "pipe":
        os.mkfifo(path)
    elif kind_of_file == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        character = kind_of_file == "character device"
        try:
            if character:
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            else:
                os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 250))
        except PermissionError:
            pytest.skip("only root makes devices")


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "behind a link"])
@pytest.mark.parametrize("kind_of_file", ["directory", "pipe", "socket", "character device", "block device"])
def test_saving_onto_a_special_file_is_refused(kind: str, kind_of_file: str, linked: bool, tmp_path: Path) -> None:
    special(kind_of_file, tmp_path / "special")
    before = os.lstat(tmp_path / "special")
    path = tmp_path / ("link" if linked else "special")
    if linked:
        path.symlink_to("special")
    error = IsADirectoryError if kind_of_file == "directory" else OSError
    with pytest.raises(error, match=f"saved as a regular file, and this is a {kind_of_file}: '{path}'"):
        index_of(rows(3, 4)).save(path)
    assert os.path.samestat(os.lstat(tmp_path / "special"), before)
    assert sorted(os.listdir(tmp_path)) == (["link", "special"] if linked else ["special"])
    assert path.is_symlink() == linked


def test_saving_onto_a_descriptor(kind: str, tmp_path: Path) -> None:
    """/dev/stdout and >(...) are links in /proc whose targets may not be paths."""
    read, write = os.pipe()
    with open(tmp_path / "deleted", "wb") as file, os.fdopen(read), os.fdopen(write, "w"):
        os.unlink(tmp_path / "deleted")
        for descriptor, message in ((write, "this is a pipe"), (file.fileno(), "the path links to a deleted file")):
            with pytest.raises(OSError, match=message):
                index_of(rows(3, 4)).save(f"/proc/self/fd/{descriptor}")
    assert not os.listdir(tmp_path)
    with open(tmp_path / "there", "wb") as file:
        index_of(rows(3, 4)).save(f"/proc/self/fd/{file.fileno()}")
    assert len(CosineIndex.load(tmp_path / "there")) == 3


def test_file_names_of_maximum_length(kind: str, tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127, "名" * 85):
        index_of(rows(3, 4)).save(tmp_path / name)
        assert len(CosineIndex.load(tmp_path / name)) == 3
        assert os.listdir(tmp_path) == [name]
        (tmp_path / "link").symlink_to(name)
        index_of(rows(5, 4)).save(tmp_path / "link")
        assert len(CosineIndex.load(tmp_path / name)) == 5
        (tmp_path / "link").unlink()
        (tmp_path / name).unlink()
    with pytest.raises(OSError, match=r"File name too long: '.*nnn'"):
        index_of(rows(3, 4)).save(tmp_path / ("n" * 256))
    assert not os.listdir(tmp_path)


# ---- threads


def test_searches_during_concurrent_changes(kind: str, tmp_path: Path) -> None:
    """A search sees the rows of whole additions and removals, never a part of one."""
    vectors, query = rows(2400, 16), rows(5, 16, 1)
    steps = [index_of(vectors[:n]).search(query, 10) if n else None for n in range(0, 2401, 200)]
    index = CosineIndex(16)
    index.add(vectors[:200])
    running, failures, seen = threading.Event(), [], set()
    running.set()

    def work(task) -> None:
        try:
            while running.is_set():
                task()
        except BaseException as error:
            failures.append(error)

    def search() -> None:
        got = index.search(query, 10)
        matches = [i for i, step in enumerate(steps) if step and all(map(np.array_equal, got, step))]
        assert matches
        seen.update(matches)

    def save() -> None:
        path = tmp_path / f"{threading.get_ident()}"
        index.save(path)
        assert len(CosineIndex.load(path)) % 200 == 0

    threads = [threading.Thread(target=work, args=(task,)) for task in (search, search, save)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        for n in range(200, 2400, 200):
            index.add(vectors[n : n + 200], range(n, n + 200))
            time.sleep(0.002)
        for n in range(2200, 0, -200):
            index.remove(range(n, n + 200))
    running.clear()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert len(seen) > 1


@needs_library
def test_other_python_threads_run_meanwhile() -> None:
    index = index_of(rows(20_000, 64), threads=1)
    query = rows(1500, 64, 1)
    start = time.thread_time()
    for _ in range(10_000):
        pass
    a_loop = time.thread_time() - start
    thread = threading.Thread(target=index.search, args=(query, 1000))
    count = 0
    thread.start()
    while thread.is_alive():
        for _ in range(10_000):
            pass
        count += 1
    # if the search held the GIL, the loop would run only for the 5 ms until Python's first thread switch
    assert count * a_loop > 0.03


def test_a_path_with_a_null_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null byte"):
        CosineIndex(4).save(str(tmp_path / "a\0b"))
    with pytest.raises(ValueError, match="null byte"):
        CosineIndex.load(str(tmp_path / "a\0b"))
    assert not list(tmp_path.iterdir())
