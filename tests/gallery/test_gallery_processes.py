"""Tests galleries whose processes are killed, share a backfill, fork, or run out of disk space.

`SIMPLEXFIX_KILLS=100 pytest -m '' tests/gallery/test_gallery_processes.py -k killed` kills 100 times per test and
store, and fewer times on Milvus.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.reduction import DupFd
from typing import Any

import cloudpickle
import numpy as np
import pytest
from gallery_stores import A, B, settle, stores, url, vectors
from processes import CONTEXT

from simplexfix.gallery import Gallery, StoreError

__all__ = ["url"]  # a fixture

KILLS = int(os.environ.get("SIMPLEXFIX_KILLS", "10"))
# rows of the backfill beside a reader; 0: 500 on a Milvus server, else 2000
ROWS = int(os.environ.get("SIMPLEXFIX_ROWS", "0"))


class Child:
    """A process that runs `call(say)`, where `say` sends a line; its exit code is 0 unless the call raises.

    It is forked from this process, or from a fork server if `fresh`, for a client that does not survive a fork.
    """

    fresh = False

    def __init__(self, call: Callable[[Callable[[object], None]], None]) -> None:
        read, write = os.pipe()
        if Child.fresh:
            process = CONTEXT.Process(target=run_fresh, args=(cloudpickle.dumps(call), DupFd(write)))
            process.start()
            self.pid, self._exit_code = process.pid, lambda: (process.join(), process.exitcode)[1]
        else:
            self.pid = os.fork()
            if self.pid == 0:
                os.close(read)
                run_child(call, write)
            self._exit_code = lambda: os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(write)
        self._lines = os.fdopen(read)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, signal.SIGKILL)

    def line(self) -> str:
        return self._lines.readline()

    def end(self) -> tuple[list[str], int]:
        """Returns the remaining lines, and the exit code, which is negative for a signal."""
        lines = self._lines.read().split()
        self._lines.close()
        code = self._exit_code()
        if code < 0:
            settle(f"child {self.pid}")
        return lines, code


DEAD_SECONDS = 10.0  # on Milvus: less than by default, so that others take over from a killed writer sooner


def run_fresh(call: bytes, write: Any) -> None:
    from simplexfix.gallery.stores import _milvus_register

    _milvus_register.DEAD_SECONDS = DEAD_SECONDS
    run_child(cloudpickle.loads(call), write.detach())


def run_child(call: Callable[[Callable[[object], None]], None], write: int) -> None:
    code = 1
    try:
        os.environ["PGAPPNAME"] = f"child {os.getpid()}"  # names its connections to PostgreSQL: settle()
        call(lambda line: os.write(write, f"{line}\n".encode()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture(autouse=True)
def fresh_children(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets `fresh` for Milvus: its client does not survive a fork."""
    if "milvus" in request.node.name:
        from simplexfix.gallery.stores import _milvus_register

        monkeypatch.setattr(Child, "fresh", True)
        monkeypatch.setattr(_milvus_register, "DEAD_SECONDS", DEAD_SECONDS)


