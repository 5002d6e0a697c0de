"""Galleries in Milvus beyond the contract: Milvus Lite, and an upgrade on a server that is killed and restarted."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gallery_stores import A, B, C, gate_of, milvus_lite_url, milvus_server, vectors
from processes import Child
from test_gallery_contract import facts

from simplexfix.gallery import Gallery, StoreError

pytest.importorskip("pymilvus", reason="Milvus needs pymilvus")

from simplexfix.gallery.stores import _milvus_client, _milvus_register, _milvus_rows, _milvus_search, milvus
from simplexfix.gallery.stores._milvus_rows import Record

IDS = np.arange(40)


@pytest.fixture
def lite(tmp_path: Path) -> str:
    return milvus_lite_url(tmp_path)


@pytest.fixture
def gallery(lite: str) -> Gallery:
    made = Gallery.create(lite, model=A)
    made.add(IDS, vectors(IDS), model=A, payload={"shop": IDS % 3})
    return made


# a change is committed by one rename


def count_requests(monkeypatch: pytest.MonkeyPatch, fails: int = -1) -> list[int]:
    """A list to which each request to Milvus adds its number; request `fails` raises before it is sent."""
    sent: list[int] = []
    call = _milvus_client.Connection._call

    def counted(connection: object, request: object) -> object:
        sent.append(len(sent))
        if sent[-1] == fails:
            raise StoreError("the plug was pulled")
        return call(connection, request)

    monkeypatch.setattr(_milvus_client.Connection, "_call", counted)
    return sent


@pytest.mark.parametrize("kind", ["add", "replace", "remove", "rollback", "retire"])
def test_a_call_whose_nth_request_fails_is_whole_or_not_there(tmp_path: Path, monkeypatch, kind: str) -> None:
    def prepared(name: str) -> Gallery:
        gallery = Gallery.create(str(tmp_path / f"{name}.db#photos"), model=A)
        gallery.add(IDS, vectors(IDS), model=A)
        if kind != "add":
            gallery.admit(B, gate_of(A, B))
            ids = IDS if kind == "retire" else IDS[:20]
            gallery.replace(ids, vectors(ids, 1), model=B)
        return gallery

    def take(gallery: Gallery) -> None:
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

    def seen(gallery: Gallery) -> object:
        status = gallery.status()
        hits = gallery.search(vectors([3]), 60, model=gallery.model)
        return (
            facts(gallery),
            [(v["rows"], v["old_rows"], v["standing"]) for v in status["versions"]],
            sorted(hits.ids[0]),
        )

    with prepared("whole") as gallery:
        before = seen(gallery)
        with monkeypatch.context() as patch:
            sent = count_requests(patch)
            take(gallery)
        after = seen(gallery)
    assert before != after
    with prepared("cut") as gallery:
        for fails in range(len(sent)):
            with monkeypatch.context() as patch:
                count_requests(patch, fails)
                refused = None
                try:
                    take(gallery)
                except StoreError as error:
                    refused = str(error)
            if refused is None:
                break  # the call was committed, and deleting old rows failed
            assert "cut.db#photos cannot" in refused
            assert seen(gallery) == before
        else:
            take(gallery)
        assert seen(gallery) == after
        assert fails >= 3


def test_a_writer_that_stood_still_loses_its_turn_and_writes_nothing(lite: str, gallery: Gallery, monkeypatch) -> None:
    """Another store takes the turn.  Both are in one process, so it waits until the first counts as dead."""
    monkeypatch.setattr(_milvus_register, "DEAD_SECONDS", 0.2)
    before, other = facts(gallery), Gallery.open(lite)
    pack, waits = _milvus_rows.pack, [0.5]

    def slow(*arguments: object) -> object:
        rows = pack(*arguments)
        if waits:
            waits.pop()
            other.add([70], vectors([70]), model=A)
        return rows

    monkeypatch.setattr("simplexfix.gallery.stores._milvus_turn.pack", slow)
    with pytest.raises(StoreError, match=r"cannot add 1 rows: this process stood still for .* seconds while it wrote"):
        gallery.add([60], vectors([60]), model=A)
    assert set(facts(gallery)) == {*before, 70}
    gallery.add([60], vectors([60]), model=A)
    assert set(facts(other)) == {*before, 60, 70}


def test_a_writer_whose_turn_was_taken_never_reports_a_commit(lite: str, gallery: Gallery, monkeypatch) -> None:
    """Its turn ends between its last sign of life and its commit, and the other store commits a later change."""
    monkeypatch.setattr(_milvus_register, "DEAD_SECONDS", 0.2)
    before, other = facts(gallery), Gallery.open(lite)
    commit = _milvus_register.Register.commit

    def late(register: _milvus_register.Register, stamp: int) -> None:
        monkeypatch.setattr(_milvus_register.Register, "commit", commit)
        other.add([70], vectors([70]), model=A)
        commit(register, stamp)

    monkeypatch.setattr(_milvus_register.Register, "commit", late)
    with pytest.raises(
        StoreError, match=r"was to add: .*look whether it was done .*: another process has written since"
    ):
        gallery.add([60], vectors([60]), model=A)
    assert set(facts(gallery)) == {*before, 70}


def test_a_writer_that_waits_for_a_collection_gives_signs_of_life(lite: str, monkeypatch) -> None:
    """A server takes seconds to load a collection, and more on a busy machine."""
    from pymilvus import MilvusClient

    monkeypatch.setattr(_milvus_register, "DEAD_SECONDS", 1.0)
    begun: dict[str, float] = {}
    state = MilvusClient.get_load_state

    def late(client: MilvusClient, name: str, **options: object) -> object:
        if time.monotonic() < begun.setdefault(name, time.monotonic()) + 0.8:
            return {"state": SimpleNamespace(name="Loading")}
        return state(client, name, **options)

    monkeypatch.setattr(MilvusClient, "get_load_state", late)
    gallery = Gallery.create(lite, model=A)
    gallery.add(IDS, vectors(IDS), model=A)
    assert len(begun) == 2


def test_of_several_writers_that_take_a_turn_one_gets_it(lite: str, gallery: Gallery) -> None:
    others = [Gallery.open(lite) for _ in range(4)]

    def write(at: int) -> None:
        for step in range(5):
            others[at].add([100 + 10 * at + step], vectors([100 + 10 * at + step]), model=A)

    threads = [threading.Thread(target=write, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(facts(gallery)) == [*range(40), *(100 + 10 * at + step for at in range(4) for step in range(5))]
    record = gallery._store._snapshots.read(lambda now: now.record)
    assert record.rows == {0: 60}
    assert record.never == ()


def test_what_rollbacks_leave_is_deleted_later_and_never_found(gallery: Gallery, monkeypatch) -> None:
    store = gallery._store
    before = facts(gallery)

    def stored(version: int) -> int:
        return len(store._connection.query(f"photos__v{version}", "key >= 0", ["key"], 0))

    for _ in range(2):
        gallery.admit(B, force="test")
        gallery.replace(IDS[:25], vectors(IDS[:25], 1), model=B)
        gallery.rollback()
        assert facts(gallery) == before
    assert stored(1) == 50
    monkeypatch.setattr(milvus, "_GARBAGE_SECONDS", -1.0)
    gallery.admit(B, force="test")
    assert stored(1) == 0
    assert facts(gallery) == before


def test_a_version_between_two_others_is_retired_after_the_older_one(gallery: Gallery) -> None:
    gallery.admit(B, force="test")
    gallery.replace(IDS, vectors(IDS, 1), model=B)
    gallery.admit(C, force="test")
    gallery.replace(IDS, vectors(IDS, 2), model=C)
    with pytest.raises(ValueError, match=r"rows of version 1 have replaced older ones, of version 0, which are kept"):
        gallery.retire(1)
    gallery.retire(0)
    assert gallery.retire(1)["old_rows_deleted"] == 40
    assert [version["rows"] for version in gallery.status()["versions"]] == [0, 0, 40]


def test_a_writer_of_a_file_finds_rows_by_key_also_after_others_have_written(lite: str, gallery: Gallery, monkeypatch):
    """Milvus Lite gathers all vectors of a version to find rows by another field."""
    other = Gallery.open(lite)
    gallery.admit(B, gate_of(A, B))
    assert gallery.replace(IDS[:10], vectors(IDS[:10], 1), model=B) == 10
    asked: list[str] = []
    query = _milvus_client.Connection.query
    monkeypatch.setattr(
        _milvus_client.Connection,
        "query",
        lambda connection, name, where, *rest: (asked.append(where), query(connection, name, where, *rest))[1],
    )
    gallery.add([50], vectors([50], 1), model=B)
    assert gallery.replace(IDS[5:20], vectors(IDS[5:20], 1), model=B) == 10
    assert all(where.startswith("key in") for where in asked)
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


# search


def test_leases_end_at_once_although_a_deletion_has_no_stamp(gallery: Gallery, monkeypatch) -> None:
    gallery.admit(B, gate_of(A, B))
    worker = gallery.stale(batch=40)
    next(worker)
    assert gallery.status()["leased"] == 40
    # as a server, which applies it some time later
    monkeypatch.setattr(_milvus_client.Connection, "delete", lambda connection, name, key, keys: 0)
    worker.close()
    assert gallery.status()["leased"] == 0
    assert len(next(gallery.stale(batch=40))) == 40


def test_a_newer_format_is_refused_and_a_gallery_without_a_number_is_read(lite: str, monkeypatch) -> None:
    gallery = Gallery.create(lite, model=A)
    with monkeypatch.context() as patched:
        patched.setattr(Record, "to_json", lambda record: json.dumps(vars(record)))  # as the first release
        gallery.add([1], vectors([1]), model=A)
    other = Gallery.open(lite)
    assert other.search(vectors([1]), 1, model=A).ids == 1
    with monkeypatch.context() as patched:
        patched.setattr(_milvus_rows, "_FORMAT", 2)
        gallery.add([2], vectors([2]), model=A)
    message = "of format 2, and this release reads formats up to 1: install a newer simplexfix"
    for call in (lambda: Gallery.open(lite), other.history, lambda: other.add([3], vectors([3]), model=A)):
        with pytest.raises(StoreError, match=message) as caught:
            call()
        assert lite in str(caught.value)


def test_more_ties_than_are_fetched_are_fetched(lite: str, monkeypatch) -> None:
    gallery = Gallery.create(lite, model=A)
    order = np.random.default_rng(0).permutation(90)
    rows = np.repeat(vectors([1]), 90, axis=0) * (2.0 ** (order % 5))[:, None].astype(np.float32)
    gallery.add(order, rows, model=A)
    queries = np.concatenate([vectors([1, 2]), np.zeros((1, rows.shape[1]), np.float32)])
    for limit in (16_384, 20):  # by Milvus, and by reading all rows
        monkeypatch.setattr(_milvus_search, "_LIMIT", limit)
        for k in (1, 5, 30):
            hits = gallery.search(queries, k, model=A)
            np.testing.assert_array_equal(hits.ids, np.broadcast_to(np.arange(k), (3, k)))


def test_long_payloads_and_many_keys_are_refused_before_anything_is_written(gallery: Gallery) -> None:
    before = facts(gallery)
    for payload, message in (
        ({"text": "é" * 40_000}, "payload row 1 has 80011 bytes as JSON; Milvus takes at most 65535"),
        (
            {f"{at}": at for at in range(4097)},
            "payload row 1 has 4097 keys with plain values; Milvus takes at most 4096",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.add([60, 61], vectors([60, 61]), model=A, payload=[{}, payload])
    assert facts(gallery) == before
    gallery.add([60], vectors([60]), model=A, payload=[{"text": "é" * 32_000}])
    assert gallery.read([60]).payload == [{"text": "é" * 32_000}]


# one process at a time; urls


def status_of(url: str) -> None:
    try:
        print(Gallery.open(url).status()["serving"])
    except StoreError as error:
        print("StoreError", error)


def test_what_a_killed_process_leaves_in_a_file_is_cleared(tmp_path: Path, lite: str, gallery: Gallery) -> None:
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


def test_a_file_that_another_process_has_open_is_named(lite: str, gallery: Gallery) -> None:
    def answer() -> bytes:
        return Child(status_of, lite, folder=Path(lite).parent).wait().stdout

    message = f"StoreError the gallery in {lite} is open in another process: a file of Milvus Lite"
    assert answer().startswith(message.encode())
    gallery.close()
    assert answer() == b"0\n"
    assert len(gallery.read().ids) == 40  # the file is opened again


def test_a_forked_child_is_told_to_be_spawned(gallery: Gallery) -> None:
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


def test_places_without_a_gallery(tmp_path: Path, lite: str, gallery: Gallery) -> None:
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


def test_a_gallery_on_a_server_lives_through_an_upgrade_beside_queries(server) -> None:
    """Two connections share a backfill beside searches; then the server is killed and started again."""
    url = f"{server.url}#photos_{uuid.uuid4().hex[:8]}"
    gallery, worker = Gallery.create(url, model=A), None
    rows = vectors(IDS)
    rows[5] = rows[20]
    rows[8] = 2 * rows[20]
    rows[9] = 0
    rows[11] = 1e38 * rows[12] / np.abs(rows[12]).max()
    rows[13] = 1e-42
    gallery.add(IDS, rows, model=A, payload={"shop": IDS % 3, "name": [None] * 40})
    before, queries = facts(gallery), np.concatenate([rows[[20, 12, 9, 13]], vectors([500])])
    assert [before[id_][1] for id_ in IDS.tolist()] == [row.tobytes() for row in rows]

    def ranked() -> None:
        """Asserts that the gallery ranks as an exact index of the same rows."""
        hits = gallery.search(queries, 40, model=gallery.model)
        scores, ids = gallery.mirror().search(queries, 40)
        np.testing.assert_array_equal(hits.ids, ids)
        np.testing.assert_array_equal(hits.scores, scores)

    ranked()
    hits = gallery.search(queries, 40, model=A, where={"shop": [1, "x"], "name": None})
    assert sorted(hits.ids[0][:13].tolist()) == IDS[IDS % 3 == 1].tolist()
    gallery.admit(B, gate_of(A, B))
    stop, missed, searches, reader = threading.Event(), [], [0], Gallery.open(url)

    def look() -> None:
        while not stop.is_set():
            found = reader.search(vectors([3], 1), 40, model=A).ids[0]
            searches[0] += 1
            if sorted(found.tolist()) != IDS.tolist():
                missed.append(found)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        worker = Gallery.open(url)
        shared: list[list[int]] = [[], []]

        def work(at: int) -> None:
            mine = (gallery, worker)[at]
            for batch in mine.stale(batch=4):
                assert mine.replace(batch, vectors(batch, 1), model=B) == len(batch)
                shared[at] += batch.tolist()

        workers = [threading.Thread(target=work, args=(at,)) for at in range(2)]
        for each in workers:
            each.start()
        for each in workers:
            each.join()
        assert sorted(shared[0] + shared[1]) == IDS.tolist()
        assert worker.status()["stale"] == worker.status()["leased"] == 0
        gallery.rollback()
        assert facts(worker) == before
    finally:
        stop.set()
        thread.join()
    assert not missed
    assert searches[0] > 5
    print(f"{searches[0]} searches beside two workers and a rollback: no row was missed")
    ranked()

    server.kill()
    for call in (lambda: gallery.add([60], vectors([60]), model=A), gallery.status):
        with pytest.raises(StoreError, match=url):
            call()
    server.start()
    until = time.monotonic() + 120
    while True:
        try:
            assert facts(gallery) == before
            gallery.add([60], vectors([60]), model=A)
            break
        except StoreError:
            assert time.monotonic() < until
            time.sleep(0.5)
    assert set(facts(worker)) == {*IDS.tolist(), 60}
    gallery.remove([60])
    gallery.admit(B, force="again")
    gallery.replace(IDS, vectors(IDS, 1), model=B)
    assert gallery.retire(0)["old_rows_deleted"] == 40
    assert [event["event"] for event in worker.history()][-3:] == ["admitted", "backfill finished", "retired"]
    ranked()
    for each in (gallery, worker, reader):
        each.close()
