"""Measures latency on a busy machine: median and 99th percentile of our calls and of peers, beside other processes.

python benchmarks/busy.py [--calls 300] [--threads 2] [--gap 0.002] [--busy 0 1 2] [--out FILE]

Each busy process computes without pause, on a core that the system chooses.  Every round makes each call once, after a
pause of `gap` seconds, as in a service.  So all calls run under the same conditions.  Our calls also run on one thread:
if the other cores are busy, a call on `threads` threads should take no longer than on one.
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


def compute_until(end: float) -> None:
    while time.monotonic() < end:
        pass


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=compute_until, args=(time.monotonic() + 3600,), daemon=True) for _ in range(number)
    ]
    for process in processes:
        process.start()
    time.sleep(1.0)  # until all of them compute
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def all_calls(threads: int) -> dict[str, dict[str, tuple[int, Callable[[], Any]]]]:
    """Returns, for each case and candidate, the number of threads to set in torch, and the call."""
    cases: dict[str, dict[str, tuple[int, Callable[[], Any]]]] = {}
    for case in (LossCase(64, 1024), LossCase(512, 1024)):
        candidates = case.candidates(compiled=False)
        ours = candidates["simplexfix"]
        cases[case.name] = {"ours, one thread": (1, ours), "ours": (threads, ours)}
        cases[case.name]["torch, dense"] = (threads, candidates["dense matrix"])
    queries, gallery = unit_rows("Gaussian", ROWS, D)
    index_on_one, index = CosineIndex(D, threads=1), CosineIndex(D, threads=threads)
    index_on_one.add(gallery)
    index.add(gallery)
    gallery_rows = torch.from_numpy(gallery)
    flat = None
    if faiss is not None:
        faiss.omp_set_num_threads(threads)
        flat = faiss.IndexFlatIP(D)
        flat.add(gallery)
    for number in (1, 100):
        q = np.ascontiguousarray(queries[:number])
        q_tensor = torch.from_numpy(q)
        search_calls = cases[f"search of {number} in {ROWS:,} x {D}"] = {
            "ours, one thread": (1, lambda q=q: index_on_one.search(q, K)),
            "ours": (threads, lambda q=q: index.search(q, K)),
            "torch, mm and topk": (threads, lambda q=q_tensor: (q @ gallery_rows.T).topk(K)),
        }
        if flat is not None:
            search_calls["faiss"] = (threads, lambda q=q: flat.search(q, K))
    return cases


def latencies(calls: dict[str, tuple[int, Callable[[], Any]]], rounds: int, gap: float) -> dict[str, list[float]]:
    """Returns the times of each candidate's calls in seconds, in ascending order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-3, rounds):  # the first three rounds warm up
        for name, (threads, call) in calls.items():
            torch.set_num_threads(threads)
            time.sleep(gap)
            start = time.perf_counter()
            call()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calls",
        type=int,
        default=300,
        help="calls of each candidate; of fewer than 101, the 99th percentile is the slowest (default: 300)",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of simplexfix, torch and faiss (default: 2)")
    parser.add_argument("--gap", type=float, default=0.002, help="seconds before each call (default: 0.002)")
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes (default: 0 1 2)"
    )
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
                print(f"\n{case}, beside {number} busy processes: p50, p99 in ms, and both over one thread's p50")
                times = latencies(calls, arguments.calls, arguments.gap)
                base = times["ours, one thread"][arguments.calls // 2]
                for name, seconds in times.items():
                    p50, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
                    results["rows"].append({"case": case, "busy": number, "name": name, "p50": p50, "p99": p99})
                    print(f"  {name:<20} {1e3 * p50:9.3f} {1e3 * p99:9.3f} {p50 / base:7.2f} {p99 / base:7.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
