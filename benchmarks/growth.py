"""How CosineIndex grows: time per row of an addition and of a search, and bytes per row, as rows become more.

python benchmarks/growth.py [--rows 500000 1000000 ...] [--d 64] [--dtype float32] [--threads N] [--out FILE]

One index grows from size to size; linear growth is the same time per row in each line.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from measure import machine_card

from simplexfix import CosineIndex

QUERIES, K, PIECE = 100, 10, 100_000


def seconds(call: object, repeats: int) -> float:
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
            vectors = rng.standard_normal((min(PIECE, size - len(index)), arguments.d), dtype=np.float32)
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
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine_card(), "growth": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
