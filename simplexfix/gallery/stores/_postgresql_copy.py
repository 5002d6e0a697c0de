"""Converts vectors from and to pgvector's values, and encodes rows in the binary format of PostgreSQL's COPY."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ._common import SEVERAL_WIDTHS

__all__ = ["MOST_NUMBERS", "copied_rows", "copied_vectors", "given_vectors", "searchable", "stacked", "text_of"]

MOST_NUMBERS = 16_000  # pgvector's limit

_BEGIN, _END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
_CHUNK = 256  # rows; the server stores one chunk while the next one is encoded here
_NULL = -1


def searchable(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Returns [n, d] vectors for pgvector, and [n] whether each was scaled.

    pgvector sums squares in float32.  Vectors that would overflow or underflow are divided by their largest entry;
    zero vectors and all others are not changed.
    """
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    extreme = (largest > 0) & ((largest < 1e-12) | (largest > 1e12))
    if extreme.any():
        vectors = vectors.copy()
        vectors[extreme] = vectors[extreme].astype(np.float64) / largest[extreme, None]
    return vectors, extreme


def text_of(vector: NDArray[np.float32]) -> str:
    """A vector as text for pgvector."""
    return f"[{','.join(map(repr, vector.tolist()))}]"


def copied_vectors(ids: NDArray[np.int64], version: int, vectors: NDArray[np.float32]) -> Iterator[bytes]:
    """Yields the data for the columns id, version, vector and bits; `bits` is null if `vector` is not scaled."""
    yield _BEGIN
    for first in range(0, len(ids), _CHUNK):
        given = vectors[first : first + _CHUNK]
        values, extreme = searchable(given)
        for chosen in (~extreme, extreme):
            if chosen.any():
                bits = given[chosen] if chosen is extreme else None
                yield _records(ids[first : first + _CHUNK][chosen], version, values[chosen], bits)
    yield _END


def _records(
    ids: NDArray[np.int64], version: int, values: NDArray[np.float32], bits: NDArray[np.float32] | None
) -> bytes:
    width = values.shape[1]
    layout = [
        ("fields", ">i2"), ("id_size", ">i4"), ("id", ">i8"), ("version_size", ">i4"), ("version", ">i4"),
        ("vector_size", ">i4"), ("width", ">i2"), ("unused", ">i2"), ("vector", ">f4", (width,)), ("bits_size", ">i4"),
    ]  # fmt: skip
    records = np.zeros(len(ids), dtype=layout if bits is None else [*layout, ("bits", "<f4", (width,))])
    for name, value in {
        "fields": 4, "id_size": 8, "id": ids, "version_size": 4, "version": version, "vector_size": 4 + 4 * width,
        "width": width, "vector": values, "bits_size": _NULL if bits is None else 4 * width,
    }.items():  # fmt: skip
        records[name] = value
    if bits is not None:
        records["bits"] = bits
    return records.tobytes()


def copied_rows(ids: NDArray[np.int64], version: int, payload: Sequence[str], fields: Sequence[str]) -> Iterator[bytes]:
    """Yields the data for the columns id, version, payload (text) and fields (jsonb)."""
    yield _BEGIN
    begin, size = struct.Struct(">hiqiii"), struct.Struct(">ib")
    for first in range(0, len(ids), _CHUNK):
        chunk = bytearray()
        some = slice(first, first + _CHUNK)
        for id_, whole, plain in zip(ids[some].tolist(), payload[some], fields[some], strict=True):
            text = whole.encode()
            json = text if plain is whole else plain.encode()
            chunk += begin.pack(4, 8, id_, 4, version, len(text))
            chunk += text
            chunk += size.pack(1 + len(json), 1)  # version 1 of jsonb's binary format
            chunk += json
        yield bytes(chunk)
    yield _END


def given_vectors(values: Sequence[bytes], bits: Sequence[bytes | None]) -> NDArray[np.float32]:
    """Returns [n, d] float32, the vectors as they were given; n is at least 1.

    Args:
        values: `vector_send(vector)` of each row.
        bits: the column `bits` of each row.

    Raises:
        ValueError: the vectors have several widths.
    """
    if len({len(value) for value in values}) > 1:
        raise ValueError(SEVERAL_WIDTHS)
    records = np.frombuffer(b"".join(values), dtype=[("head", "V4"), ("vector", ">f4", (len(values[0]) // 4 - 1,))])
    vectors = records["vector"].astype(np.float32)
    for row, exact in enumerate(bits):
        if exact is not None:
            vectors[row] = np.frombuffer(exact, dtype="<f4")
    return vectors


def stacked(chunks: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Concatenates chunks of rows.

    Raises:
        ValueError: the chunks have several widths.
    """
    if len({chunk.shape[1] for chunk in chunks}) > 1:
        raise ValueError(SEVERAL_WIDTHS)
    return np.concatenate(chunks) if chunks else np.zeros((0, 0), dtype=np.float32)
