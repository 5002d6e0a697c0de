"""A gallery in a folder: one SQLite file holds everything, and each process searches an exact index in memory.

A process builds its index from the vectors in the file at the first search.  Before every later search it updates the
index with the rows that it or another process has committed since.  Each write is one SQLite transaction in WAL mode,
which readers never wait for.  It is synchronized to the disk at its end, except for leases and counts.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._state import Change, State
from ._common import SEVERAL_WIDTHS, as_json, check_present, comparable_fields, failure, stamped, taken_id
from ._sqlite import Connection
from ._versions_index import VersionsIndex
from .base import Leased, Overview, Ranking, StoredRows, StoreError

__all__ = ["FolderStore"]

_FILE = "gallery.db"
_APPLICATION, _FORMAT = 0x53465847, 1  # "SFXG"
_CHUNK = 4096  # rows that are read at a time

# `vectors` is a separate table, so that replacing a row moves no vector, and counting rows reads no vectors.
# `changed` is the number of the transaction that wrote a row.  A process updates its index with the rows that have a
# higher number than the index.
_SCHEMA = """
create table state (body text not null, changes integer not null);
create table history (number integer primary key, body text not null);
create trigger history_stays before update on history begin select raise(abort, 'the history is append-only'); end;
create trigger history_is_kept before delete on history begin select raise(abort, 'the history is append-only'); end;
create table vectors (key integer primary key, checksum integer not null, vector blob not null);
create table rows (
  id integer primary key, version integer not null, key integer not null, changed integer not null,
  payload text not null
);
create index rows_by_version on rows (version);
create index rows_by_change on rows (changed);
create table removed (id integer primary key, changed integer not null);
create index removed_by_change on removed (changed);
create table old (
  number integer primary key, id integer not null, version integer not null, replaced_by integer not null,
  key integer not null, payload text not null
);
create index old_by_id on old (id);
create index old_by_replaced on old (replaced_by, version);
create table leases (id integer primary key, worker text not null, until real not null);
create table hits (id integer primary key, times integer not null);
"""


class FolderStore:
    """See `Store`.  SQL statements take ids as one JSON array, because SQLite limits the number of parameters."""

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        path = folder / _FILE
        # Two connections: reads of this process do not wait for its writes.
        self._reader, self._writer = Connection(path), Connection(path)
        self._index = VersionsIndex()
        self._indexed = -1  # number of the last change that the index holds
        self._seen_rows: tuple[int, int] | None = None
        self._state: State | None = None
        self._seen_state: tuple[int, int] | None = None

    @classmethod
    def create(cls, url: str, state: State, event: dict[str, Any]) -> FolderStore:
        """A new gallery in a new or empty folder.

        Raises:
            FileExistsError: something is in the folder.
            StoreError, OSError: it cannot be written.
        """
        folder = Path(url)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _FILE
        others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(_FILE))
        if others:
            raise FileExistsError(f"{folder} is not empty, it holds {others[0]}: give a new folder")
        store = cls(folder)
        path.touch()
        with store._named("create the gallery"):
            with store._writer.lock:
                connection = store._writer.current
                if connection.execute("select count(*) from sqlite_master").fetchone()[0]:
                    raise FileExistsError(
                        f"{path} holds tables already: open it with Gallery.open, or give a new folder"
                    )
                connection.execute("pragma page_size=16384")  # vectors of 4,000 numbers fit into one page
                if connection.execute("pragma journal_mode=wal").fetchone()[0] != "wal":
                    raise sqlite3.OperationalError(
                        "SQLite needs shared memory, which this file system lacks: use a local disk"
                    )
            with store._writer.writing() as connection:
                for statement in _statements(_SCHEMA):
                    connection.execute(statement)
                connection.execute("insert into state values (?, 0)", [as_json(state.to_dict())])
                _record(connection, event)
                connection.execute(f"pragma application_id={_APPLICATION}")
                connection.execute(f"pragma user_version={_FORMAT}")  # last: marks the gallery as complete
        return store

    @classmethod
    def open(cls, url: str) -> FolderStore:
        """Opens the gallery in a folder.

        Raises:
            FileNotFoundError: there is none.
            StoreError: the file is damaged, is not a gallery, or has another format.
        """
        folder = Path(url)
        path = folder / _FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no gallery: it has no {_FILE}; Gallery.create makes one")
        store = cls(folder)
        with store._named("open the gallery"), store._reader.lock:
            connection = store._reader.current
            found = [connection.execute(f"pragma {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if found == [0, 0]:
            raise FileNotFoundError(f"{path} holds no gallery: its creation was interrupted; create it again")
        if found != [_APPLICATION, _FORMAT]:
            raise StoreError(
                f"{path} is not a gallery of format {_FORMAT}: expected application_id and user_version "
                f"{[_APPLICATION, _FORMAT]}, got {found}; another program or a newer simplexfix wrote it"
            )
        return store

    def state(self) -> State:
        with self._named("read the state"), self._reader.lock:
            seen = self._data_version()
            if self._state is None or seen != self._seen_state:
                self._state, self._seen_state = _read_state(self._reader.current), seen
            return self._state

    def change(self, decide: Callable[[State, Mapping[int, int]], Change]) -> dict[str, Any]:
        with self._named("change the state"), self._writer.writing() as connection:
            before = _read_state(connection)
            change = decide(before, _counted(connection, "rows"))
            event = dict(change.event)
            if change.restore is not None:
                event["rows_restored"] = _restore(connection, change.restore)
                event["rows_that_stay"] = _counted(connection, "rows").get(change.restore, 0)
            if change.drop is not None:
                event["old_rows_deleted"] = _drop(connection, change.drop)
            if change.state.serving[-1] != before.serving[-1]:
                connection.execute("delete from leases")
            connection.execute("update state set body = ?", [as_json(change.state.to_dict())])
            return _record(connection, event)

    def history(self) -> list[dict[str, Any]]:
        with self._named("read the history"), self._reader.reading() as connection:
            return _read_history(connection)

    def overview(self) -> Overview:
        with self._named("count rows"), self._reader.reading() as connection:
            leased = (
                "select worker, count(*), max(until) from leases where until > ? and id in (select id from rows) "
                "group by worker order by 3, worker"
            )
            return Overview(
                _read_state(connection),
                _read_history(connection),
                _counted(connection, "rows"),
                _counted(connection, "old"),
                [Leased(*row) for row in connection.execute(leased, [time.time()])],
            )

    def add(
        self,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        version: int,
        payload: list[str] | None,
        allow: Callable[[State], None],
    ) -> None:
        with self._named("add", len(ids)), self._writer.writing() as connection:
            allow(_read_state(connection))
            given = as_json(ids.tolist())
            there = connection.execute(
                "select rows.id from json_each(?) as given join rows on rows.id = given.value limit 1", [given]
            ).fetchone()
            if there:
                raise taken_id(there[0])
            change = _next_change(connection)
            keys = _add_vectors(connection, vectors)
            connection.executemany(
                "insert into rows values (?, ?, ?, ?, ?)",
                zip(
                    ids.tolist(), [version] * len(ids), keys, [change] * len(ids), payload or ["{}"] * len(ids),
                    strict=True,
                ),
            )  # fmt: skip
            connection.execute("delete from removed where id in (select value from json_each(?))", [given])

    def replace(
        self,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        version: int,
        payload: list[str] | None,
        allow: Callable[[State], None],
    ) -> int:
        with self._named("replace", len(ids)), self._writer.writing() as connection:
            allow(_read_state(connection))
            given = as_json(ids.tolist())
            versions = dict(
                connection.execute(
                    "select id, version from rows where id in (select value from json_each(?))", [given]
                ).fetchall()
            )
            absent = [id_ for id_ in ids.tolist() if id_ not in versions]
            if absent:
                leased = {
                    id_
                    for (id_,) in connection.execute(
                        "select id from leases where id in (select value from json_each(?))", [as_json(absent)]
                    )
                }
                check_present(id_ for id_ in absent if id_ not in leased)
            at = [row for row, id_ in enumerate(ids.tolist()) if versions.get(id_, version) != version]
            some = ids[at].tolist()
            connection.execute(
                "insert into old (id, version, replaced_by, key, payload) "
                "select id, version, ?, key, payload from rows where id in (select value from json_each(?))",
                [version, as_json(some)],
            )
            keys = _add_vectors(connection, vectors[at])
            change = _next_change(connection)
            texts = [None] * len(at) if payload is None else [payload[row] for row in at]
            connection.executemany(
                "update rows set version = ?, key = ?, changed = ?, payload = coalesce(?, payload) where id = ?",
                zip([version] * len(at), keys, [change] * len(at), texts, some, strict=True),
            )
            connection.execute("delete from leases where id in (select value from json_each(?))", [given])
            others = (
                "select exists(select 1 from rows where version < ?) or exists(select 1 from rows where version > ?)"
            )
            if some and not connection.execute(others, [version, version]).fetchone()[0]:
                _record(connection, {"event": "backfill finished", "version": version})
            return len(some)

    def remove(self, ids: NDArray[np.int64]) -> None:
        with self._named("remove", len(ids)), self._writer.writing() as connection:
            given = as_json(ids.tolist())
            _check_held(connection, given)
            change = _next_change(connection)
            for table in ("rows", "old"):
                connection.execute(
                    f"delete from vectors where key in "
                    f"(select key from {table} where id in (select value from json_each(?)))",
                    [given],
                )
            for table in ("rows", "old", "hits"):
                connection.execute(f"delete from {table} where id in (select value from json_each(?))", [given])
            connection.execute("insert or replace into removed select value, ? from json_each(?)", [change, given])

    def search(self, queries: NDArray[np.float32], k: int, where: Mapping[str, tuple[Any, ...]] | None) -> Ranking:
        with self._named("search"), ExitStack() as stack:
            # The index changes under the reader's lock only.  `searching` begins under it: no change can come between.
            with self._reader.lock:
                if where is None and self._data_version() == self._seen_rows:
                    include = None
                else:
                    with self._reader.reading() as connection:
                        self._take_over(connection)
                        include = None if where is None else _matching(connection, where)
                index = self._index
                stack.enter_context(index.searching())
            return index.search(queries, k, include)

    def read(self, ids: NDArray[np.int64] | None) -> StoredRows:
        with self._named("read rows"), self._reader.reading() as connection:
            columns = "rows.id, rows.version, rows.payload, vectors.checksum, vectors.vector"
            if ids is None:
                query = f"select {columns} from rows join vectors using (key) order by rows.id"
                found = connection.execute(query).fetchall()
            else:
                given = as_json(ids.tolist())
                _check_held(connection, given)
                found = connection.execute(
                    f"select {columns} from json_each(?) as given join rows on rows.id = given.value "
                    "join vectors on vectors.key = rows.key order by given.key",
                    [given],
                ).fetchall()
            return StoredRows(
                np.array([row[0] for row in found], dtype=np.int64),
                np.array([row[1] for row in found], dtype=np.int64),
                _vectors([row[0] for row in found], [row[3] for row in found], [row[4] for row in found]),
                [json.loads(row[2]) for row in found],
            )

    def stale(self, version: int, order: str | NDArray[np.int64]) -> NDArray[np.int64]:
        with self._named("list rows"), self._reader.reading() as connection:
            given: Sequence[Any] = [version]
            if not isinstance(order, str):
                given = [as_json(order.tolist()), version]
                _check_held(connection, given[0])
                query = (
                    "select rows.id from json_each(?) as given join rows on rows.id = given.value "
                    "where version != ? order by given.key"
                )
            elif order == "traffic":
                query = (
                    "select rows.id from rows left join hits on hits.id = rows.id where version != ? "
                    "order by coalesce(times, 0) desc, rows.id"
                )
            else:
                query = "select id from rows where version != ? order by id"
            return np.array([id_ for (id_,) in connection.execute(query, given)], dtype=np.int64)

    def claim(self, ids: NDArray[np.int64], limit: int, version: int, worker: str, seconds: float) -> NDArray[np.int64]:
        now = time.time()
        # Not durable: if a power failure undoes a lease, a row is embedded twice, and nothing is lost.
        with self._named("lease rows"), self._writer.writing(durable=False) as connection:
            found = connection.execute(
                "select rows.id from json_each(?) as given join rows on rows.id = given.value "
                "left join leases on leases.id = rows.id "
                "where version != ? and coalesce(until, 0) <= ? order by given.key limit ?",
                [as_json(ids.tolist()), version, now, limit],
            ).fetchall()
            connection.executemany(
                "insert or replace into leases values (?, ?, ?)", [(id_, worker, now + seconds) for (id_,) in found]
            )
            return np.array([id_ for (id_,) in found], dtype=np.int64)

    def release(self, worker: str) -> None:
        with self._named("end leases"), self._writer.writing(durable=False) as connection:
            connection.execute("delete from leases where worker = ?", [worker])

    def count_hits(self, ids: NDArray[np.int64], times: NDArray[np.int64]) -> bool:
        if not self._writer.lock.acquire(blocking=False):
            return False
        try:
            with self._writer.writing(durable=False, wait=0.0) as connection:
                connection.executemany(
                    "insert into hits select id, ? from rows where id = ? "
                    "on conflict (id) do update set times = times + excluded.times",
                    zip(times.tolist(), ids.tolist(), strict=True),
                )
        except sqlite3.Error:  # counts are hints: a search does not fail for them
            return False
        finally:
            self._writer.lock.release()
        return True

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _data_version(self) -> tuple[int, int]:
        """Returns numbers that change with every commit of another connection; the caller holds the reader's lock."""
        connection = self._reader.current
        return self._reader.times_opened, connection.execute("pragma data_version").fetchone()[0]

    def _take_over(self, connection: sqlite3.Connection) -> None:
        """Updates the index to the snapshot that the connection reads."""
        seen = self._data_version()
        if seen == self._seen_rows:
            return
        last = connection.execute("select changes from state").fetchone()[0]
        if last == self._indexed:
            self._seen_rows = seen
            return
        try:
            with self._index.changing():
                query = "select rows.version, rows.id, checksum, vector from rows join vectors using (key)"
                if self._indexed < 0:  # by id: an index takes less memory for ascending ids
                    rows = connection.execute(f"{query} order by rows.id")
                else:
                    gone = "select id from rows where changed > ? union all select id from removed where changed > ?"
                    ids = connection.execute(gone, [self._indexed, self._indexed]).fetchall()
                    self._index.drop(np.array([id_ for (id_,) in ids], dtype=np.int64))
                    # without an order: to sort the rows by id, SQLite would read the whole table
                    rows = connection.execute(f"{query} where rows.changed > ?", [self._indexed])
                while chunk := rows.fetchmany(_CHUNK):
                    versions = np.array([row[0] for row in chunk])
                    for version in np.unique(versions).tolist():
                        some = [row[1:] for row in chunk if row[0] == version]
                        names, checksums, blobs = zip(*some, strict=True)
                        self._index.put(version, np.array(names, dtype=np.int64), _vectors(names, checksums, blobs))
        except BaseException:  # the index may be incomplete: the next search builds a new one
            self._index, self._indexed, self._seen_rows = VersionsIndex(), -1, None
            raise
        self._indexed, self._seen_rows = last, seen

    @contextmanager
    def _named(self, what: str, rows: int | None = None) -> Iterator[None]:
        """Raises SQLite's errors as StoreError, with the store, the call and the rows in the message."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, FileExistsError):
                raise
            raise failure(self.url, what, rows, error) from error


def _statements(script: str) -> Iterator[str]:
    """Yields the statements one by one: `executescript` would commit the open transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _read_state(connection: sqlite3.Connection) -> State:
    return State.from_dict(json.loads(connection.execute("select body from state").fetchone()[0]))


