"""Features and labels in single files, beside those of versions."""

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
    """The rows of an .npy file; or a version's gallery, and the version.

    Raises:
        OSError, FeatureFileError: it cannot be read, or holds no features; names it.
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
    """[N] of an .npy file, or the lines of a text."""
    if path.suffix == ".npy":
        return map_array(path.parent, path.stem)
    try:
        return np.array(read_text(path).splitlines())
    except ValueError as error:
        raise FeatureFileError(f"{os.fspath(path)}: {error}") from None
