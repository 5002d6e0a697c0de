"""Tests finding image files in folders and reading them for a network's preprocessing."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from simplexfix.data import (
    Drawings,
    ImageFileError,
    Normalize,
    Photographs,
    Vectors,
    find_images,
    load_omniglot,
    read_images,
)

Image = pytest.importorskip("PIL.Image", reason="images are read with Pillow")
HALF = Normalize((0.5,) * 3, (0.5,) * 3)


def test_all_images_of_a_folder_are_found_in_order(tmp_path) -> None:
    for name in ("b.png", "a/z.PNG", "a/b/c.jpg", ".hidden/x.png", "a/.x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "c").symlink_to(tmp_path / "a" / "b")
    assert find_images(tmp_path) == ["a/b/c.jpg", "a/z.PNG", "b.png", "c/c.jpg"]
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    with pytest.raises(ImageFileError, match=r"back links to .*, a folder that it lies in"):
        find_images(tmp_path)
    (tmp_path / "a" / "back").unlink()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(ImageFileError, match=r"notes\.txt is not an image; expected"):
        find_images(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageFileError, match="empty has no images"):
        find_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"b\.png is not a folder; expected one of images"):
        find_images(tmp_path / "b.png")
    not_utf8 = os.fsencode(tmp_path / "empty") + b"/\xff.png"
    Path(os.fsdecode(not_utf8)).write_bytes((tmp_path / "b.png").read_bytes())
    with pytest.raises(ImageFileError, match="has a name that is not UTF-8; rename it"):
        find_images(tmp_path / "empty")


def test_photographs_are_read_as_rgb_and_drawings_as_ink(tmp_path) -> None:
    """Ink is 1 and paper 0, for black on white and for opaque on transparent."""
    red = tmp_path / "red.png"
    Image.new("RGB", (20, 10), (255, 0, 0)).save(red)
    rows = read_images([red, str(red)], Photographs(4, HALF))
    assert (rows.dtype, rows.shape) == (torch.uint8, (2, 3, 4, 4))
    assert rows[1, :, 0, 0].tolist() == [255, 0, 0]
    drawing = load_omniglot().images[3, 2]
    transparent_paper = np.zeros((28, 28, 4), np.uint8)  # RGBA; the ink is opaque black
    transparent_paper[..., 3] = 255 * drawing
    for pixels in (255 * (1 - drawing), transparent_paper):
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
        ink = read_images([file], Drawings(28))
        assert ink.dtype == torch.float32
        assert torch.equal(ink[0], torch.from_numpy(drawing).float())


def test_errors_name_the_unreadable_image_or_the_wrong_preprocessing(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ImageFileError, match=r"a\.png cannot be read, it may be truncated or damaged"):
        read_images([tmp_path / "a.png"], Drawings(4))
    with pytest.raises(ImageFileError, match=r"none\.png cannot be read.*No such file"):
        read_images([tmp_path / "none.png"], Drawings(4))
    with pytest.raises(ImageFileError, match="the image cannot be read"):
        read_images([io.BytesIO(b"GIF89a")], Drawings(4))
    for preprocessing, given in ((None, "none"), (HALF, "Normalize"), (Vectors(3), "Vectors")):
        with pytest.raises(
            ValueError, match=f"Photographs or Drawings, which define the size; this one has {given}: save it"
        ):
            read_images([tmp_path / "a.png"], preprocessing)
