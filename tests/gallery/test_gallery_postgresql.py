"""Tests the PostgreSQL store; test_gallery_contract.py has the tests of all stores.

The tests cover urls and passwords, a server that stops, and the database's own constraints.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_stores import DIM, A, B, postgresql_database, postgresql_url, vectors

from simplexfix.gallery import Gallery, StoreError
from simplexfix.models import ModelIdentity

psycopg = pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg")
IDS = np.arange(40)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return postgresql_url(tmp_path)


@pytest.fixture
def gallery(url: str) -> Gallery:
    made = Gallery.create(url, model=A)
    made.add(IDS, vectors(IDS), model=A)
    return made


@contextmanager
def sql(url: str) -> Iterator[Any]:
    """Opens a connection with the gallery's schema as its search path."""
    database, name = url.split("#")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"set search_path to {name}, public")
        yield connection


@contextmanager
def stopped_server() -> Iterator[None]:
    """Stops the server, and starts it again at the end."""
    server = postgresql_database()[1]
    server.stop()
    try:
        yield
    finally:
        server.start()


# urls


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cret@127.0.0.1:1/photos#no-name",
        "postgresql://me:s3cret@127.0.0.1:1/photos",
        "postgresql://me:s3cret@127.0.0.1:1/photos#",
        "postgresql://me:s3cret@127.0.0.1:1/photos#public",
        "postgresql://me:s3cret@127.0.0.1:1/photos#pg_photos",
        "postgresql://me:s3cret@127.0.0.1:1/photos#" + 64 * "x",
        "postgresql://me:s3cret@127.0.0.1:1/photos?nothing=s3cret#photos",
        "postgresql://me:s3@cret@127.0.0.1:1/photos#photos",
        "postgresql://me:s3/cret@127.0.0.1:1/photos#photos",
        "postgresql://me:s3#cret@127.0.0.1:1/photos",
        "postgresql://me:s3%cret@127.0.0.1:1/photos#photos",
        "postgresql://me:s3cret@127.0.0.1:port/photos#photos",
    ],
)
def test_errors_of_bad_urls_do_not_quote_them(url: str) -> None:
    """A password with unencoded characters may appear in any part of the parsed url."""
    for call in (Gallery.open, lambda url: Gallery.create(url, model=A)):
        with pytest.raises(ValueError, match="url must be postgresql://USER@HOST:PORT/DATABASE#NAME") as error:
            call(url)
        assert "s3" not in str(error.value)
        assert "cret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:s3cret@127.0.0.1:1/photos#shop", "postgresql://me@127.0.0.1:1/photos#shop"),
        ("postgresql://me:s3cret?@127.0.0.1:1/photos#shop", "postgresql://me@127.0.0.1:1/photos#shop"),
        ("postgres://[::1]:1/photos?password=s3cret&user=me#shop", "postgresql://me@[::1]:1/photos#shop"),
        (
            "postgresql://me:s3cret@/photos?host=/nowhere&sslpassword=s3cret#shop",
            "postgresql://me@/photos?host=/nowhere#shop",
        ),
        (
            "postgresql://me:s3cret@127.0.0.1:1,127.0.0.1:2/photos#shop",
            "postgresql://me@/photos?host=127.0.0.1,127.0.0.1&port=1,2#shop",
        ),
    ],
)
def test_errors_show_the_url_without_its_password(url: str, shown: str) -> None:
    from simplexfix.gallery.stores._postgresql_url import read_url

    with pytest.raises(StoreError, match=r"the gallery in .* cannot open the gallery: .*connection") as error:
        Gallery.open(url)
    assert shown in str(error.value)
    assert "s3cret" not in str(error.value)
    assert read_url(shown).shown == shown  # this url opens the gallery if PGPASSWORD holds the password


def test_the_password_of_an_open_gallery_is_not_shown(url: str) -> None:
    gallery = Gallery.create(url.replace("postgres:@", "postgres:s3cret@"), model=A)  # the server accepts any
    assert gallery.url == url.replace("postgres:@", "postgres@")
    assert "s3cret" not in f"{gallery!r} {gallery.status()} {gallery.history()}"
    assert Gallery.open(gallery.url).model == A


def test_names_are_quoted_and_several_galleries_share_a_database(url: str) -> None:
    database, name = url.split("#")
    names = [f"{name}_Select", f"{name}_select"]
    for at, other in enumerate(names):
        Gallery.create(f"{database}#{other}", model=A).add([at], vectors([at]), model=A)
    assert [Gallery.open(f"{database}#{other}").read().ids.tolist() for other in names] == [[0], [1]]
    with pytest.raises(FileNotFoundError, match=f"#{name} holds no gallery; Gallery.create makes one"):
        Gallery.open(url)


