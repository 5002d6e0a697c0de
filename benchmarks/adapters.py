"""Measures adapters: time and peak memory of a fit beside SciPy's and scikit-learn's, and time of `simplexfix adapt`.

python benchmarks/adapters.py [--parts fit adapt] [--rows N] [--width D] [--rounds R] [--threads T]
                              [--work DIR] [--out FILE]

Part "fit" fits maps of float32 unit rows of the same N items by two encoders, D dimensions each, in two .npy files.

    procrustes    ours maps the files; scipy.linalg.orthogonal_procrustes gets both in memory
    ridge         ours maps the files; sklearn.linear_model.Ridge(solver="cholesky", fit_intercept=False, copy_X=False)

Ours also normalises and centres the rows; peers do neither.  Each fit runs in its own process, candidates are
interleaved, and the time is the minimum over the rounds.  The time of peers excludes reading the files.  Memory is the
peak of the process minus its memory before it read any rows.  The error of a map W is |W - T|_F / |T|_F; NumPy computes
T by the same equation in float64 over blocks of rows, centred for ours and not centred for peers.

Part "adapt" measures the wall time of the command `simplexfix adapt` on 20,000 pairs of 1,280 dimensions.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine_card, process_memory
from numpy.typing import NDArray

PENALTY = 0.1
BLOCK = 8192  # rows
CANDIDATES = ("procrustes: simplexfix", "procrustes: scipy", "ridge: simplexfix", "ridge: scikit-learn")
ADAPT_ROWS, ADAPT_WIDTH, ADAPT_CLASSES = 20_000, 1_280, 100


def write_pairs(folder: Path, rows: int, width: int, *, classes: int = 0) -> None:
    """Writes old.npy and new.npy with unit rows: two noisy linear views of 64 hidden numbers of each item.

    With classes it also writes labels.npy, and the hidden numbers of a class have a common centre.
    """
    rng = np.random.default_rng(0)
    views = [rng.standard_normal((64, width), dtype=np.float32) for _ in range(2)]
    labels = rng.integers(0, classes, rows) if classes else None
    centers = rng.standard_normal((max(classes, 1), 64), dtype=np.float32)
    files = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=np.float32, shape=(rows, width))
        for name in ("old", "new")
    ]
    for begin in range(0, rows, BLOCK):
        count = min(BLOCK, rows - begin)
        hidden = rng.standard_normal((count, 64), dtype=np.float32)
        if labels is not None:
            hidden += centers[labels[begin : begin + count]]
        for file, view in zip(files, views, strict=True):
            block = hidden @ view + 4 * rng.standard_normal((count, width), dtype=np.float32)
            file[begin : begin + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    for file in files:
        file.flush()
    if labels is not None:
        np.save(folder / "labels.npy", labels)


def truth(folder: Path) -> dict[str, Any]:
    """Returns each method's map in float64, for ours and for its peer, and the penalty of both."""
    files = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("new", "old")]
    count, width = files[0].shape
    gram, cross = np.zeros((2, width, width))
    sums = np.zeros((2, width))
    for begin in range(0, count, BLOCK):
        x, y = (np.asarray(file[begin : begin + BLOCK], dtype=np.float64) for file in files)
        gram += x.T @ x
        cross += x.T @ y
        sums += x.sum(0), y.sum(0)
    mean = sums / count
    centred = gram - count * np.outer(mean[0], mean[0]), cross - count * np.outer(mean[0], mean[1])
    out: dict[str, Any] = {}
    for by, (g, c) in {"ours": centred, "peer": (gram, cross)}.items():
        u, _, vt = np.linalg.svd(c, full_matrices=False)
        penalty = PENALTY * float(np.trace(g)) / width
        ridge = np.linalg.solve(g + penalty * np.eye(width), c)
        out[by] = {"procrustes": u @ vt, "ridge": ridge, "penalty": penalty}
    return out


