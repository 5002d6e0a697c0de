"""A gallery in Milvus: a file of milvus-lite (`FILE.db#NAME`) or a server (`http://HOST:PORT#NAME`).

Milvus has no transactions.  A change writes rows and entries under a new number, in any number of requests.  One rename
then publishes that number (`_milvus_register`).  A reader takes the last published number, and reads the gallery as of
that change, whatever is written meanwhile.  The number of a killed writer is never published.

Each version has its own collection.  Rows that `replace` replaces stay there, marked, until `retire`.  Milvus finds
candidates by its float32 scores, and their exact order is computed here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._state import RETIRED, Change, State
from ._common import SEVERAL_WIDTHS, check_present, failure, stamped, taken_id
from ._milvus_client import Connection, chunks, split_url
from ._milvus_register import Register, UnknownError
from ._milvus_rows import Record, matching, unpack
from ._milvus_search import Searcher
from ._milvus_snapshot import Snapshot, Snapshots
from ._milvus_turn import Turn, taken
from .base import Leased, Overview, Ranking, StoredRows, StoreError

__all__ = ["MilvusStore"]

_GARBAGE_SECONDS = 60.0  # a rollback's void rows are deleted after this time: no earlier search still reads them


class MilvusStore:
    """See `Store`."""

    def __init__(self, url: str) -> None:
        address, gallery, self.url = split_url(url)
        self._connection = Connection(address, self.url)
        self._snapshots = Snapshots(self._connection, Register(self._connection, gallery), gallery)
        self._meta = self._snapshots.meta

    @classmethod
    def create(cls, url: str, state: State, event: dict[str, Any]) -> MilvusStore:
        """A new gallery.

        Raises:
            FileExistsError: there is one of this name.
            StoreError: Milvus failed, or is not there.
        """
        store = cls(url)
        with store._named("create the gallery"):
            store._snapshots.register.create()
            with taken(store._snapshots) as turn:
                if turn.before.record.change:
                    raise FileExistsError(f"{store.url} holds a gallery, which Gallery.open opens: give another name")
                beat = store._snapshots.register.beat
                store._meta.create()  # it loads while the other collection is created
                store._snapshots.make_rows(state.served_by.identity.version, state, beat)
                store._snapshots.load([store._meta.name], beat)
                turn.record = replace(turn.record, state=turn.change, epoch=turn.change)
                turn.state, turn.event, turn.commits = state, stamped(event), True
        return store

    @classmethod
    def open(cls, url: str) -> MilvusStore:
        """The gallery of this name.

        Raises:
            FileNotFoundError: there is none.
            StoreError: Milvus failed, or is not there, or the gallery is of a newer format.
        """
        store = cls(url)
        with store._named("open the gallery"):
            store._connection.check_there()
            position = store._snapshots.register.find()
            if position is None or not position.change:
                made = "" if position is None else "its creation was interrupted; "
                raise FileNotFoundError(f"{store.url} holds no gallery: {made}Gallery.create makes one")
            store._snapshots.read(lambda now: now.record)  # checks the format
        return store

    # reading

    def state(self) -> State:
        with self._named("read the state"):
            return self._snapshots.read(lambda now: now.state)

    def history(self) -> list[dict[str, Any]]:
        with self._named("read the history"):
            return self._snapshots.read(lambda now: self._meta.history(now.record, now.stamp))

    def overview(self) -> Overview:
        def count(now: Snapshot) -> Overview:
            leases = self._meta.leases(now.record.epoch, now.stamp, now=time.time())
            ends: dict[str, list[float]] = {}
            for id_ in now.versions_of(sorted(leases)):
                worker, until = leases[id_]
                ends.setdefault(worker, []).append(until)
            leased = [Leased(worker, len(each), max(each)) for worker, each in ends.items()]
            leased.sort(key=lambda each: (each.until, each.worker))
            history = self._meta.history(now.record, now.stamp)
            return Overview(now.state, history, dict(now.record.rows), dict(now.record.old), leased)

        with self._named("count rows"):
            return self._snapshots.read(count)

    def search(self, queries: NDArray[np.float32], k: int, where: Mapping[str, tuple[Any, ...]] | None) -> Ranking:
        condition = "" if where is None else matching(where)
        with self._named("search"):
            return self._snapshots.read(lambda now: Searcher(now, condition).search(queries, k))

    def read(self, ids: NDArray[np.int64] | None) -> StoredRows:
        def read(now: Snapshot) -> StoredRows:
            wanted = None if ids is None else ids.tolist()
            found: dict[int, tuple[int, Any, str]] = {}
            for version, rows in now.rows(wanted):
                for row, vector in zip(rows, unpack(rows), strict=True):
                    found[row["id"]] = version, vector, row["payload"]
            order = sorted(found) if wanted is None else wanted
            check_present(id_ for id_ in order if id_ not in found)
            widths = {len(found[id_][1]) for id_ in order}
            if len(widths) > 1:
                raise ValueError(SEVERAL_WIDTHS)
            vectors = np.array([found[id_][1] for id_ in order], dtype=np.float32)
            return StoredRows(
                np.array(order, dtype=np.int64),
                np.array([found[id_][0] for id_ in order], dtype=np.int64),
                vectors.reshape(len(order), max(widths, default=0)),
                [json.loads(found[id_][2]) for id_ in order],
            )

        with self._named("read rows"):
            return self._snapshots.read(read)

    def stale(self, version: int, order: str | NDArray[np.int64]) -> NDArray[np.int64]:
        def stale(now: Snapshot) -> NDArray[np.int64]:
            if not isinstance(order, str):
                versions = now.versions_of(order.tolist())
                check_present(id_ for id_ in order.tolist() if id_ not in versions)
                return np.array([id_ for id_ in order.tolist() if versions[id_] != version], dtype=np.int64)
            found = sorted(id_ for other in now.record.rows if other != version for id_ in now.ids_of(other))
            if order == "traffic" and found:
                hits = self._meta.hits(now.stamp)
                found.sort(key=lambda id_: (-hits.get(id_, 0), id_))
            return np.array(found, dtype=np.int64)

        with self._named("list rows"):
            return self._snapshots.read(stale)

    # writing

    def change(self, decide: Callable[[State, Mapping[int, int]], Change]) -> dict[str, Any]:
        with self._named("change the state"):
            with taken(self._snapshots) as turn:
                before = turn.before.state
                change = decide(before, turn.before.record.rows)
                event = dict(change.event)
                if change.restore is not None:
                    event["rows_restored"] = _restore(turn, change.restore)
                    event["rows_that_stay"] = turn.record.rows.get(change.restore, 0)
                if change.drop is not None:
                    _check_droppable(turn, change.drop)
                    event["old_rows_deleted"] = turn.record.old.get(change.drop, 0)
                    turn.record = turn.record.counted("old", {change.drop: -event["old_rows_deleted"]})
                epoch = turn.change if change.state.serving[-1] != before.serving[-1] else turn.record.epoch
                turn.record = replace(turn.record, state=turn.change, epoch=epoch)
                turn.event = event = stamped(event)
                turn.state, turn.commits = change.state, True
            if change.state.serving != before.serving:
                with suppress(StoreError):  # the change is committed; the next one deletes what is left
                    self._clean(turn.record, change.state, turn.stamp)
            return event

    def add(
        self, ids: NDArray[np.int64], vectors: NDArray[np.float32], version: int, payload: list[str] | None,
        allow: Callable[[State], None],
    ) -> None:  # fmt: skip
        with self._writing("add", len(ids), version, allow) as turn:
            there = turn.versions_of(ids.tolist())
            if there:
                raise taken_id(min(there))
            turn.insert(ids, vectors, version, payload or ["{}"] * len(ids))

    def replace(
        self, ids: NDArray[np.int64], vectors: NDArray[np.float32], version: int, payload: list[str] | None,
        allow: Callable[[State], None],
    ) -> int:  # fmt: skip
        with self._writing("replace", len(ids), version, allow) as turn:
            number = _replace(turn, ids, vectors, version, payload)
            turn.wrote(self._meta.delete(["lease"], ids.tolist()))
            others = any(rows for other, rows in turn.record.rows.items() if other != version)
            if number and not others:
                turn.event = stamped({"event": "backfill finished", "version": version})
            return number

    def remove(self, ids: NDArray[np.int64]) -> None:
        with self._named("remove", len(ids)):
            gone: dict[int, list[int]] = {}
            with taken(self._snapshots) as turn:
                now = turn.before
                there = turn.versions_of(ids.tolist())
                check_present(id_ for id_ in ids.tolist() if id_ not in there)
                for version in {**now.record.rows, **now.record.old}:
                    for counted, where in (("rows", now.record.live(version)), ("old", now.record.dead(version))):
                        rows = now.fetch(version, ids.tolist(), where)
                        turn.remove(version, rows)
                        turn.record = turn.record.counted(counted, {version: -len(rows)})
                        gone.setdefault(version, []).extend(row["key"] for row in rows)
            with suppress(StoreError):  # no reader selects them any more; a later change deletes what is left
                for version, keys in gone.items():
                    self._connection.delete(self._snapshots.rows_of(version), "key", keys)
                self._meta.delete(["hits"], ids.tolist())

    def claim(self, ids: NDArray[np.int64], limit: int, version: int, worker: str, seconds: float) -> NDArray[np.int64]:
        with self._named("lease rows"), taken(self._snapshots) as turn:
            now, mine, epoch = time.time(), [], turn.before.record.epoch
            held = self._meta.leases(epoch, turn.stamp, now=now)
            free = [id_ for id_ in ids.tolist() if id_ not in held]
            for some in chunks(free, max(2 * limit, 1024)):
                stale = turn.versions_of(some, [other for other in turn.before.record.rows if other != version])
                mine += [id_ for id_ in some if id_ in stale]
                if len(mine) >= limit:
                    break
            if mine[:limit]:
                turn.wrote(self._meta.lease(mine[:limit], epoch, worker, now + seconds))
            return np.array(mine[:limit], dtype=np.int64)

    def release(self, worker: str) -> None:
        if self._connection.ended:  # by the garbage collector; the leases expire
            return
        with self._named("end leases"), taken(self._snapshots) as turn:  # later claims read up to its stamp
            turn.wrote(self._meta.release(worker, turn.stamp))

    def count_hits(self, ids: NDArray[np.int64], times: NDArray[np.int64]) -> bool:
        try:
            with self._named("count hits"), taken(self._snapshots, wait=0.0) as turn:
                turn.wrote(self._meta.add_hits(ids, times, turn.stamp))
        except StoreError:  # counts are hints: a search does not fail for them
            return False
        return True

    def close(self) -> None:
        self._snapshots.loaded.clear()
        self._snapshots.places = None
        self._connection.close()

    @contextmanager
    def _writing(self, what: str, rows: int, version: int, allow: Callable[[State], None]) -> Iterator[Turn]:
        """A turn that writes rows of a version.

        The collection of the version is made before the turn, because a server takes seconds for it.
        """
        with self._named(what, rows):
            if self._snapshots.rows_of(version) not in self._snapshots.loaded:
                state = self._snapshots.read(lambda now: now.state)
                allow(state)
                self._snapshots.make_rows(version, state)
            with taken(self._snapshots) as turn:
                allow(turn.before.state)
                yield turn

    def _clean(self, record: Record, state: State, stamp: int) -> None:
        """Deletes collections, rows and records that no reader selects any more."""
        there = set(self._connection.names())
        for version, member in state.models.items():
            name = self._snapshots.rows_of(version)
            if name not in there:
                continue
            if member.standing == RETIRED:
                self._snapshots.loaded.discard(name)
                self._connection.drop(name)
            elif name in self._snapshots.loaded:
                where = record.garbage(version, time.time() - _GARBAGE_SECONDS)
                found = self._connection.query(name, where, ["key"], stamp)
                self._connection.delete(name, "key", [row["key"] for row in found])
        self._meta.forget(record.change - 16, stamp)

    @contextmanager
    def _named(self, what: str, rows: int | None = None) -> Iterator[None]:
        """Raises Milvus's errors as StoreError, with the store, the call and the rows in the message."""
        try:
            yield
        except UnknownError as error:
            raise StoreError(f"cannot {what} in {self.url}: {error}") from error
        except StoreError as error:
            if self.url in str(error):
                raise
            raise failure(self.url, what, rows, error) from error


