"""A pool of connections to PostgreSQL: one for each running call, never shared with a forked process."""

from __future__ import annotations

import os
import select
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg.pq import TransactionStatus

from ._postgresql_url import Place

__all__ = ["Connection", "Connections", "LostCommitError", "find_extension"]

Connection: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"

_IDLE = 8  # connections that are kept for later calls

# The gallery's schema comes first, then the schema of the extension, which an administrator may have chosen.
_PATH = """
select set_config('search_path', quote_ident(%s) || ', ' || coalesce((
  select quote_ident(nspname) from pg_extension join pg_namespace on pg_namespace.oid = extnamespace
  where extname = 'vector'
), 'public'), false)
"""


class LostCommitError(Exception):
    """The connection broke while a transaction was committed: the server has done all of it, or nothing."""


class Connections:
    """The pool, for any number of threads; a call that finds no idle connection opens one."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._idle: deque[Connection] = deque()  # its methods are atomic: no lock that a fork could leave locked
        _all.add(self)

    @contextmanager
    def one(self) -> Iterator[Connection]:
        """A connection in autocommit mode.  It is closed afterwards if its transaction did not end."""
        connection = self._take()
        try:
            yield connection
        finally:
            ended = connection.info.transaction_status == TransactionStatus.IDLE
            if ended and len(self._idle) < _IDLE:
                self._idle.append(connection)
            else:
                connection.close()

    @contextmanager
    def transaction(self, first: str = "") -> Iterator[Connection]:
        """One transaction, which is committed at the end, or, after an error, undone.

        Args:
            first: its first statement, sent in one message with `begin`.

        Raises:
            LostCommitError: the connection broke during the commit.
        """
        with self.one() as connection:
            try:
                connection.execute(f"begin; {first}")
                yield connection
            except BaseException:
                if connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                    connection.execute("rollback")
                raise
            try:
                connection.execute("commit")
            except psycopg.Error as error:
                if connection.closed:
                    raise LostCommitError(error) from error
                raise  # the server answered, and has rolled it back

    def close(self) -> None:
        """Closes the idle connections; a later call opens new ones."""
        while self._idle:
            self._idle.pop().close()

    def __del__(self) -> None:
        self.close()

    def _take(self) -> Connection:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if _is_silent(connection):
                return connection
            connection.close()
        connection = psycopg.connect(self._place.conninfo, autocommit=True, fallback_application_name="simplexfix")
        _open.add(connection)
        find_extension(connection, self._place)
        return connection


def find_extension(connection: Connection, place: Place) -> None:
    """Sets `search_path` to the gallery's tables and pgvector's types, for the whole session."""
    connection.execute(_PATH, [place.name])


def _is_silent(connection: Connection) -> bool:
    """Whether the server has sent nothing since the last call: it sends a message when it stops."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return not poll.poll(0)


_all: weakref.WeakSet[Connections] = weakref.WeakSet()
_open: weakref.WeakSet[Connection] = weakref.WeakSet()
_inherited: list[Connection] = []


def _after_fork_in_child() -> None:
    """Closes the child's copies of the sockets without a message to the server.

    A copy would keep the transactions of a killed parent open, with their locks.
    """
    for connection in _open:
        if not connection.closed:
            os.close(connection.fileno())
        _inherited.append(connection)  # a reference: psycopg's destructor would close the descriptor again
    _open.clear()
    for connections in _all:
        connections._idle.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
