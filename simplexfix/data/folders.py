"""Image folders with one subfolder per class, read with Pillow."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .._checks import check_integer
from .image_files import SUFFIXES, ImageFileError, import_pillow, read_rgb

__all__ = ["ImageFolder", "ImageFolderDataset", "find_images", "load_image_folder"]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images of all classes in memory, 3 * size^2 bytes each.

    Attributes:
        images: [N, 3, size, size] uint8, channels red, green, blue.
        labels: [N] int64, indices into `class_names`.
        class_names: sorted names of the classes, as in `ImageFolderDataset`.
        files: [N] path of each image, sorted within its class.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    files: tuple[Path, ...]


class ImageFolderDataset(Dataset[tuple[Tensor, int]]):
    """A map-style dataset of the images `path/CLASS/.../IMAGE`, decoded lazily.

    An image is rotated by its EXIF orientation and converted to RGB; an alpha channel is dropped.  It is resized
    (bicubic, antialiased) so that the shorter side is `size`, and cropped at the centre.  Animations give their first
    frame.  Files beside the class folders and names that begin with a dot are ignored.  Symbolic links are followed.

    The name of a class is its folder's name in Unicode form NFC, without surrounding blanks.  Folders with equal names
    form one class.  Bytes of a name that are not UTF-8 are written as `\\xNN`.

    The constructor checks all files, about 10 us each.  Reading an item may still raise ImageFileError.

    Args:
        path: the folder that holds the class folders.
        size: side of the images in pixels, at least 1.

    Attributes:
        files: [N] path of each image, sorted within its class.
        targets: [N] int64, indices into `class_names`.
        class_names: sorted names of the classes.

    Raises:
        FileNotFoundError: the folder does not exist or holds no class folder.
        ImageFileError: a class has no images or an empty name; a file has no image suffix, is empty or cannot be read;
            or a link is dangling or leads to a folder that contains it.
        ValueError: `size` is below 1.
        ModuleNotFoundError: Pillow is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, size: int) -> None:
        if check_integer("size", size) < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        import_pillow()
        of_class = _find_classes(os.fspath(path))
        self.size = size
        self.class_names = tuple(of_class)
        self.files = [file for files in of_class.values() for file in files]
        counts = torch.tensor([len(files) for files in of_class.values()])
        self.targets = torch.arange(len(of_class)).repeat_interleave(counts)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns the image [3, size, size] uint8 and its label."""
        return torch.from_numpy(read_rgb(self.files[index], self.size)), int(self.targets[index])

    def content(self, index: int) -> bytes:
        """Returns the bytes of the file, which identify the image without decoding."""
        try:
            return Path(self.files[index]).read_bytes()
        except OSError as error:
            raise ImageFileError(f"{self.files[index]} cannot be read: {error.strerror}") from None

    def in_memory(self) -> ImageFolder:
        """Decodes all images, with one thread per processor."""
        images = np.empty((len(self), 3, self.size, self.size), dtype=np.uint8)
        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
            for i, (image, _) in enumerate(pool.map(self.__getitem__, range(len(self)))):
                images[i] = image
        return ImageFolder(images, self.targets.numpy(), self.class_names, tuple(map(Path, self.files)))


def load_image_folder(path: str | os.PathLike[str], *, size: int) -> ImageFolder:
    """Reads all images of a folder into memory; see `ImageFolderDataset` for layout and preprocessing.

    Args:
        path: the folder that holds the class folders.
        size: side of the images in pixels, at least 1.

    Raises:
        FileNotFoundError, ImageFileError, ValueError, ModuleNotFoundError: as in `ImageFolderDataset`.
        ImageFileError: an image is damaged, or its pixels have more than 8 bits.
    """
    return ImageFolderDataset(path, size=size).in_memory()


def find_images(path: str | os.PathLike[str]) -> list[str]:
    """Returns the paths of all images in a folder and its subfolders, relative to the folder and sorted.

    Names that begin with a dot are ignored.  Symbolic links are followed.

    Raises:
        FileNotFoundError: the folder does not exist.
        ImageFileError: there are no images; a file has no image suffix, is empty or cannot be read; a name is not
            UTF-8; or a link is dangling or leads to a folder that contains it.
    """
    root = os.fspath(path)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is not a folder; expected one of images")
    found = [os.path.relpath(file, root) for file in _find_files(root, os.stat(root), ())]
    if not found:
        raise ImageFileError(f"{root} has no images; expected {', '.join(SUFFIXES)}")
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ImageFileError(f"{os.path.join(root, name)!r} has a name that is not UTF-8; rename it") from None
    return found


def _find_classes(root: str) -> dict[str, list[str]]:
    """Returns a dict from class name to files, both sorted."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is not a folder; expected one with a folder of images for each class")
    above = (_identity(os.stat(root)),)
    of_class: dict[str, list[str]] = {}
    for entry in _entries(root):
        found = _stat(entry)
        if not stat.S_ISDIR(found.st_mode):
            continue
        name = unicodedata.normalize("NFC", os.fsencode(entry.name).decode("utf-8", "backslashreplace")).strip()
        if not name:
            raise ImageFileError(f"class folder {entry.path!r} has a name of blanks alone; rename it")
        files = list(_find_files(entry.path, found, above))
        if not files:
            raise ImageFileError(f"{entry.path} has no images; a class has at least one")
        of_class.setdefault(name, []).extend(files)
    if not of_class:
        raise FileNotFoundError(f"{root} has no folders; expected one for each class, with its images")
    return dict(sorted(of_class.items()))


def _find_files(folder: str, found: os.stat_result, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yields all files below a folder, sorted by the components of their paths.

    Args:
        folder: path of the folder.
        found: stat result of the folder, or of its target if it is a link.
        above: device and inode of each folder above it, to detect cycles of links.
    """
    if _identity(found) in above:
        raise ImageFileError(
            f"{folder} links to {os.path.realpath(folder)}, a folder that it lies in: following it would never end; "
            "remove the link"
        )
    for entry in _entries(folder):
        inner = _stat(entry)
        if stat.S_ISDIR(inner.st_mode):
            yield from _find_files(entry.path, inner, (*above, _identity(found)))
            continue
        if os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
            raise ImageFileError(f"{entry.path} is not an image; expected {', '.join(SUFFIXES)}")
        if not stat.S_ISREG(inner.st_mode):
            raise ImageFileError(f"{entry.path} is a device, a pipe or a socket; expected a file")
        if not inner.st_size:
            raise ImageFileError(f"{entry.path} cannot be read, it may be truncated or damaged: it is empty")
        if not os.access(entry.path, os.R_OK):
            raise ImageFileError(f"{entry.path} cannot be read: this user has no permission")
        yield entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Returns the sorted entries of a folder, without names that begin with a dot."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ImageFileError(f"{folder} cannot be read: {error.strerror}") from None


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    """Returns the stat result of an entry; links are followed."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink():
            raise ImageFileError(
                f"{entry.path} links to {os.readlink(entry.path)}, which cannot be followed: {error.strerror}; "
                "put the target there, or remove the link"
            ) from None
        raise ImageFileError(f"{entry.path} cannot be read: {error.strerror}") from None


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