def test_existing_schemas_and_other_formats_are_refused(url: str, gallery: Gallery) -> None:
    with pytest.raises(
        FileExistsError, match=r"schema photos_\w+ of .* holds a gallery, which Gallery.open opens: give"
    ):
        Gallery.create(url, model=A)
    with sql(url) as connection:
        connection.execute("update state set format = 2")
    with pytest.raises(StoreError, match="has a gallery of format 2, but this release reads format 1"):
        Gallery.open(url)
    with sql(url) as connection:
        connection.execute("alter table vectors rename to aside")
    with pytest.raises(StoreError, match='cannot search: relation "vectors" does not exist'):
        gallery.search(vectors([1]), 1, model=A)
    database, name = url.split("#")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"create schema {name}_mine")
        connection.execute(f"create schema {name}_full create table {name}_full.shops (id integer)")
    Gallery.create(f"{url}_mine", model=A)  # an administrator may have created an empty schema
    with pytest.raises(FileExistsError, match=r"holds shops: give a new one another name"):
        Gallery.create(f"{url}_full", model=A)


def test_without_psycopg_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith("simplexfix.gallery.stores.") and "postgresql" in name
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs psycopg: pip install 'simplexfix\[postgresql\]'"):
        Gallery.open("postgresql://me@127.0.0.1:1/photos#shop")


# a server that stops


def test_calls_fail_while_the_server_is_stopped_and_work_afterwards(url: str, gallery: Gallery) -> None:
    acknowledged, failed = [], []
    stop = threading.Event()

    def add_until_stopped(first: int) -> None:
        while not stop.is_set():
            ids = np.arange(first, first + 50)
            try:
                gallery.add(ids, vectors(ids), model=A)
                acknowledged.append(first)
            except StoreError as error:
                failed.append((first, str(error)))
                time.sleep(0.05)
            first += 50

    workers = [threading.Thread(target=add_until_stopped, args=(first,)) for first in (100, 1_000_000)]
    for worker in workers:
        worker.start()
    time.sleep(0.3)
    with stopped_server():
        time.sleep(0.1)
        with pytest.raises(StoreError, match=rf"the gallery in {gallery.url.replace('?', '.')} cannot read the state"):
            gallery.search(vectors([1]), 1, model=A)
    assert gallery.search(vectors([1]), 1, model=A).ids == 1
    count = len(acknowledged)
    while len(acknowledged) < count + 4:
        time.sleep(0.01)
    stop.set()
    for worker in workers:
        worker.join()
    stored = set(gallery.read().ids.tolist())
    assert failed
    for _, message in failed:
        assert gallery.url in message
        assert any(words in message for words in ("cannot read the state", "none of the 50 rows", "or nothing"))
    for first in acknowledged:
        assert stored.issuperset(range(first, first + 50))
    for first, message in failed:
        found = len(stored.intersection(range(first, first + 50)))
        assert found == 0 or (found == 50 and "or nothing" in message)


