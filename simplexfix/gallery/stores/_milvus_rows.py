"""Rows of one version in a Milvus collection, and the expressions that select those of a snapshot.

A replaced row stays in its collection.  `died` is the change that replaced it, `by` the version of the new row, and
`gone` the change that removed it.  Readers ignore the number of a change that is not committed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from json.encoder import encode_basestring_ascii
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._common import comparable_fields, is_number
from ._milvus_client import Fields
from .base import StoreError

__all__ = ["LIVES", "NEVER", "Record", "fields_of", "matching", "pack", "tokens", "unpack"]

_FORMAT = 1  # of all collections of a gallery
NEVER = 2**62  # `died` and `gone` of a row that is in the gallery
ADDED = -1  # `replaces` of a row that replaced none; `by` of one that was not replaced
ZERO = -10_000  # `scale` of the zero vector, which has no cosine
_LONGEST = 65_535  # text in Milvus, in bytes

_FIELDS: Fields = [
    ("key", "INT64", {}),
    ("id", "INT64", {}),
    ("born", "INT64", {}),  # the change that wrote it
    ("replaces", "INT64", {}),  # the version whose row it replaced
    ("died", "INT64", {}),
    ("by", "INT64", {}),
    ("gone", "INT64", {}),  # the change that removed it, replaced or not
    ("scale", "INT64", {}),  # the given vector is the stored one times 2 to this power
    ("bits", "VARCHAR", {"max_length": _LONGEST}),  # the given vector in base64, if that product would round
    ("payload", "VARCHAR", {"max_length": _LONGEST}),
    ("facts", "ARRAY", {"element_type": "VARCHAR", "max_capacity": 4096, "max_length": 32}),  # tokens, for filters
]
LIVES = [name for name, _, _ in _FIELDS]


def fields_of(width: int) -> Fields:
    """The fields of a collection of vectors of this width."""
    return [*_FIELDS, ("vector", "FLOAT_VECTOR", {"dim": width})]


Rollback: TypeAlias = "tuple[int, tuple[int, ...], float]"


@dataclass(frozen=True)
class Record:
    """Data of a committed change by which readers select its rows.

    Attributes:
        change: its number.
        state: the change whose record holds the state of the gallery.
        epoch: the change since which the same model serves; leases of earlier epochs have ended.
        never: changes that were not committed.
        undone: by version, (change, retired versions, time) of each rollback.  Rows of this version that replaced
            rows before that change are void, and the replaced rows are in the gallery again.  Rows that replaced rows
            of a retired version stay.
        rows, old: by version, the number of rows that are searched, and of replaced rows that are kept.
        zeros: by version, an upper bound of the number of zero vectors.
    """

    change: int = 0
    state: int = 0
    epoch: int = 0
    never: tuple[int, ...] = ()
    undone: Mapping[int, tuple[Rollback, ...]] = field(default_factory=dict)
    rows: Mapping[int, int] = field(default_factory=dict)
    old: Mapping[int, int] = field(default_factory=dict)
    zeros: Mapping[int, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **self.__dict__}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises StoreError if a newer release has written it."""
        saved = json.loads(text)
        found = saved.pop("format", 1)  # the first galleries have no number
        if found > _FORMAT:
            raise StoreError(
                f"it has format {found}, but this release reads formats up to {_FORMAT}: install a newer simplexfix"
            )
        for name in ("rows", "old", "zeros", "undone"):
            saved[name] = {int(version): value for version, value in saved[name].items()}
        saved["undone"] = {
            version: tuple((change, tuple(kept), at) for change, kept, at in rollbacks)
            for version, rollbacks in saved["undone"].items()
        }
        return cls(**{**saved, "never": tuple(saved["never"])})

    def counted(self, name: str, numbers: Mapping[int, int]) -> Record:
        """A copy with these numbers added to `rows`, `old` or `zeros`."""
        merged = dict(getattr(self, name))
        for version, number in numbers.items():
            merged[version] = merged.get(version, 0) + number
        changes: dict[str, Any] = {name: {version: number for version, number in merged.items() if number}}
        return replace(self, **changes)

    # expressions over the rows of one version

    def live(self, version: int) -> str:
        """Rows that are in the gallery."""
        return f"{self._valid(version)} and ({' or '.join([f'died > {self.change}', *self._alive_again()])})"

    def dead(self, version: int) -> str:
        """Rows that were replaced and are kept."""
        again = [f"not ({each})" for each in self._alive_again()]
        return " and ".join([self._valid(version), f"died <= {self.change}", *again])

    def garbage(self, version: int, before: float) -> str:
        """Rows that no reader selects: not committed, removed, or made void by a rollback before this time."""
        conditions = [f"(gone <= {self.change}{self._committed('gone')})"]
        if self.never:
            conditions.append(f"born in {list(self.never)}")
        for change, kept, at in self.undone.get(version, ()):
            if at < before:
                conditions.append(f"not ({_survives(change, kept)})")
        return " or ".join(conditions)

    def _valid(self, version: int) -> str:
        """Rows of committed changes that nobody removed and no rollback made void."""
        rollbacks = [f"({_survives(change, kept)})" for change, kept, _ in self.undone.get(version, ())]
        stays = f"(gone > {self.change} or gone in {list(self.never)})" if self.never else f"gone > {self.change}"
        return " and ".join([f"born <= {self.change}{self._committed('born')}", stays, *rollbacks])

    def _alive_again(self) -> list[str]:
        """Rows whose replacement was not committed, or was undone by a rollback."""
        never = [f"died in {list(self.never)}"] if self.never else []
        return [*never, *(f"(by == {by} and died < {rules[-1][0]})" for by, rules in self.undone.items())]

    def _committed(self, name: str) -> str:
        return f" and {name} not in {list(self.never)}" if self.never else ""


