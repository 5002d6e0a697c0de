"""Reference implementation of the compiled index in NumPy and torch: same methods, results, errors and file format.

Scores may differ from the compiled index's by the rounding of float64 sums, which have another order.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import weakref
import zlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._files import write_whole
from .._reference import unit_float32, unit_topk

_HEADER = struct.Struct("<8sIIqqqI16s")  # followed by the CRC-32 of these fields
_MAGIC, _VERSION = b"SFXINDEX", 1
_DTYPES = ("float32", "bfloat16")
_LARGEST_ID = 2**63 - 2
_QUERIES = 256  # queries per chunk; Ctrl-C takes effect between chunks


class _Rows(NamedTuple):
    """Immutable state that a search reads; a change replaces it as a whole."""

    vectors: NDArray[np.float32]  # [n, d], normalised; rounded to bfloat16 values for an index of bfloat16
    ids: NDArray[np.int64]
    next_id: int


class PlainIndex:
    def __init__(self, dim: int, dtype: str, threads: int) -> None:
        self.dim, self.dtype, self.threads = dim, dtype, threads
        self._rows = _Rows(np.empty((0, dim), np.float32), np.empty(0, np.int64), 0)
        self._changing = threading.Lock()
        _all.add(self)

    def __len__(self) -> int:
        return len(self._rows.ids)

    def __contains__(self, id_: int) -> bool:
        return bool(np.isin(id_, self._rows.ids))

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._rows.ids.copy()

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows = self._rows
        return rows.ids.copy(), rows.vectors.copy()

    def vectors(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = self._rows
        _check_held(ids, rows.ids)
        order = np.argsort(rows.ids)
        return rows.vectors[order[np.searchsorted(rows.ids, ids, sorter=order)]]

    @property
    def nbytes(self) -> int:
        return self._rows.vectors.nbytes + self._rows.ids.nbytes

    def add(self, vectors: NDArray[np.float32], ids: NDArray[np.int64] | None) -> int:
        _refuse_non_finite("vectors", vectors)
        unit = unit_float32(torch.from_numpy(vectors))
        if self.dtype == "bfloat16":
            unit = unit.bfloat16().float()
        with self._changing:
            old = self._rows
            if ids is None:
                if old.next_id > _LARGEST_ID + 1 - len(vectors):
                    raise ValueError(f"no ids are left above {old.next_id - 1}")
                ids = np.arange(old.next_id, old.next_id + len(vectors))
            _check_new(ids, old.ids)
            next_id = max(old.next_id, int(ids.max()) + 1) if len(ids) else old.next_id
            self._rows = _Rows(np.concatenate([old.vectors, unit.numpy()]), np.concatenate([old.ids, ids]), next_id)
            return old.next_id

    def remove(self, ids: NDArray[np.int64]) -> None:
        with self._changing:
            old = self._rows
            _check_held(ids, old.ids)
            if (twice := _repeated(ids)) is not None:
                raise ValueError(f"id {twice} is given twice")
            kept = ~np.isin(old.ids, ids)
            self._rows = _Rows(old.vectors[kept], old.ids[kept], old.next_id)

    def search(
        self, query: NDArray[np.float32], k: int, ids: NDArray[np.int64] | None = None, exclude: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        _refuse_non_finite("query", query)
        rows = self._rows
        order = np.argsort(rows.ids)
        if ids is not None:
            if not exclude:
                _check_held(ids, rows.ids)
            order = order[np.isin(rows.ids[order], ids, invert=exclude)]
        blocks = torch.split(torch.from_numpy(rows.vectors[order]), 8192)
        parts = torch.split(unit_float32(torch.from_numpy(query)), _QUERIES)
        found = [unit_topk(part, blocks, k) for part in parts]
        names = np.append(rows.ids[order], -1)  # index -1 of an empty place selects the appended -1
        return torch.cat([part[0] for part in found]).numpy(), names[torch.cat([part[1] for part in found]).numpy()]

    def save(self, path: bytes) -> None:
        rows = self._rows
        vectors = rows.vectors.astype("<f4")
        content = rows.ids.astype("<i8").tobytes()
        content += (
            (vectors.view("<u4") >> 16).astype("<u2").tobytes() if self.dtype == "bfloat16" else vectors.tobytes()
        )
        fields = (_DTYPES.index(self.dtype), self.dim, len(rows.ids), rows.next_id, zlib.crc32(content), bytes(16))
        header = _HEADER.pack(_MAGIC, _VERSION, *fields)
        write_whole(path, header + struct.pack("<I", zlib.crc32(header)) + content)

    @classmethod
    def load(cls, path: bytes, threads: int) -> PlainIndex:
        descriptor = os.open(os.fsdecode(path), os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not block
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ValueError("it is not a regular file")
        with open(descriptor, "rb") as file:
            data = file.read()
        if len(data) < 64:
            raise ValueError("it is shorter than a header of 64 bytes")
        magic, version, code, dim, count, next_id, checksum, zero = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("it does not begin with SFXINDEX")
        if version != _VERSION:
            raise ValueError(f"it is of version {version}, expected 1")
        if struct.unpack_from("<I", data, 60)[0] != zlib.crc32(data[:60]):
            raise ValueError("the header's checksum does not match: the file is damaged")
        if any(zero):
            raise ValueError("a reserved field of the header is not 0")
        if code >= len(_DTYPES):
            raise ValueError("its row type must be 0 (float32) or 1 (bfloat16)")
        if not 1 <= dim <= 2**31 - 2:
            raise ValueError("its dim must lie in [1, 2^31 - 2]")
        if not 0 <= count <= 2**40 or next_id < 0:
            raise ValueError("its number of rows or its next id is out of range")
        if len(data) != 64 + count * (8 + dim * (2 if code else 4)):
            raise ValueError(f"it has {len(data)} bytes, which its header contradicts: it is truncated or damaged")
        if checksum != zlib.crc32(data[64:]):
            raise ValueError("the checksum of its content does not match: the file is damaged")
        ids = np.frombuffer(data, "<i8", count, 64).astype(np.int64)
        _check_new(ids, ids[:0])
        if count and next_id <= ids.max():
            raise ValueError("its next id must be above all of its ids")
        numbers = np.frombuffer(data, "<u2" if code else "<f4", count * dim, 64 + 8 * count)
        vectors = (numbers.astype(np.uint32) << 16).view(np.float32) if code else numbers.astype(np.float32)
        vectors = vectors.reshape(count, dim)
        square = np.square(vectors, dtype=np.float64).sum(1)
        wrong = ~((square == 0) | (np.abs(square - 1) <= (2.0**-7 if code else 2.0**-20)))
        if wrong.any():
            raise ValueError(f"row {int(wrong.argmax())} must have length 1 or 0")
        index = cls(dim, _DTYPES[code], threads)
        index._rows = _Rows(vectors, ids, next_id)
        return index


def _refuse_non_finite(name: str, rows: NDArray[np.float32]) -> None:
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        raise ValueError(f"{name} row {int(finite.argmin())} holds nan or inf")


def _check_new(ids: NDArray[np.int64], present: NDArray[np.int64]) -> None:
    bad = (ids < 0) | (ids > _LARGEST_ID)
    if bad.any():
        raise ValueError(f"ids must lie between 0 and 2^63 - 2, got {ids[bad.argmax()]}")
    known = np.isin(ids, present)
    if known.any():
        raise ValueError(f"id {ids[known.argmax()]} is in the index already")
    if (twice := _repeated(ids)) is not None:
        raise ValueError(f"id {twice} is given twice")


def _check_held(ids: NDArray[np.int64], held: NDArray[np.int64]) -> None:
    missing = ids[~np.isin(ids, held)]
    if len(missing):
        raise KeyError(f"id {missing[0]} is not in the index")


def _repeated(ids: NDArray[np.int64]) -> int | None:
    """Returns the id that occurs most often (the lowest of several), or None if all occur once."""
    found, counts = np.unique(ids, return_counts=True)
    return int(found[counts.argmax()]) if len(found) and counts.max() > 1 else None


_all: weakref.WeakSet[PlainIndex] = weakref.WeakSet()


def _free_locks() -> None:
    """Renews all locks in a forked child, where the threads that hold them do not exist.

    The rows are consistent, because every change replaces them in one assignment.
    """
    for index in _all:
        index._changing = threading.Lock()


os.register_at_fork(after_in_child=_free_locks)
