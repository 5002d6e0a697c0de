"""SQLite connections that threads share and that are closed before a fork; transactions are atomic."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Connection"]

_BUSY_SECONDS = 60.0  # timeout of a writer that waits for another one


class Connection:
    """One connection to a file, opened at its first use.

    It is closed before the process forks and opened again after that, in the parent and in the child: SQLite's locks do
    not survive a fork.

    Attributes:
        lock: held by the thread that uses the connection.
        times_opened: number of times that it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.times_opened = 0
        self._open: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        _all_connections.add(self)

    @property
    def current(self) -> sqlite3.Connection:
        """The connection, which is opened if it is not open; only for the thread that holds `lock`."""
        status = self.path.stat()  # raises for a missing file; sqlite3.connect would create it
        if self._open is None:
            self._open = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._open.execute("pragma synchronous=full")  # each commit reaches the disk
            self._file = status.st_dev, status.st_ino
            self.times_opened += 1
        elif (status.st_dev, status.st_ino) != self._file:  # SQLite would still use the deleted file
            raise sqlite3.OperationalError(f"{self.path.name} was replaced by another file while it was open")
        return self._open

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Opens a read transaction, which has one snapshot of the file."""
        with self.lock:
            connection = self.current
            connection.execute("begin")
            try:
                yield connection
            finally:
                connection.execute("rollback")

    @contextmanager
    def writing(self, *, durable: bool = True, wait: float = _BUSY_SECONDS) -> Iterator[sqlite3.Connection]:
        """Opens a write transaction, which is committed to the disk at the end, or rolled back after an error.

        Args:
            durable: whether the commit survives a power failure; it always survives a kill of this process.
            wait: seconds to wait for another writer; sqlite3.OperationalError after that.
        """
        with self.lock:
            connection = self.current
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
        self.close()  # else sqlite3's object may stay open until garbage collection, and a fork would copy it


_all_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_forking: list[Connection] = []  # connections whose locks are held during a fork


def _before_fork() -> None:
    _forking[:] = list(_all_connections)
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