def _replace(
    turn: Turn, ids: NDArray[np.int64], vectors: NDArray[np.float32], version: int, payload: list[str] | None
) -> int:
    now, left = turn.before, ids.tolist()
    replaced = {}
    held: dict[int, tuple[int, str]] = {}  # by id, version and payload of the row that is replaced
    for old in [other for other in now.record.rows if other != version]:
        replaced[old] = turn.live_rows(old, left)
        held |= {row["id"]: (old, row["payload"]) for row in replaced[old]}
        left = [id_ for id_ in left if id_ not in held]
    if left:
        there = turn.versions_of(left, [version])
        absent = [id_ for id_ in left if id_ not in there]
        leased = now.meta.leased(absent, now.record.epoch, now.stamp)
        check_present(id_ for id_ in absent if id_ not in leased)
    for old, rows in replaced.items():
        turn.end(old, rows, version)
        turn.record = turn.record.counted("rows", {old: -len(rows)}).counted("old", {old: len(rows)})
    at = [row for row, id_ in enumerate(ids.tolist()) if id_ in held]
    if at:
        old_rows = [held[id_] for id_ in ids[at].tolist()]
        kept = [text for _, text in old_rows] if payload is None else [payload[row] for row in at]
        turn.insert(ids[at], vectors[at], version, kept, [old for old, _ in old_rows])
    return len(at)


