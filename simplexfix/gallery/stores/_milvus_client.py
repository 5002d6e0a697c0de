"""One connection to Milvus, either a file (milvus-lite) or a server.  It opens at its first use.

Each write returns a timestamp of the server, the `stamp`.  A read takes a stamp and blocks until the server has applied
all writes up to it.
"""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

from ._milvus_file import repair
from .base import StoreError

__all__ = ["SECONDS", "Connection", "Fields", "GoneError", "chunks", "no_beat", "split_url"]

Fields: TypeAlias = "Sequence[tuple[str, str, dict[str, Any]]]"  # name, type and options; the primary key first

SECONDS = 20.0  # timeout of one request
_MESSAGE = 8 << 20  # bytes of rows in one request; servers accept 64 MiB
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*")
_NOT_FOUND = 100  # Milvus's code for a collection that does not exist


def no_beat() -> None:
    """A heartbeat that does nothing, for readers and short calls."""


class GoneError(StoreError):
    """A collection does not exist."""


def split_url(url: str) -> tuple[str, str, str]:
    """Returns the address, the name of the gallery, and the url without user and password.

    Raises:
        ValueError: the url has another form.
    """
    address, _, name = url.partition("#")
    scheme, server, rest = address.rpartition("://")
    shown = f"{scheme}{server}{rest.rpartition('@')[2] if server else rest}#{name}"
    if not _NAME.fullmatch(name) or len(name) > 64:
        raise ValueError(
            "the part of a url after # is the name of the gallery: at most 64 letters, digits and single _ between "
            f"them, a letter first; got {shown!r}"
        )
    return address, name, shown


def chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    """Yields slices of at most `size` items."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


class Connection:
    """Requests to a `MilvusClient`, from any number of threads.

    Attributes:
        shown: the url without user and password, for messages.
        alone: whether the address is a file, which only one process at a time may open.
    """

    def __init__(self, address: str, shown: str) -> None:
        self.shown = shown
        self.alone = "://" not in address
        self._address = os.path.abspath(address) if self.alone else address
        self._client: Any = None
        self._finish: Any = None
        self._lock = threading.RLock()
        # milvus-lite does not lock a write against other requests
        self._turn = _turn_of(self._address) if self.alone else nullcontext()
        self._pid = os.getpid()

    def check_there(self) -> None:
        """Raises FileNotFoundError for a file that does not exist: the client would create it."""
        if self.alone and not os.path.exists(self._address):
            raise FileNotFoundError(f"{self.shown} holds no gallery: there is no such file; Gallery.create makes one")

    # requests

    def names(self) -> list[str]:
        """Returns the names of all collections."""
        return self._call(lambda client: client.list_collections(timeout=SECONDS))  # type: ignore[no-any-return]

    def rename(self, old: str, new: str) -> None:
        """Raises GoneError if `old` does not exist: of several clients that rename it, one succeeds."""
        self._call(lambda client: client.rename_collection(old, new, timeout=SECONDS))

    def drop(self, name: str) -> None:
        self._call(lambda client: client.drop_collection(name, timeout=SECONDS))

    def create(self, name: str, fields: Fields, metric: str | None = None) -> None:
        """Creates a collection unless it exists.  With a metric it has an exact index, and begins to load."""
        from pymilvus import DataType

        def make(client: Any) -> None:
            if not client.has_collection(name, timeout=SECONDS):
                schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
                for at, (field, kind, options) in enumerate(fields):
                    given = {key: DataType[value] if key == "element_type" else value for key, value in options.items()}
                    schema.add_field(field, DataType[kind], is_primary=at == 0, **given)
                client.create_collection(name, schema=schema, num_shards=1, timeout=SECONDS)
            if metric is not None and not client.list_indexes(name, field_name="vector"):
                index = client.prepare_index_params()
                index.add_index("vector", index_type="FLAT", metric_type=metric)
                client.create_index(name, index_params=index, sync=False, timeout=SECONDS)
                client.load_collection(name, _async=True, timeout=SECONDS)

        self._call(make)

    def load(self, name: str, beat: Callable[[], None]) -> None:
        """Blocks until the collection can be searched.  A server loads a collection once, for all clients.

        A writer passes its heartbeat as `beat`, which is called about every 20 ms: loading can take longer than the
        time after which a writer without heartbeats loses its turn.
        """
        beat()

        def loaded(client: Any) -> bool:
            return client.get_load_state(name, timeout=SECONDS)["state"].name == "Loaded"  # type: ignore[no-any-return]

        if self._call(loaded):
            return
        self._call(lambda client: client.load_collection(name, _async=True, timeout=SECONDS))
        while not self._call(loaded):
            beat()
            time.sleep(0.02)

    def insert(self, name: str, fields: Fields, rows: Sequence[dict[str, Any]], row_bytes: int = 1024) -> int:
        """Adds rows with new keys in one or more atomic requests.  Returns the stamp of the last one."""
        return self._write("batch_insert", name, fields, rows, row_bytes)

    def upsert(self, name: str, fields: Fields, rows: Sequence[dict[str, Any]], row_bytes: int = 1024) -> int:
        """Replaces the rows with the same keys as a whole: a server does not keep fields that are left out."""
        return self._write("upsert", name, fields, rows, row_bytes)

    def delete(self, name: str, key: str, keys: Sequence[int | str]) -> int:
        """Deletes rows.  Returns the stamp, which is 0 on a server: reads with an earlier stamp may return the rows."""
        stamp = 0
        for some in chunks(keys, 4096):
            expression = f"{key} in {_listed(some)}"
            stamp = max(stamp, self._call(_deletion(name, expression)).timestamp)
        return stamp

    def query(self, name: str, where: str, fields: Sequence[str], stamp: int) -> list[dict[str, Any]]:
        """Returns all rows for which the expression holds."""
        found = self._call(
            lambda client: client.query(
                name,
                filter=where,
                output_fields=list(fields),
                consistency_level="Customized",
                guarantee_timestamp=stamp or 1,
                timeout=SECONDS,
            )
        )
        return list(found)

    def query_in(
        self, name: str, field: str, values: Sequence[int | str], where: str, fields: Sequence[str], stamp: int,
        size: int = 4096,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Returns the rows whose field has one of these values, and for which the expression holds."""
        found: list[dict[str, Any]] = []
        for some in chunks(values, size):
            condition = f"{field} in {_listed(some)}" + (f" and {where}" if where else "")
            found += self.query(name, condition, fields, stamp)
        return found

    def search(self, name: str, queries: Any, limit: int, where: str, fields: Sequence[str], stamp: int) -> Any:
        """Returns for each query a list of dicts with `id`, `distance` and `entity`, highest score first."""
        return self._call(
            lambda client: client.search(
                name,
                data=list(queries),
                limit=limit,
                filter=where,
                output_fields=list(fields),
                consistency_level="Customized",
                guarantee_timestamp=stamp or 1,
                timeout=SECONDS,
            )
        )

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client, finish = None, self._finish
                finish()

    @property
    def ended(self) -> bool:
        """Whether the garbage collector has closed the connection before the store that holds it."""
        return self._client is not None and not self._finish.alive

    # the connection itself

    def _write(self, call: str, name: str, fields: Fields, rows: Sequence[dict[str, Any]], row_bytes: int) -> int:
        stamp = 0
        for some in chunks(rows, max(1, _MESSAGE // row_bytes)):
            stamp = max(stamp, self._call(_writing(call, name, _columns(fields, some))).timestamp)
        return stamp

    def _call(self, request: Callable[[Any], Any]) -> Any:
        import grpc
        from pymilvus import MilvusException

        try:
            client = self._open()
            with self._turn:
                return request(client)
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            kind = GoneError if getattr(error, "code", None) == _NOT_FOUND else StoreError
            raise kind(getattr(error, "message", "") or str(error)) from error

    def _open(self) -> Any:
        if os.getpid() != self._pid:
            raise StoreError(
                f"the gallery in {self.shown} was opened before this process was forked, and Milvus's client does not "
                'survive that: start processes with the method "spawn" or "forkserver"'
            )
        with self._lock:
            if self._client is None:
                from pymilvus import MilvusClient

                with _users_lock if self.alone else nullcontext():  # two threads would lock the file against each other
                    if self.alone and not _users.get(self._address):
                        repair(self._address, self.shown)
                    self._client = MilvusClient(self._address, timeout=SECONDS)
                    self._finish = weakref.finalize(self, _end, self._client, self._address, self.alone, self._pid)
                    if self.alone:
                        _users[self._address] = _users.get(self._address, 0) + 1
            return self._client


_users: dict[str, int] = {}  # connections of this process, by file
_turns: dict[str, threading.RLock] = {}  # locks of requests, by file
_users_lock = threading.RLock()


def _turn_of(file: str) -> threading.RLock:
    with _users_lock:
        return _turns.setdefault(file, threading.RLock())


def _end(client: Any, address: str, alone: bool, pid: int) -> None:
    if os.getpid() != pid:  # a forked child: the connection is the parent's
        return
    client.close()
    if alone:
        from milvus_lite.server_manager import server_manager_instance

        with _users_lock:
            _users[address] -= 1
            if not _users[address]:
                server_manager_instance.release_server(address)


# The public methods of `MilvusClient` do not return the timestamp of a write; those of its connection do.


def _writing(call: str, name: str, columns: list[dict[str, Any]]) -> Callable[[Any], Any]:
    return lambda client: getattr(client._get_connection(), call)(name, columns, timeout=SECONDS)


def _columns(fields: Fields, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one column of values per field, which pymilvus converts in half the time of rows."""
    from pymilvus import DataType

    columns = []
    for field, kind, _ in fields:
        columns.append({"name": field, "type": DataType[kind], "values": [row[field] for row in rows]})
    return columns


def _deletion(name: str, where: str) -> Callable[[Any], Any]:
    return lambda client: client._get_connection().delete(name, where, timeout=SECONDS)


def _listed(values: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(v) if isinstance(v, int) else f'"{v}"' for v in values) + "]"
