"""Reads CIFAR-10 and CIFAR-100 from the binary version that their author publishes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._checks import check_name

__all__ = ["CIFAR100_MEAN", "CIFAR100_STD", "Cifar", "CifarFileError", "load_cifar10", "load_cifar100"]

SIDE = 32
PIXELS = 3 * SIDE * SIDE
SPLITS = ("train", "test")
PUBLISHED = "https://www.cs.toronto.edu/~kriz/cifar.html"

# statistics of CIFAR-100's training images per channel, for pixels in [0, 1]
CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


class CifarFileError(ValueError):
    """A file does not have CIFAR's binary format or is damaged; the message names the file."""


@dataclass(frozen=True, eq=False)
class Cifar:
    """Images and labels of one split, in file order.

    Attributes:
        images: [N, 3, 32, 32] uint8, channels red, green, blue.
        labels: [N] int64 class ids; for CIFAR-100 those of the fine classes.
        class_names: names of class 0, 1, ...
        coarse_labels: [N] int64 superclass ids of CIFAR-100; None for CIFAR-10.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    coarse_labels: NDArray[np.int64] | None


def load_cifar10(
    path: str | os.PathLike[str], split: str = "train", *, batches: Sequence[int] = (1, 2, 3, 4, 5)
) -> Cifar:
    """Reads CIFAR-10: 50,000 training and 10,000 test images of 10 classes.

    A file consists of records of 3,073 bytes: the class, then 1,024 bytes each of red, green and blue in row order.  A
    file may hold fewer than the published 10,000 records, but only whole ones.

    Args:
        path: the folder `cifar-10-batches-bin`, or its parent.
        split: "train" or "test".
        batches: numbers of the training files `data_batch_N.bin` to read, from 1 to 5.

    Raises:
        FileNotFoundError: a file is missing; the message says where the data is published.
        CifarFileError: a file has a wrong size, or a label is out of range; the message names the record.
        ValueError: the split is unknown, or a batch number is out of range or a duplicate.

    Reference:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, 2009.
    """
    check_name("split", split, SPLITS)
    if not batches or not set(batches) <= {1, 2, 3, 4, 5} or len(set(batches)) < len(batches):
        raise ValueError(f"batches must be numbers from 1 to 5, each once, got {list(batches)}")
    names = [f"data_batch_{i}.bin" for i in batches] if split == "train" else ["test_batch.bin"]
    folder = _folder(path, "cifar-10-batches-bin", [*names, "batches.meta.txt"])
    class_names = _names(folder / "batches.meta.txt", 10)
    records = np.concatenate([_records(folder / name, (10,)) for name in names])
    return Cifar(_images(records), records[:, 0].astype(np.int64), class_names, None)


def load_cifar100(path: str | os.PathLike[str], split: str = "train") -> Cifar:
    """Reads CIFAR-100: 50,000 training and 10,000 test images of 100 classes.

    A file consists of records of 3,074 bytes: superclass, class, then 1,024 bytes each of red, green and blue in row
    order.  A file may hold fewer records than published, but only whole ones.

    Args:
        path: the folder `cifar-100-binary`, or its parent.
        split: "train" or "test".

    Raises:
        FileNotFoundError, CifarFileError: as in `load_cifar10`.
        ValueError: the split is unknown.

    Reference:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, 2009.
    """
    check_name("split", split, SPLITS)
    folder = _folder(path, "cifar-100-binary", [f"{split}.bin", "fine_label_names.txt"])
    class_names = _names(folder / "fine_label_names.txt", 100)
    records = _records(folder / f"{split}.bin", (20, 100))
    coarse, fine = (records[:, i].astype(np.int64) for i in (0, 1))
    return Cifar(_images(records), fine, class_names, coarse)


def _folder(path: str | os.PathLike[str], name: str, files: list[str]) -> Path:
    folder = Path(path)
    if (folder / name).is_dir():
        folder = folder / name
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}; expected a folder {name} with {', '.join(files)}, as in the binary "
            f"version published at {PUBLISHED}"
        )
    return folder


def _names(file: Path, classes: int) -> tuple[str, ...]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != classes:
        raise CifarFileError(f"{file} must name {classes} classes, one per line, got {len(names)}")
    return names


def _records(file: Path, classes: tuple[int, ...]) -> NDArray[np.uint8]:
    """Reads records [N, labels + 3072] and checks labels; `classes` holds the number of classes of each label."""
    width = len(classes) + PIXELS
    found = np.fromfile(file, dtype=np.uint8)
    if not len(found) or len(found) % width:
        raise CifarFileError(f"{file} must hold records of {width} bytes, got {len(found)} bytes; it may be truncated")
    records = found.reshape(-1, width)
    bad = np.argwhere(records[:, : len(classes)] >= classes)
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise CifarFileError(
            f"{file} record {row} has label {records[row, column]}, expected one below {classes[column]}"
        )
    return records


def _images(records: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(records[:, -PIXELS:]).reshape(-1, 3, SIDE, SIDE)
