"""The collection of a gallery on Milvus for everything except rows: changes, states, history, leases and counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._state import State
from ._common import as_json
from ._milvus_client import Connection, Fields
from ._milvus_rows import Record

__all__ = ["Meta"]

_PART = 16_000  # characters of a text per entry: at most 4 bytes each, and a field holds 65,535 bytes
_FIELDS: Fields = [
    ("key", "VARCHAR", {"max_length": 64}),
    ("kind", "VARCHAR", {"max_length": 16}),
    ("number", "INT64", {}),  # number of the change; epoch of a lease; number of hits of a count
    ("item", "INT64", {}),  # index of a part of a text; id of the row of a lease or a count
    ("until", "DOUBLE", {}),
    ("body", "VARCHAR", {"max_length": 65_535}),
    ("vector", "FLOAT_VECTOR", {"dim": 2}),  # every collection must have one
]


class Meta:
    """Reads and writes entries.  Those of a change are written once, before its commit; leases and counts change."""

    def __init__(self, connection: Connection, gallery: str) -> None:
        self._connection = connection
        self.name = f"{gallery}__meta"

    def create(self) -> None:
        self._connection.create(self.name, _FIELDS, "L2")

    # changes

    def write(self, record: Record, state: State | None, event: dict[str, Any] | None) -> int:
        """Writes all entries of one change; returns the stamp."""
        entries = _texts("commit", record.change, record.to_json())
        if state is not None:
            entries += _texts("state", record.change, as_json(state.to_dict()))
        if event is not None:
            entries += _texts("event", record.change, as_json(event))
        return self._connection.insert(self.name, _FIELDS, entries, 65_536)

    def record(self, change: int, stamp: int) -> Record | None:
        """The record of a change; None if it was deleted because there are newer ones."""
        text = self._text("commit", change, stamp)
        return None if text is None else Record.from_json(text)

    def state(self, change: int, stamp: int) -> State:
        text = self._text("state", change, stamp)
        assert text is not None
        return State.from_dict(json.loads(text))

    def history(self, record: Record, stamp: int) -> list[dict[str, Any]]:
        committed = f'kind == "event" and number <= {record.change}'
        found = self._connection.query(self.name, committed, ["number", "item", "body"], stamp)
        never = set(record.never)
        changes: dict[int, list[tuple[int, str]]] = {}
        for entry in found:
            if entry["number"] not in never:
                changes.setdefault(entry["number"], []).append((entry["item"], entry["body"]))
        return [json.loads("".join(body for _, body in sorted(changes[number]))) for number in sorted(changes)]

    def forget(self, change: int, stamp: int) -> int:
        """Deletes the records of changes before this one."""
        found = self._connection.query(self.name, f'kind == "commit" and number < {change}', ["key"], stamp)
        return self._connection.delete(self.name, "key", [entry["key"] for entry in found])

    def _text(self, kind: str, change: int, stamp: int) -> str | None:
        found = self._connection.query(self.name, f'kind == "{kind}" and number == {change}', ["item", "body"], stamp)
        return "".join(entry["body"] for entry in sorted(found, key=lambda entry: entry["item"])) if found else None

    # leases

    def leases(self, epoch: int, stamp: int, *, now: float) -> dict[int, tuple[str, float]]:
        """Returns id -> (worker, end in seconds since 1970) of each lease that has not expired."""
        where = f'kind == "lease" and number == {epoch} and until > {now!r}'
        found = self._connection.query(self.name, where, ["item", "body", "until"], stamp)
        return {entry["item"]: (entry["body"], entry["until"]) for entry in found}

    def leased(self, ids: Sequence[int], epoch: int, stamp: int) -> set[int]:
        """Returns those of these ids that have a lease, expired or not; `replace` deletes leases."""
        keys = [f"lease/{id_}" for id_ in ids]
        found = self._connection.query_in(self.name, "key", keys, f"number == {epoch}", ["item"], stamp)
        return {entry["item"] for entry in found}

    def lease(self, ids: Sequence[int], epoch: int, worker: str, until: float) -> int:
        entries = [_entry(f"lease/{id_}", "lease", epoch, id_, worker, until) for id_ in ids]
        return self._connection.upsert(self.name, _FIELDS, entries, 256)

    def release(self, worker: str, stamp: int) -> int:
        where = f'kind == "lease" and body == "{worker}"'
        found = self._connection.query(self.name, where, ["key", "number", "item"], stamp)
        # A server returns no stamp for a deletion, so a later read may return the leases: first set their ends to 0.
        ended = [_entry(entry["key"], "lease", entry["number"], entry["item"], worker, 0.0) for entry in found]
        stamp = self._connection.upsert(self.name, _FIELDS, ended, 256)
        self._connection.delete(self.name, "key", [entry["key"] for entry in found])
        return stamp

    def delete(self, kinds: Iterable[str], ids: Sequence[int]) -> int:
        return self._connection.delete(self.name, "key", [f"{kind}/{id_}" for kind in kinds for id_ in ids])

    # counts of hits

    def hits(self, stamp: int, ids: Sequence[int] | None = None) -> dict[int, int]:
        fields = ["item", "number"]
        if ids is None:
            found = self._connection.query(self.name, 'kind == "hits"', fields, stamp)
        else:
            found = self._connection.query_in(self.name, "key", [f"hits/{id_}" for id_ in ids], "", fields, stamp)
        return {entry["item"]: entry["number"] for entry in found}

    def add_hits(self, ids: NDArray[np.int64], times: NDArray[np.int64], stamp: int) -> int:
        before = self.hits(stamp, ids.tolist())
        entries = [
            _entry(f"hits/{id_}", "hits", before.get(id_, 0) + number, id_, "", 0.0)
            for id_, number in zip(ids.tolist(), times.tolist(), strict=True)
        ]
        return self._connection.upsert(self.name, _FIELDS, entries, 256)


def _texts(kind: str, change: int, text: str) -> list[dict[str, Any]]:
    parts = [text[at : at + _PART] for at in range(0, len(text), _PART)]
    return [_entry(f"{kind}/{change}/{at}", kind, change, at, part, 0.0) for at, part in enumerate(parts)]


def _entry(key: str, kind: str, number: int, item: int, body: str, until: float) -> dict[str, Any]:
    return {
        "key": key, "kind": kind, "number": number, "item": item, "until": until, "body": body, "vector": [0.0, 1.0],
    }  # fmt: skip
