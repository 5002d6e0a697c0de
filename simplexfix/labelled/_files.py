"""Reads features, labels, ids and groups of a version from files; docs/reference/formats.md specifies each format."""

from __future__ import annotations

import itertools
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._text import listed
from ._columns import read_ids
from ._rows import FeatureRows

__all__ = ["FeatureFileError", "find_versions", "is_version", "load_rows", "load_vectors", "map_array", "read_arrays"]

REQUIRED = ("query", "gallery", "query_labels", "gallery_labels")
KEYS = (*REQUIRED, "query_ids", "gallery_ids", "query_groups", "prefixes")
PARTS = ("query", "gallery")


class _Form(NamedTuple):
    """Names of the arrays that one kind of file must and may hold."""

    what: str
    required: tuple[str, ...]
    keys: tuple[str, ...]


VERSION = _Form("a version", REQUIRED, KEYS)
# for items with relevance judgements instead of labels
JUDGED = _Form("a version", ("query", "gallery", "query_ids", "gallery_ids"), KEYS)
FEATURES = _Form("a version", ("query", "gallery"), KEYS)
_VECTORS = _Form("a file of vectors", ("vectors",), ("vectors", "ids"))
# columns of .parquet -> suffix of the key, as in query_labels
_COLUMNS = {"label": "labels", "item_id": "ids", "group": "groups"}
_SPLIT, _VECTOR = "split", "embedding"
# RuntimeError: an encrypted member; OSError: damage that bz2 detects
_DAMAGED = (
    ValueError, OverflowError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError,
    RuntimeError, OSError,
)  # fmt: skip


class FeatureFileError(ValueError):
    """A feature file is damaged, or an array in it is missing or invalid; the message names file and array."""


def read_arrays(path: Path, form: _Form = VERSION) -> Mapping[str, Any]:
    """Returns the arrays of a version's file by key, unchecked; `.npy` arrays are read-only maps.

    Args:
        path: a file or folder, as in `VersionFeatures.load`.
        form: `VERSION`, `JUDGED` for a version without labels, or `FEATURES` for one that may lack labels and ids.

    Raises:
        OSError, FeatureFileError, ModuleNotFoundError: as in `VersionFeatures.load`.
    """
    try:
        if path.is_dir() and not any((path / f"{part}.parquet").is_file() for part in PARTS):
            arrays: Mapping[str, Any] = _read_folder(path, form)
        elif path.is_dir() and any((path / f"{key}.npy").is_file() for key in REQUIRED):
            raise FeatureFileError(f"{path} holds .npy and .parquet files: keep one of the two forms in a folder")
        elif path.is_dir() or path.suffix == ".parquet":
            arrays = _read_parquet(path, form.required)
        elif path.suffix == ".npz":
            arrays = _read_npz(path, form)
        elif path.suffix == ".safetensors":
            arrays = _read_safetensors(path, form)
        else:
            path.stat()  # raises FileNotFoundError first if there is no such file
            raise FeatureFileError(
                f"{path} must be an .npz, .safetensors or .parquet file or a folder of .npy or .parquet files"
            )
    except FeatureFileError:
        raise
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    return arrays


def _damaged(path: Path, error: Exception) -> Exception:
    # bz2 raises OSError without errno for damaged bytes; errors of the operating system have an errno
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return FeatureFileError(f"{path} cannot be read, it may be truncated or damaged: {error}")


def load_rows(folder: Path, name: str) -> tuple[FeatureRows, NDArray[np.int64]]:
    """Maps the features `NAME.npy` of a folder and reads their labels `NAME_labels.npy`.

    Args:
        folder: folder of `.npy` files.
        name: name of the features.

    Returns:
        The features [n, d] and their labels [n] int64.

    Raises:
        OSError, FeatureFileError: as in `VersionFeatures.load`.
        FeatureFileError: labels are names; their codes would differ between files.
    """
    names = name, f"{name}_labels"
    arrays = [map_array(folder, name) for name in names]
    try:
        rows = FeatureRows(name, arrays[0])
        if not len(rows):
            raise ValueError(f"{name} has no rows")
        rows.hashes()
        return rows, read_ids(names[1], arrays[1], name, len(rows))
    except (TypeError, ValueError) as error:
        raise FeatureFileError(f"{folder}: {error}") from None