def _restore(turn: Turn, version: int) -> int:
    """Undoes all replacements by a version.  It writes no rows: the record gets a rule that readers apply."""
    now, record = turn.before, turn.record
    models, live = now.state.models, now.state.live
    retired = tuple(sorted(set(models) - set(live)))
    rollbacks = [each for each in record.undone.get(version, ()) if each[1] != retired]
    rollbacks.append((turn.change, retired, time.time()))
    record = replace(record, undone={**record.undone, version: tuple(rollbacks)})
    number = 0
    for other in now.record.old:
        where = f"{now.record.dead(other)} and by == {version}"
        back = len(now.connection.query(now.rows_of(other), where, ["key"], now.stamp))
        record = record.counted("rows", {other: back}).counted("old", {other: -back})
        number += back
    turn.record, turn.restores = record.counted("rows", {version: -number}), True
    return number


def _check_droppable(turn: Turn, version: int) -> None:
    """Raises ValueError if rows of this version have replaced older ones that are kept: those are retired first."""
    now = turn.before
    older = [other for other in now.record.old if other != version]
    if older and version in now.record.old:
        where = f"{now.record.dead(version)} and replaces in {older}"
        if now.connection.query(now.rows_of(version), where, ["key"], now.stamp):
            raise ValueError(
                f"rows of version {version} have replaced older ones, of version {', '.join(map(str, older))}, which "
                "are kept: on Milvus the older version is retired first"
            )
