"""Compares methods by `simplexfix train cpu-small` or `paper-half` over seeds, and HOC with one change at a time.

python benchmarks/methods.py DATA [--preset cpu-small] [--seeds 0 1 2] [--methods ROW ...] [--ablation VARIANT ...]
                             [--runs DIR] [--pretraining DIR] [--jobs N] [--out FILE] [KEY.SUB=VALUE ...]

DATA holds CIFAR-10 and CIFAR-100 in their binary version; paper-half also needs data.pretraining=FOLDER, with a folder
of images for every class.  A ROW of --methods is one line of the table: a method and its changes of the configuration.
Runs are stored in DIR; stopped ones resume, and finished ones are only read.  N runs train at a time, with one thread
each.  --ablation trains HOC once more for each VARIANT, with the first seed.  Methods with a learnable classifier share
one pre-training, and methods with the fixed classifier another one; --pretraining is the --runs folder of an earlier
call that has these.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from measure import machine_card

from simplexfix.training import PRESETS
from simplexfix.training.run_config import ER_PRETRAINED

AUTHORS = "tasks.hoc_reference=replacement"  # as in the authors' code
UNALIGNED = "tasks.align=none"
KEPT = ("tasks.replacement_junction=kept", UNALIGNED)
# row of the table -> method, and changes of the configuration
METHODS = {
    **{name: (name,) for name in ("er", "fd", "bct", "oca", "simplex", "hoc", "asnn")},
    "hoc-authors": ("hoc", AUTHORS),
    "hoc-asnn": ("hoc", "method.classification=asnn", AUTHORS),
    "hoc-deployed": ("hoc", "tasks.hoc_reference=deployed", *KEPT),
    "hoc-deployed-or-replacement": ("hoc", "tasks.hoc_reference=deployed_or_replacement", *KEPT),
    "hoc-all": ("hoc", "tasks.hoc_reference=all", *KEPT),
    "hoc-all-junction": ("hoc", "tasks.hoc_reference=all", UNALIGNED),
    "hoc-all-rotated": ("hoc", "tasks.hoc_reference=all"),
    "hoc-junction": ("hoc", "tasks.hoc_reference=deployed_or_replacement", UNALIGNED),
    "hoc-denoised": ("hoc", "tasks.hoc_reference=deployed_or_replacement", "tasks.denoise=0.5", *KEPT),
    "hoc-all-denoised": ("hoc", "tasks.hoc_reference=all", "tasks.denoise=0.5", *KEPT),
    "hoc-aligned": ("hoc", "method.classification=asnn", "tasks.align=older", AUTHORS),
    "hoc-all-aligned": ("hoc", "method.classification=asnn", "tasks.hoc_reference=all", "tasks.align=older"),
    "fd-all": ("fd", "tasks.hoc_reference=all"),
}
DEFAULT = ("er", "fd", "bct", "oca", "simplex", "hoc", "hoc-authors", "asnn", "hoc-asnn")
SHORT_REPLACEMENTS = tuple(f"tasks.replacements.{t}.epochs=12" for t in (0, 2, 4))
VARIANTS = {
    "deployed": ("tasks.hoc_reference=deployed", *KEPT),
    "deployed-mu-20": ("tasks.hoc_reference=deployed", *KEPT, "method.mu=20.0"),
    "deployed-or-replacement": ("tasks.hoc_reference=deployed_or_replacement", *KEPT),
    "deployed-or-replacement-mu-20": ("tasks.hoc_reference=deployed_or_replacement", *KEPT, "method.mu=20.0"),
    "short": (AUTHORS, *SHORT_REPLACEMENTS),
    "short-lambda-0.5": (AUTHORS, *SHORT_REPLACEMENTS, "method.lambda_=0.5"),
    "short-rate-0.003": (AUTHORS, *SHORT_REPLACEMENTS, "schedule.learning_rate=0.003"),
    "lambda-0.5": (AUTHORS, "method.lambda_=0.5"),
    "mu-20": (AUTHORS, "method.mu=20.0"),
    "infonce": (AUTHORS, "method.negatives=infonce"),
    "batch-256": (AUTHORS, "schedule.batch=256", "schedule.learning_rate=0.02"),
    "rate-0.003": (AUTHORS, "schedule.learning_rate=0.003"),
}
# changes that the pre-training depends on; with classification by neighbours, classes take no slots
CHANGE_PRETRAINING = ("tasks.replacements", "method.normalize", "method.scale", "method.classification")
FIRST = "nearest_class_mean"


def trained(
    preset: str, runs: Path, pretraining: Path, seed: int, method: str, changes: tuple[str, ...], folder: str
) -> dict[str, Any]:
    """Trains a run, unless it is finished; returns matrices and criteria of the search from its report."""
    seed_folder = runs / f"seed-{seed}"
    # the folder's name has all changes that the pre-training depends on
    pretraining_changes = [c for c in changes if c.startswith(CHANGE_PRETRAINING)]
    shared = pretraining / f"seed-{seed}" / "-".join(["pretraining", *pretraining_changes])
    file = seed_folder / folder / "report.json"
    if not file.exists():
        command = [sys.executable, "-m", "simplexfix", "train", preset, f"seed={seed}", f"method.name={method}"]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, f"tasks.pretraining_folder={shared}", *changes, "--out", str(seed_folder / folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"seed {seed}, {folder}: {done.stderr}")
        print(f"seed {seed}, {folder}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {protocol: {"matrix": entry["matrix"], **entry["criteria"]} for protocol, entry in report["search"].items()}


def line(name: str, reports: list[dict[str, Any]]) -> str:
    """Returns a line of the table: means over seeds, with standard deviations if there are several."""
    cells = []
    for protocol in reports[0]:
        for key, factor in (("AC", 1), ("AA", 100), ("BC", 100)):
            values = [factor * report[protocol][key] for report in reports]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):6.2f}{spread}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY.SUB=VALUE", help="changes of the configuration of all runs")
    parser.add_argument("--preset", choices=("cpu-small", "paper-half"), default="cpu-small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT))
    parser.add_argument("--ablation", nargs="+", choices=VARIANTS, default=[])
    parser.add_argument("--runs", type=Path, help="default: runs/PRESET")
    parser.add_argument("--pretraining", type=Path, help="default: --runs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write all matrices and criteria as JSON")
    a = parser.parse_intermixed_args()
    runs = a.runs or Path("runs") / a.preset
    changes = (f"data.path={a.data}", *a.changes)
    jobs = {
        (seed, row): (seed, method, (*changes, *more), row)
        for seed in a.seeds
        for row, (method, *more) in ((row, METHODS[row]) for row in a.methods)
    }
    ablation = {
        name: (a.seeds[0], "hoc", (*changes, f'protocols=["{FIRST}"]', *VARIANTS[name]), name) for name in a.ablation
    }
    # For each shared pre-training, one run goes first and stores it for the others.
    first = {METHODS[row][0] in ER_PRETRAINED: row for row in reversed(a.methods)}
    leaders = {key for key in jobs if key[1] in first.values()}
    with ThreadPoolExecutor(a.jobs) as pool:
        run = partial(trained, a.preset, runs, a.pretraining or runs)
        futures = {key: pool.submit(run, *job) for key, job in jobs.items() if key in leaders}
        for future in futures.values():
            future.result()
        futures |= {key: pool.submit(run, *job) for key, job in jobs.items() if key not in leaders}
        variant_futures = {name: pool.submit(run, *job) for name, job in ablation.items()}
        reports = {key: future.result() for key, future in futures.items()}
        variants = {name: future.result() for name, future in variant_futures.items()}
    protocols = list(next(iter(reports.values())))
    print("| | " + " | ".join(f"{p.replace('_', ' ')} {key}" for p in protocols for key in ("AC", "AA", "BC")) + " |")
    print("| --- |" + " ---: |" * 3 * len(protocols))
    for method in a.methods:
        print(line(method, [reports[seed, method] for seed in a.seeds]))
    if a.ablation and "hoc-authors" in a.methods:
        variants = {"as above": reports[a.seeds[0], "hoc-authors"], **variants}
    if a.ablation:
        print("| HOC, one seed | nearest class mean AC | AA | BC |\n| --- | ---: | ---: | ---: |")
        for name, report in variants.items():
            print(line(name, [{FIRST: report[FIRST]}]))
    if a.out:
        content = {
            "machine": machine_card(),
            "configuration": asdict(PRESETS[a.preset]),
            "changes": a.changes,
            "seeds": a.seeds,
            "rows": {row: METHODS[row] for row in a.methods},
            "methods": {row: {seed: reports[seed, row] for seed in a.seeds} for row in a.methods},
            "ablation": {name: {"changes": VARIANTS[name], **variants[name]} for name in a.ablation},
        }
        a.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
