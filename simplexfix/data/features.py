"""Features of model versions from files: `.npz`, a folder of `.npy`, or `.safetensors`; mapped where possible.

Keys, or names of files without `.npy`:

    query           [Q, d] floating       gallery           [N, d], of the same dtype and width
    query_labels    [Q] integers          gallery_labels    [N] integers
    query_groups    [Q] integers or strings, optional: groups of queries that rules may be made for
"""

from __future__ import annotations

import itertools
import lzma
import mmap
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "FeatureFileError",
    "Features",
    "check_alike",
    "check_same_items",
    "find_versions",
    "load_features",
    "load_labelled",
]

REQUIRED = ("query", "gallery", "query_labels", "gallery_labels")
OPTIONAL = ("query_groups",)
CHUNK = 16 << 20  # bytes looked at together
# RuntimeError: an encrypted member; OSError: damage that bz2 finds
_DAMAGED = (
    ValueError, OverflowError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError,
    RuntimeError, OSError,
)  # fmt: skip


class FeatureFileError(ValueError):
    """A feature file is damaged, or what it holds is not features and labels; the message names file and array."""


@dataclass(frozen=True, eq=False)
class Features:
    """Features and labels of one version, checked.  Tensors may share memory with a mapped file: do not write to them.

    Attributes:
        path: where they are from.
        query: [Q, d] floating, finite.
        gallery: [N, d], of the same dtype, finite.
        query_labels: [Q] int64.
        gallery_labels: [N] int64.
        query_groups: [Q] integers or strings; None if there are none.
        zero_rows: how many rows of query and gallery are all zero: they have no direction, and find what comes first.
    """

    path: Path
    query: Tensor
    gallery: Tensor
    query_labels: Tensor
    gallery_labels: Tensor
    query_groups: NDArray[Any] | None
    zero_rows: tuple[int, int]

    def rows(self, part: str) -> NDArray[Any] | Tensor:
        """ "query" or "gallery" for reading alone: of a folder a read-only map, whose pages a pass can give back."""
        if self.path.is_dir():
            array: NDArray[Any] = np.load(self.path / f"{part}.npy", mmap_mode="r")
            return array
        tensor: Tensor = getattr(self, part)
        return tensor