def kills(url: str) -> int:
    """Returns the number of kills: fewer with Milvus, where all calls take seconds, and fewest with its server."""
    return max(2, KILLS // 10) if url.startswith("http") else max(2, KILLS // 4) if Child.fresh else KILLS


# killed at any moment


def bits(rows: dict[int, int]) -> dict[int, tuple[int, bytes]]:
    return {id_: (version, ALL[version][id_].tobytes()) for id_, version in rows.items()}


COUNT = 600
ALL = [vectors(np.arange(COUNT), version) for version in range(2)]
STEPS = [
    *[("add", range(first, first + 100)) for first in range(0, 500, 100)],
    ("admit", ()),
    *[("replace", range(first, first + 90)) for first in range(0, 360, 90)],
    ("remove", range(50, 60)),
    ("rollback", ()),
    ("admit", ()),
    *[("replace", [id_ for id_ in range(first, first + 250) if not 50 <= id_ < 60]) for first in (0, 250)],
    ("retire", ()),
    ("add", range(500, 600)),
]


def take(gallery: Gallery, step: tuple[str, Any]) -> None:
    kind, ids = step
    ids = np.asarray(ids, dtype=np.int64)
    if kind == "admit":
        gallery.admit(B, force="test")
    elif kind == "rollback":
        gallery.rollback()
    elif kind == "retire":
        gallery.retire(0)
    elif kind == "remove":
        gallery.remove(ids)
    elif kind == "replace":
        gallery.replace(ids, ALL[1][ids], model=B)
    else:
        model = gallery.model
        gallery.add(ids, ALL[model.version][ids], model=model, payload={"n": ids})


def expected(steps: int) -> tuple[dict[int, int], dict[int, int], tuple[int, ...]]:
    """Returns the state after so many steps: versions of rows and of old rows by id, and the versions that served."""
    rows: dict[int, int] = {}
    old: dict[int, int] = {}
    serving: tuple[int, ...] = (0,)
    for kind, ids in STEPS[:steps]:
        if kind == "admit":
            serving = (0, 1)
        elif kind == "rollback":
            rows, old, serving = {**rows, **old}, {}, (0,)
        elif kind == "retire":
            old, serving = {}, (1,)
        elif kind == "remove":
            rows, old = ({id_: v for id_, v in held.items() if id_ not in ids} for held in (rows, old))
        elif kind == "replace":
            old |= {id_: rows[id_] for id_ in ids}
            rows |= dict.fromkeys(ids, 1)
        else:
            rows |= dict.fromkeys(ids, serving[-1])
    return rows, old, serving


def is_after(gallery: Gallery, steps: int) -> bool:
    """Returns whether the gallery has the bits that it has after so many steps."""
    rows, old, serving = expected(steps)
    read, status = gallery.read(), gallery.status()
    columns = zip(read.ids.tolist(), read.versions.tolist(), read.vectors, strict=True)
    found = {id_: (version, vector.tobytes()) for id_, version, vector in columns}
    stored = [{"n": id_} for id_ in read.ids.tolist()]
    kept = {entry["version"]: entry["old_rows"] for entry in status["versions"] if entry["old_rows"]}
    hits = gallery.search(ALL[0][:1], max(len(rows), 1), model=gallery.model)
    return (
        found == bits(rows)
        and read.payload == stored
        and kept == ({0: len(old)} if old else {})
        and (status["serving"], status["rolls_back_to"]) == (serving[-1], serving[-2] if len(serving) > 1 else None)
        and sorted(hits.ids[0].tolist()) == sorted(rows or [-1])
    )


@pytest.mark.parametrize("url", stores("milvus-lite", "postgresql"), indirect=True)
def test_a_process_killed_at_any_moment_loses_no_acknowledged_call(url: str) -> None:
    """Every step is one call; a killed process leaves the state after its last acknowledged call, or after the next."""

    def run(place: str, begin: int) -> Callable[[Callable[[object], None]], None]:
        def steps(say: Callable[[object], None]) -> None:
            with Gallery.open(place) as gallery:
                say("begin")
                for step in STEPS[begin:]:
                    take(gallery, step)
                    say("done")

        return steps

    def start(place: str) -> Child:
        Gallery.create(place, model=A).close()
        child = Child(run(place, 0))
        child.line()
        return child

    child, begun = start(f"{url}_whole"), time.monotonic()
    assert child.end() == (["done"] * len(STEPS), 0)
    whole = time.monotonic() - begun
    with Gallery.open(f"{url}_whole") as gallery:
        assert is_after(gallery, len(STEPS))
        assert not is_after(gallery, len(STEPS) - 1)
    draw = np.random.default_rng()
    in_the_middle = 0
    for attempt in range(kills(url)):
        place = f"{url}_{attempt}"
        child = start(place)
        first = int(draw.integers(len(STEPS) - 1))  # calls that end before the kill, however slow the machine is
        for _ in range(first):
            child.line()
        time.sleep(draw.uniform(0, whole / len(STEPS)))
        child.kill()
        lines, _ = child.end()
        done = first + len(lines)
        with Gallery.open(place) as gallery:
            after = [steps for steps in (done, done + 1) if steps <= len(STEPS) and is_after(gallery, steps)]
            assert len(after) == 1, f"killed after {done} of {len(STEPS)} calls, the next is {STEPS[done]}"
            in_the_middle += after[0] < len(STEPS)
        child = Child(run(place, after[0]))  # another process continues
        assert child.end()[1] == 0
        with Gallery.open(place) as gallery:
            assert is_after(gallery, len(STEPS))
    assert in_the_middle > kills(url) // 3


@pytest.mark.parametrize("kind", ["add", "replace", "remove", "rollback", "retire"])
def test_a_call_killed_at_a_statement_takes_full_effect_or_none(tmp_path, kind: str) -> None:
    """A process with a folder is killed at a call's first SQL statements, at its last ones, and at two between."""
    before = next(at for at, step in enumerate(STEPS) if step[0] == kind)
    made = tmp_path / "made"
    with Gallery.create(made, model=A) as gallery:
        for step in STEPS[:before]:
            take(gallery, step)

    def call(place: object, last: int) -> Callable[[Callable[[object], None]], None]:
        def counted(say: Callable[[object], None]) -> None:
            gallery, statements = Gallery.open(place), 0

            def count(statement: str) -> None:
                nonlocal statements
                statements += 1
                if statements == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            gallery._store._writer.current.set_trace_callback(count)
            take(gallery, STEPS[before])
            say(statements)

        return counted

    shutil.copytree(made, tmp_path / "whole")
    (line,), code = Child(call(tmp_path / "whole", 0)).end()
    assert code == 0
    number = int(line)
    between = np.random.default_rng().integers(1, number, size=2).tolist()
    for last in {1, 2, *between, *range(max(1, number - 4), number + 1)}:
        place = tmp_path / f"killed-{last}"
        shutil.copytree(made, place)
        assert Child(call(place, last)).end() == ([], -signal.SIGKILL)
        with Gallery.open(place) as gallery:
            assert is_after(gallery, before), f"killed at statement {last} of {number}"
            take(gallery, STEPS[before])
            assert is_after(gallery, before + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["create", "add", "replace", "retire"])
def test_killed_at_a_file_operation_of_milvus_lite(tmp_path, kind: str) -> None:
    """A process is killed at 20 of the operations that change the file, or at all with `SIMPLEXFIX_KILLS=1000`."""
    pytest.importorskip("milvus_lite")
    before = next((at for at, step in enumerate(STEPS) if step[0] == kind), 0)
    made = tmp_path / "made.db"
    if kind != "create":
        with Gallery.create(f"{made}#photos", model=A) as gallery:
            for step in STEPS[:before]:
                take(gallery, step)

    def call(file: str, last: int) -> Callable[[Callable[[object], None]], None]:
        def counted(say: Callable[[object], None]) -> None:
            operations = 0

            def count(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal operations
                changes = event in {"os.mkdir", "os.rename", "os.remove"} or (event == "open" and arguments[1] == "w")
                if changes and file in str(arguments[0]):
                    operations += 1
                    if operations == last:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            if kind == "create":
                Gallery.create(f"{file}#photos", model=A).close()
            else:
                with Gallery.open(f"{file}#photos") as gallery:
                    take(gallery, STEPS[before])
            say(operations)

        return counted

    def copied(name: str) -> str:
        if kind != "create":
            shutil.copytree(made, tmp_path / name)
        return str(tmp_path / name)

    (line,), code = Child(call(copied("whole.db"), 0)).end()
    assert code == 0
    number = int(line)
    some = range(1, number + 1) if number < 2 * KILLS else np.linspace(1, number, 2 * KILLS).astype(int).tolist()
    for last in some:
        file = copied(f"killed-{last}.db")
        assert Child(call(file, last)).end() == ([], -signal.SIGKILL)
        try:
            gallery = Gallery.open(f"{file}#photos")
        except FileNotFoundError:
            assert kind == "create"
            gallery = Gallery.create(f"{file}#photos", model=A)
        with gallery:
            taken = kind == "create" or is_after(gallery, before + 1)
            assert taken or is_after(gallery, before), f"killed at operation {last} of {number}"
            if not taken:
                take(gallery, STEPS[before])
            if kind != "create":
                assert is_after(gallery, before + 1), f"killed at operation {last} of {number}, and called again"
        with Gallery.open(f"{file}#photos") as gallery:
            assert is_after(gallery, 0 if kind == "create" else before + 1)


def test_a_gallery_whose_creation_was_killed_can_be_created_again(url: str) -> None:
    begun = time.monotonic()
    Gallery.create(f"{url}_whole", model=A).close()
    whole = time.monotonic() - begun
    for attempt in range(kills(url)):
        place = f"{url}_{attempt}"
        child = Child(lambda say, place=place: (say("go"), Gallery.create(place, model=A), say("made")))
        child.line()
        time.sleep(np.random.default_rng().uniform(0, whole))
        child.kill()
        lines, _ = child.end()
        try:
            gallery = Gallery.open(place)
        except FileNotFoundError:
            assert not lines
            gallery = Gallery.create(place, model=A)
        assert gallery.model == A
        gallery.close()


# several processes


def test_no_query_misses_a_row_while_two_workers_replace_all(url: str, tmp_path) -> None:
    if ".db#" in url:
        pytest.skip("one process at a time has a file of Milvus Lite")
    rows = ROWS or (500 if url.startswith("http") else 2000)
    ids = np.arange(rows)
    draw = np.random.default_rng(0)
    old = draw.standard_normal((rows, A.embedding_dim)).astype(np.float32)
    new = old + 0.05 * draw.standard_normal(old.shape).astype(np.float32)
    with Gallery.create(url, model=A) as gallery:
        gallery.add(ids, old, model=A)
        gallery.admit(B, force="test")

    rounds = tmp_path / "rounds"  # has one byte for each round of searches
    rounds.touch()

    def work(say: Callable[[object], None]) -> None:
        with Gallery.open(url) as mine:
            say("ready")
            for number, batch in enumerate(mine.stale(batch=64)):
                next_round = rounds.stat().st_size + 1
                for _ in range(10_000 if number < 5 else 0):  # so that both workers get batches, with searches between
                    if rounds.stat().st_size >= next_round:
                        break
                    time.sleep(0.001)
                time.sleep(0.005)  # stands for a model
                say(mine.replace(batch, new[batch], model=B))

    workers = [Child(work) for _ in range(2)]
    assert [worker.line() for worker in workers] == ["ready\n"] * 2
    searches, seen, gallery = 0, set(), Gallery.open(url)
    while (status := gallery.status())["stale"]:
        for model, queries in ((B, new), (A, old)):
            at = draw.integers(rows, size=20)
            hits = gallery.search(queries[at], 1, model=model)
            assert hits.ids[:, 0].tolist() == at.tolist(), status
            searches += 1
        everything = gallery.search(new[:1], rows, model=B)
        assert sorted(everything.ids[0].tolist()) == ids.tolist()
        seen.add(status["stale"])
        with rounds.open("ab") as file:
            file.write(b".")
    ended = [worker.end() for worker in workers]
    assert [code for _, code in ended] == [0, 0]
    replaced = [sum(map(int, lines)) for lines, _ in ended]
    assert sum(replaced) == rows  # each row once
    assert min(replaced) > 0
    assert len(seen) > 2
    np.testing.assert_array_equal(gallery.read().vectors, new)
    print(f"{searches} searches beside the backfill of {rows} rows, shared {replaced}: no row was missed")


def test_a_worker_that_is_killed_leaves_its_rows_to_the_others(url: str) -> None:
    ids = np.arange(100)
    with Gallery.create(url, model=A) as gallery:
        gallery.add(ids, ALL[0][ids], model=A)
        gallery.admit(B, force="test")

    def work(say: Callable[[object], None]) -> None:
        with Gallery.open(url) as mine:
            for batch in mine.stale(batch=30, lease=0.5):
                say(len(batch))
                time.sleep(60)

    child = Child(work)
    assert child.line() == "30\n"
    child.kill()
    assert child.end()[1] == -signal.SIGKILL
    with Gallery.open(url) as gallery:
        sizes = []
        for batch in gallery.stale(batch=100):
            sizes.append(len(batch))
            gallery.replace(batch, ALL[1][batch], model=B)
        assert sizes in ([70, 30], [100])
        assert gallery.status()["stale"] == 0


def test_a_gallery_that_is_open_survives_a_fork(url: str) -> None:
    """Both processes can use the gallery, also if another thread searches during the fork."""
    if Child.fresh:
        pytest.skip("Milvus's client does not survive a fork: test_a_forked_child_gets_an_error_that_recommends_spawn")
    gallery = Gallery.create(url, model=A, count_traffic=True)
    gallery.add(range(100), ALL[0][:100], model=A)
    gallery.search(ALL[0][:1], 1, model=A)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            gallery.search(ALL[0][:50], 5, model=A)

    reader = threading.Thread(target=look)
    reader.start()

    def use(first: int) -> None:
        for id_ in range(first, first + 20):
            gallery.add([id_], ALL[0][[id_]], model=A)
            assert gallery.search(ALL[0][[id_]], 1, model=A).ids == id_

    def look_and_use(first: int) -> None:
        # a child does not inherit SQLite's locks, and must not have the files open
        files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        assert not [file for file in files if "gallery.db" in file]
        use(first)

    try:
        children = [Child(lambda say, first=first: look_and_use(first)) for first in (200, 300)]
        use(400)
    finally:
        stop.set()
        reader.join()
    assert [child.end()[1] for child in children] == [0, 0]
    assert len(gallery.read().ids) == 160
    assert gallery.search(ALL[0][[210, 310, 410]], 1, model=A).ids.ravel().tolist() == [210, 310, 410]


# the folder store: a disk that is full, files that move or are damaged


def test_a_full_disk_is_an_error_and_the_gallery_stays_usable(tmp_path) -> None:
    """A limit on the size of a file stands for a small disk."""
    place = tmp_path / "photos"
    with Gallery.create(place, model=A) as gallery:
        gallery.add(range(100), ALL[0][:100], model=A)

    def fill(say: Callable[[object], None]) -> None:
        gallery = Gallery.open(place)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        ids = np.arange(50)
        message = f"the gallery in {place} cannot add 50 rows: .*none of the 50 rows was taken, and the call can be"

        def add_all() -> None:
            while True:
                ids[:] += 50
                gallery.add(ids + 50, ALL[0][ids + 50], model=A)
                say(ids[0] + 50)

        with pytest.raises(StoreError, match=message):
            add_all()
        assert gallery.search(ALL[0][:1], 1, model=A).ids == 0  # reading still works
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        ids += 50
        gallery.add(ids, ALL[0][ids], model=A)
        assert gallery.search(ALL[0][ids], 1, model=A).ids.ravel().tolist() == ids.tolist()
        say(ids[0])

    lines, code = Child(fill).end()
    assert code == 0
    assert len(lines) > 1
    with Gallery.open(place) as gallery:
        assert gallery.read().ids.tolist() == [*range(100), *(int(f) + i for f in lines for i in range(50))]


def test_reading_a_few_changed_rows_scans_no_table(tmp_path) -> None:
    """SQLite's query plans have no scan, which would add 60 ms to each search in a million rows beside a backfill."""
    gallery = Gallery.create(tmp_path / "photos", model=A)
    gallery.add(range(300), ALL[0][:300], model=A)
    gallery.search(ALL[0][:1], 1, model=A)
    gallery.admit(B, force="test")
    gallery.replace(range(5), ALL[1][:5], model=B)
    statements: list[str] = []
    reader = gallery._store._reader.current
    reader.set_trace_callback(statements.append)
    assert gallery.search(ALL[0][:5], 1, model=B).versions.tolist() == [[1]] * 5
    reader.set_trace_callback(None)
    selects = [statement for statement in statements if statement.startswith("select")]
    assert any("vector" in statement for statement in selects)
    for statement in selects:
        plan = [row[3] for row in reader.execute(f"explain query plan {statement}")]
        assert not [step for step in plan if step.startswith(("SCAN rows", "SCAN vectors"))], statement


def test_files_that_are_moved_replaced_or_damaged_are_named(tmp_path) -> None:
    place = tmp_path / "photos"
    gallery = Gallery.create(place, model=A)
    gallery.add(range(300), ALL[0][:300], model=A)
    file = place / "gallery.db"
    file.rename(place / "aside")
    with pytest.raises(StoreError, match=r"the gallery in .*photos cannot read the state: .*No such file"):
        gallery.add([300], ALL[0][[300]], model=A)
    (place / "aside").rename(file)
    gallery.add([300], ALL[0][[300]], model=A)
    gallery.close()  # moves the write-ahead log into the file
    gallery.search(ALL[0][:1], 1, model=A)
    shutil.copy(file, place / "copy")
    (place / "copy").rename(file)
    for call in (
        lambda: gallery.add([301], ALL[0][[301]], model=A),
        lambda: gallery.search(ALL[0][:1], 1, model=A),
        gallery.status,
    ):
        with pytest.raises(StoreError, match="was replaced by another file while it was open"):
            call()
    gallery.close()
    for name in ("-wal", "-shm"):
        (place / f"gallery.db{name}").unlink(missing_ok=True)
    content = file.read_bytes()
    for damage, message in (
        (b"x" * len(content), "cannot open the gallery: file is not a database"),
        (content[:100] + b"x" * 5000 + content[5100:], "cannot .*malformed|cannot .*not a database"),
        (content.replace(ALL[0][7].tobytes(), ALL[0][8].tobytes()), "the vector of id 7 does not match its checksum"),
        (
            content[:68] + b"abcd" + content[72:],
            "is not a gallery of format 1: expected application_id and user_version",
        ),
        (content[:60] + (2).to_bytes(4, "big") + content[64:], r"got \[1397119047, 2\]; another program"),
    ):
        file.write_bytes(damage)
        with pytest.raises(StoreError, match=message):
            Gallery.open(place).search(ALL[0][:1], 1, model=A)
    file.write_bytes(content)
    assert len(Gallery.open(place).read().ids) == 301


def test_places_without_a_gallery_and_with_something_else(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").touch()
    (tmp_path / "file").touch()
    Gallery.create(tmp_path / "there", model=A).close()
    for call, kind, message in (
        (lambda: Gallery.open(tmp_path / "none"), FileNotFoundError, r"holds no gallery: it has no gallery\.db; Gall"),
        (lambda: Gallery.create(tmp_path / "full", model=A), FileExistsError, "not empty, it holds photo.png: give a"),
        (
            lambda: Gallery.create(tmp_path / "there", model=A),
            FileExistsError,
            "holds tables already",
        ),
        (lambda: Gallery.create(tmp_path / "file", model=A), OSError, "File exists"),
        (
            lambda: Gallery.open("redis://me:secret@there"),
            ValueError,
            "must be .*, got redis:",
        ),
        (lambda: Gallery.open("there#photos"), ValueError, "the path of a folder has no #, got 'there#photos'"),
        (lambda: Gallery.open(""), TypeError, "url must be the path of a folder"),
        (lambda: Gallery.create(tmp_path / "new", model="v0"), TypeError, "model must be a ModelIdentity, got str"),
        (lambda: Gallery.create(tmp_path / "new", model=A, threshold=3), ValueError, r"must lie in \[-1, 1\], got 3"),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "photo.png").exists()