def fit(name: str, folder: Path, penalty: float) -> dict[str, Any]:
    """Returns seconds, peak bytes and the map of one candidate; must run in a new process."""
    method, by = name.split(": ")
    files = [folder / f"{part}.npy" for part in ("old", "new")]
    call: Callable[[], NDArray[Any]]
    if by == "simplexfix":
        from simplexfix.adapters import Procrustes, Ridge

        ours = Procrustes() if method == "procrustes" else Ridge(PENALTY)

        def load() -> Callable[[], NDArray[Any]]:
            old, new = (np.load(file, mmap_mode="r") for file in files)
            return lambda: ours.fit(old, new).query_map.weight.numpy()

    elif by == "scipy":
        linalg = importlib.import_module("scipy.linalg")

        def load() -> Callable[[], NDArray[Any]]:
            old, new = (np.load(file) for file in files)
            return lambda: linalg.orthogonal_procrustes(new, old)[0]

    else:
        linear = importlib.import_module("sklearn.linear_model")

        def load() -> Callable[[], NDArray[Any]]:
            old, new = (np.load(file) for file in files)
            ridge = linear.Ridge(alpha=penalty, solver="cholesky", fit_intercept=False, copy_X=False)
            return lambda: ridge.fit(new, old).coef_.T

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = process_memory("VmRSS")
    call = load()
    start = time.perf_counter()
    weight = call()
    return {"seconds": time.perf_counter() - start, "bytes": process_memory("VmHWM") - before, "weight": weight}


def child(name: str, folder: Path, penalty: float, threads: int) -> dict[str, Any]:
    """Runs `fit` in a new process."""
    weight = folder / "weight.npy"
    arguments = ["--fit", name, "--work", str(folder), "--penalty", repr(penalty), "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env=_environment(threads), check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout), "weight": np.load(weight)}


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}


def measure_fits(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    write_pairs(folder, arguments.rows, arguments.width)
    expected = truth(folder)
    penalty = expected["peer"]["penalty"]
    found: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for name in CANDIDATES:
            got = child(name, folder, penalty, arguments.threads)
            method, by = name.split(": ")
            target = expected["ours" if by == "simplexfix" else "peer"][method]
            row = found.setdefault(name, {"seconds": [], "bytes": got["bytes"]})
            row["seconds"].append(got["seconds"])
            row["bytes"] = max(row["bytes"], got["bytes"])
            row["error"] = float(np.linalg.norm(got["weight"] - target) / np.linalg.norm(target))
            print(f"  {name:<24} {got['seconds']:8.2f} s {row['bytes'] / 2**30:7.2f} GiB, error {row['error']:.1e}")
    return {"rows": arguments.rows, "width": arguments.width, "fits": found}


def measure_adapt(folder: Path, threads: int) -> dict[str, Any]:
    write_pairs(folder, ADAPT_ROWS, ADAPT_WIDTH, classes=ADAPT_CLASSES)
    found = {}
    for name, flags in (("with labels", ["--labels", str(folder / "labels.npy")]), ("without labels", [])):
        command = ["adapt", "--old", str(folder / "old.npy"), "--new", str(folder / "new.npy"), *flags]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "simplexfix", *command, "--out", str(folder / "adapter"), "--json"],
            capture_output=True,
            text=True,
            env=_environment(threads),
            check=False,
        )
        if done.returncode not in (0, 1):
            raise SystemExit(f"adapt failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        seconds = time.perf_counter() - start
        found[name] = {"seconds": seconds, "candidates": len(json.loads(done.stdout)["table"])}
        print(f"  adapt {name}: {seconds:.1f} s, {found[name]['candidates']} candidates", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("fit", "adapt"), default=["fit", "adapt"])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of part fit (default: 1,000,000)")
    parser.add_argument("--width", type=int, default=1_024, help="of part fit (default: 1,024)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    parser.add_argument("--work", type=Path, help="folder for the features, 8 GB by default (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    parser.add_argument("--fit", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--penalty", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.fit is not None:
        got = fit(arguments.fit, arguments.work, arguments.penalty)
        np.save(arguments.work / "weight.npy", got.pop("weight"))
        print(json.dumps(got))
        return
    results: dict[str, Any] = {"machine": machine_card()}
    with tempfile.TemporaryDirectory(dir=arguments.work) as made:
        if "fit" in arguments.parts:
            results["fit"] = measure_fits(Path(made), arguments)
        if "adapt" in arguments.parts:
            results["adapt"] = measure_adapt(Path(made), arguments.threads)
    for name, row in results.get("fit", {}).get("fits", {}).items():
        ours = results["fit"]["fits"][f"{name.split(': ')[0]}: simplexfix"]
        ratio, memory = min(row["seconds"]) / min(ours["seconds"]), row["bytes"] / ours["bytes"]
        print(f"{name:<24} {ratio:6.2f} x our time, {memory:6.2f} x our memory, error {row['error']:.1e}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
