"""One run from its configuration: data, pre-training, versions, and their evaluation at the end."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from .. import __version__
from .._files import write_whole
from .._seeds import mixed_seed, seeded
from ..labelled import LabelledItems
from ..methods import Method
from ..models import EmbeddingModel
from ..report import evaluate
from ..slots import SlotRegistry
from . import processes
from .config import plain
from .items import Items
from .locks import FolderInUseError
from .loggers import LOGGERS, Progress, RunLog, check_loggers
from .rehearsal import herding_rows, random_rows
from .retrieval_sequence import RetrievalData, RetrievalJudge, load_retrieval_data
from .run_checks import agree_on, check_batches, check_networks, check_slots, usable_device
from .run_config import RunConfig, pretraining_folder
from .run_data import RunData, load_run_data
from .scenario import train_versions
from .schedule import Schedule
from .trainer import Trainer

__all__ = ["searches_of", "train_run"]

_WAIT = 10.0  # seconds


def train_run(
    config: RunConfig,
    folder: str | os.PathLike[str],
    *,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Trains and evaluates all versions of a run; with the same folder, a stopped run resumes.

        report = train_run(PRESETS["omniglot"], "runs/omniglot")
        report["unseen"]["instance"]["matrix"]  # [T][T], None above the diagonal

    The folder has these entries:

        run.json                    configuration with all defaults, fingerprint of the data
        pretraining-NN/, task-NN/   files of `Trainer.fit`; memory and rotation of `train_versions`
        task-NN/model/              the version, for `EmbeddingModel.from_pretrained`
        task-NN/drift.safetensors   retrieval sequences: drifts so far, for `simplexfix.adapters.QueryDrift.load`
        report.json                 written at the end

    Args:
        config: from `read_config` or `PRESETS`, or constructed.
        folder: folder of this run only.
        on_step: function that is called with a `Progress` after every step.

    Returns:
        The content of report.json.  "versions" has folder and fingerprint of each model.  Every search of `DataConfig`,
        and "validation" if items were held out, maps a protocol to the values of `simplexfix.report.evaluate`.

    Raises:
        ValueError: the folder belongs to another configuration or other data (the message lists the differences),
            networks of a method without a junction have different widths, or the device cannot be used.
        FileNotFoundError: data is missing.
        ModuleNotFoundError: a package that a logger needs is missing.
    """
    check_loggers(config.trainer.loggers)
    device = usable_device(config.trainer.device)
    folder = Path(folder)
    data = load_retrieval_data(config) if config.data.kind == "retrieval" else load_run_data(config)
    run = _Run(config, folder, data, device, SlotRegistry(config.method.slots), _Watch(config, on_step))
    names = run.data.class_names()
    facts = {"simplexfix": __version__, "config": plain(config), "data": run.data.fingerprint()}
    facts |= {"class_names": names} if names else {}
    check_batches(config, len(run.data.tasks))
    check_networks(config, run.data.inputs, run.data.prepare(run.data.first_inputs(2)))
    check_slots(config, run.data.tasks[-1].classes.stop)

    def remembered(version: EmbeddingModel, items: Items, generator: np.random.Generator) -> Tensor:
        return remember(run, version, items, generator)  # memory files store the name `remembered`

    versions = fit(run, remembered if config.tasks.remembers else None)
    agree_on(folder, facts)  # the first write: all checks of the configuration have passed
    judge = _judge(run, names)  # only the first process uses it
    saved: list[dict[str, str]] = []

    def add(t: int, version: EmbeddingModel) -> None:
        saved.append(save(run, t, version))
        judge.add(t, version)

    def report() -> dict[str, Any]:
        content = {"versions": saved, **judge.report()}
        write_whole(folder / "report.json", f"{json.dumps(content, indent=1)}\n".encode())
        return content

    try:
        if processes.rank() == 0:
            run.watch.log = RunLog(run.places(), [LOGGERS[name][0](folder, facts) for name in config.trainer.loggers])
        for t, version in enumerate(versions):
            processes.run_on_rank0(partial(add, t, version))
        if run.watch.log is not None:
            run.watch.log.catch_up()
    finally:
        if run.watch.log is not None:
            run.watch.log.close()
    return processes.run_on_rank0(report)


