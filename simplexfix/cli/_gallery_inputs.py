"""Inputs of `simplexfix gallery`: files of vectors or features, folders of images, and tables of payload."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import read_text
from ..data import find_images
from ..data.image_files import SUFFIXES
from ..gallery import Gallery
from ..gallery._input import read_unique_ids
from ..labelled import FeatureRows, load_vectors
from ._embedder import Embedder

__all__ = [
    "PATH", "FileRows", "FolderImages", "ImageItem", "embedded_images", "image_items", "image_names", "is_images",
    "payloads", "read_table",
]  # fmt: skip

PATH = "path"  # payload key of an image's path relative to its folder
_ROWS = 4096  # rows per read of payload
_IMAGES = 256  # images in memory at a time


def is_images(path: Path) -> bool:
    """Returns whether the path is a folder of images; a folder of .npy files is not."""
    return path.is_dir() and not (path / "vectors.npy").exists()


def image_names(path: Path) -> list[str] | None:
    """Returns the name of an image, or those of all images in a folder, sorted; None for a path of vectors."""
    if is_images(path):
        return find_images(path)
    return [path.name] if path.suffix.lower() in SUFFIXES and not path.is_dir() else None


def embedded_images(path: Path, names: Sequence[str], embedder: Embedder) -> Iterator[NDArray[np.float32]]:
    """Yields the vectors of the images that `image_names` has found, block by block.

    Raises:
        ImageFileError: an image cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    for begin in range(0, len(names), _IMAGES):
        _, vectors, errors = embedder.images([folder / name for name in names[begin : begin + _IMAGES]])
        if errors:
            raise errors[0]
        yield vectors