def load_vectors(path: str | os.PathLike[str]) -> tuple[FeatureRows, NDArray[np.int64] | None]:
    """Reads the vectors and ids of a gallery from a file; docs/reference/formats.md specifies the formats.

    Args:
        path: an `.npz` file, a folder of `.npy` files or a `.safetensors` file with `vectors` and `ids`; a `.parquet`
            file with a column of vectors and a column `item_id`; or one `.npy` file of vectors without ids.

    Returns:
        Vectors [n, d], and ids [n] int64 or None.

    Raises:
        OSError, FeatureFileError, ModuleNotFoundError: as in `VersionFeatures.load`.
    """
    path = Path(path)
    arrays: Mapping[str, Any]
    try:
        if path.is_dir():
            arrays = _read_folder(path, _VECTORS)
        elif path.suffix == ".parquet":
            path.stat()
            table = _read_table(path)
            arrays = {"vectors": table[_vector_column(path, "it", table)]}
            if "item_id" in table.column_names:
                arrays["ids"] = table["item_id"]
        elif path.suffix == ".npy":
            arrays = {"vectors": map_array(path.parent, path.stem)}
        elif path.suffix == ".npz":
            arrays = _read_npz(path, _VECTORS)
        elif path.suffix == ".safetensors":
            arrays = _read_safetensors(path, _VECTORS)
        else:
            path.stat()
            raise FeatureFileError(
                f"{path} must be an .npz, .npy, .safetensors or .parquet file or a folder of .npy files"
            )
    except FeatureFileError:
        raise
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    try:
        rows = FeatureRows(f"{path}: vectors", arrays["vectors"])
        ids = None if "ids" not in arrays else read_ids("ids", arrays["ids"], "vectors", len(rows), unique=True)
    except (TypeError, ValueError) as error:
        raise FeatureFileError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return rows, ids


def find_versions(folder: str | os.PathLike[str]) -> list[Path]:
    """Returns the paths of the versions in a folder in natural order (v2 before v10).

    A version is an .npz, .safetensors or .parquet file, or a subfolder with .npy or .parquet files.  Other entries are
    ignored.

    Args:
        folder: folder that holds one entry per version.

    Raises:
        OSError: the folder cannot be listed.
        FeatureFileError: the folder holds no version, or two names differ only in case or leading zeros, so that their
            order is ambiguous.
    """
    folder = Path(folder)
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    found = [
        path
        for path in entries
        if (
            any(path.glob("*.npy")) or any(path.glob("*.parquet"))
            if path.is_dir()
            else path.suffix in (".npz", ".safetensors", ".parquet")
        )
    ]
    if not found:
        raise FeatureFileError(
            f"{folder} holds no versions: neither .npz, .safetensors or .parquet files, nor folders of .npy or "
            f".parquet files; it holds {listed(sorted(path.name for path in entries))}"
        )
    found.sort(key=_natural)
    for first, second in itertools.pairwise(found):
        if _natural(first) == _natural(second):
            raise FeatureFileError(
                f"{first} and {second}: their names define no order; list the versions one by one, oldest first"
            )
    return found


def is_version(path: Path) -> bool:
    """Returns whether a folder is one version, as opposed to a folder of versions."""
    return any((path / f"{name}.npy").exists() for name in REQUIRED) or any(
        (path / f"{part}.parquet").exists() for part in PARTS
    )


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    name = path.name if path.is_dir() else path.stem
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece.lstrip("0123456789")) for piece in pieces]


def _check_complete(path: Path, form: _Form, keys: Iterable[str], held: Iterable[str]) -> None:
    found = set(keys)
    missing = [key for key in form.required if key not in found]
    if missing:
        raise FeatureFileError(
            f"{path}: no {', '.join(missing)}; it holds {listed(sorted(held))}; "
            f"{form.what} needs the arrays {', '.join(form.required)}"
        )


def _read_folder(path: Path, form: _Form) -> dict[str, NDArray[Any]]:
    held = {entry.name.removesuffix(".npy") for entry in path.iterdir()}
    keys = [key for key in form.keys if (path / f"{key}.npy").is_file()]
    _check_complete(path, form, keys, held)
    return {key: map_array(path, key) for key in keys}


def map_array(folder: Path, key: str) -> NDArray[Any]:
    """Maps the array of `KEY.npy` read-only.

    Args:
        folder: folder of `.npy` files.
        key: name of the array.

    Raises:
        OSError: the file cannot be opened.
        FeatureFileError: the file is damaged or holds Python objects.
    """
    file = folder / f"{key}.npy"
    try:
        with open(file, "rb") as opened:
            _, _, dtype = _read_header(opened)
        _refuse_objects(folder, key, dtype)
        with np.errstate(over="ignore"):  # a size in a damaged header may overflow; np.load then raises
            array: NDArray[Any] = np.load(file, mmap_mode="r")
        return array
    except FeatureFileError:
        raise
    except _DAMAGED as error:
        raise _damaged(file, error) from error


