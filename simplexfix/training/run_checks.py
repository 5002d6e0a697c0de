"""What would fail a run later is refused before it writes anything; what began it is written down, or compared."""

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
from .facts import check_resumable, read_facts
from .run_config import LEARNABLE, RunConfig
from .samplers import batch_sizes, check_lone_row
from .schedule import Schedule

__all__ = ["agree_on", "check_batches", "check_networks", "check_slots", "usable_device"]

# options that a run that goes on may change: how it runs, and where data is whose fingerprint is the same
_FREE = ("protocols", *(f"trainer.{key}" for key in ("device", "keep", "log_every", "loggers", "save_every")))
_PLACES = ("data.path", "data.pretraining", "tasks.pretraining_folder")


def usable_device(name: str | None) -> str:
    """That one, if it can be used here, or the GPU of this process where there is one."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name or gpu).item()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"trainer.device={name or gpu!r} cannot be used here: {reason}") from None
    return name or gpu


def check_batches(config: RunConfig, tasks: int) -> None:
    """Those of all stages can be shared out."""
    plan = config.tasks
    strangers = sorted(set(plan.schedules) - set(range(tasks)))
    if strangers:
        raise ValueError(f"tasks.schedules must be for tasks 0 to {tasks - 1}, got {strangers}")
    stages = [(plan.schedules.get(t, config.schedule), t > 0 and plan.memory_per_class > 0) for t in range(tasks)]
    pretrainings = [replacement.schedule for replacement in plan.replacements.values()]
    for schedule, remembers in stages + [(schedule, False) for schedule in pretrainings if schedule is not None]:
        batch_sizes(schedule.batch, remembers, processes.world(), schedule.accumulate)


def check_networks(config: RunConfig, inputs: int, prepared: Tensor) -> None:
    """All make rows of a few inputs, take the rows of a part of a batch, and give embeddings of one width.

    Args:
        config: of the run.
        inputs: what `ModelConfig.backbone` takes.
        prepared: a few inputs as networks take them.

    Raises:
        ValueError: one does not; names its place in the configuration.
    """
    plans = {f"tasks.replacements.{t}.model": plan for t, plan in config.tasks.replacements.items()}
    models = {name: plan.model for name, plan in plans.items()}
    own: list[Schedule | None] = [config.schedule, *config.tasks.schedules.values()]
    schedules = {name: [plan.schedule, *own] for name, plan in plans.items()}
    if 0 not in config.tasks.replacements:
        models, schedules = {"model": config.model, **models}, {"model": own, **schedules}
    method = config.method.method(SlotRegistry(config.method.slots), "default")
    widths: dict[str, int] = {}
    for name, model in models.items():
        with seeded(config.seed), torch.no_grad():
            made = replace(model, pretrained=False).backbone(inputs).eval()
            widths[name] = made.out_features  # type: ignore[assignment]
            try:
                found = list(made(prepared).shape)
            except Exception as error:  # of whatever library
                raise ValueError(
                    f"{name}.kind={model.kind} does not take the data's inputs {list(prepared.shape)}: {error}"
                ) from error
        if found != [len(prepared), widths[name]]:
            raise ValueError(
                f"{name}.kind={model.kind} must make {[len(prepared), widths[name]]} of inputs "
                f"{list(prepared.shape)}, got {found}"
            )
        for schedule in filter(None, schedules[name]):
            shares = {"batch": schedule.batch, "world": processes.world(), "accumulate": schedule.accumulate}
            check_lone_row(f"{name}.kind={model.kind}", made, prepared[:1], **shares)
        with torch.device("meta"):
            method.head(widths[name])
    # a head with a junction makes embeddings of one width of any features
    if config.method.name in LEARNABLE and len(set(widths.values())) > 1:
        raise ValueError(
            f"{config.method.name.upper()} has no junction, all its networks must give features of one width: "
            + ", ".join(f"{name} gives {width}" for name, width in widths.items())
        )


def check_slots(config: RunConfig, classes: int) -> None:
    """The simplex has room for the tasks' classes and those of pre-training."""
    others = max((plan.classes for plan in config.tasks.replacements.values()), default=0)
    if config.method.name not in LEARNABLE and classes + others > config.method.slots:
        raise ValueError(
            f"method.slots must be at least {classes + others}, for {classes} classes of the tasks and {others} of "
            f"pre-training, got {config.method.slots}"
        )


def agree_on(folder: Path, facts: dict[str, Any]) -> None:
    """Writes down what this run is of, or compares it with what was written: but for how it runs and is judged, and
    for where data is that has the same fingerprint."""
    file = folder / "run.json"
    if processes.broadcast(file.exists()):
        then = read_facts(file)
        # a later release may know more options: the run began with what are their defaults now; one that cannot be
        # read any more differs from any that can, and the comparison says where
        with suppress(ConfigError):
            then["config"] = plain(read_config(RunConfig, then["config"]))
        if then.get("simplexfix") != __version__ and processes.rank() == 0:
            warnings.warn(
                f"{file} was begun by simplexfix {then.get('simplexfix')}, this is {__version__}: it goes on, but what "
                "comes out need not have the same bits",
                stacklevel=3,
            )
        _set_free(then["config"], facts["config"], _FREE)
        if then["data"] == facts["data"]:
            _set_free(then["config"], facts["config"], _PLACES)
            if facts["config"]["data"]["workers"] is not None and then["config"]["data"].get("workers") is not None:
                _set_free(then["config"], facts["config"], ["data.workers"])
        now = {key: value for key, value in facts.items() if key != "class_names"}  # which its ids are called by
        then = {key: value for key, value in then.items() if key != "class_names"}
        check_resumable({**then, "simplexfix": __version__}, now, str(file))
    elif processes.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{json.dumps(facts, indent=1)}\n".encode())
    processes.barrier()


def _set_free(then: dict[str, Any], now: dict[str, Any], keys: Sequence[str]) -> None:
    """Gives options that may change their values of now."""
    for key in keys:
        part, _, name = key.rpartition(".")
        if part:
            then.setdefault(part, {})[name] = now[part][name]
        else:
            then[name] = now[name]