def load_features(path: str | os.PathLike[str]) -> Features:
    """Reads and checks the features of one version.

    `.npy` and `.safetensors` are mapped, not read; an `.npz`, whose arrays lie at odd addresses, is read into memory.

    Args:
        path: an `.npz` file, a folder of `.npy` files, or a `.safetensors` file.

    Raises:
        FileNotFoundError, OSError: it cannot be opened.
        FeatureFileError: an unreadable or truncated file; an array that is missing or of pickled objects; features that
            are not [rows, d] floats, of two dtypes or widths, or hold nan, inf or what is that, or nothing, in float32,
            by row; labels that are not integers, or not one per row.
        ModuleNotFoundError: `.safetensors`, and the package of this name is not installed.
    """
    path = Path(path)
    arrays = _read(path)
    missing = [key for key in REQUIRED if key not in arrays]
    if missing:
        raise FeatureFileError(f"{path}: no {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
    (query, zero_queries), (gallery, zero_items) = (_rows(path, name, arrays[name]) for name in ("query", "gallery"))
    if query.dtype != gallery.dtype:
        raise FeatureFileError(f"{path}: query is {_name(query)} and gallery is {_name(gallery)}: save both alike")
    if query.shape[1] != gallery.shape[1]:
        raise FeatureFileError(f"{path}: query has {query.shape[1]} columns, gallery has {gallery.shape[1]}")
    return Features(
        path=path,
        query=query,
        gallery=gallery,
        query_labels=_labels(path, "query_labels", arrays["query_labels"], "query", len(query)),
        gallery_labels=_labels(path, "gallery_labels", arrays["gallery_labels"], "gallery", len(gallery)),
        query_groups=_groups(path, arrays["query_groups"], len(query)) if "query_groups" in arrays else None,
        zero_rows=(zero_queries, zero_items),
    )


def load_labelled(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Features `NAME.npy`, mapped, and `NAME_labels.npy` of a folder, checked as those of a version.

    Raises:
        OSError, FeatureFileError: as `load_features`.
    """
    files = [folder / f"{part}.npy" for part in (name, f"{name}_labels")]
    try:
        arrays = [np.load(file, mmap_mode="c") for file in files]
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FeatureFileError(f"{folder}: {name} cannot be read, it may be truncated or damaged: {error}") from error
    rows, _ = _rows(folder, name, arrays[0])
    return rows, _labels(folder, f"{name}_labels", arrays[1], name, len(rows))


def find_versions(folder: str | os.PathLike[str]) -> list[Path]:
    """The feature files in a folder, a version each, sorted naturally: v2 before v10.

    Subfolders with .npy files, .npz and .safetensors files; what else lies there is not looked at.

    Raises:
        OSError: it cannot be listed.
        FeatureFileError: there is none; two are of one name but for case or leading zeros, so that no order is natural.
    """
    folder = Path(folder)
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    found = [
        path
        for path in entries
        if (any(path.glob("*.npy")) if path.is_dir() else path.suffix in (".npz", ".safetensors"))
    ]
    if not found:
        raise FeatureFileError(
            f"{folder} holds no versions: neither .npz nor .safetensors files, nor folders of .npy files"
        )
    found.sort(key=_natural)
    for first, second in itertools.pairwise(found):
        if _natural(first) == _natural(second):
            raise FeatureFileError(f"{first} and {second}: which is older? Name the versions one by one, oldest first")
    return found


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    name = path.name if path.is_dir() else path.stem
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece.lstrip("0123456789")) for piece in pieces]


def check_same_items(first: Features, second: Features) -> None:
    """Labels, and groups where both have them, are all that tells whether two files are of the same items.

    Raises:
        FeatureFileError: they are not; names both files, the array and the first row that differs.
    """
    for name in ("query_labels", "gallery_labels"):
        a, b = getattr(first, name), getattr(second, name)
        if a.shape != b.shape:
            raise FeatureFileError(
                f"{first.path} and {second.path} must be of the same items: {name} has {len(a)} and {len(b)} entries"
            )
        if not torch.equal(a, b):
            row = int((a != b).int().argmax())
            raise FeatureFileError(
                f"{first.path} and {second.path} must be of the same items in the same order: {name} at {row} is "
                f"{int(a[row])} and {int(b[row])}"
            )
    a, b = first.query_groups, second.query_groups
    if a is not None and b is not None and not np.array_equal(a.astype(str), b.astype(str)):
        raise FeatureFileError(f"{first.path} and {second.path} differ in query_groups")


def check_alike(first: Features, other: Features, widths: str) -> None:
    """Of the same items, of one dtype, and of one width where `widths` is "equal".

    Raises:
        FeatureFileError: they are not, by file and array.
    """
    check_same_items(first, other)
    if other.query.dtype != first.query.dtype:
        raise FeatureFileError(
            f"{first.path} and {other.path} differ in the dtype of query and gallery: {_name(first.query)} and "
            f"{_name(other.query)}; save all versions alike"
        )
    if other.query.shape[1] != first.query.shape[1] and widths == "equal":
        raise FeatureFileError(
            f"{other.path}: query and gallery have {other.query.shape[1]} columns, those of {first.path} have "
            f"{first.query.shape[1]}; --widths leading compares the leading ones that both have"
        )


def _read(path: Path) -> Mapping[str, NDArray[Any] | Tensor]:
    try:
        if path.is_dir():
            files = {key: path / f"{key}.npy" for key in REQUIRED + OPTIONAL}
            with np.errstate(over="ignore"):  # of a size that no file has, which is then refused
                return {key: np.load(file, mmap_mode="c") for key, file in files.items() if file.is_file()}
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:  # not of the bytes, as bz2's is
            raise
        raise FeatureFileError(f"{path} cannot be read, it may be truncated or damaged: {error}") from error
    path.stat()  # a file that is not there is said to be so, whatever its name
    raise FeatureFileError(f"{path} must be an .npz or .safetensors file or a folder of .npy files")


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            key = info.filename.removesuffix(".npy")
            if key not in REQUIRED + OPTIONAL:
                continue
            with archive.open(info) as member:
                shape, _, dtype = _read_header(member)
                # before memory is set aside for it, and in Python's integers: a header may say anything
                size = member.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
            if size != info.file_size and not dtype.hasobject:
                raise ValueError(f"{info.filename} has {info.file_size} bytes, its header speaks of shape {shape}")
            with archive.open(info) as member:
                arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"an array of .npy version {version}, which plain arrays never have")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    path.stat()
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key in REQUIRED + OPTIONAL}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _rows(path: Path, name: str, array: NDArray[Any] | Tensor) -> tuple[Tensor, int]:
    """The rows, and how many of them are zero."""
    if isinstance(array, Tensor):
        rows, floating = array, array.is_floating_point() and array.element_size() >= 2
    else:
        floating = array.dtype.kind == "f" and array.dtype.itemsize <= 8
        # of the other byte order: torch has none of its own
        rows = torch.from_numpy(np.asarray(array, array.dtype.newbyteorder("="))) if floating else torch.empty(0)
    if not floating:
        raise FeatureFileError(f"{path}: {name} must be float16, bfloat16, float32 or float64, got {_name(array)}")
    if rows.ndim != 2 or 0 in rows.shape:
        raise FeatureFileError(f"{path}: {name} must have shape [rows, d] and not be empty, got {list(array.shape)}")
    step = max(1, CHUNK // (rows.shape[1] * rows.element_size()))
    zeros = 0
    for start in range(0, len(rows), step):
        # as float32, in which all features are compared: of float64 it may lack one
        block = rows[start : start + step].float()
        zero = ~block.any(dim=1)
        zeros += int(zero.sum())
        lost = zero & rows[start : start + step].any(dim=1) if rows.dtype == torch.float64 else zero[:0]
        if lost.any():
            row = start + int(lost.int().argmax())
            raise FeatureFileError(f"{path}: {name} row {row} holds numbers below float32's range alone: scale them up")
        finite = torch.isfinite(block).all(dim=1)
        if not finite.all():
            row = start + int(finite.int().argmin())
            what = "a number past float32's range" if torch.isfinite(rows[row]).all() else "nan or inf"
            raise FeatureFileError(f"{path}: {name} row {row} holds {what}")
    base = getattr(array, "base", None)
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):  # else all that was looked at counts as memory
        base.madvise(mmap.MADV_DONTNEED)
    return rows, zeros


def _labels(path: Path, name: str, array: NDArray[Any] | Tensor, of: str, count: int) -> Tensor:
    labels: NDArray[Any] = array.numpy() if isinstance(array, Tensor) else array
    if labels.dtype.kind not in "iu":
        raise FeatureFileError(
            f"{path}: {name} must be integers, got {labels.dtype}; class ids stay integers from end to end, "
            "for a float32 holds none above 2^24 exactly"
        )
    if labels.shape != (count,):
        raise FeatureFileError(f"{path}: {of} has {count} rows, {name} has shape {list(labels.shape)}")
    if labels.dtype.kind == "u" and labels.max() > np.iinfo(np.int64).max:
        raise FeatureFileError(f"{path}: {name} must fit into int64, got {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))


def _groups(path: Path, array: NDArray[Any] | Tensor, count: int) -> NDArray[Any]:
    groups: NDArray[Any] = array.numpy() if isinstance(array, Tensor) else np.asarray(array)
    if groups.dtype.kind not in "iuU":
        raise FeatureFileError(f"{path}: query_groups must be integers or strings, got {groups.dtype}")
    if groups.shape != (count,):
        raise FeatureFileError(f"{path}: query has {count} rows, query_groups has shape {list(groups.shape)}")
    return groups


def _name(array: NDArray[Any] | Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")
