"""Measures how CosineIndex scales: times and bytes per row, and the memory and throughput of the largest size.

python benchmarks/growth.py [--rows 500000 1000000 ...] [--d 64] [--dtype float32] [--threads N] [--out FILE]

One index grows from size to size; if time grows linearly, all lines have the same time per row.  At the last size a
tenth of the rows is removed, and at most 100,000 of them are added again.  Then this index is saved, loaded, and
searched by several threads, one query per call.  For each of these calls the rise of the process's memory is printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine_card, process_memory

from simplexfix import CosineIndex

QUERIES, K, ROWS_PER_CALL = 100, 10, 100_000


def timed(name: str, call: Callable[[], Any]) -> dict[str, Any]:
    """Runs a call once; returns its seconds, and by how many MiB it raised the process's memory at most."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before, start = process_memory("VmRSS"), time.perf_counter()
    call()
    row = {"call": name, "seconds": time.perf_counter() - start, "rose": (process_memory("VmHWM") - before) / 2**20}
    print("{:28} {:8.1f} s, memory rose by {:6.0f} MiB".format(*row.values()), flush=True)
    return row


def throughput(index: CosineIndex, query: np.ndarray, clients: int, duration: float) -> float:
    """Returns the searches per second of threads that search one query after the other."""
    done = [0] * clients
    end = time.perf_counter() + duration

    def search(client: int) -> None:
        while time.perf_counter() < end:
            at = done[client] % len(query)
            index.search(query[at : at + 1], K)
            done[client] += 1

    threads = [threading.Thread(target=search, args=(client,)) for client in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Returns the minimum of several measurements: on a shared machine noise only adds time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000, 5_000_000])
    parser.add_argument("--d", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="threads that search at once")
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    query = rng.standard_normal((QUERIES, arguments.d), dtype=np.float32)
    index = CosineIndex(arguments.d, dtype=arguments.dtype, threads=arguments.threads)
    results = []
    print(f"d={arguments.d} {arguments.dtype}, {index.threads} threads; ns per row (and query)")
    print(f"{'rows':>10} {'add':>8} {'Q=1':>8} {f'Q={QUERIES}':>8} {'bytes':>8} {'of fp32':>8}")
    for size in arguments.rows:
        added, spent = size - len(index), 0.0
        while len(index) < size:
            vectors = rng.standard_normal((min(ROWS_PER_CALL, size - len(index)), arguments.d), dtype=np.float32)
            start = time.perf_counter()
            index.add(vectors)
            spent += time.perf_counter() - start
        one = seconds(lambda: index.search(query[:1], K), 7)
        many = seconds(lambda: index.search(query, K), 2)
        row = {
            "rows": size,
            "add": 1e9 * spent / added,
            "Q=1": 1e9 * one / size,
            f"Q={QUERIES}": 1e9 * many / size / QUERIES,
            "bytes": index.nbytes / size,
            "of fp32": index.nbytes / (4 * size * arguments.d),
        }
        results.append(row)
        print("{:10} {:8.1f} {:8.3f} {:8.4f} {:8.1f} {:8.3f}".format(*row.values()), flush=True)
    tenth = rng.permutation(len(index))[: len(index) // 10]
    vectors = index.vectors(tenth[:ROWS_PER_CALL])
    print(f"the index: {index.nbytes / 2**20:.0f} MiB, the process: {process_memory('VmRSS') / 2**20:.0f} MiB")
    calls = [timed(f"remove {len(tenth)} rows", lambda: index.remove(tenth))]
    calls.append(timed(f"add {len(vectors)} of them again", lambda: index.add(vectors, tenth[:ROWS_PER_CALL])))
    with tempfile.TemporaryDirectory() as folder:
        calls.append(timed("save", lambda: index.save(Path(folder, "index"))))
        loaded: list[CosineIndex] = []
        calls.append(timed("load", lambda: loaded.append(CosineIndex.load(Path(folder, "index")))))
        loaded.clear()
    rates = {}
    for clients in arguments.clients:
        rates[clients] = throughput(index, query, clients, 5.0)
        print(f"{clients} client threads: {rates[clients]:.1f} searches of one query per second", flush=True)
    if arguments.out:
        content = {"machine": machine_card(), "growth": results, "calls": calls, "searches per second": rates}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
