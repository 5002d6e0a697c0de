"""The gallery as of one committed change, whatever is written meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from .._state import State
from ._milvus_client import Connection, GoneError, no_beat
from ._milvus_meta import Meta
from ._milvus_register import Position, Register
from ._milvus_rows import LIVES, Record, fields_of
from .base import StoreError

__all__ = ["Snapshot", "Snapshots"]

_T = TypeVar("_T")


class Snapshots:
    """The snapshots of one gallery, for one store."""

    def __init__(self, connection: Connection, register: Register, gallery: str) -> None:
        self.connection, self.register, self.gallery = connection, register, gallery
        self.meta = Meta(connection, gallery)
        self.loaded: set[str] = set()  # collections that exist and can be searched
        # For a file: a change, and id -> (version, key) of each row as of that change.  Only the writer that has the
        # turn uses it.  Milvus Lite finds a row by its key immediately, but reads all vectors of a version to find a
        # row by its id.
        self.places: tuple[int, dict[int, tuple[int, int]]] | None = None
        self._record: Record | None = None  # the last one, cached
        self._state: tuple[int, State] | None = None  # the last one, cached, and its change

    def read(self, call: Callable[[Snapshot], _T]) -> _T:
        """Calls `call` on the last committed snapshot; repeats that if other writers have deleted data of it."""
        for _ in range(20):
            position = self.register.read()
            try:
                snapshot = self.at(position)
                if snapshot is not None:
                    return call(snapshot)
            except GoneError:
                if self.register.read().change == position.change:
                    raise
        raise StoreError("20 reads were each overtaken by a newer change: repeat the call when fewer writers run")

    def at(self, position: Position, beat: Callable[[], None] = no_beat) -> Snapshot | None:
        """The snapshot of a change; None if its record was deleted because there are newer ones."""
        if not position.change:
            return Snapshot(self, Record(), position.stamp)
        self.load([self.meta.name], beat)
        record = self._record
        if record is None or record.change != position.change:
            record = self.meta.record(position.change, position.stamp)
            if record is None:
                return None
            self._record = record
        self.load([self.rows_of(version) for version in {**record.rows, **record.old}], beat)
        return Snapshot(self, record, position.stamp)

    def state_of(self, record: Record, stamp: int) -> State:
        found = self._state
        if found is None or found[0] != record.state:
            found = self._state = record.state, self.meta.state(record.state, stamp)
        return found[1]

    def keep(self, record: Record, state: State | None) -> None:
        """Caches record and state of a change that this store has committed."""
        self._record = record
        if state is not None:
            self._state = record.state, state

    def rows_of(self, version: int) -> str:
        """The name of the collection with the rows of a version."""
        return f"{self.gallery}__v{version}"

    def make_rows(self, version: int, state: State, beat: Callable[[], None] = no_beat) -> None:
        """Creates the collection of a version unless it exists."""
        name = self.rows_of(version)
        if name not in self.loaded:
            width = state.models[version].identity.embedding_dim
            self.connection.create(name, fields_of(width), "COSINE")
            self.load([name], beat)

    def load(self, names: Iterable[str], beat: Callable[[], None]) -> None:
        """Blocks until these collections can be searched."""
        for name in names:
            if name not in self.loaded:
                self.connection.load(name, beat)
                self.loaded.add(name)


class Snapshot:
    """Reads the gallery as of one change.

    Attributes:
        record: record of the change.
        stamp: timestamp of the server up to which reads return all writes.
    """

    def __init__(self, all_: Snapshots, record: Record, stamp: int) -> None:
        self.record, self.stamp = record, stamp
        self.connection, self.meta, self.rows_of = all_.connection, all_.meta, all_.rows_of
        self._all = all_

    @property
    def state(self) -> State:
        return self._all.state_of(self.record, self.stamp)

    def versions_of(self, ids: list[int], versions: Iterable[int] | None = None) -> dict[int, int]:
        """The version of each of these ids that is in the gallery; `versions`: None for all, else only these."""
        found: dict[int, int] = {}
        for version in self.record.rows if versions is None else versions:
            left = [id_ for id_ in ids if id_ not in found]
            where = self.record.live(version)
            rows = self.connection.query_in(self.rows_of(version), "id", left, where, ["id"], self.stamp, 8192)
            found |= {row["id"]: version for row in rows}
        return found

    def ids_of(self, version: int) -> list[int]:
        where = self.record.live(version)
        return [row["id"] for row in self.connection.query(self.rows_of(version), where, ["id"], self.stamp)]

    def keys_of(self, version: int) -> dict[int, int]:
        """Returns id -> key of all rows of a version that are in the gallery."""
        where = self.record.live(version)
        found = self.connection.query(self.rows_of(version), where, ["id", "key"], self.stamp)
        return {row["id"]: row["key"] for row in found}

    def rows(self, ids: list[int] | None) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yields each version with its whole rows that are in the gallery; `ids`: None for all, else only these."""
        for version in self.record.rows:
            wanted = self.ids_of(version) if ids is None else ids
            yield version, self.fetch(version, wanted, self.record.live(version))

    def fetch(self, version: int, ids: Sequence[int], where: str) -> list[dict[str, Any]]:
        """Whole rows of a version, by id."""
        return self.connection.query_in(self.rows_of(version), "id", ids, where, [*LIVES, "vector"], self.stamp, 1024)

    def fetch_keys(self, version: int, keys: Sequence[int]) -> list[dict[str, Any]]:
        """Whole rows of a version, by key, whether or not they are in the gallery."""
        return self.connection.query_in(self.rows_of(version), "key", keys, "", [*LIVES, "vector"], self.stamp, 1024)
