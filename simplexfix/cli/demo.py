"""Trains four versions on handwriting, replaces the model, and searches the old galleries, in a minute or two.

It trains the preset `omniglot` by three methods with the same data, budget and networks: the fixed simplex with HOC,
the fixed simplex alone, and experience replay (ER) with an ordinary learnable classifier.  A small convolutional
network learns the characters of six alphabets in steps.  v0 is trained from scratch, v1 and v2 are fine-tuned.  v3
replaces them by a wider network that was trained from scratch on all earlier characters.  The galleries of v0, v1 and
v2 are not embedded again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..training import PRESETS, MethodConfig, Progress, RunConfig, TrainerConfig
from ..training.config import plain
from ..training.run_data import UNSEEN_ALPHABETS, load_run_data
from ._heat_map import heat_map
from ._progress import bars
from ._side_by_side import train_side_by_side
from ._terminal import console, criteria_text

TITLES = {"hoc": "d-simplex with HOC", "simplex": "d-simplex, CE only", "er": "ER: learnable head"}
CHAINS = (("hoc", "simplex"), ("er",))  # hoc and simplex share the pre-training of the replacement
SEARCHES = {
    "seen": "held-out drawings of the characters that v0 learned",
    "unseen": f"alphabets that no version saw ({', '.join(UNSEEN_ALPHABETS)})",
}


def run(arguments: argparse.Namespace) -> int:
    from ..report import figures
    from . import _pictures

    bar = bars(sys.stderr)  # standard output is left to the report of --json
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = trained = time.perf_counter()
    configs = _configs(arguments.seed, quick=arguments.quick)

    def step(name: str, progress: Progress) -> None:
        nonlocal trained
        trained = time.perf_counter()
        bar.update(task, description=f"{name}, {progress.stage}", advance=1)

    task = bar.add_task("start", total=sum(_steps([configs[name] for name in names]) for names in CHAINS), figures="")
    with TemporaryDirectory(prefix="simplexfix-demo-") as folder, bar:
        shared = {name: _with_pretraining(config, Path(folder, "pretrained")) for name, config in configs.items()}
        chains = [{name: shared[name] for name in names} for names in CHAINS]
        reports = train_side_by_side(chains, Path(folder), on_step=step)
        judged = time.perf_counter()
        found = {
            search: {title: reports[name][search]["nearest_class_mean"] for name, title in TITLES.items()}
            for search in SEARCHES
        }
        (arguments.out / "matrices.png").write_bytes(figures.draw_matrices(found))
        query, gallery = load_run_data(configs["hoc"]).searched["seen"]
        runs = {TITLES[name]: Path(folder, name) for name in ("hoc", "er")}
        _pictures.save_neighbours(arguments.out / "neighbours.png", runs, query, gallery, seed=arguments.seed)
    done = time.perf_counter()
    report: dict[str, Any] = {
        "seed": arguments.seed,
        "quick": arguments.quick,
        "recipe": {name: plain(config) for name, config in configs.items()},
        "versions": _described(configs["hoc"]),
        "methods": {name: _summary(reports[name]) for name in TITLES},
        "seconds": {"training": trained - began, "search": judged - trained, "pictures": done - judged},
    }
    text = json.dumps(report, indent=1)
    (arguments.out / "report.json").write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        _print(report, reports, arguments.out, done - began)
    return 0


def _configs(seed: int, *, quick: bool) -> dict[str, RunConfig]:
    preset = replace(PRESETS["omniglot"], seed=seed, trainer=TrainerConfig(device="cpu"))
    if quick:
        preset = _shortened(preset, first=60, pretraining=90, others=30)
    # the same simplex without an old model; a learnable classifier, with its own tuned scale
    others = {"simplex": preset.method.pretraining(), "er": MethodConfig("er", scale=8.0)}
    return {"hoc": preset, **{name: replace(preset, method=method) for name, method in others.items()}}


def _shortened(config: RunConfig, *, first: int, pretraining: int, others: int) -> RunConfig:
    """Returns the configuration with these numbers of steps."""
    tasks = config.tasks
    replacements = {
        t: replace(plan, schedule=plan.schedule and replace(plan.schedule, steps=pretraining))
        for t, plan in tasks.replacements.items()
    }
    schedules = {t: replace(schedule, steps=first) for t, schedule in tasks.schedules.items()}
    return replace(
        config,
        tasks=replace(tasks, replacements=replacements, schedules=schedules),
        schedule=replace(config.schedule, steps=others),
    )


def _with_pretraining(config: RunConfig, folder: Path) -> RunConfig:
    return replace(config, tasks=replace(config.tasks, pretraining_folder=str(folder)))


def _steps(chain: list[RunConfig]) -> int:
    """Returns the number of steps of runs that differ only in their method; the first one pre-trains for all."""
    tasks, own = chain[0].tasks, chain[0].schedule
    pretraining = sum(plan.schedule.steps for plan in tasks.replacements.values() if plan.schedule is not None)
    return pretraining + len(chain) * sum(tasks.schedules.get(t, own).steps for t in range(len(tasks.counts)))


def _described(config: RunConfig) -> list[str]:
    known = np.cumsum(config.tasks.counts)
    (last, plan), *_ = config.tasks.replacements.items()
    lines = [f"v0: {config.model.width or 16} channels, {known[0]} characters"]
    lines += [f"v{t}: v{t - 1} fine-tuned, {known[t]} characters" for t in range(1, last)]
    return [
        *lines,
        f"v{last}: replaced by {plan.model.width} channels pre-trained on {known[last - 1]} characters, fine-tuned, "
        f"{known[last]} characters",
    ]


def _summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns search -> protocol -> matrix, AC, AA, and the fraction of accuracy that is left on each older gallery."""
    return {
        search: {
            protocol: {
                "matrix": (matrix := entry["matrix"]),
                "AC": entry["criteria"]["AC"],
                "AA": entry["criteria"]["AA"],
                "kept": [matrix[-1][j] / max(matrix[j][j], 1e-9) for j in range(len(matrix) - 1)],
            }
            for protocol, entry in report[search].items()
        }
        for search in SEARCHES
    }


