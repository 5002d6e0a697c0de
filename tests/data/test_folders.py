"""Tests image folders: classes, order, kinds of files and pixels, and errors that name the file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from simplexfix.data import ImageFileError, ImageFolderDataset, load_image_folder

Image = pytest.importorskip("PIL.Image", reason="folders of images are read with Pillow")


def save(path: Path, color, *, size=(12, 12), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def test_classes_order_and_skipped_files(tmp_path) -> None:
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


def test_images_of_the_given_size_keep_every_byte_and_others_their_middle(tmp_path) -> None:
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
    # scaled with antialiasing: every output pixel is near the mean of the pixels that it covers
    board = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    (tmp_path / "d").mkdir()
    Image.fromarray(board).save(tmp_path / "d" / "a.png")
    assert abs(load_image_folder(tmp_path, size=4).images[3].astype(int) - 127).max() < 20


def test_other_modes_become_rgb_and_exif_rotations_are_applied(tmp_path) -> None:
    save(tmp_path / "c" / "a.png", 77, mode="L")
    save(tmp_path / "c" / "b.png", (10, 20, 30, 0), mode="RGBA")
    save(tmp_path / "c" / "d.gif", 1, mode="1")
    picture = Image.new("RGB", (16, 16), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 16, 8))  # upper half white
    exif = Image.Exif()
    exif[0x0112] = 6  # with a tag that rotates by 90 degrees clockwise
    picture.save(tmp_path / "c" / "e.jpg", exif=exif, quality=100)
    found = load_image_folder(tmp_path, size=12).images
    assert (found[0] == 77).all()
    assert found[1][:, 0, 0].tolist() == [10, 20, 30]
    assert (found[2] == 255).all()
    assert found[3][:, :, 9:].min() > 240  # the upper half has become the right half
    assert found[3][:, :, :3].max() < 15


def test_bad_folders_and_images_are_named(tmp_path) -> None:
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
    with pytest.raises(ImageFileError, match=r"labels\.csv is not an image; expected \.bmp, \.gif"):
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


def test_a_missing_pillow_is_named(tmp_path, monkeypatch) -> None:
    save(tmp_path / "c" / "a.png", (1, 2, 3))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^folders of images need Pillow: pip install 'simplexfix\[images\]'$"
    ):
        load_image_folder(tmp_path, size=4)


def test_links_are_followed(tmp_path) -> None:
    """Links to folders, files and classes are followed, also two links to one folder; hidden entries are skipped."""
    for i in range(3):
        save(tmp_path / "store" / "deep" / f"{i}.png", (i, 0, 0))
    root = tmp_path / "root"
    save(root / "a" / "x" / "0.png", (9, 0, 0))
    (root / "a" / "x" / "shoot").symlink_to(tmp_path / "store")
    (root / "a" / "y").symlink_to(tmp_path / "store" / "deep")
    (root / "a" / ".hidden").symlink_to(tmp_path / "store")
    (root / "b").symlink_to(tmp_path / "store", target_is_directory=True)
    (root / "b.txt").symlink_to(tmp_path / "store" / "deep" / "0.png")  # a file beside the class folders
    save(tmp_path / "c.png", (8, 0, 0))
    (root / "c").mkdir()
    (root / "c" / "1.png").symlink_to(tmp_path / "c.png")
    found = load_image_folder(root, size=4)
    assert found.class_names == ("a", "b", "c")
    assert found.labels.tolist() == [0] * 7 + [1] * 3 + [2]
    assert found.images[:, 0, 0, 0].tolist() == [9, 0, 1, 2, 0, 1, 2, 0, 1, 2, 8]
    assert str(found.files[1]) == str(root / "a" / "x" / "shoot" / "deep" / "0.png")


@pytest.mark.parametrize("place", ["a/up", "a/x/up", "a/x/self", "whole"])
def test_a_link_to_a_folder_that_it_lies_in_is_named(tmp_path, place: str) -> None:
    save(tmp_path / "a" / "x" / "0.png", (1, 2, 3))
    target = {"a/up": tmp_path, "a/x/up": tmp_path / "a", "a/x/self": tmp_path / "a" / "x", "whole": tmp_path}[place]
    (tmp_path / place).symlink_to(target)
    with pytest.raises(ImageFileError, match=rf"{place} links to {target}, a folder that it lies in") as error:
        load_image_folder(tmp_path, size=4)
    assert "remove the link" in str(error.value)


@pytest.mark.parametrize("place", ["b", "a/b", "a/b.png", "a/x/b"])
def test_a_link_to_nothing_is_named(tmp_path, place: str) -> None:
    """A dangling link raises, also in place of a class folder."""
    save(tmp_path / "a" / "x" / "0.png", (1, 2, 3))
    (tmp_path / place).symlink_to(tmp_path / "gone")
    with pytest.raises(ImageFileError, match=rf"{place} links to {tmp_path}/gone, which cannot be followed: No such"):
        load_image_folder(tmp_path, size=4)
    (tmp_path / place).unlink()
    (tmp_path / place).symlink_to(tmp_path / place)
    with pytest.raises(ImageFileError, match=r"which cannot be followed: Too many levels"):
        load_image_folder(tmp_path, size=4)


def test_names_that_look_alike_are_one_class(tmp_path) -> None:
    """Names that differ in Unicode form or outer blanks are one class; names that differ in case are two."""
    for i, name in enumerate(("caf\u00e9", "cafe\u0301", "A", "a", "a ", " A")):
        save(tmp_path / name / f"{i}.png", (i, 0, 0))
    found = load_image_folder(tmp_path, size=4)
    assert found.class_names == ("A", "a", "caf\u00e9")
    reds = found.images[:, 0, 0, 0].tolist()
    assert {(name, red) for name, red in zip(map(found.class_names.__getitem__, found.labels), reds, strict=True)} == {
        ("A", 2),
        ("A", 5),
        ("a", 3),
        ("a", 4),
        ("caf\u00e9", 0),
        ("caf\u00e9", 1),
    }
    assert found.labels.tolist() == sorted(found.labels.tolist())
    save(tmp_path / " " / "0.png", (1, 2, 3))
    with pytest.raises(ImageFileError, match="has a name of blanks alone; rename it"):
        load_image_folder(tmp_path, size=4)


def test_names_that_are_not_utf8_are_read_and_can_be_written(tmp_path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    content = save(tmp_path / "x.png", (7, 0, 0)).read_bytes()
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(content)
    found = load_image_folder(tmp_path, size=4)
    assert found.class_names == (r"caf\xe9",)
    assert found.images[0, 0, 0, 0] == 7
    found.class_names[0].encode()


def test_files_that_cannot_be_read_are_named_before_any_is_decoded(tmp_path, monkeypatch) -> None:
    save(tmp_path / "a" / "0.png", (1, 2, 3))
    strange = tmp_path / "a" / "1.png"
    os.mkfifo(strange)  # opening a pipe would block forever
    with pytest.raises(ImageFileError, match=r"1\.png is a device, a pipe or a socket; expected a file"):
        ImageFolderDataset(tmp_path, size=4)
    strange.unlink()
    strange.touch()
    with pytest.raises(ImageFileError, match=r"1\.png cannot be read, it may be truncated or damaged: it is empty"):
        ImageFolderDataset(tmp_path, size=4)
    strange.unlink()
    # simulates a user other than root, who may read every file
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("0.png"))
    with pytest.raises(ImageFileError, match=r"0\.png cannot be read: this user has no permission"):
        ImageFolderDataset(tmp_path, size=4)
    monkeypatch.undo()
    (tmp_path / "a" / "locked").mkdir()
    scan = os.scandir

    def refused(folder):
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ImageFileError, match=r"locked cannot be read: Permission denied"):
        ImageFolderDataset(tmp_path, size=4)


def test_a_dataset_has_the_images_of_load_image_folder(tmp_path) -> None:
    for i, name in enumerate("abcab"):
        save(tmp_path / name / f"{i}.png", (i, 2 * i, 3 * i), size=(9, 7))
    whole, items = load_image_folder(tmp_path, size=4), ImageFolderDataset(tmp_path, size=4)
    assert len(items) == 5
    assert items.class_names == whole.class_names
    assert items.targets.tolist() == whole.labels.tolist()
    for i, (image, label) in enumerate(items[k] for k in range(5)):
        assert np.array_equal(image.numpy(), whole.images[i])
        assert (image.shape, label) == ((3, 4, 4), whole.labels[i])
        assert items.content(i) == whole.files[i].read_bytes()
    whole.files[0].unlink()
    with pytest.raises(ImageFileError, match=r"0\.png cannot be read"):
        items[0]
    with pytest.raises(ImageFileError, match=r"0\.png cannot be read: No such file"):
        items.content(0)
