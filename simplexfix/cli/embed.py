"""Applies a model or an adapter to a file of features, block by block; the output is written atomically."""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._files import write_whole
from .._text import printable
from ..adapters import Adapter
from ..adapters.maps import unit
from ..labelled import FeatureFileError, FeatureRows, load_vectors, map_array
from ..models import EmbeddingModel, read_identity
from ..models.identity import ADAPTED
from ._terminal import in_flags

ROWS = 4096


def run(arguments: argparse.Namespace) -> int:
    try:
        sources, ids, embed = _inputs(arguments)
        form = arguments.output.suffix
        if form not in (".npy", ".npz"):
            raise ValueError(f"OUT must be an .npy or .npz file, got {arguments.output}")
        blocks = _blocks(arguments.input, sources, embed)
        write_whole(arguments.output, _npy(blocks, len(sources[0])) if form == ".npy" else _npz(blocks, ids, sources))
    except (ValueError, TypeError) as error:
        print(f"simplexfix embed: {printable(in_flags(error))}", file=sys.stderr)
        return 2
    return 0


def _inputs(arguments: argparse.Namespace) -> tuple[list[Any], NDArray[np.int64] | None, Callable[..., Tensor]]:
    """Returns the rows of IN (and of --old), the ids of IN, and a function that maps a block of rows."""
    adapter = Adapter.from_pretrained(arguments.model) if read_identity(arguments.model).head == ADAPTED else None
    if adapter is None and (arguments.old is not None or arguments.gallery):
        raise ValueError(f"--old and --gallery are for adapters, {arguments.model} holds a model")
    rows: Any
    if adapter is None and arguments.input.suffix == ".npy":
        rows, ids = map_array(arguments.input.parent, arguments.input.stem), None  # of any shape
    else:
        rows, ids = load_vectors(arguments.input)
    if (isinstance(rows, np.ndarray) and not rows.ndim) or not len(rows):
        raise FeatureFileError(f"{arguments.input} has no rows")
    if adapter is None:
        model = EmbeddingModel.from_pretrained(arguments.model)
        return [rows], ids, lambda input: model.extract(input, prepare=model.preprocessing)
    if arguments.gallery:
        if arguments.old is not None:
            raise ValueError("--old is for queries: leave it out with --gallery")
        return [rows], ids, lambda stored: unit(adapter.gallery(stored), torch.float32)
    if arguments.old is None:
        return [rows], ids, adapter
    old, _ = load_vectors(arguments.old)
    if len(old) != len(rows):
        raise ValueError(f"--old has {len(old)} rows, IN has {len(rows)}: both must be of the same queries")
    return [rows, old], ids, adapter


def _blocks(path: Path, sources: list[Any], embed: Callable[..., Tensor]) -> Iterator[NDArray[np.float32]]:
    for begin in range(0, len(sources[0]), ROWS):
        with torch.inference_mode():
            out = embed(*(_tensor(rows, begin, begin + ROWS) for rows in sources)).numpy()
        bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
        if len(bad):
            raise ValueError(f"{path} row {begin + bad[0]} is embedded as nan or inf: is the row itself finite?")
        yield out


def _tensor(rows: Any, begin: int, end: int) -> Tensor:
    if isinstance(rows, FeatureRows):
        return rows.block_tensor(begin, min(end, len(rows)))
    block = rows[begin:end]
    return torch.from_numpy(np.array(block, dtype=block.dtype.newbyteorder("=")))  # a copy: mapped rows are read-only


def _npy(blocks: Iterator[NDArray[np.float32]], count: int) -> Iterator[bytes]:
    """Yields the bytes of an .npy file with all rows, in chunks."""
    for at, block in enumerate(blocks):
        if not at:
            header = io.BytesIO()
            shape = count, block.shape[1]
            np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
            yield header.getvalue()
        yield block.astype("<f4", copy=False).tobytes()


def _npz(blocks: Iterator[NDArray[np.float32]], ids: NDArray[np.int64] | None, sources: list[Any]) -> Iterator[bytes]:
    """Yields the bytes of an .npz file with `vectors` and, if there are any, `ids`, in chunks."""
    out = _Unseekable()
    with zipfile.ZipFile(out, "w") as archive:
        with archive.open("vectors.npy", "w", force_zip64=True) as member:
            for chunk in _npy(blocks, len(sources[0])):
                member.write(chunk)
                yield out.taken()
        if ids is not None:
            content = io.BytesIO()
            np.save(content, ids)
            archive.writestr("ids.npy", content.getvalue())
    yield out.taken()


class _Unseekable(io.RawIOBase):
    """A file without seek, whose content is taken in chunks; zipfile then writes sizes and checksums after the data."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, chunk: Any) -> int:
        self._chunks.append(bytes(chunk))
        return len(chunk)

    def taken(self) -> bytes:
        out, self._chunks = b"".join(self._chunks), []
        return out
