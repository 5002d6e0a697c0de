"""Checks that a run makes before it writes anything, and the record of its configuration for a resumed run."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from .._files import write_whole
from .._seeds import seeded
from ..slots import SlotRegistry
from . import processes
from .config import ConfigError, plain, read_config
from .resume import check_resumable, read_run_record
from .run_config import SIMPLEX, RunConfig
from .samplers import batch_sizes, check_batch_norm
from .schedule import Schedule

__all__ = ["agree_on", "check_batches", "check_networks", "check_slots", "usable_device"]

# Options that a resumed run may change: _FREE always, _PLACES (paths) only if the data has the same fingerprint.
_FREE = ("protocols", *(f"trainer.{key}" for key in ("device", "keep", "log_every", "loggers", "save_every")))
_PLACES = ("data.path", "data.pretraining", "model.path", "tasks.pretraining_folder")


def usable_device(name: str | None) -> str:
    """Returns the device after a check that it works; for None this process's GPU, or the CPU if there is none.

    Raises:
        ValueError: the device cannot be used on this machine.
    """
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name or gpu).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"trainer.device={name or gpu!r} cannot be used here: {reason}") from None
    return name or gpu


def check_batches(config: RunConfig, tasks: int) -> None:
    """Checks that the batches of all stages can be split evenly over processes and parts.

    Raises:
        ValueError: a batch cannot be split, or a schedule is for a task that does not exist.
    """
    plan = config.tasks
    strangers = sorted(set(plan.schedules) - set(range(tasks)))
    if strangers:
        raise ValueError(f"keys of tasks.schedules must be tasks 0 to {tasks - 1}, got {strangers}")
    stages = [(plan.schedules.get(t, config.schedule), t > 0 and plan.remembers) for t in range(tasks)]
    pretrainings = [replacement.schedule for replacement in plan.replacements.values()]
    for schedule, remembers in stages + [(schedule, False) for schedule in pretrainings if schedule is not None]:
        batch_sizes(schedule.batch, remembers, processes.world_size(), schedule.accumulate)


def check_networks(config: RunConfig, inputs: int, prepared: Tensor) -> None:
    """Checks all networks of a run: accepted inputs, output width, batch normalisation, and embedding width.

    Args:
        config: configuration of the run.
        inputs: number of features or channels, as in `ModelConfig.backbone`.
        prepared: [n, ...] a few preprocessed inputs.

    Raises:
        ValueError: a network fails a check; the message names its key in the configuration.
    """
    plans = {f"tasks.replacements.{t}.model": plan for t, plan in config.tasks.replacements.items()}
    models = {name: plan.model for name, plan in plans.items()}
    own: list[Schedule | None] = [config.schedule, *config.tasks.schedules.values()]
    schedules = {name: [plan.schedule, *own] for name, plan in plans.items()}
    if 0 not in config.tasks.replacements:
        models, schedules = {"model": config.model, **models}, {"model": own, **schedules}
    method = config.method.method(SlotRegistry(config.method.slots), "default")
    widths: dict[str, int] = {}
    dimensions: dict[str, int] = {}
    for name, model in models.items():
        with seeded(config.seed), torch.no_grad():
            made = replace(model, pretrained=False).backbone(inputs).eval()
            widths[name] = made.out_features  # type: ignore[assignment]
            try:
                found = list(made(prepared).shape)
            except Exception as error:  # networks of other libraries raise any class
                raise ValueError(
                    f"{name}.kind={model.kind} does not take the data's inputs {list(prepared.shape)}: {error}"
                ) from error
        if found != [len(prepared), widths[name]]:
            raise ValueError(
                f"{name}.kind={model.kind} must return shape {[len(prepared), widths[name]]} for inputs of shape "
                f"{list(prepared.shape)}, got {found}"
            )
        for schedule in filter(None, schedules[name]):
            split = {"batch": schedule.batch, "world_size": processes.world_size(), "accumulate": schedule.accumulate}
            check_batch_norm(f"{name}.kind={model.kind}", made, prepared[:1], **split)
        with torch.device("meta"):
            head = method.head(widths[name])
        dimensions[name] = head.embedding_dim  # type: ignore[assignment]
    # with a junction the embedding width does not depend on the feature width
    if len(set(dimensions.values())) > 1:
        raise ValueError(
            f"{config.method.name.upper()} has no junction, all its networks must give features of one width: "
            + ", ".join(f"{name} gives {width}" for name, width in widths.items())
        )


def check_slots(config: RunConfig, classes: int) -> None:
    """Checks that the simplex has a slot for each class of the tasks and of pre-training.

    Raises:
        ValueError: there are too few slots.
    """
    others = max((plan.classes for plan in config.tasks.replacements.values()), default=0)
    if config.method.name in SIMPLEX and classes + others > config.method.slots:
        raise ValueError(
            f"method.slots must be at least {classes + others}, for {classes} classes of the tasks and {others} of "
            f"pre-training, got {config.method.slots}"
        )


def agree_on(folder: Path, record: dict[str, Any]) -> None:
    """Writes the record of a run to `run.json`, or compares it with the record that is there.

    Options in `_FREE` may differ, and paths in `_PLACES` if the data has the same fingerprint.

    Raises:
        ValueError: another option or the data differ; the message lists the differences.
    """
    file = folder / "run.json"
    if processes.broadcast(file.exists()):
        then = read_run_record(file)
        # Newer options that a record of an earlier release lacks get their defaults.  A record that this release cannot
        # read is left unchanged, and the comparison lists the differences.
        with suppress(ConfigError):
            then["config"] = plain(read_config(RunConfig, then["config"]))
        if then.get("simplexfix") != __version__ and processes.rank() == 0:
            warnings.warn(
                f"{file} was begun by simplexfix {then.get('simplexfix')}, this is {__version__}: it resumes, but its "
                "results may differ in the last bits",
                stacklevel=3,
            )
        _set_free(then["config"], record["config"], _FREE)
        if then["data"] == record["data"]:
            _set_free(then["config"], record["config"], _PLACES)
            if record["config"]["data"]["workers"] is not None and then["config"]["data"].get("workers") is not None:
                _set_free(then["config"], record["config"], ["data.workers"])
        now = {key: value for key, value in record.items() if key != "class_names"}
        then = {key: value for key, value in then.items() if key != "class_names"}
        check_resumable({**then, "simplexfix": __version__}, now, str(file))
    elif processes.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{json.dumps(record, indent=1)}\n".encode())
    processes.barrier()


def _set_free(then: dict[str, Any], now: dict[str, Any], keys: Sequence[str]) -> None:
    """Copies the values of these options from `now` to `then`, so that they compare equal."""
    for key in keys:
        part, _, name = key.rpartition(".")
        if part:
            then.setdefault(part, {})[name] = now[part][name]
        else:
            then[name] = now[name]
