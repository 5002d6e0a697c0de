"""A folder of images per class, read with Pillow."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_integer

__all__ = ["ImageFileError", "ImageFolder", "load_image_folder"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFileError(ValueError):
    """A file among the images is none, or damaged; the message names it."""


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images of all classes, in memory: 3 * size^2 bytes each.

    Attributes:
        images: uint8 [N, 3, size, size]: red, green, blue.
        labels: int64 [N]: positions in `class_names`.
        class_names: the names of the class folders, sorted.
        files: [N] where each image is from, sorted within its class.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    files: tuple[Path, ...]


def load_image_folder(path: str | os.PathLike[str], *, size: int) -> ImageFolder:
    """Reads `path/CLASS/.../IMAGE` for every folder CLASS.

    An image is turned upright by its EXIF orientation, converted to RGB (transparency is dropped), scaled, bicubic with
    antialiasing, for its shorter side to be `size`, and its middle is cut out.  Of an animation the first frame counts.
    Files beside the class folders, and whatever begins with a dot, are passed over.

    Args:
        path: the folder of class folders.
        size: side of the images in pixels.

    Raises:
        FileNotFoundError: no such folder, or no class folder in it.
        ImageFileError: a class without images; a file that is no image by its suffix, that cannot be read, or whose
            pixels are not of 8 bits.
        ValueError: a size below 1.
        ModuleNotFoundError: Pillow is not installed.
    """
    if check_integer("size", size) < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; expected one with a folder of images for each class")
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise FileNotFoundError(f"{root} has no folders; expected one for each class, with its images")
    of_class = [_files(folder) for folder in classes]
    files = [file for group in of_class for file in group]
    images = np.empty((len(files), 3, size, size), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        for i, image in enumerate(pool.map(partial(_read, _pillow(), size), files)):
            images[i] = image
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(group) for group in of_class])
    return ImageFolder(images, labels, tuple(folder.name for folder in classes), tuple(files))


def _files(folder: Path) -> list[Path]:
    inside = [p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files = sorted(p for p in inside if not p.is_dir())
    strangers = [file for file in files if file.suffix.lower() not in SUFFIXES]
    if strangers:
        raise ImageFileError(f"{strangers[0]} is no image; expected {', '.join(SUFFIXES)}")
    if not files:
        raise ImageFileError(f"{folder} has no images; a class has at least one")
    return files


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "folders of images need Pillow: pip install 'simplexfix[images]'", name="PIL"
        ) from error
    return Image, ImageOps


def _read(pillow: tuple[Any, Any], size: int, file: Path) -> NDArray[np.uint8]:
    """[3, size, size]."""
    image_module, operations = pillow
    try:
        with image_module.open(file) as opened:
            if opened.mode[0] in "IF":  # which Pillow would cut off at 255
                raise ValueError(f"pixels must be of 8 bits, got mode {opened.mode}")
            upright = operations.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, image_module.DecompressionBombError) as error:
        raise ImageFileError(f"{file} cannot be read, it may be truncated or damaged: {error}") from error
    fitted = operations.fit(upright, (size, size), method=image_module.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))