class FileRows:
    """The vectors of a file by id.  With an embedder the file holds features, which are embedded when they are read."""

    def __init__(self, path: Path, embedder: Embedder | None) -> None:
        rows, ids = load_vectors(path)
        if ids is None:
            raise ValueError(f"{path} has no ids: the gallery stores and replaces rows by them")
        self.ids = ids
        self._rows: FeatureRows = rows
        self._embedder = embedder
        self._order = np.argsort(ids)

    def all_vectors(self) -> Any:
        return self._vectors(self._rows)

    def vectors(self, gallery: Gallery, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
        """Returns those of the ids that the file has, and their vectors."""
        if not len(self.ids):
            return ids[:0], None
        place = self._order[np.searchsorted(self.ids, ids, sorter=self._order).clip(max=len(self.ids) - 1)]
        known = self.ids[place] == ids
        return ids[known], self._vectors(self._rows.take(place[known])) if known.any() else None

    def _vectors(self, rows: FeatureRows) -> Any:
        return rows.tensor() if self._embedder is None else self._embedder.features(rows)


class FolderImages:
    """The images in a folder; the payload of a row has the path of its image.

    Attributes:
        unreadable: messages about files that are damaged or missing; `complain` is called with each of them.
    """

    def __init__(self, folder: Path, embedder: Embedder, complain: Callable[[str], None]) -> None:
        self.unreadable: list[str] = []
        self._folder = folder
        self._embedder = embedder
        self._complain = complain

    def vectors(self, gallery: Gallery, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
        """Returns those of the ids whose images can be read, and their vectors."""
        paths = [payload.get(PATH) for payload in payloads(gallery, ids)]
        named = [at for at, path in enumerate(paths) if _is_inside(path)]
        kept, vectors = self.embed([str(paths[at]) for at in named])
        return ids[[named[at] for at in kept]], vectors

    def embed(self, paths: Sequence[str]) -> tuple[list[int], NDArray[np.float32]]:
        """Returns the positions of the images that can be read, and their vectors."""
        kept, vectors, errors = self._embedder.images([self._folder / path for path in paths])
        for error in errors:
            self._complain(str(error))
            self.unreadable.append(str(error))
        return kept, vectors


@dataclass(frozen=True)
class ImageItem:
    """An image to add; its payload has its path."""

    id: int
    payload: dict[str, Any]


def image_items(gallery: Gallery, folder: Path, table: Path | None) -> tuple[list[ImageItem], int]:
    """Returns the images whose paths the gallery lacks, and the number of images that it has already.

    Ids are those of the table.  Without them, the images get the numbers after the largest id of the gallery, in order.

    Raises:
        OSError, ImageFileError: as in `find_images`.
        ValueError: a row of the table has no path, or a path outside the folder; only some rows have an id; a path or
            an id is given twice; or an id is that of another row of the gallery.
    """
    rows: list[dict[str, Any]] = [{PATH: path} for path in find_images(folder)] if table is None else read_table(table)
    paths = [row.get(PATH) for row in rows]
    for number, path in enumerate(paths):
        if not _is_inside(path):
            raise ValueError(f"{table} row {number} must have a {PATH} in {folder}, without .. in it, got {path!r}")
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise ValueError(f"{table} has the {PATH} {twice[0]!r} twice")
    stored = gallery.ids()
    there = {
        payload[PATH]: id_
        for id_, payload in zip(stored.tolist(), payloads(gallery, stored), strict=True)
        if isinstance(payload.get(PATH), str)
    }
    first = int(stored.max()) + 1 if len(stored) else 0
    has_ids = ["id" in row for row in rows]
    if any(has_ids) and not all(has_ids):
        raise ValueError(f"{table} row {has_ids.index(False)} has no id, others have one")
    items: list[ImageItem] = []
    for row in rows:
        id_ = row.pop("id", None)
        if row[PATH] not in there:
            items.append(ImageItem(first + len(items) if id_ is None else id_, row))
        elif id_ not in (None, there[row[PATH]]):
            raise ValueError(f"{row[PATH]} has id {id_} in {table} and {there[row[PATH]]} in the gallery")
    taken = np.intersect1d(stored, read_unique_ids(f"ids of {table}", [item.id for item in items]))
    if len(taken):
        raise ValueError(f"id {taken[0]} of {table} is another row of the gallery")
    return items, len(rows) - len(items)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Reads rows from a .json list of objects or a .csv table; columns of numbers in a .csv table become numbers.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is neither; the message names it.
    """
    try:
        text = read_text(path)
        rows = _csv_rows(text) if path.suffix == ".csv" else json.loads(text)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not {'a table' if path.suffix == '.csv' else 'JSON'}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of objects, one for each row, or be a .csv table")
    return rows


def payloads(gallery: Gallery, ids: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Returns the payload of each row; it is empty if the row was removed meanwhile."""
    found: list[dict[str, Any]] = []
    for begin in range(0, len(ids), _ROWS):
        some = ids[begin : begin + _ROWS]
        try:
            found += gallery.read(some).payload
        except (KeyError, ValueError):  # a row was removed, or the rows have different widths
            for id_ in some:
                try:
                    found += gallery.read([id_]).payload
                except KeyError:
                    found.append({})
    return found


def _is_inside(path: object) -> bool:
    if not isinstance(path, str) or not path or "\0" in path:
        return False
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def _csv_rows(text: str) -> list[dict[str, Any]]:
    names, *lines = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"its first line must have the names of the columns, each once, got {names}")
    for number, line in enumerate(lines):
        if len(line) != len(names):
            raise ValueError(f"row {number} has {len(line)} values for {len(names)} columns")
    columns = [_numbers([line[at] for line in lines]) for at in range(len(names))]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _numbers(column: list[str]) -> list[Any]:
    """Converts a column to integers or finite floats if all its values are JSON numbers; 007 stays text."""
    try:
        values = [json.loads(value, parse_constant=_refuse) for value in column]
    except ValueError:
        return list(column)
    return values if all(type(value) in (int, float) for value in values) else list(column)


def _refuse(name: str) -> Any:
    raise ValueError(name)
