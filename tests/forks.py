"""A process that forks during computations: python forks.py CASE...

Prints a JSON object: the list of the children's results by case. Children are killed after LIMIT seconds;
test_forks.py limits the time of the whole process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import simplexfix.functional as SF
from simplexfix import CosineIndex, _native

LIMIT = 15.0
# a fork does not copy torch's threads: with the reference implementation a child would deadlock
torch.set_num_threads(2 if _native.library else 1)

rng = np.random.default_rng(0)
vectors = rng.standard_normal((20_000, 64)).astype(np.float32)
query = vectors[:200] + 0.1
searched = CosineIndex(64, threads=2)


def in_child(task: Callable[[], Any], limit: float = LIMIT) -> str:
    """Returns the task's result in a forked child, or its error, or "hangs"."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(task())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    if not select.select([read], [], [], limit)[0]:
        os.kill(pid, signal.SIGKILL)
        said = "hangs"
    else:
        said = os.read(read, 1 << 16).decode()
    status = os.waitpid(pid, 0)[1]
    os.close(read)
    return said if status == 0 or said == "hangs" else f"died: {said}"


@contextmanager
def busy(*tasks: Callable[[], Any]) -> Iterator[None]:
    """Starts threads that repeat the tasks."""
    stop = threading.Event()

    def repeat(task: Callable[[], Any]) -> None:
        while not stop.is_set():
            task()

    threads = [threading.Thread(target=repeat, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def index_tasks(index: CosineIndex) -> list[Callable[[], Any]]:
    expected = index.search(query[:20], 5)

    def searches() -> str:
        found = index.search(query[:20], 5)
        return "ok" if all(map(np.array_equal, found, expected)) else "other results"

    def adds() -> str:
        ids = index.add(query[:3] * 2)
        return "ok" if index.search(query[1:2], 1)[1] == ids[1] else "not found"

    def removes() -> str:
        before = len(index)
        index.remove([0, 7, 19_999])
        return "ok" if len(index) == before - 3 and 7 not in index else "not removed"

    def saves() -> str:
        index.save("child.index")
        return "ok" if len(CosineIndex.load("child.index", threads=2)) == len(index) else "other rows"

    return [searches, adds, removes, saves]


def readers() -> Iterator[str]:
    """Threads search and save during the fork."""
    index = CosineIndex(64, threads=2)
    index.add(vectors)
    tasks = index_tasks(index)
    with busy(lambda: index.search(query, 10), lambda: index.save("parent.index"), lambda: len(index)):
        for task in tasks * 2:
            yield in_child(task)
        yield in_child(lambda: in_child(tasks[0], LIMIT / 2))
        yield in_child(lambda: in_child(tasks[1], LIMIT / 2))


def writers() -> Iterator[str]:
    """A thread adds and removes; a child that is forked during a change gets an error."""
    index = CosineIndex(64, threads=2)
    index.add(vectors)
    searches = index_tasks(index)[0]

    def changes() -> None:
        index.remove(index.add(vectors[:5000] * -1, np.arange(5000)[::-1] * 3 + 50_000))

    calls = [searches, index.__len__, lambda: index.remove([1]), lambda: index.save("child.index")]

    def child() -> str:
        said = set()
        for call in calls:
            try:
                call()
                said.add("ok")
            except RuntimeError as error:
                said.add(str(error))
        return " ".join(sorted(said))

    with busy(changes):
        for _ in range(12):
            yield in_child(child)


def waiting() -> Iterator[str]:
    """At the fork a thread waits for a search to end before it adds; the index is unchanged yet."""
    index = CosineIndex(64, threads=1)
    index.add(vectors)
    tasks = index_tasks(index)
    many = np.repeat(query, 1000, axis=0)
    others = [threading.Thread(target=index.search, args=(many, 10)), threading.Thread(target=index.add, args=(query,))]
    for other in others:
        other.start()
        time.sleep(1)  # the search normalises its queries before it takes the lock
    yield from map(in_child, tasks)
    yield "ok" if others[1].is_alive() else "the search was too short"
    for other in others:
        other.join()


# These inputs are created before a fork: torch's own operators use several threads at such sizes, and hang in a child.
draw = torch.Generator().manual_seed(0)
features = torch.randn(700, 255, generator=draw).requires_grad_()
old_features, upstream = torch.randn(700, 255, generator=draw), torch.randn(700, 256, generator=draw)
per_row, gallery = torch.randn(700, generator=draw), torch.randn(14_000, 255, generator=draw)
classes = torch.arange(700) % 256
bits, bit_classes = torch.randn(30_000, 8, generator=draw).requires_grad_(), torch.arange(30_000) % 256


def operators() -> list[bytes]:
    """Returns the bits of each operator's results."""
    results = []

    def run(value: torch.Tensor, gradient: torch.Tensor) -> None:
        features.grad = None
        value.backward(gradient)
        results.extend([value.detach(), features.grad])

    for loss in (SF.simplex_cross_entropy, SF.orthoplex_cross_entropy):
        run(loss(features, classes, reduction="none"), per_row)
        run(loss(features, classes), torch.tensor(0.7))
    bits.grad = None
    loss = SF.cube_cross_entropy(bits, bit_classes)
    loss.backward()
    results.extend([loss.detach(), bits.grad])
    run(SF.simplex_logits(features), upstream)
    run(SF.old_new_contrast(features, old_features, classes), torch.tensor(0.7))
    for queries in (5, 100):  # without codes and with them
        results.extend(SF.cosine_topk(features.detach()[:queries], gallery, 7))
    return [result.numpy().tobytes() for result in results]


def after_operators() -> Iterator[str]:
    """The parent has used torch's threads."""
    expected = operators()
    torch.ones(1 << 20).add_(1).sum()
    for _ in range(2):
        yield in_child(lambda: "ok" if operators() == expected else "other bits")
    yield in_child(lambda: in_child(lambda: "ok" if operators() == expected else "other bits", LIMIT / 2))
    yield "ok" if operators() == expected else "other bits in the parent"


def beside_operators() -> Iterator[str]:
    """Threads allocate and free gradient buffers during the fork."""
    z, target = torch.randn(4000, 63), torch.arange(4000) % 64
    expected = operators()

    def step() -> None:
        SF.simplex_cross_entropy(z.clone().requires_grad_(), target).backward()

    with busy(step, step):
        for _ in range(8):
            yield in_child(lambda: "ok" if operators() == expected else "other bits")


def item(at: int) -> int:
    """Returns one item of a worker, by a loss and a search."""
    row = torch.from_numpy(query[at : at + 1]).requires_grad_()
    SF.simplex_cross_entropy(row, torch.tensor([at % 64])).backward()
    return int(searched.search(query[at : at + 1], 1)[1][0, 0])


class Items(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, at: int) -> int:
        return item(at)


def workers() -> Iterator[str]:
    """torch's DataLoader and a pool of processes, both forked."""
    operators()
    searched.add(vectors)
    expected = list(map(item, range(64)))
    with busy(lambda: searched.search(query, 10)):
        loader = torch.utils.data.DataLoader(Items(), 8, num_workers=2, multiprocessing_context="fork", timeout=LIMIT)
        yield "ok" if torch.cat(list(loader)).tolist() == expected else "other results"
        with multiprocessing.get_context("fork").Pool(2) as pool:
            yield "ok" if pool.map_async(item, range(64)).get(LIMIT) == expected else "other results"


if __name__ == "__main__":
    print(json.dumps({case: list(globals()[case]()) for case in sys.argv[1:]}))
