"""Folders of images: classes, order, kinds of files and pixels, and what is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simplexfix.data import ImageFileError, load_image_folder

Image = pytest.importorskip("PIL.Image", reason="folders of images are read with Pillow")


def save(path: Path, color, *, size=(12, 12), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def test_classes_order_and_what_is_passed_over(tmp_path) -> None:
    save(tmp_path / "dog" / "b.png", (0, 0, 255))
    save(tmp_path / "dog" / "a" / "z.PNG", (0, 255, 0))
    save(tmp_path / "Cat" / "10.bmp", (255, 0, 0))
    save(tmp_path / "Cat" / "9.webp", (9, 8, 7), lossless=True)
    save(tmp_path / ".thumbnails" / "x.png", (1, 1, 1))
    save(tmp_path / "dog" / ".cache" / "x.png", (1, 1, 1))
    (tmp_path / "dog" / ".DS_Store").write_text("")
    (tmp_path / "README.txt").write_text("beside the classes")
    found = load_image_folder(str(tmp_path), size=4)
    assert found.class_names == ("Cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.labels.dtype == np.int64
    assert [str(file.relative_to(tmp_path)) for file in found.files] == [
        "Cat/10.bmp",
        "Cat/9.webp",
        "dog/a/z.PNG",
        "dog/b.png",
    ]
    assert found.images.shape == (4, 3, 4, 4)
    assert found.images.dtype == np.uint8
    for image, color in zip(found.images, [(255, 0, 0), (9, 8, 7), (0, 255, 0), (0, 0, 255)], strict=True):
        assert (image == np.array(color)[:, None, None]).all()


def test_an_image_of_its_size_keeps_every_byte_and_others_their_middle(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    (tmp_path / "c").mkdir()
    Image.fromarray(pixels).save(tmp_path / "c" / "a.png")
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = pixels  # the middle third
    Image.fromarray(wide).save(tmp_path / "c" / "b.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "c" / "c.png")
    found = load_image_folder(tmp_path, size=8).images
    assert np.array_equal(found[0], pixels.transpose(2, 0, 1))
    assert np.array_equal(found[1], found[0])
    assert np.array_equal(found[2], pixels.transpose(2, 1, 0))
    # scaled with antialiasing: every output pixel is near the mean of what it covers
    board = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    (tmp_path / "d").mkdir()
    Image.fromarray(board).save(tmp_path / "d" / "a.png")
    assert abs(load_image_folder(tmp_path, size=4).images[3].astype(int) - 127).max() < 20


def test_other_modes_become_rgb_and_cameras_pictures_stand_upright(tmp_path) -> None:
    save(tmp_path / "c" / "a.png", 77, mode="L")
    save(tmp_path / "c" / "b.png", (10, 20, 30, 0), mode="RGBA")
    save(tmp_path / "c" / "d.gif", 1, mode="1")
    picture = Image.new("RGB", (16, 16), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 16, 8))  # upper half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    picture.save(tmp_path / "c" / "e.jpg", exif=exif, quality=100)
    found = load_image_folder(tmp_path, size=12).images
    assert (found[0] == 77).all()
    assert found[1][:, 0, 0].tolist() == [10, 20, 30]
    assert (found[2] == 255).all()
    assert found[3][:, :, 9:].min() > 240  # the upper half has become the right one
    assert found[3][:, :, :3].max() < 15


def test_what_is_refused_by_name(tmp_path) -> None:
    whole = save(tmp_path / "c" / "a.png", (1, 2, 3), size=(64, 64)).read_bytes()
    file = tmp_path / "c" / "b.png"
    for content in (b"", b"GIF89a", whole[: len(whole) // 2], whole[:8] + whole[9:]):
        file.write_bytes(content)
        with pytest.raises(ImageFileError, match="cannot be read, it may be truncated or damaged") as error:
            load_image_folder(tmp_path, size=8)
        assert str(error.value).startswith(str(file))
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(file)
    with pytest.raises(ImageFileError, match=r"b\.png cannot be read.*pixels must be of 8 bits, got mode I"):
        load_image_folder(tmp_path, size=8)
    file.unlink()
    (tmp_path / "c" / "labels.csv").write_text("a.png,1")
    with pytest.raises(ImageFileError, match=r"labels\.csv is no image; expected \.bmp, \.gif"):
        load_image_folder(tmp_path, size=8)
    (tmp_path / "c" / "labels.csv").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageFileError, match="empty has no images; a class has at least one"):
        load_image_folder(tmp_path, size=8)
    with pytest.raises(FileNotFoundError, match="empty has no folders; expected one for each class"):
        load_image_folder(tmp_path / "empty", size=8)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_image_folder(tmp_path / "nowhere", size=8)
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        load_image_folder(tmp_path, size=0)
    with pytest.raises(TypeError, match="size must be an integer, got float"):
        load_image_folder(tmp_path, size=8.0)


def test_pillow_is_asked_for_when_it_is_needed(tmp_path) -> None:
    save(tmp_path / "c" / "a.png", (1, 2, 3))
    script = (
        "import sys; sys.modules['PIL'] = None\n"
        "from simplexfix.data import load_image_folder\n"
        "try: load_image_folder(sys.argv[1], size=4)\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "folders of images need Pillow: pip install 'simplexfix[images]'\n"
