"""Reads image files with Pillow into the form that a network's preprocessing takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .inputs import Drawings, Photographs, Preprocessing

__all__ = ["SUFFIXES", "ImageFileError", "image_reader", "import_pillow", "read_images", "read_rgb"]

ImageSource: TypeAlias = "str | os.PathLike[str] | BinaryIO"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFileError(ValueError):
    """A file is damaged or is not an image; the message names it."""


def read_images(files: Sequence[ImageSource], preprocessing: Preprocessing | None) -> Tensor:
    """Reads images of any size into the form that a preprocessing takes.

    An image is rotated by its EXIF orientation, resized so that the shorter side is `preprocessing.side`, and cropped
    at the centre.  For `Photographs` it is converted to RGB.  For `Drawings` dark pixels become ink, and light or
    transparent ones paper:

        ink = 1 - grey / 255

    Args:
        files: at least one path or open binary file.
        preprocessing: preprocessing of an `EmbeddingModel`.

    Returns:
        uint8 [B, 3, side, side] for `Photographs`, float32 [B, side, side] in [0, 1] for `Drawings`.

    Raises:
        ImageFileError: a file is not an image, is damaged, or has pixels of more than 8 bits; the message names it.
        ValueError: the preprocessing is neither `Photographs` nor `Drawings`.
        ModuleNotFoundError: Pillow is not installed.
    """
    read = image_reader(preprocessing)
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        return torch.from_numpy(np.stack(list(pool.map(read, files))))


def image_reader(preprocessing: Preprocessing | None) -> Callable[[ImageSource], NDArray[Any]]:
    """Returns a function that reads one file for this preprocessing; errors are those of `read_images`."""
    import_pillow()
    if isinstance(preprocessing, Photographs):
        return partial(read_rgb, size=preprocessing.side)
    if isinstance(preprocessing, Drawings):
        return partial(_read_ink, size=preprocessing.side)
    given = "none" if preprocessing is None else type(preprocessing).__name__
    raise ValueError(
        f"image files need a model whose preprocessing is Photographs or Drawings, which define the size; "
        f"this one has {given}: save it with preprocessing="
    )


def import_pillow() -> tuple[Any, Any]:
    """Returns Pillow's modules Image and ImageOps."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "folders of images need Pillow: pip install 'simplexfix[images]'", name="PIL"
        ) from error
    return Image, ImageOps


def read_rgb(file: ImageSource, size: int) -> NDArray[np.uint8]:
    """Reads an image as RGB: [3, size, size]; an alpha channel is dropped."""
    return np.ascontiguousarray(_resized(file, size, lambda image: image.convert("RGB")).transpose(2, 0, 1))


def _read_ink(file: ImageSource, size: int) -> NDArray[np.float32]:
    """Reads a drawing as ink: [size, size] in [0, 1]."""
    return ((255 - _resized(file, size, _grey_on_white)) / 255).astype(np.float32)


def _grey_on_white(image: Any) -> Any:
    """Converts an image to grey on a white background."""
    module, _ = import_pillow()
    rgba = image.convert("RGBA")
    return module.alpha_composite(module.new("RGBA", rgba.size, "white"), rgba).convert("L")


def _resized(file: ImageSource, size: int, convert: Callable[[Any], Any]) -> NDArray[np.uint8]:
    """Reads an image, applies `convert` to it, and resizes and crops it to `size` x `size` pixels."""
    module, operations = import_pillow()
    try:
        with module.open(file) as opened:
            if opened.mode[0] in "IF":  # Pillow would clip such pixels at 255
                raise ValueError(f"pixels must be of 8 bits, got mode {opened.mode}")
            upright = convert(operations.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, EOFError, module.DecompressionBombError) as error:
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else "the image"
        raise ImageFileError(f"{name} cannot be read, it may be truncated or damaged: {error}") from error
    return np.asarray(operations.fit(upright, (size, size), method=module.Resampling.BICUBIC))
