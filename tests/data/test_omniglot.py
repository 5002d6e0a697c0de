"""Tests the Omniglot drawings in the package: their contents, and that the published zip files reproduce them."""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import simplexfix.data.omniglot as omniglot_module
from simplexfix.data.omniglot import Omniglot, load_omniglot

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = Path(os.environ.get("SIMPLEXFIX_DATA", REPOSITORY.parent / "shared" / "data")) / "omniglot"
ZIPS = [PUBLISHED / f"images_background_small{part}.zip" for part in (1, 2)]

CHARACTERS_OF = {
    "Balinese": 24,
    "Early_Aramaic": 22,
    "Greek": 24,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Sanskrit": 42,
    "Tagalog": 17,
}


@pytest.fixture(scope="module")
def omniglot() -> Omniglot:
    return load_omniglot()


@pytest.fixture(scope="module")
def pack_omniglot() -> ModuleType:
    pytest.importorskip("PIL", reason="Pillow reads the published drawings")
    spec = importlib.util.spec_from_file_location("pack_omniglot", REPOSITORY / "tools" / "pack_omniglot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shapes_and_dtypes(omniglot: Omniglot) -> None:
    assert omniglot.images.shape == (242, 20, 28, 28)
    assert omniglot.images.dtype == np.uint8
    assert omniglot.alphabet_of.shape == (242,)
    assert omniglot.alphabet_of.dtype == np.int64
    assert len(set(omniglot.characters)) == 242


def test_characters_of_each_alphabet(omniglot: Omniglot) -> None:
    assert list(omniglot.alphabets) == sorted(CHARACTERS_OF)
    counts = np.bincount(omniglot.alphabet_of, minlength=8).tolist()
    assert dict(zip(omniglot.alphabets, counts, strict=True)) == CHARACTERS_OF
    for name, alphabet in zip(omniglot.characters, omniglot.alphabet_of, strict=True):
        assert name.startswith(omniglot.alphabets[alphabet] + "/character")


def test_drawings_are_binary_with_plausible_amounts_of_ink(omniglot: Omniglot) -> None:
    assert np.unique(omniglot.images).tolist() == [0, 1]
    ink = omniglot.images.sum(axis=(2, 3))
    assert ink.min() >= 8, "a drawing without strokes"
    assert ink.max() < 28 * 28 // 2, "a drawing with ink and paper exchanged"


def test_the_drawings_of_a_character_differ(omniglot: Omniglot) -> None:
    # A drawing in the gallery that is also a query would be found trivially.
    for drawings in omniglot.images.reshape(242, 20, 28 * 28):
        assert len(np.unique(drawings, axis=0)) == 20


def test_each_call_returns_new_arrays(omniglot: Omniglot) -> None:
    other = load_omniglot()
    other.images[:] = 0
    assert omniglot.images.any()


def test_files_are_small_and_include_the_license() -> None:
    folder = Path(omniglot_module.__file__).parent
    files = [folder / "omniglot.npz", folder / "omniglot-LICENSE.txt", folder / "omniglot.py"]
    assert sum(file.stat().st_size for file in files) < 700_000
    assert "Copyright (c) 2015 Brenden Lake" in files[1].read_text()


def test_reduction_by_hand(pack_omniglot: ModuleType) -> None:
    """A reduced pixel covers 3.75 x 3.75 original ones, and is ink if these are ink on at least 2/5 of their area."""
    ink = np.zeros((105, 105), dtype=np.bool_)
    ink[:, 0] = True  # 1 / 3.75 = .27 of the first column
    assert not pack_omniglot.reduce_drawing(ink).any()
    ink[:, 1] = True  # 2 / 3.75 = .53
    expected = np.zeros((28, 28), dtype=np.bool_)
    expected[:, 0] = True
    np.testing.assert_array_equal(pack_omniglot.reduce_drawing(ink), expected)


@pytest.mark.skipif(not all(path.exists() for path in ZIPS), reason=f"no Omniglot zips in {PUBLISHED}")
def test_published_zips_give_the_shipped_bytes(pack_omniglot: ModuleType) -> None:
    shipped = Path(omniglot_module.__file__).with_name("omniglot.npz").read_bytes()
    assert pack_omniglot.pack(ZIPS) == shipped


def test_a_zip_without_all_drawers_is_refused(pack_omniglot: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.writestr("set/Greek/character01/0001_01.png", "")
    with pytest.raises(ValueError, match=r"Greek/character01: expected drawers 1\.\.20, got \[1\]"):
        pack_omniglot.pack([tmp_path / "one.zip"])


def test_zips_with_different_files_of_one_name_are_refused(pack_omniglot: ModuleType, tmp_path: Path) -> None:
    for part in "ab":
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            archive.writestr("set/Greek/character01/0001_01.png", part)
    with pytest.raises(ValueError, match="differs from the drawing of that name"):
        pack_omniglot.pack([tmp_path / "a.zip", tmp_path / "b.zip"])
