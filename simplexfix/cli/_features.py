"""Reads features and labels from single files or from files of a version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import read_text
from ..labelled import FeatureFileError, FeatureRows, VersionFeatures, map_array

__all__ = ["read_labels", "read_rows"]


def read_rows(path: Path) -> tuple[FeatureRows, VersionFeatures | None]:
    """Reads the rows of an .npy file, or a version and the rows of its gallery.

    Returns:
        The rows, and the version or None.

    Raises:
        OSError: the file cannot be read.
        FeatureFileError: the file holds no features; the message names it.
    """
    if path.suffix != ".npy":
        version = VersionFeatures.load(path)
        return version.gallery, version
    try:
        rows = FeatureRows(str(path), map_array(path.parent, path.stem))
    except TypeError as error:
        raise FeatureFileError(str(error)) from None
    if not len(rows):
        raise FeatureFileError(f"{path} has no rows")
    return rows, None


def read_labels(path: Path) -> NDArray[Any]:
    """Reads labels [N] from an .npy file, or from a text file with one label per line."""
    if path.suffix == ".npy":
        return map_array(path.parent, path.stem)
    try:
        return np.array(read_text(path).splitlines())
    except ValueError as error:
        raise FeatureFileError(f"{os.fspath(path)}: {error}") from None
