"""Lists the runs in a folder: progress, scores, and the differences between their configurations."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.resume import differences, read_run_record
from ..training.run import searches_of
from ..training.run_config import pretraining_folder
from ._terminal import criteria_text


def run(arguments: argparse.Namespace) -> int:
    files = sorted(arguments.folder.glob("*/run.json")) or sorted(arguments.folder.glob("run.json"))
    if not files:
        print(
            f"simplexfix runs: {arguments.folder} and its subfolders hold no run.json: "
            "pass the folder of --out, or its parent",
            file=sys.stderr,
        )
        return 2
    runs = [_summary(file.parent) for file in files]
    if arguments.json:
        print(json.dumps(runs, indent=1))
        return 0
    width = max(len(run["name"]) for run in runs)
    for run in runs:
        print(f"{run['name']:<{width}}  {run['state']:<28} {_scores(run['scores'])}".rstrip())
    known = [run for run in runs if run["config"] is not None]
    for run in known[1:]:
        for line in differences(known[0]["config"], run["config"]):
            place, _, change = line.partition(": ")
            was, _, now = change.removeprefix("was ").rpartition(", is ")
            print(f"{run['name']}: {place} = {now} ({known[0]['name']}: {was})")
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    """Returns a run's row in the list; for a damaged run prints the error to stderr and returns the name."""
    summary: dict[str, Any] = {"name": folder.resolve().name, "state": "damaged: run.json", "scores": {}}
    summary |= {"config": None, "data": None}
    try:
        record = read_run_record(folder / "run.json")
        summary |= {"state": _progress(folder, record["config"]), "config": record["config"], "data": record["data"]}
        report = folder / "report.json"
        if report.exists():
            summary["state"] = "damaged: report.json"
            summary |= {"scores": _read_scores(report), "state": "done"}
    except (ValueError, OSError) as error:
        print(f"simplexfix runs: {error}", file=sys.stderr)
    return summary


def _read_scores(report: Path) -> dict[str, Any]:
    """Returns search -> protocol -> criterion -> value, in the order of `searches_of`."""
    try:
        content = json.loads(report.read_bytes())
        if "versions" not in content:
            raise KeyError("versions")
        return {
            search: {
                protocol: {key: entry["criteria"][key] for key in ("AC", "AA")} for protocol, entry in protocols.items()
            }
            for search, protocols in searches_of(content).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = error if isinstance(error, ValueError) else "it holds no criteria"
        raise ValueError(f"{report} is damaged: {what}; the command that trained the run writes it again") from None


def _progress(folder: Path, config: Mapping[str, Any]) -> str:
    """Returns the current stage and its last logged step."""
    done = len(list(folder.glob("task-*/version.safetensors")))
    shared, method = config.get("tasks", {}).get("pretraining_folder"), config.get("method", {}).get("name")
    stages = [
        folder / f"task-{done:02d}",
        pretraining_folder(folder, shared, method) / f"pretraining-{done:02d}",
        folder / f"task-{done - 1:02d}",
    ]
    stage = next((stage for stage in stages if (stage / "log.jsonl").exists()), None)
    if stage is None:
        return "just begun"
    lines = (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
    try:
        return f"{stage.name}, step {json.loads(lines[-1])['step']}"
    except (IndexError, ValueError):  # no line yet, or an incomplete one
        return stage.name


def _scores(scores: dict[str, Any]) -> str:
    """Returns the scores of the first search, which is validation if there is one: choices must not use test data."""
    for search, protocols in scores.items():
        entries = [f"{name.replace('_', ' ')} {criteria_text(entry)}" for name, entry in protocols.items()]
        return f"{search}: {'; '.join(entries)}"
    return ""