def _survives(change: int, kept: Sequence[int]) -> str:
    """Rows that a rollback keeps: rows of later changes, added rows, and rows that replaced rows of versions `kept`."""
    return f"born > {change} or replaces == {ADDED}" + (f" or replaces in {list(kept)}" if kept else "")


def pack(
    keys: Sequence[int], ids: NDArray[np.int64], vectors: NDArray[np.float32], payload: Sequence[str], born: int,
    replaces: Sequence[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns new rows.

    Raises:
        ValueError: a payload, or the exact bits of a vector, exceed a limit of Milvus.
    """
    largest = np.abs(vectors).max(axis=1, initial=0)
    powers = np.frexp(largest)[1].astype(np.int64) - 1
    with np.errstate(under="ignore"):
        scaled = np.ldexp(vectors.astype(np.float64), -powers[:, None]).astype(np.float32)  # largest entry in [1, 2)
        again = np.ldexp(scaled.astype(np.float64), powers[:, None]).astype(np.float32)
    exact = (again.view(np.uint32) == vectors.view(np.uint32)).all(axis=1)
    zero = largest == 0
    scaled[zero, :1] = 1.0
    exact &= ~zero | (vectors.view(np.uint32) == 0).all(axis=1)  # -0.0 needs its bits
    rows = []
    for at, id_ in enumerate(ids.tolist()):
        bits = "" if exact[at] else base64.b64encode(vectors[at].astype("<f4").tobytes()).decode()
        if len(bits) > _LONGEST:
            raise ValueError(
                f"vectors row {at} has {len(vectors[at])} numbers of too different sizes for Milvus to store exactly: "
                "use a folder or PostgreSQL"
            )
        if len(payload[at].encode()) > _LONGEST:
            raise ValueError(
                f"payload row {at} has {len(payload[at].encode())} bytes as JSON; Milvus takes at most {_LONGEST}"
            )
        facts = tokens(json.loads(payload[at]))
        if len(facts) > 4096:
            raise ValueError(f"payload row {at} has {len(facts)} keys with plain values; Milvus takes at most 4096")
        rows.append(
            {
                "key": keys[at], "id": id_, "born": born, "replaces": replaces[at], "died": NEVER, "by": ADDED,
                "gone": NEVER,
                "scale": ZERO if zero[at] else int(powers[at]), "bits": bits, "payload": payload[at], "facts": facts,
                "vector": scaled[at].data,  # pymilvus reads a memoryview faster than an array or a list
            }
        )  # fmt: skip
    return rows


def unpack(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
    """Returns [n, d] float32, the vectors of rows of one version as they were given."""
    if not rows:
        return np.zeros((0, 0), dtype=np.float32)
    stored = np.array([row["vector"] for row in rows], dtype=np.float32).reshape(len(rows), -1)
    powers = np.array([row["scale"] for row in rows], dtype=np.int64)
    zero = powers == ZERO
    with np.errstate(under="ignore"):
        given = np.ldexp(stored.astype(np.float64), np.where(zero, 0, powers)[:, None]).astype(np.float32)
    given[zero] = 0
    for at, row in enumerate(rows):
        if row["bits"]:
            given[at] = np.frombuffer(base64.b64decode(row["bits"]), dtype="<f4")
    return given


def tokens(payload: Mapping[str, Any]) -> list[str]:
    """A hash of key, kind and value for each key with a plain value.

    Milvus's own conditions on JSON do not distinguish null from a missing key, or a number from a bool, and differ
    between Milvus Lite and a server.  A hash needs no escapes in an expression.
    """
    return [_token(key, value) for key, value in comparable_fields(payload).items()]


def matching(where: Mapping[str, tuple[Any, ...]]) -> str:
    """The expression for rows whose payload has, under each key, one of its values; numbers are `comparable`."""
    conditions = []
    for key, values in where.items():
        any_of = ", ".join(f'"{_token(key, value)}"' for value in values)
        conditions.append(f"array_contains_any(facts, [{any_of}])" if values else "key < 0")
    return " and ".join(conditions)


def _token(key: str, value: Any) -> str:
    if isinstance(value, str):
        text = encode_basestring_ascii(value)  # as json.dumps, in a tenth of its time
    elif is_number(value):
        text = f'["number", "{int(value) if float(value).is_integer() else repr(value)}"]'
    else:
        text = json.dumps(value)
    return hashlib.blake2b(f"[{encode_basestring_ascii(key)}, {text}]".encode(), digest_size=16).hexdigest()
