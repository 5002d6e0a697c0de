"""One run from its configuration: data, pre-training, versions, and how they judge each other at the end."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from .._files import write_whole
from .._seeds import mixed_seed, seeded
from ..labelled import LabelledItems
from ..models import EmbeddingModel, FeatureMLP, ResNet18, SmallConvNet, external_backbone
from ..report import evaluate
from ..slots import SlotRegistry
from . import processes
from .config import ConfigError, plain, read_config
from .facts import check_no_drift, read_facts
from .items import Items
from .locks import FolderInUseError
from .loggers import LOGGERS, Progress, RunLog, check_loggers
from .rehearsal import herding_rows, random_rows
from .run_config import LEARNABLE, ModelConfig, ReplacementConfig, RunConfig, pretraining_folder
from .run_data import load_run_data
from .samplers import batch_sizes, check_lone_row
from .scenario import train_versions
from .schedule import Schedule
from .trainer import Trainer

__all__ = ["train_run"]

_WAIT = 10.0  # seconds
# options that a run that goes on may change: how it runs, and where data is whose fingerprint is the same
_FREE = ("protocols", *(f"trainer.{key}" for key in ("device", "keep", "log_every", "loggers", "save_every")))
_PLACES = ("data.path", "data.pretraining", "tasks.pretraining_folder")


def train_run(
    config: RunConfig,
    folder: str | os.PathLike[str],
    *,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Trains all versions and judges them; called again with the same folder it goes on where it was stopped.

    In the folder: `run.json` (resolved configuration, fingerprint of the data), a folder for each pre-training and
    each task (`Trainer.fit`), in a task's the folder `model`, which `EmbeddingModel.from_pretrained` reads, and at the
    end `report.json`, which is returned: under "versions" where each model is, and its fingerprint; under "search", and
    under "validation" where items were held out, for each protocol what
    `simplexfix.compatibility.evaluate` says.

    Args:
        config: read by `simplexfix.training.config.read_config`, or made.
        folder: of this run alone.
        on_step: called after every step.

    Raises:
        ValueError: the folder is of another configuration or other data; names what differs.  Networks of different
            widths by a method without a junction.  A device that is not there.
        FileNotFoundError: data that is not there.
        ModuleNotFoundError: a package that a logger needs is missing.
    """
    check_loggers(config.trainer.loggers)
    device = _device(config.trainer.device)
    folder = Path(folder)
    data = load_run_data(config)
    facts = {
        "simplexfix": __version__,
        "config": plain(config),
        "data": data.fingerprint(),
    }
    if names := data.class_names():
        facts["class_names"] = names
    workers = config.data.workers or 0
    inputs = data.tasks[0].items.inputs
    _check_batches(config, len(data.tasks))
    _check_networks(config, inputs, data.prepare(data.tasks[0].items.take(torch.arange(min(2, len(inputs)))).read()))
    slots = SlotRegistry(config.method.slots)
    _check_slots(config, data.tasks[-1].classes.stop)
    options = {**asdict(config.trainer), "device": device, "workers": workers}
    del options["loggers"]
    remembers = config.tasks.memory_per_class > 0
    schedules = [
        _schedule(
            config.schedule,
            config.tasks.epochs,
            len(task.items.labels),
            config.schedule.batch // 2 if remembers and t > 0 else config.schedule.batch,
        )
        for t, task in enumerate(data.tasks)
    ]
    kept = pretraining_folder(folder, config.tasks.pretraining_folder, config.method.name)
    places: dict[str, Path] = {}  # of the stages, in their order
    for t in range(len(data.tasks)):
        if t in config.tasks.replacements:
            places[f"pretraining-{t:02d}"] = kept / f"pretraining-{t:02d}"
        places[f"task-{t:02d}"] = folder / f"task-{t:02d}"
    log: RunLog | None = None

    def after_step(title: str, stage: str, schedule: Schedule, step: int) -> None:
        last = step == schedule.steps
        logged = last or step % config.trainer.log_every == 0
        line = log.follow(stage, last=last) if log is not None and logged else None
        on_step(Progress(title, step, schedule.steps, schedule.batch, line))

    def pretrained(t: int, plan: ReplacementConfig) -> nn.Module:
        if plan.schedule is None:
            return _backbone(plan.model, inputs)
        method = config.method.pretraining().method(slots, "pretraining")
        items = data.pretraining.take((data.pretraining.labels < plan.classes).nonzero()[:, 0])
        schedule = _schedule(plan.schedule, plan.epochs, len(items.labels), plan.schedule.batch)
        stage = f"pretraining-{t:02d}"
        with seeded(mixed_seed(config.seed, t, 10)):
            made = _backbone(plan.model, inputs)
            fresh = EmbeddingModel(made, method.head(made.out_features))  # type: ignore[arg-type]
        fit = partial(
            Trainer(method, augment=data.augment, **options).fit,
            fresh,
            items,
            schedule,
            classes=range(plan.classes),
            seed=mixed_seed(config.seed, t, 11),
            folder=places[stage],
            on_step=partial(after_step, f"pre-training for task {t}", stage, schedule),
        )
        model = fit() if kept == folder else _waited_for(fit)
        return model.backbone if config.method.name in LEARNABLE else model  # whose classifier knows other classes

    def features(version: EmbeddingModel, items: Items) -> Tensor:
        return version.extract(items.inputs, prepare=data.prepare, workers=workers).cpu()

    def remembered(version: EmbeddingModel, items: Items, generator: np.random.Generator) -> Tensor:
        if config.tasks.rehearsal == "herding":
            return herding_rows(features(version, items), items.labels, config.tasks.memory_per_class)
        return random_rows(items.labels, config.tasks.memory_per_class, generator)

    stages = train_versions(
        Trainer(config.method.method(slots, "default"), augment=data.augment, **options),
        data.tasks,
        partial(_backbone, config.model, inputs),
        schedules,
        seed=config.seed,
        rehearsal=remembered if remembers else None,
        replacements={t: partial(pretrained, t, plan) for t, plan in config.tasks.replacements.items()},
        hoc_reference=config.tasks.hoc_reference if config.method.name == "hoc" else "deployed",
        folder=folder,
        on_step=lambda t, step: after_step(f"task {t}", f"task-{t:02d}", schedules[t], step),
    )
    _agree_on(folder, facts)  # now that nothing is left that would refuse the configuration
    extracted: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in data.searched}
    written: list[dict[str, str]] = []

    def keep(t: int, version: EmbeddingModel) -> None:
        place = f"task-{t:02d}/model"
        version.preprocessing = data.prepare
        version.class_names = data.names_of(t)
        identity = version.save_pretrained(folder / place, version=t, name=f"{config.method.name}, task {t}")
        written.append({"folder": place, "fingerprint": identity.fingerprint})
        for name, pair in data.searched.items():
            for rows, items in zip(extracted[name], pair, strict=True):
                rows.append(features(version, items))

    def judged() -> dict[str, Any]:
        report: dict[str, Any] = {"versions": written}
        if judged_names := {name: names[name] for name in data.searched if name in names}:
            report["class_names"] = judged_names
        for name, (query, gallery) in data.searched.items():
            items = LabelledItems(query.labels, gallery.labels)
            versions = [items.version(*rows) for rows in zip(*extracted[name], strict=True)]
            report[name] = {protocol: evaluate(versions, protocol=protocol).as_dict() for protocol in config.protocols}
        write_whole(folder / "report.json", f"{json.dumps(report, indent=1)}\n".encode())
        return report

    try:
        if processes.rank() == 0:
            log = RunLog(places, [LOGGERS[name][0](folder, facts) for name in config.trainer.loggers])
        for t, version in enumerate(stages):
            processes.by_first(partial(keep, t, version))
        if log is not None:
            log.catch_up()
    finally:
        if log is not None:
            log.close()
    return processes.by_first(judged)