class _Watch:
    """Calls `on_step` for every step, with the line of the log if the step wrote one."""

    def __init__(self, config: RunConfig, on_step: Callable[[Progress], None]) -> None:
        self.log: RunLog | None = None
        self.log_every = config.trainer.log_every
        self.on_step = on_step

    def __call__(self, title: str, stage: str, schedule: Schedule, step: int) -> None:
        last = step == schedule.steps
        logged = last or step % self.log_every == 0
        line = self.log.follow(stage, last=last) if self.log is not None and logged else None
        self.on_step(Progress(title, step, schedule.steps, schedule.batch, line))


@dataclass(frozen=True, eq=False)
class _Run:
    """State that all functions of a run share.

    Args:
        config, folder, data: configuration, folder and data of the run.
        device: a device that works on this machine.
        slots: registry to which pre-training and tasks add their classes.
        watch: function that is called after every step.
    """

    config: RunConfig
    folder: Path
    data: RunData | RetrievalData
    device: str
    slots: SlotRegistry
    watch: _Watch

    @property
    def workers(self) -> int:
        return self.config.data.workers or 0

    def trainer(self, method: Method) -> Trainer:
        options = {**asdict(self.config.trainer), "device": self.device, "workers": self.workers}
        del options["loggers"]
        return Trainer(method, augment=self.data.augment, preprocessing=self.data.prepare, **options)

    def pretraining(self) -> Path:
        """Returns the folder of pre-trained networks."""
        return pretraining_folder(self.folder, self.config.tasks.pretraining_folder, self.config.method.name)

    def places(self) -> dict[str, Path]:
        """Returns the folder of each stage, in order."""
        places = {}
        for t in range(len(self.data.tasks)):
            if t in self.config.tasks.replacements:
                places[f"pretraining-{t:02d}"] = self.pretraining() / f"pretraining-{t:02d}"
            places[f"task-{t:02d}"] = self.folder / f"task-{t:02d}"
        return places


def pretrain(run: _Run, t: int) -> nn.Module:
    """Returns the replacement at task t, pre-trained if its configuration has a schedule."""
    config, plan = run.config, run.config.tasks.replacements[t]
    if plan.schedule is None:
        return plan.model.backbone(run.data.inputs)
    assert isinstance(run.data, RunData)
    if plan.source == "tasks":
        namespace, classes = "default", run.data.tasks[t - 1].classes
        items = reduce(Items.joined, [task.items for task in run.data.tasks[:t]])
    else:
        namespace, classes = "pretraining", range(plan.classes)
        items = run.data.pretraining.take((run.data.pretraining.labels < plan.classes).nonzero()[:, 0])
    method = config.method.pretraining().method(run.slots, namespace)
    schedule = _schedule(plan.schedule, plan.epochs, len(items.labels), plan.schedule.batch)
    stage = f"pretraining-{t:02d}"
    with seeded(mixed_seed(config.seed, t, 10)):
        made = plan.model.backbone(run.data.inputs)
        fresh = EmbeddingModel(made, method.head(made.out_features))  # type: ignore[arg-type]
    train = partial(
        run.trainer(method).fit,
        fresh,
        items,
        schedule,
        classes=classes,
        seed=mixed_seed(config.seed, t, 11),
        folder=run.pretraining() / stage,
        on_step=partial(run.watch, f"pre-training for task {t}", stage, schedule),
    )
    model = train() if run.pretraining() == run.folder else _waited_for(train)
    return model if config.method.goes_on_with(plan.source) else model.backbone


def fit(
    run: _Run, remembered: Callable[[EmbeddingModel, Items, np.random.Generator], Tensor] | None
) -> Iterator[EmbeddingModel]:
    """Yields the version of each task when it is trained."""
    config, tasks = run.config, run.data.tasks
    schedules = []
    for t, task in enumerate(tasks):
        schedule = config.tasks.schedules.get(t, config.schedule)
        new = schedule.batch // 2 if remembered is not None and t > 0 else schedule.batch
        schedules.append(_schedule(schedule, config.tasks.epochs, len(task.items.labels), new))
    return train_versions(
        run.trainer(config.method.method(run.slots, "default")),
        tasks,
        partial(config.model.backbone, run.data.inputs),
        schedules,
        seed=config.seed,
        rehearsal=remembered,
        replacements={t: partial(pretrain, run, t) for t in config.tasks.replacements},
        hoc_reference=config.hoc_reference,
        replacement_junction=config.tasks.replacement_junction,
        replacement_frozen=config.tasks.replacement_frozen,
        denoise=config.tasks.denoise,
        align=config.tasks.align,
        folder=run.folder,
        on_step=lambda t, step: run.watch(f"task {t}", f"task-{t:02d}", schedules[t], step),
    )


