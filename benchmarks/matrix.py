"""Measures the compatibility matrix of T versions from mapped files beside the straightforward method, as T grows.

python benchmarks/matrix.py [--versions 2 4 8] [--queries 50000] [--rows 10000] [--d 1023] [--classes 10]
                            [--threads N] [--no-straightforward] [--folder DIR] [--out FILE]

The straightforward method reads both files for each cell, normalises the queries, averages and normalises the gallery
per class, and searches with faiss.  It is measured with NumPy's norm and division, and with faiss.normalize_L2 in
place.  All methods read the same .npy files, which are read once before the clock starts, into the system's cache.
Each method runs in its own process, whose peak memory includes mapped pages.  The files hold
T * (queries + rows) * d * 4 bytes.  If the cache is too small for a T, --distinct D creates D files per kind, which
versions share in turn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import machine_card

from simplexfix.compatibility import compatibility_matrix
from simplexfix.labelled import LabelledItems

try:
    import faiss
except ModuleNotFoundError:
    faiss = None


def write_versions(folder: Path, distinct: int, queries: int, rows: int, d: int, classes: int) -> None:
    """Writes versions whose class centers drift, with noise, so that the cells have different values."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((classes, d), dtype=np.float32)
    for kind, count in (("query", queries), ("gallery", rows)):
        np.save(folder / f"{kind}_labels.npy", rng.integers(classes, size=count))
    for version in range(distinct):
        centers = centers + np.float32(0.3) * rng.standard_normal((classes, d), dtype=np.float32)
        for kind in ("query", "gallery"):
            labels = np.load(folder / f"{kind}_labels.npy")
            x = np.lib.format.open_memmap(folder / f"{kind}_{version}.npy", "w+", np.float32, (len(labels), d))
            for begin in range(0, len(labels), 5000):
                part = labels[begin : begin + 5000]
                x[begin : begin + 5000] = centers[part] + 12 * rng.standard_normal((len(part), d), dtype=np.float32)


def opened(folder: Path, kind: str, versions: int, distinct: int) -> list[np.ndarray]:
    return [np.load(folder / f"{kind}_{t % distinct}.npy", mmap_mode="r") for t in range(versions)]


def ours(folder: Path, versions: int, distinct: int) -> np.ndarray:
    queries, galleries = (opened(folder, kind, versions, distinct) for kind in ("query", "gallery"))
    items = LabelledItems(*(np.load(folder / f"{kind}_labels.npy") for kind in ("query", "gallery")))
    return compatibility_matrix([items.version(*rows) for rows in zip(queries, galleries, strict=True)])


def numpy_normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def faiss_normalized(rows: np.ndarray) -> np.ndarray:
    rows = np.array(rows)
    faiss.normalize_L2(rows)
    return rows


def straightforward(folder: Path, versions: int, distinct: int, normalized: Callable = numpy_normalized) -> np.ndarray:
    queries, galleries = (opened(folder, kind, versions, distinct) for kind in ("query", "gallery"))
    query_labels, gallery_labels = (np.load(folder / f"{kind}_labels.npy") for kind in ("query", "gallery"))
    matrix = np.full((versions, versions), np.nan)
    for i in range(versions):
        for j in range(i + 1):
            query = normalized(queries[i])
            classes = np.unique(gallery_labels)
            templates = normalized(np.stack([galleries[j][gallery_labels == c].mean(0) for c in classes]))
            index = faiss.IndexFlatIP(query.shape[1])
            index.add(templates)
            nearest = classes[index.search(query, 1)[1][:, 0]]
            matrix[i, j] = (nearest == query_labels).mean()
    return matrix


METHODS = {
    "simplexfix": ours,
    "NumPy, faiss": straightforward,
    "faiss alone": partial(straightforward, normalized=faiss_normalized),
}


def measured(method: str, folder: Path, versions: int, distinct: int, threads: int) -> tuple[float, float, np.ndarray]:
    """Returns seconds, peak memory in MiB, and the matrix."""
    torch.set_num_threads(threads)
    if faiss is not None:
        faiss.omp_set_num_threads(threads)
    METHODS[method](folder, 1, distinct)  # libraries start their threads and load their kernels
    start = time.perf_counter()
    matrix = METHODS[method](folder, versions, distinct)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--d", type=int, default=1023)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--distinct", type=int, help="files of each kind (default: as many as versions)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--no-straightforward",
        action="store_true",
        help="leave out the cell-by-cell alternative, which takes T (T + 1) / 2 searches",
    )
    parser.add_argument(
        "--folder", type=Path, help="folder for the features, kept afterwards (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    a = parser.parse_args()
    distinct = min(a.distinct or max(a.versions), max(a.versions))
    results = []
    print(f"Q={a.queries} N={a.rows} d={a.d} classes={a.classes} threads={a.threads}")
    print(f"{'T':>3} {'method':<16} {'seconds':>8} {'per cell':>9} {'MiB':>6} {'ratio':>6} {'cells that differ':>18}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.folder or Path(temporary)
        if not (folder / f"gallery_{distinct - 1}.npy").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_versions(folder, distinct, a.queries, a.rows, a.d, a.classes)
        for path in folder.glob("*.npy"):
            with path.open("rb") as file:  # reads the files into the system's cache
                while file.read(2**24):
                    pass
        for versions in a.versions:
            first = None
            for method in METHODS:
                if method != "simplexfix" and (faiss is None or a.no_straightforward):
                    continue
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    job = process.submit(measured, method, folder, versions, distinct, a.threads)
                    seconds, mib, matrix = job.result()
                first = (seconds, matrix) if first is None else first
                cells = np.tril_indices(versions)
                differ = int((np.abs(matrix - first[1])[cells] > 0).sum())
                row = (versions, method, seconds, seconds / len(cells[0]), mib, seconds / first[0], differ)
                keys = ("T", "method", "s", "s_per_cell", "MiB", "ratio", "differ")
                results.append(dict(zip(keys, row, strict=True)))
                print("{:3} {:<16} {:8.2f} {:9.4f} {:6.0f} {:6.2f} {:18}".format(*row), flush=True)
    if a.out:
        shape = {"queries": a.queries, "rows": a.rows, "d": a.d, "classes": a.classes}
        a.out.write_text(json.dumps({"machine": machine_card(), **shape, "matrix": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