def _print(report: dict[str, Any], reports: Mapping[str, Any], out: Path, seconds: float) -> None:
    from rich.table import Table

    terminal = console(sys.stdout)
    for line in report["versions"]:
        terminal.print(f"  {line}")
    width = terminal.width // len(TITLES) - 2
    for search, meaning in SEARCHES.items():
        terminal.print(
            f"\n[bold]{search}[/bold]: {meaning}; percent right by nearest class mean; a row per query model\n"
        )
        table = Table.grid(*TITLES.values(), padding=(0, 2))
        table.add_row(*(f"[bold]{title}[/bold]" for title in TITLES.values()))
        found = [reports[name][search] for name in TITLES]
        matrices = [np.array(entry["nearest_class_mean"]["matrix"], dtype=float) for entry in found]
        names = [f"v{t}" for t in range(len(matrices[0]))]
        table.add_row(*(heat_map(matrix, names, terminal, width=width, scale=(0.0, 1.0)) for matrix in matrices))
        for protocol, label in (("nearest_class_mean", "mean"), ("instance", "instance")):
            table.add_row(*(f"{label}: {criteria_text(entry[protocol]['criteria'])}" for entry in found))
        terminal.print(table)
    terminal.print()
    for name, title in TITLES.items():
        terminal.print(f"[bold]{title}.[/bold] {_in_words(report['methods'][name])}")
    terminal.print(f"\n{seconds:.0f} s; report.json, matrices.png and neighbours.png are in {out}")


def _in_words(scores: dict[str, Any]) -> str:
    """Describes the results of v3, the replacement, in the gallery of v0."""
    sentences = []
    for search in SEARCHES:
        result = scores[search]["nearest_class_mean"]
        own, cross, kept = result["matrix"][0][0], result["matrix"][3][0], result["kept"][0]
        sentences.append(
            f"{search}: v0 itself found {100 * own:.0f} % of its queries in its gallery, the replacement finds "
            f"{100 * cross:.0f} % there: {_verdict(kept)}"
        )
    return "; ".join(sentences) + "."


def _verdict(kept: float) -> str:
    """Describes the fraction of the old accuracy that is left."""
    for least, words in ((1.0, "as good as ever"), (0.75, "still searchable"), (0.25, "damaged")):
        if kept >= least:
            return words
    return "lost"
