"""Makes a long call that a signal ends: python interrupts.py CASE.

Prints "ready", then how the call ended, as JSON. Each call would take several times as long as test_interrupts.py
allows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import simplexfix
from simplexfix import CosineIndex

torch.set_num_threads(2)
rng = np.random.default_rng(0)
NATIVE = simplexfix._native.library is not None


def unit_rows(n: int, d: int) -> np.ndarray:
    return rng.standard_normal((n, d), np.float32)


def ready() -> None:
    print("ready", flush=True)


def ended(call: Callable[[], Any]) -> dict[str, Any]:
    ready()
    try:
        call()
    except BaseException as error:
        return {"ended": type(error).__name__, "said": str(error)}
    return {"ended": "finished"}


def long_search(threads: int = 2) -> tuple[CosineIndex, Callable[[], Any]]:
    index = CosineIndex(128, threads=threads)
    index.add(unit_rows(50_000, 128))
    query = unit_rows(100, 128)
    many = np.repeat(query, 2000 if NATIVE else 200, axis=0)
    return index, lambda: index.search(many, 10)


def search() -> dict[str, Any]:
    index, call = long_search()
    return {**ended(call), "rows": len(index), "found": int(index.search(unit_rows(1, 128), 1)[1][0, 0]) >= 0}


def search_on_one_thread() -> dict[str, Any]:
    return ended(long_search(1)[1])


def search_without_codes() -> dict[str, Any]:
    index = CosineIndex(128, threads=2)
    index.add(unit_rows(20_000, 128))
    query = unit_rows(20_000, 128)
    return ended(lambda: index.search(query, 6000))


def big_add() -> tuple[CosineIndex, Callable[[], Any]]:
    index = CosineIndex(16, threads=1)
    index.add(unit_rows(100, 16), np.arange(100) + 10**9)
    vectors, names = unit_rows(3_000_000, 16), rng.permutation(3_000_000)
    return index, lambda: index.add(vectors, names)


def add() -> dict[str, Any]:
    index, call = big_add()
    query = unit_rows(5, 16)
    before = index.search(query, 9)
    ending = ended(call)
    after = index.search(query, 9)
    same = all(map(np.array_equal, before, after))
    index.add(unit_rows(10, 16), np.arange(10))
    return {**ending, "rows": len(index), "same": same}


def load() -> dict[str, Any]:
    index, call = big_add()
    call()
    index.save("index")
    start = time.monotonic()
    CosineIndex.load("index", threads=1)
    whole, start = time.monotonic() - start, time.monotonic()
    ending = ended(lambda: CosineIndex.load("index", threads=1))
    return {**ending, "early": time.monotonic() - start < 0.7 * whole}


def save() -> dict[str, Any]:
    index, call = big_add()
    index.save("index")
    size = os.path.getsize("index")
    call()
    index.save("other")
    whole = os.path.getsize("other")
    os.unlink("other")

    def saves() -> None:
        while True:  # one call may be too short
            index.save("other")
            os.unlink("other")

    ending = ended(saves)
    if os.path.exists("other"):  # the signal came between the two calls
        assert os.path.getsize("other") == whole
        os.unlink("other")
    return {**ending, "same": os.path.getsize("index") == size, "files": sorted(os.listdir())}


def wait_for_another_thread() -> dict[str, Any]:
    index, call = long_search(1)
    threading.Thread(target=call, daemon=True).start()
    time.sleep(1)
    rows = len(index)
    ending = ended(lambda: index.add(unit_rows(3, 128)))
    return {**ending, "rows": len(index) - rows}


def topk() -> dict[str, Any]:
    query, gallery = torch.from_numpy(unit_rows(200_000, 128)), torch.from_numpy(unit_rows(50_000, 128))
    ending = ended(lambda: simplexfix.cosine_topk(query, gallery, 10))
    return {**ending, "again": list(simplexfix.cosine_topk(query[:3], gallery, 2)[1].shape)}


def topk_with_gradient() -> dict[str, Any]:
    query, gallery = torch.from_numpy(unit_rows(200_000, 128)), torch.from_numpy(unit_rows(50_000, 128))
    return ended(lambda: simplexfix.cosine_topk(query.requires_grad_(), gallery, 10))


def another_exception() -> dict[str, Any]:
    def handler(*_: Any) -> None:
        raise TimeoutError("too long")

    signal.signal(signal.SIGINT, handler)
    return ended(long_search()[1])


def handler_that_returns() -> dict[str, Any]:
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(time.monotonic()))
    index, query = CosineIndex(128, threads=2), unit_rows(60_000, 128)
    index.add(unit_rows(30_000, 128))
    expected = [part[:50] for part in index.search(query[:50], 10)]
    ready()
    found = index.search(query, 10)
    end = time.monotonic()
    same = all(np.array_equal(part[:50], truth) for part, truth in zip(found, expected, strict=True))
    return {"ended": "finished", "same": same, "came": len(came), "meanwhile": end - came[0] > 0.2}


def handler_that_uses_the_index() -> dict[str, Any]:
    index, call = long_search()
    said: list[str] = []

    def handler(*_: Any) -> None:
        said.append(str(len(index)))
        for change in (lambda: index.add(unit_rows(1, 128)), lambda: index.remove([0])):
            try:
                change()
            except RuntimeError as error:
                said.append(str(error))
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    return {**ended(call), "handler": said, "rows": len(index), "new": index.add(unit_rows(1, 128)).tolist()}


def child() -> dict[str, Any]:
    """A thread that is not the main one forks; in the child it is the main thread."""
    _, call = long_search()
    results: list[dict[str, Any]] = []

    def fork() -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            start = time.monotonic()
            try:
                call()
            except KeyboardInterrupt:
                os.write(write, json.dumps({"ended": "KeyboardInterrupt", "after": time.monotonic() - start}).encode())
            os._exit(0)
        os.close(write)
        results.append(json.loads(os.read(read, 1000)))
        os.waitpid(pid, 0)

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    ready()
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(20)
    return results[0]


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()), flush=True)
    os._exit(0)  # a normal exit would wait for the search of a daemon thread
