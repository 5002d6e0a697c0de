"""The register of a gallery on Milvus: an empty collection whose name holds the number of the last committed change.

Milvus has no transactions, but of several clients that rename a collection exactly one succeeds.  So a commit is one
rename: it is atomic, and it fails for a writer that has lost its turn, which is its exclusive right to write.

    NAME__at_{change}_{stamp}_{tried}                        nobody writes
    NAME__at_{change}_{stamp}_{tried}__by_{writer}_{beats}   a writer prepares change `tried`

`Position` explains the fields.

A writer renames the collection regularly, as its heartbeat.  If the name does not change for `DEAD_SECONDS`, another
writer takes the turn under a higher number.  The dead writer's rows stay invisible permanently.
"""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from dataclasses import dataclass

from ._milvus_client import SECONDS, Connection, GoneError
from .base import StoreError

__all__ = ["Position", "Register", "UnknownError"]


class UnknownError(StoreError):
    """It is unknown whether a change was committed."""


# A writer without a heartbeat for this long counts as dead.  Heartbeats are due every tenth of it, and a late writer
# stops after half of it.
DEAD_SECONDS = 30.0
_WAIT_SECONDS = 120.0  # longest wait for other writers
_POLL_SECONDS = 0.02
_PROCESS = uuid.uuid4().hex[:12]


def _begin_anew() -> None:
    global _PROCESS
    _PROCESS = uuid.uuid4().hex[:12]


os.register_at_fork(after_in_child=_begin_anew)


@dataclass(frozen=True)
class Position:
    """The fields of the collection's name.

    Attributes:
        change: number of the last committed change; 0: the creation of the gallery is not committed yet.
        stamp: timestamp of Milvus; reads with it as `guarantee_timestamp` return all committed rows.
        tried: highest change number that a writer has taken, committed or not.
        writer: writer that has the turn; "" for none.
        beats: number of that writer's heartbeats.
    """

    change: int
    stamp: int
    tried: int
    writer: str = ""
    beats: int = 0

    def name(self, gallery: str) -> str:
        free = f"{gallery}__at_{self.change}_{self.stamp}_{self.tried}"
        return f"{free}__by_{self.writer}_{self.beats}" if self.writer else free


class Register:
    """Takes and ends turns on a gallery, for one store object.  A thread of the store holds `lock` during its turn."""

    def __init__(self, connection: Connection, gallery: str) -> None:
        self._connection = connection
        self._gallery = gallery
        self._pattern = re.compile(rf"{gallery}__at_(\d+)_(\d+)_(\d+)(?:__by_([0-9a-f]+)_(\d+))?")
        self._store = uuid.uuid4().hex[:12]
        self._mine: Position | None = None
        self._seen = 0.0  # time of the last heartbeat
        self.lock = threading.RLock()

    def create(self) -> None:
        """Creates the collection unless it exists."""
        if self.find() is None:
            self._connection.create(
                Position(0, 0, 0).name(self._gallery),
                [("key", "INT64", {}), ("vector", "FLOAT_VECTOR", {"dim": 2})],
            )

    def find(self) -> Position | None:
        """Returns the position; None if there is not a gallery of this name."""
        found = [match for name in self._connection.names() if (match := self._pattern.fullmatch(name))]
        if not found:
            return None
        positions = [Position(int(m[1]), int(m[2]), int(m[3]), m[4] or "", int(m[5] or 0)) for m in found]
        return max(positions, key=lambda position: (position.change, position.tried))

    def read(self) -> Position:
        found = self.find()
        if found is None:
            raise GoneError(
                f"there is no gallery {self._gallery}, or it was deleted: no collection {self._gallery}__at_..."
            )
        return found

    def begin(self, *, wait: float = _WAIT_SECONDS) -> Position | None:
        """Takes the turn.  Returns the position with the number of the change to prepare; None after `wait` seconds."""
        writer = _PROCESS + self._store
        seen: Position | None = None
        since = begun = time.monotonic()
        while True:
            now, position = time.monotonic(), self.read()
            if position != seen:
                seen, since = position, now
            dead = now - since > DEAD_SECONDS or position.writer == writer
            # only one process can open a local database file: a writer of another process is dead
            dead |= self._connection.alone and not position.writer.startswith(_PROCESS)
            if not position.writer or dead:
                mine = Position(position.change, position.stamp, position.tried + 1, writer)
                if self._rename(position, mine):
                    return mine
            if now - begun > wait:
                return None
            time.sleep(_POLL_SECONDS)

    def beat(self) -> None:
        """Renames the collection if a heartbeat is due.  A writer calls it before each of its requests.

        Raises:
            StoreError: the turn was lost, or the last heartbeat is so old that another writer may have taken it.
        """
        assert self._mine is not None
        late = time.monotonic() - self._seen
        if late < DEAD_SECONDS / 10:
            return
        mine = self._mine
        after = Position(mine.change, mine.stamp, mine.tried, mine.writer, mine.beats + 1)
        if late > DEAD_SECONDS / 2 or not (self._rename(mine, after) or self.read() == after):
            raise StoreError(
                f"this writer lost its turn: its last heartbeat was {late:.0f} seconds ago, because Milvus was slow "
                "or the process was paused, or another writer took over; nothing was committed: repeat the call"
            )

    def commit(self, stamp: int) -> None:
        """Commits the change that was prepared.

        Raises:
            StoreError: another writer has taken the turn.
            UnknownError: it is unknown whether the change was committed.
        """
        assert self._mine is not None
        mine = self._mine
        self._end(mine, Position(mine.tried, max(stamp, mine.stamp), mine.tried))

    def give_up(self, stamp: int, *, tried: bool) -> None:
        """Ends the turn without a change; `tried`: whether rows may have been written under its change number."""
        mine = self._mine
        if mine is None:
            return
        self._end(mine, Position(mine.change, max(stamp, mine.stamp), mine.tried - (not tried)))

    def _end(self, mine: Position, after: Position) -> None:
        try:
            if self._rename(mine, after):
                return
            error: StoreError | None = None
        except StoreError as lost:  # the server may have renamed it, although no answer came
            error = lost
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            try:
                now = self.read()
                if now != mine:
                    if now.change < after.change:
                        error = None
                        break
                    if mine.change < after.change < now.change:  # a later change followed this one, or replaced it
                        error = StoreError("another writer has committed a change since")
                        break
                    return  # Milvus's client retried a rename that had succeeded
                if self._rename(mine, after):
                    return
            except StoreError as again:
                error = again
            time.sleep(0.2)
        if error is None:
            raise StoreError(
                f"another writer took over, because this one sent no heartbeat for {DEAD_SECONDS:.0f} seconds; nothing "
                "was committed: repeat the call"
            )
        raise UnknownError(
            f"Milvus did not confirm the change; check whether the gallery has it before you repeat the call: {error}"
        ) from error

    def _rename(self, before: Position, after: Position) -> bool:
        try:
            self._connection.rename(before.name(self._gallery), after.name(self._gallery))
        except GoneError:
            return False
        self._mine = after if after.writer else None
        self._seen = time.monotonic()
        return True