def _read_history(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    return [json.loads(body) for (body,) in connection.execute("select body from history order by number")]


def _record(connection: sqlite3.Connection, event: dict[str, Any]) -> dict[str, Any]:
    event = stamped(event)
    connection.execute("insert into history (body) values (?)", [as_json(event)])
    return event


def _next_change(connection: sqlite3.Connection) -> int:
    connection.execute("update state set changes = changes + 1")
    return int(connection.execute("select changes from state").fetchone()[0])


def _counted(connection: sqlite3.Connection, table: str) -> dict[int, int]:
    return dict(connection.execute(f"select version, count(*) from {table} group by version").fetchall())


def _add_vectors(connection: sqlite3.Connection, vectors: NDArray[np.float32]) -> range:
    first = connection.execute("select coalesce(max(key), 0) + 1 from vectors").fetchone()[0]
    keys = range(first, first + len(vectors))
    blobs = (row.tobytes() for row in vectors)
    connection.executemany(
        "insert into vectors values (?, ?, ?)",
        ((key, zlib.crc32(blob), blob) for key, blob in zip(keys, blobs, strict=True)),
    )
    return keys


def _restore(connection: sqlite3.Connection, version: int) -> int:
    """Puts back the rows that rows of this version replaced; returns how many."""
    change = _next_change(connection)
    back = (
        "from old join rows on rows.id = old.id and rows.version = old.replaced_by where old.replaced_by = ? "
        "and old.number = (select max(number) from old as last where last.id = old.id)"
    )
    connection.execute(f"create temp table back as select old.number, rows.key as gone {back}", [version])
    connection.execute("delete from vectors where key in (select gone from back)")
    number = connection.execute(
        "insert or replace into rows select id, version, key, ?, payload from old "
        "where number in (select number from back)",
        [change],
    ).rowcount
    connection.execute("delete from old where number in (select number from back)")
    connection.execute("drop table temp.back")
    return number


def _drop(connection: sqlite3.Connection, version: int) -> int:
    connection.execute("delete from vectors where key in (select key from old where version = ?)", [version])
    return connection.execute("delete from old where version = ?", [version]).rowcount


def _matching(connection: sqlite3.Connection, where: Mapping[str, tuple[Any, ...]]) -> dict[int, NDArray[np.int64]]:
    """Returns version -> ids of rows whose payload has one of the values under each key."""
    condition = """exists (
      select 1 from json_each(payload) as field where key = :key_{0} and case type
        when 'text' then atom in (select value from json_each(:texts_{0}))
        when 'integer' then atom in (select value from json_each(:numbers_{0}))
        when 'real' then atom in (select value from json_each(:numbers_{0}))
        else type in (select value from json_each(:literals_{0}))
      end
    )"""
    given: dict[str, str] = {"null_character": r"\u0000"}
    for at, (key, values) in enumerate(where.items()):
        kinds: dict[str, list[Any]] = {"texts": [], "numbers": [], "literals": []}
        for value in values:
            if value is None or isinstance(value, bool):
                kinds["literals"].append(as_json(value))
            else:
                kinds["texts" if isinstance(value, str) else "numbers"].append(value)
        given |= {f"key_{at}": key} | {f"{kind}_{at}": as_json(some) for kind, some in kinds.items()}
    conditions = " and ".join(condition.format(at) for at in range(len(where))) or "1"
    query = (
        f"select version, id, case when instr(payload, :null_character) then payload end from rows where {conditions}"
    )
    found: dict[int, list[int]] = {}
    for version, id_, payload in connection.execute(query, given):
        if payload is None or _is_match(json.loads(payload), where):
            found.setdefault(version, []).append(id_)
    return {version: np.array(ids, dtype=np.int64) for version, ids in found.items()}


def _is_match(payload: Mapping[str, Any], where: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether the payload has one of the values under each key.

    Payloads with U+0000 are compared here: SQLite ends keys and text there.
    """

    def kind_and_value(value: Any) -> tuple[bool, Any]:
        return isinstance(value, bool), value  # True == 1

    fields = comparable_fields(payload)
    return all(
        key in fields and kind_and_value(fields[key]) in map(kind_and_value, values) for key, values in where.items()
    )


def _check_held(connection: sqlite3.Connection, ids: str) -> None:
    absent = connection.execute(
        "select given.value from json_each(?) as given where given.value not in (select id from rows) limit 1", [ids]
    ).fetchone()
    check_present(absent or ())


def _vectors(ids: Sequence[int], checksums: Sequence[int], blobs: Sequence[bytes]) -> NDArray[np.float32]:
    """Returns [n, d] float32, the vectors in the blobs; an error if a checksum or the widths differ."""
    for id_, checksum, blob in zip(ids, checksums, blobs, strict=True):
        if zlib.crc32(blob) != checksum:
            raise sqlite3.DatabaseError(
                f"the vector of id {id_} does not match its checksum: restore the gallery from a backup, or "
                "remove the row and add it again"
            )
    if len({len(blob) for blob in blobs}) > 1:
        raise ValueError(SEVERAL_WIDTHS)
    return np.frombuffer(b"".join(blobs), dtype="<f4").reshape(len(blobs), -1 if blobs else 0)
