"""One writer's turn: it writes a change under a number that no reader selects yet, and commits it by one rename."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._state import State
from ._milvus_client import chunks
from ._milvus_rows import ADDED, Record, fields_of, pack
from ._milvus_snapshot import Snapshot, Snapshots
from .base import StoreError

__all__ = ["Turn", "taken"]

_KEYS = 1 << 24  # keys that each change has for its rows
_BYTES = 8 << 20  # of one request


class Turn:
    """The change that a writer prepares.

    Attributes:
        change: number of the change.
        before: the gallery as of the last change.
        record: record of this change.
        state, event: the new state, and the event for the history; None if there is none.
        commits: whether there is anything to commit.
        restores: whether it is a rollback, which replaces rows without writing any.
    """

    def __init__(self, snapshots: Snapshots, before: Snapshot, change: int) -> None:
        never = (*before.record.never, *range(before.record.change + 1, change))
        self.change, self.before = change, before
        self.record: Record = replace(before.record, change=change, never=never)
        self.state: State | None = None
        self.event: dict[str, Any] | None = None
        self.commits = self.restores = False
        self.stamp = before.stamp
        self.tried = False  # whether rows may have been written under its number
        self._snapshots, self._register = snapshots, snapshots.register
        self._moved: dict[int, tuple[int, int] | None] = {}  # id -> place, as in `Snapshots.places`; None: removed

    # reading, by id

    def versions_of(self, ids: list[int], versions: Collection[int] | None = None) -> dict[int, int]:
        """Calls `Snapshot.versions_of` on the snapshot of the last change."""
        places = self._places()
        if places is None:
            return self.before.versions_of(ids, versions)
        found = {id_: places[id_][0] for id_ in ids if id_ in places}
        return {id_: version for id_, version in found.items() if versions is None or version in versions}

    def live_rows(self, version: int, ids: list[int]) -> list[dict[str, Any]]:
        """Whole rows of a version that are in the gallery."""
        places = self._places()
        if places is None:
            return self.before.fetch(version, ids, self.before.record.live(version))
        keys = [places[id_][1] for id_ in ids if id_ in places and places[id_][0] == version]
        return self.before.fetch_keys(version, keys)

    def _places(self) -> dict[int, tuple[int, int]] | None:
        """See `Snapshots.places`; None on a server, where other clients write rows at any time."""
        now = self.before
        if not now.connection.alone:
            return None
        known = self._snapshots.places
        if known is None or known[0] != now.record.change:
            found = ((version, now.keys_of(version)) for version in now.record.rows)
            by_id = {id_: (version, key) for version, keys in found for id_, key in keys.items()}
            known = self._snapshots.places = now.record.change, by_id
        return known[1]

    # writing

    def wrote(self, stamp: int) -> None:
        self.stamp = max(self.stamp, stamp)

    def insert(
        self, ids: NDArray[np.int64], vectors: NDArray[np.float32], version: int, payload: list[str],
        replaces: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Adds rows; `replaces`: the version of the row that each one replaces."""
        if len(ids) >= _KEYS:
            raise ValueError(f"Milvus takes at most {_KEYS - 1} rows at a time here, got {len(ids)}")
        keys = range(self.change * _KEYS, self.change * _KEYS + len(ids))
        rows = pack(keys, ids, vectors, payload, self.change, replaces or [ADDED] * len(ids))
        self._write(self._snapshots.connection.insert, version, rows)
        self._moved |= {id_: (version, key) for id_, key in zip(ids.tolist(), keys, strict=True)}
        zeros = int((vectors == 0).all(axis=1).sum())
        self.record = self.record.counted("rows", {version: len(ids)}).counted("zeros", {version: zeros})
        self.commits |= bool(len(ids))

    def end(self, version: int, rows: list[dict[str, Any]], by: int) -> None:
        """Marks rows of a version as replaced from this change on; `by`: the version that replaces them."""
        self._mark(version, [{**row, "died": self.change, "by": by} for row in rows])

    def remove(self, version: int, rows: list[dict[str, Any]]) -> None:
        """Marks rows of a version, live or replaced, as removed from this change on."""
        self._mark(version, [{**row, "gone": self.change} for row in rows])
        self._moved |= dict.fromkeys(row["id"] for row in rows)

    def _mark(self, version: int, rows: list[dict[str, Any]]) -> None:
        self._write(self._snapshots.connection.upsert, version, rows)
        self.commits |= bool(rows)

    def _write(self, request: Callable[..., int], version: int, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        width = len(rows[0]["vector"])
        size = 4 * width + 512 + max(4 * len(row["payload"]) + len(row["bits"]) for row in rows)
        for some in chunks(rows, max(1, _BYTES // size)):
            self._register.beat()
            self.tried = True
            self.wrote(request(self._snapshots.rows_of(version), fields_of(width), some, size))

    def commit(self) -> None:
        if not self.commits:
            self._register.give_up(self.stamp, tried=self.tried)
            return
        self._register.beat()
        self.tried = True
        self.wrote(self._snapshots.meta.write(self.record, self.state, self.event))
        known, self._snapshots.places = self._snapshots.places, None  # in case the commit fails
        self._register.commit(self.stamp)
        self._snapshots.keep(self.record, self.state)
        if known is not None and known[0] == self.before.record.change and not self.restores:
            for id_, place in self._moved.items():
                if place is None:
                    known[1].pop(id_, None)
                else:
                    known[1][id_] = place
            self._snapshots.places = self.change, known[1]


@contextmanager
def taken(snapshots: Snapshots, *, wait: float | None = None) -> Iterator[Turn]:
    """Takes this writer's turn.  Its change is committed at the end; after an error it never is.

    Args:
        wait: seconds to wait for others to end their turns; None: no limit for threads of this store, and
            `_WAIT_SECONDS` of the register for other writers.
    """
    register = snapshots.register
    if not register.lock.acquire(timeout=-1 if wait is None else wait):
        raise StoreError("another thread of this process is writing: repeat the call")
    try:
        mine = register.begin() if wait is None else register.begin(wait=wait)
        if mine is None:
            raise StoreError("other writers did not finish in time: repeat the call, or end a writer that hangs")
        turn: Turn | None = None
        try:
            before = snapshots.at(mine, register.beat)
            assert before is not None, "only the one whose turn it is deletes records"
            turn = Turn(snapshots, before, mine.tried)
            yield turn
            turn.commit()
        except BaseException:
            with suppress(StoreError):  # Milvus may be gone; this store can take its own turn again
                register.give_up(turn.stamp if turn else 0, tried=turn is not None and turn.tried)
            raise
    finally:
        register.lock.release()