def _waited_for(fit: Callable[[], EmbeddingModel]) -> EmbeddingModel:
    """In a folder that other runs train in, too: what one of them has finished all read."""
    told = False
    while True:
        try:
            return fit()
        except FolderInUseError as error:
            if not told:
                warnings.warn(f"{error}; this run waits for it", stacklevel=2)
            told = True
            time.sleep(_WAIT)


def _backbone(model: ModelConfig, inputs: Tensor) -> nn.Module:
    if model.kind == "convnet":
        return SmallConvNet(model.width or 16, model.features)
    if model.kind == "mlp":
        return FeatureMLP(inputs.shape[1], model.hidden)
    if model.kind == "resnet18":
        return ResNet18(model.stem, width=model.width or 64, in_channels=inputs.shape[1])
    return external_backbone(model.kind, pretrained=model.pretrained, in_channels=inputs.shape[1])


def _device(name: str | None) -> str:
    """That one, if it can be used here, or the GPU of this process where there is one."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name or gpu).item()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"trainer.device={name or gpu!r} cannot be used here: {reason}") from None
    return name or gpu


def _check_batches(config: RunConfig, tasks: int) -> None:
    """Before anything is trained: those of all stages can be shared out."""
    plans = config.tasks.replacements.values()
    stages = [(config.schedule, False), (config.schedule, tasks > 1 and config.tasks.memory_per_class > 0)]
    for schedule, remembers in stages + [(plan.schedule, False) for plan in plans if plan.schedule is not None]:
        batch_sizes(schedule.batch, remembers, processes.world(), schedule.accumulate)


def _check_networks(config: RunConfig, inputs: Tensor, prepared: Tensor) -> None:
    """Before anything is trained: all make rows of a few inputs, and give embeddings of one width."""
    plans = {f"tasks.replacements.{t}.model": plan for t, plan in config.tasks.replacements.items()}
    models = {name: plan.model for name, plan in plans.items()}
    schedules = {name: [plan.schedule, config.schedule] for name, plan in plans.items()}
    if 0 not in config.tasks.replacements:
        models, schedules = {"model": config.model, **models}, {"model": [config.schedule], **schedules}
    method = config.method.method(SlotRegistry(config.method.slots), "default")
    widths: dict[str, int] = {}
    for name, model in models.items():
        with seeded(config.seed), torch.no_grad():
            made = _backbone(replace(model, pretrained=False), inputs).eval()
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


def _check_slots(config: RunConfig, classes: int) -> None:
    """Before anything is trained: the simplex has room for the tasks' classes and those of pre-training."""
    others = max((plan.classes for plan in config.tasks.replacements.values()), default=0)
    if config.method.name not in LEARNABLE and classes + others > config.method.slots:
        raise ValueError(
            f"method.slots must be at least {classes + others}, for {classes} classes of the tasks and {others} of "
            f"pre-training, got {config.method.slots}"
        )


def _agree_on(folder: Path, facts: dict[str, Any]) -> None:
    """Writes down what this run is of, or compares it with what was written: but for how it runs and is judged, and
    for where data is that has the same fingerprint."""
    file = folder / "run.json"
    if processes.agreed(file.exists()):
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
        check_no_drift({**then, "simplexfix": __version__}, now, str(file))
    elif processes.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{json.dumps(facts, indent=1)}\n".encode())
    processes.meet()


def _set_free(then: dict[str, Any], now: dict[str, Any], keys: Sequence[str]) -> None:
    """Gives options that may change their values of now."""
    for key in keys:
        part, _, name = key.rpartition(".")
        if part:
            then.setdefault(part, {})[name] = now[part][name]
        else:
            then[name] = now[name]


def _schedule(schedule: Schedule, epochs: int | None, items: int, rows: int) -> Schedule:
    """Of that many passes over the items, of which a step sees so many rows."""
    return schedule if epochs is None else replace(schedule, steps=epochs * -(-items // rows))
