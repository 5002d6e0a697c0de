"""Latency on a busy machine: median and 99th percentile of our calls and of their peers, beside other processes.

python benchmarks/busy.py [--calls 300] [--threads 2] [--gap 0.002] [--busy 0 1 2] [--out FILE]

Each busy process computes without end on one core.  In every round each call has its turn after a pause of `gap`
seconds, as in a service, so all meet the same noise.  A call on one thread is the measure for the same call on
`threads`: where the other cores are taken, it should not take longer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cases.loss import LossCase
from cases.search import faiss, unit_rows
from measure import machine_card

from simplexfix import CosineIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS, D, K = 100_000, 128, 10


def spin(end: float) -> None:
    while time.monotonic() < end:
        pass


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=spin, args=(time.monotonic() + 3600,), daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    time.sleep(1.0)  # until they compute
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def all_calls(threads: int) -> dict[str, dict[str, tuple[int, Callable[[], Any]]]]:
    """Returns, for each case and candidate, torch's number of threads and the call."""
    cases: dict[str, dict[str, tuple[int, Callable[[], Any]]]] = {}
    for case in (LossCase(64, 1024), LossCase(512, 1024)):
        candidates = case.candidates(compiled=False)
        ours = candidates["simplexfix"]
        cases[case.name] = {"ours, one thread": (1, ours), "ours": (threads, ours)}
        cases[case.name]["torch, dense"] = (threads, candidates["dense matrix"])
    query, gallery = unit_rows("Gaussian", ROWS, D)
    one, more = CosineIndex(D, threads=1), CosineIndex(D, threads=threads)
    one.add(gallery)
    more.add(gallery)
    rows = torch.from_numpy(gallery)
    flat = None
    if faiss is not None:
        faiss.omp_set_num_threads(threads)
        flat = faiss.IndexFlatIP(D)
        flat.add(gallery)
    for queries in (1, 100):
        q = np.ascontiguousarray(query[:queries])
        q_rows = torch.from_numpy(q)
        found = cases[f"search of {queries} in {ROWS:,} x {D}"] = {
            "ours, one thread": (1, lambda q=q: one.search(q, K)),
            "ours": (threads, lambda q=q: more.search(q, K)),
            "torch, mm and topk": (threads, lambda q=q_rows: (q @ rows.T).topk(K)),
        }
        if flat is not None:
            found["faiss"] = (threads, lambda q=q: flat.search(q, K))
    return cases


def latencies(calls: dict[str, tuple[int, Callable[[], Any]]], rounds: int, gap: float) -> dict[str, list[float]]:
    """Returns the sorted seconds of each candidate's calls."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(-3, rounds):  # three rounds warm up
        for name, (threads, call) in calls.items():
            torch.set_num_threads(threads)
            time.sleep(gap)
            start = time.perf_counter()
            call()
            if done >= 0:
                spent[name].append(time.perf_counter() - start)
    return {name: sorted(seconds) for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300, help="per candidate (default: 300)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gap", type=float, default=0.002, help="seconds before each call (default: 0.002)")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes")
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    arguments = parser.parse_args()
    cases = all_calls(arguments.threads)
    results: dict[str, Any] = {
        "machine": machine_card(),
        "threads": arguments.threads,
        "gap": arguments.gap,
        "rows": [],
    }
    for number in arguments.busy:
        with busy_processes(number):
            for case, calls in cases.items():
                print(f"\n{case}, beside {number} busy processes: p50 and p99 in ms, and over one thread's p50")
                spent = latencies(calls, arguments.calls, arguments.gap)
                base = spent["ours, one thread"][arguments.calls // 2]
                for name, seconds in spent.items():
                    p50, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
                    results["rows"].append({"case": case, "busy": number, "name": name, "p50": p50, "p99": p99})
                    print(f"  {name:<20} {1e3 * p50:9.3f} {1e3 * p99:9.3f} {p50 / base:7.2f} {p99 / base:7.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
