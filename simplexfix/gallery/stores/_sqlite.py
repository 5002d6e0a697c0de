"""SQLite connections that threads share, that a fork does not carry over, and whose transactions are whole."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Connection"]

_BUSY_SECONDS = 60.0  # for a writer that waits for another


class Connection:
    """One connection to a file, opened at its first use.

    It is closed before the process forks and opened again after that, in the parent and in the child: SQLite's locks do
    not survive a fork.

    Attributes:
        lock: of the thread that uses it.
        opened: how often it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.opened = 0
        self._open: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        _all.add(self)

    @property
    def now(self) -> sqlite3.Connection:
        """The open connection, for the thread that holds `lock`."""
        found = self.path.stat()  # sqlite3.connect would make a new file
        if self._open is None:
            self._open = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._open.execute("pragma synchronous=full")  # each commit reaches the disk
            self._file = found.st_dev, found.st_ino
            self.opened += 1
        elif (found.st_dev, found.st_ino) != self._file:  # SQLite reads and writes the deleted file on
            raise sqlite3.OperationalError(f"{self.path.name} was replaced by another file while it was open")
        return self._open

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One snapshot of the file."""
        with self.lock:
            connection = self.now
            connection.execute("begin")
            try:
                yield connection
            finally:
                connection.execute("rollback")

    @contextmanager
    def writing(self, *, durable: bool = True, wait: float = _BUSY_SECONDS) -> Iterator[sqlite3.Connection]:
        """One transaction, which is on the disk at the end, or, after an error, undone.

        Args:
            durable: False: a power failure may undo it, a killed process does not.
            wait: seconds for another writer to end; sqlite3.OperationalError after that.
        """
        with self.lock:
            connection = self.now
            connection.execute(f"pragma busy_timeout={round(1000 * wait)}")
            connection.execute(f"pragma synchronous={'full' if durable else 'normal'}")
            connection.execute("begin immediate")
            try:
                yield connection
                connection.execute("commit")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("rollback")
                raise

    def close(self) -> None:
        with self.lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def __del__(self) -> None:
        self.close()  # sqlite3's own object waits for the garbage collector, and a fork would carry it over


_all: weakref.WeakSet[Connection] = weakref.WeakSet()
_forking: list[Connection] = []


def _before_fork() -> None:
    _forking[:] = list(_all)
    for connection in _forking:
        connection.lock.acquire()
        connection.close()


def _after_fork_in_parent() -> None:
    for connection in _forking:
        connection.lock.release()
    _forking.clear()


def _after_fork_in_child() -> None:
    for connection in _forking:
        connection.lock = threading.RLock()
    _forking.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
