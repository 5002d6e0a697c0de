"""Tests the Milvus store; test_gallery_contract.py has the tests of all stores.

Most tests use a file of Milvus Lite; the last one uses a server, which is killed and restarted.  A *turn* is the right
to write to a gallery: one `Gallery` has it at a time, and renews it regularly (its heartbeat).  The commit of a change
is one rename of a collection.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gallery_stores import A, B, C, gate_of, milvus_lite_url, milvus_server, vectors
from processes import Child
from test_gallery_contract import stored_rows

from simplexfix.gallery import Gallery, StoreError

pytest.importorskip("pymilvus", reason="Milvus needs pymilvus")

import pymilvus

from simplexfix.gallery.stores import _milvus_client, _milvus_register, _milvus_rows, _milvus_search, milvus
from simplexfix.gallery.stores._milvus_rows import Record, tokens

IDS = np.arange(40)


@pytest.fixture
def lite(tmp_path: Path) -> str:
    return milvus_lite_url(tmp_path)


@pytest.fixture
def gallery(lite: str) -> Gallery:
    made = Gallery.create(lite, model=A)
    made.add(IDS, vectors(IDS), model=A, payload={"shop": IDS % 3})
    return made


# commits and turns


def record_requests(monkeypatch: pytest.MonkeyPatch, failing: int = -1) -> list[int]:
    """Returns a list to which each request to Milvus adds its number; request `failing` raises before it is sent."""
    numbers: list[int] = []
    call = _milvus_client.Connection._call

    def recorded(connection: object, request: object) -> object:
        numbers.append(len(numbers))
        if numbers[-1] == failing:
            raise StoreError("a simulated failure")
        return call(connection, request)

    monkeypatch.setattr(_milvus_client.Connection, "_call", recorded)
    return numbers


@pytest.mark.parametrize("kind", ["add", "replace", "remove", "rollback", "retire"])
def test_a_call_whose_nth_request_fails_takes_full_effect_or_none(tmp_path: Path, monkeypatch, kind: str) -> None:
    def make_gallery(name: str) -> Gallery:
        gallery = Gallery.create(str(tmp_path / f"{name}.db#photos"), model=A)
        gallery.add(IDS, vectors(IDS), model=A)
        if kind != "add":
            gallery.admit(B, gate_of(A, B))
            ids = IDS if kind == "retire" else IDS[:20]
            gallery.replace(ids, vectors(ids, 1), model=B)
        return gallery

    def change(gallery: Gallery) -> None:
        if kind == "add":
            gallery.add([50, 51], vectors([50, 51]), model=A)
        elif kind == "replace":
            gallery.replace([18, 19, 20, 21], vectors([18, 19, 20, 21], 1), model=B)
        elif kind == "remove":
            gallery.remove([3, 30])
        elif kind == "rollback":
            gallery.rollback()
        else:
            gallery.retire(0)

    def visible_state(gallery: Gallery) -> object:
        status = gallery.status()
        hits = gallery.search(vectors([3]), 60, model=gallery.model)
        return (
            stored_rows(gallery),
            [(v["rows"], v["old_rows"], v["standing"]) for v in status["versions"]],
            sorted(hits.ids[0]),
        )

    with make_gallery("whole") as gallery:
        before = visible_state(gallery)
        with monkeypatch.context() as patch:
            requests = record_requests(patch)
            change(gallery)
        after = visible_state(gallery)
    assert before != after
    with make_gallery("cut") as gallery:
        for failing in range(len(requests)):
            with monkeypatch.context() as patch:
                record_requests(patch, failing)
                message = None
                try:
                    change(gallery)
                except StoreError as error:
                    message = str(error)
            if message is None:
                break  # the call was committed; only the deletion of old rows after the commit failed
            assert "cut.db#photos cannot" in message
            assert visible_state(gallery) == before
        else:
            change(gallery)
        assert visible_state(gallery) == after
        assert failing >= 3


def test_a_stalled_writer_loses_its_turn_and_writes_nothing(lite: str, gallery: Gallery, monkeypatch) -> None:
    """Another `Gallery` takes the turn once the writer has had no heartbeat for `DEAD_SECONDS`."""
    monkeypatch.setattr(_milvus_register, "DEAD_SECONDS", 0.2)
    before, other = stored_rows(gallery), Gallery.open(lite)
    pack, calls = _milvus_rows.pack, []

    def stalled_pack(*arguments: object) -> object:
        calls.append(1)
        rows = pack(*arguments)
        if len(calls) == 1:
            other.add([70], vectors([70]), model=A)  # blocks until the first writer counts as dead
        return rows

    monkeypatch.setattr("simplexfix.gallery.stores._milvus_turn.pack", stalled_pack)
    with pytest.raises(
        StoreError, match=r"cannot add 1 rows: this writer lost its turn: its last heartbeat was .* seconds ago"
    ):
        gallery.add([60], vectors([60]), model=A)
    assert set(stored_rows(gallery)) == {*before, 70}
    gallery.add([60], vectors([60]), model=A)
    assert set(stored_rows(other)) == {*before, 60, 70}


def test_a_writer_whose_turn_was_taken_never_reports_a_commit(lite: str, gallery: Gallery, monkeypatch) -> None:
    """The turn ends between the last heartbeat and the commit, and another `Gallery` commits a later change."""
    monkeypatch.setattr(_milvus_register, "DEAD_SECONDS", 0.2)
    before, other = stored_rows(gallery), Gallery.open(lite)
    commit = _milvus_register.Register.commit

    def late_commit(register: _milvus_register.Register, stamp: int) -> None:
        monkeypatch.setattr(_milvus_register.Register, "commit", commit)
        other.add([70], vectors([70]), model=A)
        commit(register, stamp)

    monkeypatch.setattr(_milvus_register.Register, "commit", late_commit)
    with pytest.raises(
        StoreError, match=r"cannot add in .*: Milvus did not confirm .*: another writer has committed a change since"
    ):
        gallery.add([60], vectors([60]), model=A)
    assert set(stored_rows(gallery)) == {*before, 70}


def test_a_writer_renews_its_turn_while_a_collection_loads(lite: str, monkeypatch) -> None:
    """A server takes seconds to load a collection, and more on a busy machine."""
    from pymilvus import MilvusClient

    monkeypatch.setattr(_milvus_register, "DEAD_SECONDS", 1.0)
    first_query: dict[str, float] = {}
    get_load_state = MilvusClient.get_load_state

    def slow_load(client: MilvusClient, name: str, **options: object) -> object:
        if time.monotonic() < first_query.setdefault(name, time.monotonic()) + 0.8:
            return {"state": SimpleNamespace(name="Loading")}
        return get_load_state(client, name, **options)

    monkeypatch.setattr(MilvusClient, "get_load_state", slow_load)
    gallery = Gallery.create(lite, model=A)
    gallery.add(IDS, vectors(IDS), model=A)
    assert len(first_query) == 2


def test_several_writers_take_turns(lite: str, gallery: Gallery) -> None:
    others = [Gallery.open(lite) for _ in range(4)]

    def write(at: int) -> None:
        for step in range(5):
            others[at].add([100 + 10 * at + step], vectors([100 + 10 * at + step]), model=A)

    threads = [threading.Thread(target=write, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stored_rows(gallery)) == [*range(40), *(100 + 10 * at + step for at in range(4) for step in range(5))]
    record = gallery._store._snapshots.read(lambda now: now.record)
    assert record.rows == {0: 60}
    assert record.never == ()


def test_rolled_back_rows_are_never_found_and_are_deleted_later(gallery: Gallery, monkeypatch) -> None:
    store = gallery._store
    before = stored_rows(gallery)

    def rows_in_milvus(version: int) -> int:
        return len(store._connection.query(f"photos__v{version}", "key >= 0", ["key"], 0))

    for _ in range(2):
        gallery.admit(B, force="test")
        gallery.replace(IDS[:25], vectors(IDS[:25], 1), model=B)
        gallery.rollback()
        assert stored_rows(gallery) == before
    assert rows_in_milvus(1) == 50
    monkeypatch.setattr(milvus, "_GARBAGE_SECONDS", -1.0)
    gallery.admit(B, force="test")
    assert rows_in_milvus(1) == 0
    assert stored_rows(gallery) == before


def test_a_version_is_retired_after_the_older_ones(gallery: Gallery) -> None:
    gallery.admit(B, force="test")
    gallery.replace(IDS, vectors(IDS, 1), model=B)
    gallery.admit(C, force="test")
    gallery.replace(IDS, vectors(IDS, 2), model=C)
    with pytest.raises(ValueError, match=r"rows of version 1 have replaced older ones, of version 0, which are kept"):
        gallery.retire(1)
    gallery.retire(0)
    assert gallery.retire(1)["old_rows_deleted"] == 40
    assert [version["rows"] for version in gallery.status()["versions"]] == [0, 0, 40]


def test_a_writer_of_a_file_queries_rows_by_key(lite: str, gallery: Gallery, monkeypatch):
    """A query by another field would make Milvus Lite read all vectors.  Another `Gallery` writes in between."""
    other = Gallery.open(lite)
    gallery.admit(B, gate_of(A, B))
    assert gallery.replace(IDS[:10], vectors(IDS[:10], 1), model=B) == 10
    filters: list[str] = []
    query = _milvus_client.Connection.query
    monkeypatch.setattr(
        _milvus_client.Connection,
        "query",
        lambda connection, name, where, *rest: (filters.append(where), query(connection, name, where, *rest))[1],
    )
    gallery.add([50], vectors([50], 1), model=B)
    assert gallery.replace(IDS[5:20], vectors(IDS[5:20], 1), model=B) == 10
    assert all(where.startswith("key in") for where in filters)
    other.remove([30])
    other.replace(IDS[20:25], vectors(IDS[20:25], 1), model=B)
    with pytest.raises(KeyError, match="id 30 "):
        gallery.replace([29, 30], vectors([29, 30], 1), model=B)
    with pytest.raises(ValueError, match="id 50 is in the gallery"):
        other.add([30, 50], vectors([30, 50], 1), model=B)
    gallery.add([30], vectors([30], 1), model=B)
    assert gallery.replace(IDS[20:30], vectors(IDS[20:30], 1), model=B) == 5
    gallery.rollback()
    assert sorted(next(gallery.stale(batch=99)).tolist()) == [30, 50]
    gallery.admit(B, force="again")
    assert gallery.replace(IDS, vectors(IDS, 1), model=B) == 39
    assert gallery.status()["stale"] == 0


def test_leases_end_at_once_although_the_server_deletes_them_later(gallery: Gallery, monkeypatch) -> None:
    gallery.admit(B, gate_of(A, B))
    worker = gallery.stale(batch=40)
    next(worker)
    assert gallery.status()["leased"] == 40
    # A server applies a deletion some time later; here it is never applied.
    monkeypatch.setattr(_milvus_client.Connection, "delete", lambda connection, name, key, keys: 0)
    worker.close()
    assert gallery.status()["leased"] == 0
    assert len(next(gallery.stale(batch=40))) == 40


# formats, ties and sizes


def test_a_newer_format_is_refused_and_one_without_a_format_number_is_read(lite: str, monkeypatch) -> None:
    gallery = Gallery.create(lite, model=A)
    with monkeypatch.context() as patched:
        # an early version of the store wrote no number of the format
        patched.setattr(Record, "to_json", lambda record: json.dumps(vars(record)))
        gallery.add([1], vectors([1]), model=A)
    other = Gallery.open(lite)
    assert other.search(vectors([1]), 1, model=A).ids == 1
    with monkeypatch.context() as patched:
        patched.setattr(_milvus_rows, "_FORMAT", 2)
        gallery.add([2], vectors([2]), model=A)
    message = "it has format 2, but this release reads formats up to 1: install a newer simplexfix"
    for call in (lambda: Gallery.open(lite), other.history, lambda: other.add([3], vectors([3]), model=A)):
        with pytest.raises(StoreError, match=message) as caught:
            call()
        assert lite in str(caught.value)


def test_ties_beyond_the_first_fetch_are_fetched_too(lite: str, monkeypatch) -> None:
    gallery = Gallery.create(lite, model=A)
    order = np.random.default_rng(0).permutation(90)
    rows = np.repeat(vectors([1]), 90, axis=0) * (2.0 ** (order % 5))[:, None].astype(np.float32)
    gallery.add(order, rows, model=A)
    queries = np.concatenate([vectors([1, 2]), np.zeros((1, rows.shape[1]), np.float32)])
    for limit in (16_384, 20):  # the most hits of one search; beyond them the store reads all rows
        monkeypatch.setattr(_milvus_search, "_LIMIT", limit)
        for k in (1, 5, 30):
            hits = gallery.search(queries, k, model=A)
            np.testing.assert_array_equal(hits.ids, np.broadcast_to(np.arange(k), (3, k)))


def test_long_payloads_and_many_keys_are_refused_before_anything_is_written(gallery: Gallery) -> None:
    before = stored_rows(gallery)
    for payload, message in (
        ({"text": "é" * 40_000}, "payload row 1 has 80011 bytes as JSON; Milvus takes at most 65535"),
        (
            {f"{at}": at for at in range(4097)},
            "payload row 1 has 4097 keys with plain values; Milvus takes at most 4096",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.add([60, 61], vectors([60, 61]), model=A, payload=[{}, payload])
    assert stored_rows(gallery) == before
    gallery.add([60], vectors([60]), model=A, payload=[{"text": "é" * 32_000}])
    assert gallery.read([60]).payload == [{"text": "é" * 32_000}]


# a file of Milvus Lite admits one process at a time; urls


def print_serving_version(url: str) -> None:
    try:
        print(Gallery.open(url).status()["serving"])
    except StoreError as error:
        print("StoreError", error)


def test_leftovers_of_a_killed_process_are_removed_from_a_file(tmp_path: Path, lite: str, gallery: Gallery) -> None:
    collections = Path(lite.partition("#")[0], "collections")
    logs = {log: log.read_bytes() for log in collections.glob("*/wal/*.arrow")}
    gallery.close()  # moves the rows of the logs to data files
    for log, rows in logs.items():
        assert not log.exists()
        log.write_bytes(rows)
    Path(collections, "photos__v1").mkdir()  # killed before the collection had a schema
    with Gallery.open(lite) as gallery:
        assert gallery.read().ids.tolist() == IDS.tolist()
        gallery.admit(B, gate_of(A, B))
        gallery.replace(IDS, vectors(IDS, 1), model=B)
        assert gallery.search(vectors(IDS[:1], 1), len(IDS), model=B).ids[0].tolist().count(0) == 1
    assert logs


def test_threads_that_open_a_file_at_the_same_time(lite: str, gallery: Gallery, monkeypatch) -> None:
    gallery.close()
    made = pymilvus.MilvusClient

    def slow(*arguments: object, **options: object) -> object:
        client = made(*arguments, **options)  # locks the file
        time.sleep(0.3)
        return client

    monkeypatch.setattr(pymilvus, "MilvusClient", slow)
    with ThreadPoolExecutor(2) as threads:
        opened = list(threads.map(Gallery.open, [lite, lite]))
    for each in opened:
        assert each.ids().tolist() == IDS.tolist()
        each.close()


def test_a_file_that_another_process_has_open_is_named(lite: str, gallery: Gallery) -> None:
    def printed_by_another_process() -> bytes:
        return Child(print_serving_version, lite, folder=Path(lite).parent).wait().stdout

    message = f"StoreError the gallery in {lite} is open in another process: a file of Milvus Lite"
    assert printed_by_another_process().startswith(message.encode())
    gallery.close()
    assert printed_by_another_process() == b"0\n"
    assert len(gallery.read().ids) == 40  # the file is opened again


def test_a_forked_child_gets_an_error_that_recommends_spawn(gallery: Gallery) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            gallery.read()
        except StoreError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    assert 'does not survive that: start processes with the method "spawn" or "forkserver"' in os.fdopen(read).read()
    assert len(gallery.read().ids) == 40


def test_bad_urls_and_urls_without_a_gallery(tmp_path: Path, lite: str, gallery: Gallery) -> None:
    file = lite.partition("#")[0]
    for call, kind, message in (
        (
            lambda: Gallery.open(f"{file}#other"),
            FileNotFoundError,
            r"#other holds no gallery: Gallery\.create makes one",
        ),
        (lambda: Gallery.open(str(tmp_path / "none.db#photos")), FileNotFoundError, "there is no such file"),
        (lambda: Gallery.create(lite, model=A), FileExistsError, "holds a gallery, which Gallery.open opens"),
        (lambda: Gallery.open(f"{file}#a__b"), ValueError, "at most 64 letters, digits and single _ between them"),
        (lambda: Gallery.open("http://me:secret@localhost:1#7"), ValueError, "got 'http://localhost:1#7'"),
        (
            lambda: Gallery.open("http://me:secret@localhost:1#photos"),
            StoreError,
            "the gallery in http://localhost:1#pho",
        ),
    ):
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "secret" not in str(caught.value)
    assert not (tmp_path / "none.db").exists()
    other = Gallery.create(f"{file}#other", model=B)
    other.add([1], vectors([1]), model=B)
    assert (len(other.read().ids), len(gallery.read().ids)) == (1, 40)


# a real server


@pytest.fixture(params=[pytest.param("milvus-server", marks=pytest.mark.slow)])
def server():
    return milvus_server()


def test_an_upgrade_on_a_server_during_queries_and_a_restart_of_the_server(server) -> None:
    """Two connections share a backfill while a third one searches; then the server is killed and started again."""
    url = f"{server.url}#photos_{uuid.uuid4().hex[:8]}"
    gallery, worker = Gallery.create(url, model=A), None
    rows = vectors(IDS)
    rows[5] = rows[20]
    rows[8] = 2 * rows[20]
    rows[9] = 0
    rows[11] = 1e38 * rows[12] / np.abs(rows[12]).max()
    rows[13] = 1e-42
    gallery.add(IDS, rows, model=A, payload={"shop": IDS % 3, "name": [None] * 40})
    before, queries = stored_rows(gallery), np.concatenate([rows[[20, 12, 9, 13]], vectors([500])])
    assert [before[id_][1] for id_ in IDS.tolist()] == [row.tobytes() for row in rows]

    def assert_exact_ranking() -> None:
        """Compares with an exact index of the same rows."""
        hits = gallery.search(queries, 40, model=gallery.model)
        scores, ids = gallery.mirror().search(queries, 40)
        np.testing.assert_array_equal(hits.ids, ids)
        np.testing.assert_array_equal(hits.scores, scores)

    assert_exact_ranking()
    hits = gallery.search(queries, 40, model=A, where={"shop": [1, "x"], "name": None})
    assert sorted(hits.ids[0][:13].tolist()) == IDS[IDS % 3 == 1].tolist()
    gallery.admit(B, gate_of(A, B))
    stop, incomplete, searches, reader = threading.Event(), [], [0], Gallery.open(url)

    def search_until_stopped() -> None:
        while not stop.is_set():
            found = reader.search(vectors([3], 1), 40, model=A).ids[0]
            searches[0] += 1
            if sorted(found.tolist()) != IDS.tolist():
                incomplete.append(found)

    thread = threading.Thread(target=search_until_stopped)
    thread.start()
    try:
        worker = Gallery.open(url)
        replaced: list[list[int]] = [[], []]

        def backfill(at: int) -> None:
            connection = (gallery, worker)[at]
            for batch in connection.stale(batch=4):
                assert connection.replace(batch, vectors(batch, 1), model=B) == len(batch)
                replaced[at] += batch.tolist()

        workers = [threading.Thread(target=backfill, args=(at,)) for at in range(2)]
        for each in workers:
            each.start()
        for each in workers:
            each.join()
        assert sorted(replaced[0] + replaced[1]) == IDS.tolist()
        assert worker.status()["stale"] == worker.status()["leased"] == 0
        gallery.rollback()
        assert stored_rows(worker) == before
    finally:
        stop.set()
        thread.join()
    assert not incomplete
    assert searches[0] > 5
    print(f"{searches[0]} searches during a backfill by two workers and a rollback: each found all rows")
    assert_exact_ranking()

    server.kill()
    for call in (lambda: gallery.add([60], vectors([60]), model=A), gallery.status):
        with pytest.raises(StoreError, match=url):
            call()
    server.start()
    deadline = time.monotonic() + 120
    while True:
        try:
            assert stored_rows(gallery) == before
            gallery.add([60], vectors([60]), model=A)
            break
        except StoreError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert set(stored_rows(worker)) == {*IDS.tolist(), 60}
    gallery.remove([60])
    gallery.admit(B, force="again")
    gallery.replace(IDS, vectors(IDS, 1), model=B)
    assert gallery.retire(0)["old_rows_deleted"] == 40
    assert [event["event"] for event in worker.history()][-3:] == ["admitted", "backfill finished", "retired"]
    assert_exact_ranking()
    for connection in (gallery, worker, reader):
        connection.close()


def test_tokens_stay_those_that_stored_galleries_hold() -> None:
    """The hashes are of `json.dumps([key, value])`, with numbers as ["number", text]."""
    payload = {"shop": 3, 'na"me': 'it"em\né😀', "none": None, "ok": True, "half": 0.5, "large": 1e300, "list": [1]}
    texts = [
        '["shop", ["number", "3"]]',
        '["na\\"me", "it\\"em\\n\\u00e9\\ud83d\\ude00"]',
        '["none", null]',
        '["ok", true]',
        '["half", ["number", "0.5"]]',
        f'["large", ["number", "{int(1e300)}"]]',
    ]
    assert tokens(payload) == [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]