def remember(run: _Run, version: EmbeddingModel, items: Items, generator: np.random.Generator) -> Tensor:
    """Returns the row numbers of the items that rehearsal stores."""
    tasks = run.config.tasks
    if tasks.rehearsal == "herding":
        return herding_rows(extract(run, version, items.inputs), items.labels, tasks.memory_per_class)
    return random_rows(items.labels, tasks.memory_per_class, generator)


def extract(run: _Run, version: EmbeddingModel, inputs: Any) -> Tensor:
    """Returns the embeddings [N, d] of inputs on the CPU."""
    return version.extract(inputs, prepare=run.data.prepare, workers=run.workers).cpu()


def save(run: _Run, t: int, version: EmbeddingModel) -> dict[str, str]:
    """Writes a version's folder and returns its entry in the report."""
    place = f"task-{t:02d}/model"
    version.class_names = run.data.names_of(t)
    identity = version.save_pretrained(run.folder / place, version=t, name=f"{run.config.method.name}, task {t}")
    return {"folder": place, "fingerprint": identity.fingerprint}


class _Judge(Protocol):
    """Evaluates the versions of a run; `add` is called once per version, in order."""

    def add(self, t: int, version: EmbeddingModel) -> None: ...

    def report(self) -> dict[str, Any]: ...


def _judge(run: _Run, names: dict[str, list[str]]) -> _Judge:
    if isinstance(run.data, RetrievalData):
        return RetrievalJudge(run.data, partial(extract, run), run.folder)
    return _LabelledJudge(run.data, partial(extract, run), run.config.protocols, names)


class _LabelledJudge:
    """Evaluates versions on labelled items: every search by every protocol.

    Args:
        data: data of the run.
        extract: (version, inputs) -> embeddings [N, d].
        protocols: names of protocols.
        names: class names by search.
    """

    def __init__(
        self,
        data: RunData,
        extract: Callable[[EmbeddingModel, Any], Tensor],
        protocols: Sequence[str],
        names: dict[str, list[str]],
    ) -> None:
        self.data = data
        self.extract = extract
        self.protocols = protocols
        self.names = {name: names[name] for name in data.searched if name in names}
        self.embeddings: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in data.searched}
        self.prefixes: list[tuple[int, ...]] = []

    def add(self, t: int, version: EmbeddingModel) -> None:
        for name, (query, gallery) in self.data.searched.items():
            pair = self.extract(version, query.inputs), self.extract(version, gallery.inputs)
            self.embeddings[name].append(pair)
        self.prefixes.append(version.prefixes)

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = {"class_names": self.names} if self.names else {}
        for name, (query, gallery) in self.data.searched.items():
            items = LabelledItems(query.labels, gallery.labels)
            rows = zip(self.embeddings[name], self.prefixes, strict=True)
            versions = [items.version(*pair, prefixes=prefixes) for pair, prefixes in rows]
            report[name] = {protocol: evaluate(versions, protocol=protocol).as_dict() for protocol in self.protocols}
        return report


def searches_of(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the searches of a run's report: search -> protocol -> values of `evaluate`; "validation" comes first."""
    searches: dict[str, dict[str, Any]] = {
        name: entry for name, entry in report.items() if isinstance(entry, dict) and name != "class_names"
    }
    return dict(sorted(searches.items(), key=lambda search: search[0] != "validation"))


def _waited_for(fit: Callable[[], EmbeddingModel]) -> EmbeddingModel:
    """Calls `fit` again until no other run trains in the shared folder; `fit` then reads the finished network."""
    told = False
    while True:
        try:
            return fit()
        except FolderInUseError as error:
            if not told:
                warnings.warn(f"{error}; this run waits for it", stacklevel=2)
            told = True
            time.sleep(_WAIT)


def _schedule(schedule: Schedule, epochs: int | None, items: int, rows: int) -> Schedule:
    """Returns the schedule with its steps set to `epochs` passes over the items, `rows` new items per step."""
    return schedule if epochs is None else replace(schedule, steps=epochs * -(-items // rows))