def _read_npz(path: Path, form: _Form) -> dict[str, NDArray[Any]]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        held = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        _check_complete(path, form, held, held)
        for key, info in held.items():
            if key not in form.keys:
                continue
            with archive.open(info) as member:
                shape, _, dtype = _read_header(member)
                _refuse_objects(path, key, dtype)
                # Check the size before allocating, in Python's integers: a damaged header may hold any shape.
                size = member.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
            if size != info.file_size:
                raise ValueError(f"{info.filename} has {info.file_size} bytes, its header declares shape {shape}")
            with archive.open(info) as member:
                arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def _refuse_objects(path: Path, key: str, dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        remedy = (
            "save np.stack of the vectors, which must be of one length"
            if key in PARTS or not key.startswith(PARTS)
            else f"save {key}.astype(str), or the numbers that np.unique({key}, return_inverse=True)[1] gives"
        )
        raise FeatureFileError(
            f"{path}: {key} is an array of Python objects, which a file holds as a pickle, and pickles are not read; "
            f"{remedy}"
        )


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(
        f"the .npy version must be 1.0 or 2.0, got {version[0]}.{version[1]}: "
        "save a plain array of numbers with np.save"
    )


def _read_safetensors(path: Path, form: _Form) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    path.stat()
    try:
        with safe_open(path, framework="pt") as file:
            held = list(file.keys())
            _check_complete(path, form, held, held)
            return {key: file.get_tensor(key) for key in held if key in form.keys}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _read_parquet(path: Path, required: Sequence[str]) -> dict[str, Any]:
    if path.is_dir():
        missing = [part for part in PARTS if not (path / f"{part}.parquet").is_file()]
        if missing:
            raise FeatureFileError(
                f"{path}: no {missing[0]}.parquet; it holds {listed(sorted(entry.name for entry in path.iterdir()))}"
            )
        tables = {part: _read_table(path / f"{part}.parquet") for part in PARTS}
    else:
        path.stat()
        tables = _by_split(path, _read_table(path))
    arrays: dict[str, Any] = {}
    for part, table in tables.items():
        arrays[part] = table[_vector_column(path, part, table)]
        for column, end in _COLUMNS.items():
            if column in table.column_names:
                arrays[f"{part}_{end}"] = table[column]
        for column, end in _COLUMNS.items():
            if f"{part}_{end}" in required and column not in table.column_names:
                raise FeatureFileError(
                    f"{path}: {part} has no column {column}; it has {listed(sorted(table.column_names))}"
                )
    arrays.pop("gallery_groups", None)
    return arrays


def _read_table(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile  # optional package; ParquetFile ignores partition names in folder names

    try:
        return ParquetFile(path).read()
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def _by_split(path: Path, table: Any) -> dict[str, Any]:
    if _SPLIT not in table.column_names:
        raise FeatureFileError(
            f"{path}: no column {_SPLIT}, which says query or gallery of each row; it has "
            f"{listed(sorted(table.column_names))}; or save query.parquet and gallery.parquet in one folder"
        )
    values = np.asarray(table[_SPLIT].to_pylist(), dtype=object)
    others = sorted({str(value) for value in values} - set(PARTS))
    if others:
        raise FeatureFileError(f"{path}: column {_SPLIT} must be query or gallery in each row, got {listed(others)}")
    return {part: table.take(np.flatnonzero(values == part)) for part in PARTS}


def _vector_column(path: Path, part: str, table: Any) -> str:
    """Returns the name of the column of lists; with several such columns, the one called "embedding"."""
    import pyarrow.types as types

    lists = [
        field.name
        for field in table.schema
        if any(test(field.type) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list))
    ]
    if len(lists) == 1:
        return str(lists[0])
    if _VECTOR in lists:
        return _VECTOR
    if lists:
        names = listed(sorted(lists))
        raise FeatureFileError(f"{path}: {part} has several columns of lists, {names}: call one {_VECTOR}")
    raise FeatureFileError(
        f"{path}: {part} has no column of lists of numbers, which would be its features; it has "
        f"{listed(sorted(table.column_names))}"
    )
