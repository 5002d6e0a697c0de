"""Checks arguments of gallery calls and converts them, before anything is sent to a store."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..labelled import FeatureRows, Ids, Rows, read_ids, read_integers
from ..models import ModelIdentity
from .stores._common import comparable, is_number

__all__ = ["Payload", "Where", "read_payload", "read_unique_ids", "read_vectors", "read_where"]

Payload: TypeAlias = "Sequence[Mapping[str, Any] | None] | Mapping[str, Sequence[Any]] | Any"
_Plain: TypeAlias = "str | int | float | bool | None"
Where: TypeAlias = "Mapping[str, _Plain | Sequence[_Plain]]"

RESERVED = ("id", "vector", "version")  # names of the stores' own columns
_LARGEST_ID = 2**63 - 2
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))  # dumps builds one per row


def read_vectors(name: str, vectors: Rows, model: ModelIdentity) -> NDArray[np.float32]:
    """Returns [n, d] finite float32.

    Raises:
        ValueError: d is not the model's `embedding_dim`, or an entry is not finite.
    """
    rows = FeatureRows(name, vectors)
    if rows.width != model.embedding_dim:
        raise ValueError(
            f"{name} must have {model.embedding_dim} columns, as version {model.version} makes them, got {rows.width}"
        )
    return rows.block(0, len(rows))


def read_unique_ids(name: str, ids: Ids, count: int | None = None) -> NDArray[np.int64]:
    """Returns [n] int64 ids, each once and within the range that stores hold; n must be `count` if it is given."""
    array = read_ids(name, ids, "vectors", len(read_integers(name, ids)) if count is None else count, unique=True)
    if len(array) and (array.min() < 0 or array.max() > _LARGEST_ID):
        bad = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{name} must lie between 0 and 2^63 - 2, got {bad}")
    return array


def read_payload(payload: Payload | None, count: int) -> list[str] | None:
    """Returns one JSON object per row, as text; None for a payload of None.

    Raises:
        TypeError: neither a sequence of mappings nor a table of columns; a row that is no mapping; a key that is no
            string.
        ValueError: another number of rows than `count`; a reserved key; a value that JSON cannot hold.
    """
    if payload is None:
        return None
    objects = _objects(payload, count)
    if len(objects) != count:
        raise ValueError(f"vectors has {count} rows, payload has {len(objects)}")
    texts = []
    for row, entry in enumerate(objects):
        if type(entry) is not dict:  # isinstance of Mapping takes as long as the JSON of a small row
            if entry is not None and not isinstance(entry, Mapping):
                raise TypeError(f"payload row {row} must be a mapping or None, got {type(entry).__name__}")
            entry = dict(entry or {})
        for key in entry:
            if not isinstance(key, str):
                raise TypeError(f"payload row {row} has the key {key!r}, keys must be strings")
            if key in RESERVED:
                raise ValueError(f"payload row {row} has the key {key!r}, which the gallery itself uses: rename it")
        try:
            text = _JSON.encode(entry)
            text.isascii() or text.encode()  # a lone surrogate raises ValueError
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"payload row {row} is not a JSON object: {error}; None stands for a missing value"
            ) from None
        texts.append(text)
    return texts


def read_where(where: Where | None) -> dict[str, tuple[str | int | float | bool | None, ...]] | None:
    """Returns for each key the values that match.  Numbers are finite, and converted by `comparable`.

    Raises:
        TypeError: not a mapping of plain values, or of lists, tuples or sets of them.
        ValueError: a number that is not finite in float64, or text with U+0000 or a lone surrogate.
    """
    if where is None:
        return None
    if not isinstance(where, Mapping):
        raise TypeError(f'where must be a mapping, such as {{"shop": 3}}, got {type(where).__name__}')
    conditions = {}
    for key, wanted in where.items():
        if not isinstance(key, str):
            raise TypeError(f"where must have strings as keys, got {key!r}")
        values = wanted if isinstance(wanted, (list, tuple, set, frozenset)) else (wanted,)
        _searchable(f"a key of where, {key!r},", key)
        conditions[key] = tuple(_searchable(f"where[{key!r}]", value) for value in values)
    return conditions


def _searchable(name: str, value: _Plain) -> _Plain:
    """Returns the value in the form in which filters compare it."""
    if isinstance(value, str):
        if "\0" in value or value != value.encode(errors="ignore").decode():
            raise ValueError(f"{name} must be text without U+0000 and lone surrogates, got {value!r}")
    elif is_number(value):
        number = comparable(value)
        if not math.isfinite(number):
            got = value if isinstance(value, float) else "an integer beyond it"  # it may have thousands of digits
            raise ValueError(f"{name} must be a finite number in float64's range, got {got}")
        return number
    elif value is not None and not isinstance(value, bool):
        raise TypeError(
            f"{name} must be a string, a number, a bool or None, or a list of them, got {type(value).__name__}"
        )
    return value


def _objects(payload: Any, count: int) -> Sequence[Any]:
    if hasattr(payload, "to_pylist"):  # pyarrow
        return payload.to_pylist()  # type: ignore[no-any-return]
    if hasattr(payload, "columns") and hasattr(payload, "to_dict"):  # pandas
        names = [str(name) for name in payload.columns]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"payload has two columns {twice!r}")
        payload = {name: payload.iloc[:, at].tolist() for at, name in enumerate(names)}
    if isinstance(payload, Mapping):
        columns = {
            key: column.tolist() if hasattr(column, "tolist") else list(column) for key, column in payload.items()
        }
        for key, column in columns.items():
            if len(column) != count:
                raise ValueError(f"vectors has {count} rows, column {key!r} of payload has {len(column)}")
        return [{key: column[row] for key, column in columns.items()} for row in range(count)]
    if isinstance(payload, (str, bytes)) or not isinstance(payload, Sequence):
        raise TypeError(f"payload must be a list of mappings, or a mapping of columns, got {type(payload).__name__}")
    return payload
