"""Lists the runs in a folder: how far each is, what it reached, and in what their configurations differ."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.facts import differences, read_facts
from ..training.run import searches_of
from ..training.run_config import pretraining_folder
from ._terminal import criteria_text


def run(arguments: argparse.Namespace) -> int:
    files = sorted(arguments.folder.glob("*/run.json")) or sorted(arguments.folder.glob("run.json"))
    if not files:
        print(f"simplexfix runs: {arguments.folder} holds no runs", file=sys.stderr)
        return 2
    runs = [_described(file.parent) for file in files]
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


def _described(folder: Path) -> dict[str, Any]:
    """Of a damaged run its name, and on stderr what is damaged: the others are listed all the same."""
    described: dict[str, Any] = {"name": folder.resolve().name, "state": "damaged: run.json", "scores": {}}
    described |= {"config": None, "data": None}
    try:
        facts = read_facts(folder / "run.json")
        described |= {"state": _progress(folder, facts["config"]), "config": facts["config"], "data": facts["data"]}
        report = folder / "report.json"
        if report.exists():
            described["state"] = "damaged: report.json"
            described |= {"scores": _read_scores(report), "state": "done"}
    except (ValueError, OSError) as error:
        print(f"simplexfix runs: {error}", file=sys.stderr)
    return described


def _read_scores(report: Path) -> dict[str, Any]:
    """Search, protocol, criterion, in the order of `searches_of`."""
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
    """The stage that it is at, and the last line of that."""
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
    except (IndexError, ValueError):  # none yet, or half of one
        return stage.name


def _scores(scores: dict[str, Any]) -> str:
    """Those of the first search: of validation, where there is one, for to choose by others is to learn from them."""
    for search, protocols in scores.items():
        entries = [f"{name.replace('_', ' ')} {criteria_text(entry)}" for name, entry in protocols.items()]
        return f"{search}: {'; '.join(entries)}"
    return ""