def test_a_connection_that_breaks_at_the_commit_is_reported_as_undecided(url: str, gallery: Gallery) -> None:
    with (
        pytest.raises(StoreError, match=r"broke before .* the call to add 50 rows: all of the change was made, or"),
        gallery._store._writing("add", 50) as connection,
        sql(url) as other,
    ):
        other.execute("select pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
    with sql(url) as connection:  # a deferred constraint, which makes the commit below fail
        connection.execute("alter table rows add foreign key (id) references vectors deferrable initially deferred")
    message = "cannot remove 1 rows: .*violates foreign key.*; none of the 1 rows"
    with pytest.raises(StoreError, match=message), gallery._store._writing("remove", 1) as connection:
        connection.execute("delete from vectors where id = 3")
    assert 3 in gallery.search(vectors([3]), 1, model=A).ids


def test_idle_connections_are_replaced_after_a_restart_of_the_server(gallery: Gallery) -> None:
    gallery.status()
    with stopped_server():
        pass
    assert gallery.search(vectors([1]), 1, model=A).ids == 1


# constraints, payload and connections


def test_the_database_rejects_unknown_versions_and_edits_of_the_history(url: str, gallery: Gallery) -> None:
    with sql(url) as connection:
        with pytest.raises(psycopg.errors.ForeignKeyViolation, match="a version that was not admitted"):
            connection.execute("update rows set version = 7 where id = 3")
        with pytest.raises(psycopg.errors.ForeignKeyViolation, match="a version that was not admitted"):
            connection.execute("insert into rows values (70, 0, '{}', '{}'), (71, 7, '{}', '{}')")
        for edit in ("update history set body = ''", "delete from history", "truncate history"):
            with pytest.raises(psycopg.errors.RaiseException, match="the history is append-only"):
                connection.execute(edit)


def test_payload_that_jsonb_cannot_hold_is_stored(gallery: Gallery) -> None:
    payload = [
        {"name": "a\0b", "n": 1},
        {"big": 1e300, "n": 1, "list": [1e-7, {"n": 2}], "text": 'quote " and \\ and é'},
        {"a\0": 1, "n": 2},
    ]
    gallery.add([50, 51, 52], vectors([50, 51, 52]), model=A, payload=payload)
    read = gallery.read([50, 51, 52]).payload
    assert read == payload
    assert [type(read[1]["big"]), list(read[1])] == [float, list(payload[1])]
    for where, found in (
        ({"n": 1}, [50, 51]),
        ({"big": 1e300}, [51]),
        ({"list": [1e-7]}, []),
        ({"text": 'quote " and \\ and é'}, [51]),
    ):
        hits = gallery.search(vectors([50]), 3, model=A, where=where)
        assert sorted(hits.ids[hits.ids >= 0].tolist()) == found, where


def test_the_approximate_index_of_the_guide(url: str, gallery: Gallery) -> None:
    """Runs the SQL of docs/guides/gallery.md: one query per version of a mixed gallery, whose hits are merged."""
    page = (Path(__file__).parents[2] / "docs" / "guides" / "gallery.md").read_text()
    (block,) = re.findall(r"^```sql\n(.*?)^```", page, re.M | re.S)
    block = block.replace("photos.", "").replace("512", str(DIM))
    gallery.admit(B, force="test")
    gallery.replace(IDS[:15], vectors(IDS[:15], 1), model=B)
    queries = vectors(IDS, 1)
    with sql(url) as connection:
        for version in (0, 1):
            connection.execute(index_and_query(block, version)[0])
        connection.execute("set enable_seqscan = off; set enable_sort = off; set hnsw.ef_search = 200")

        def found(query: np.ndarray) -> list[int]:
            hits = []
            for version in (0, 1):
                select = index_and_query(block, version)[1]
                plan = connection.execute(f"explain {select}", {"query": str(query.tolist())}).fetchall()
                assert f"Index Scan using vectors_of_{version}" in str(plan)
                hits += connection.execute(select, {"query": str(query.tolist())}).fetchall()
            return [id_ for id_, _ in sorted(hits, key=lambda hit: -hit[1])[:5]]

        hits = gallery.search(queries, 5, model=B)
        assert [found(query) for query in queries] == hits.ids.tolist()
        gallery.replace(IDS[15:30], vectors(IDS[15:30], 1), model=B)
        gallery.rollback()
        hits = gallery.search(queries, 5, model=A)
        assert [found(query) for query in queries] == hits.ids.tolist()


def index_and_query(block: str, version: int) -> list[str]:
    """Returns the two statements of the guide, with its version 1 replaced by `version`."""
    return (
        block.replace("version = 1", f"version = {version}").replace("vectors_of_1", f"vectors_of_{version}").split(";")
    )


def test_a_model_of_another_width_admitted_before_the_search_is_an_error(url: str, gallery: Gallery) -> None:
    other = Gallery.open(url)
    other.search(vectors([1]), 1, model=A)
    wide = ModelIdentity("ab" * 32, 1, "", "oca", 40, ancestors=((A.fingerprint, 33),))
    gallery.admit(wide, force="test")
    gallery.replace([1], np.ones((1, 40), "f"), model=wide)
    with pytest.raises(ValueError, match="queries are 33 wide and rows of version 1 are 40"):
        other._store.search(vectors([1]), 1, None)


def test_connections_are_reused_and_closed(url: str, gallery: Gallery) -> None:
    threads = [threading.Thread(target=gallery.search, args=(vectors([1]), 1), kwargs={"model": A}) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gallery.close()
    with sql(url) as connection:

        def sessions() -> set[int]:  # the server lists the session of a closed connection for a moment
            query = "select pid from pg_stat_activity where application_name = 'simplexfix'"
            return {pid for (pid,) in connection.execute(query)}

        before = sessions()
        gallery.search(vectors([1]), 1, model=A)
        gallery.status()
        opened = sessions() - before
        assert len(opened) == 1
        gallery.close()
        deadline = time.monotonic() + 5
        while sessions() & opened:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_forked_process_does_not_hold_the_locks_of_a_killed_one(url: str, gallery: Gallery) -> None:
    read, write = os.pipe()
    killed = os.fork()
    if killed == 0:
        with Gallery.open(url)._store._writing("test") as connection:
            connection.execute("lock table state in exclusive mode")
            forked = os.fork()
            if forked:
                os.write(write, str(forked).encode())
            time.sleep(60)
            os._exit(0)
    forked = int(os.read(read, 100))
    try:
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        start = time.monotonic()
        gallery.add([50], vectors([50]), model=A)
        assert time.monotonic() - start < 30
    finally:
        os.kill(forked, signal.SIGKILL)
        os.close(read)
        os.close(write)
