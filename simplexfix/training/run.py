"""One run from its configuration: data, pre-training, versions, and the matrix at the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import __version__
from .._checks import check_name
from .._files import write_whole
from ..compatibility import average_accuracy, average_compatibility, compatibility_matrix
from ..data import Drawings, Preprocessing, RandomWarp, Vectors, load_features
from ..methods import BCT, ER, FD, HOC, Method, Simplex
from ..models import EmbeddingModel, FeatureMLP, SmallConvNet
from ..retrieval import instance_accuracy, nearest_class_mean_accuracy
from ..slots import SlotRegistry
from . import processes
from .facts import check_no_drift
from .items import Items, mixed_seed, seeded
from .loggers import LOGGERS, Progress, RunLog, check_loggers
from .omniglot import Recipe, split_omniglot
from .rehearsal import SELECTIONS, herding_rows, random_rows
from .scenario import Task, class_incremental, instance_incremental, train_versions
from .schedule import Schedule
from .trainer import Trainer

__all__ = [
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "ReplacementConfig",
    "RunConfig",
    "TasksConfig",
    "TrainerConfig",
    "train_run",
]

LEARNABLE = ("bct", "er", "fd")  # methods with a classifier for each network, and features for embeddings
PROTOCOLS = {"nearest_class_mean": nearest_class_mean_accuracy, "instance": instance_accuracy}


@dataclass(frozen=True)
class DataConfig:
    """What is learned and what is searched.

    Args:
        kind: "omniglot", which comes inside the package and searches alphabets that no version saw; or "features": a
            folder of .npy files with train [N, d], train_labels [N], and query, gallery, query_labels and
            gallery_labels as `simplexfix gate` reads them.
        path: of the folder.
    """

    kind: str = "omniglot"
    path: str | None = None

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ("features", "omniglot"))
        if (self.kind == "features") != (self.path is not None):
            raise ValueError('path is the folder of kind="features", and of no other')


@dataclass(frozen=True)
class ModelConfig:
    """A backbone.

    Args:
        kind: "convnet", `SmallConvNet` of this width and so many features, for images; or "mlp", `FeatureMLP` with
            these hidden layers, for features.
    """

    kind: str = "convnet"
    width: int = 16
    features: int = 256
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ("convnet", "mlp"))

    @property
    def out_features(self) -> int | None:
        """Width of what it returns; None for that of its input."""
        if self.kind == "convnet":
            return self.features
        return self.hidden[-1] if self.hidden else None


@dataclass(frozen=True)
class MethodConfig:
    """A way to train, of `simplexfix.methods`.

    Args:
        name: "er", "fd" or "bct", with a learnable classifier; "simplex" or "hoc", with the fixed one.
        slots: K of the simplex.
        normalize: of the simplex; a learnable classifier with a scale is always normalised.
        scale: of the logits; None for plain ones.
        weight: of FD's distance and of BCT's influence loss.
        distance: of FD.
        lambda_, mu, negatives, anchor: of `hoc_loss`.
        gather: negatives of HOC from all processes.
    """

    name: str = "hoc"
    slots: int = 1024
    normalize: bool = False
    scale: float | None = None
    weight: float = 1.0
    distance: str = "cosine"
    lambda_: float = 0.1
    mu: float = 10.0
    negatives: str = "zero_mask"
    anchor: str = "old"
    gather: bool = True

    def __post_init__(self) -> None:
        check_name("name", self.name, (*LEARNABLE, "hoc", "simplex"))

    def method(self, slots: SlotRegistry, namespace: str) -> Method:
        if self.name == "er":
            return ER(scale=self.scale)
        if self.name == "fd":
            return FD(weight=self.weight, distance=self.distance, scale=self.scale)
        if self.name == "bct":
            return BCT(weight=self.weight, scale=self.scale)
        scale = 1.0 if self.scale is None else self.scale
        if self.name == "simplex":
            return Simplex(slots, namespace, normalize=self.normalize, scale=scale)
        return HOC(
            slots,
            namespace,
            normalize=self.normalize,
            scale=scale,
            lambda_=self.lambda_,
            mu=self.mu,
            negatives=self.negatives,
            anchor=self.anchor,
            group=dist.group.WORLD if self.gather and processes.world() > 1 else None,
        )


@dataclass(frozen=True)
class ReplacementConfig:
    """A network that takes over, and how it is pre-trained.

    Args:
        model: the network that takes over.
        classes: that it is pre-trained on: so many of those that no task brings.
        schedule: of pre-training.
    """

    model: ModelConfig
    classes: int
    schedule: Schedule


@dataclass(frozen=True)
class TasksConfig:
    """What versions learn one after the other.

    Args:
        kind: "class_incremental" with `counts`, or "instance_incremental" with `parts`.
        epochs: None, or passes over a task's new items, in place of the schedule's steps.
        memory_per_class: items that rehearsal keeps; 0 for no memory.
        rehearsal: which: "random", or "herding", those whose mean feature is nearest to that of the class.
        replacements: task number -> what takes over there.
        hoc_reference: of `train_versions`.
    """

    kind: str = "class_incremental"
    counts: tuple[int, ...] = ()
    parts: int = 1
    epochs: int | None = None
    memory_per_class: int = 20
    rehearsal: str = "random"
    replacements: dict[int, ReplacementConfig] = field(default_factory=dict)
    hoc_reference: str = "deployed"

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ("class_incremental", "instance_incremental"))
        if (self.kind == "class_incremental") != bool(self.counts):
            raise ValueError('counts are the new classes of each task of kind="class_incremental", and of no other')
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        check_name("rehearsal", self.rehearsal, SELECTIONS)
        if self.memory_per_class < 0:
            raise ValueError(f"memory_per_class must be 0 or more, got {self.memory_per_class}")


@dataclass(frozen=True)
class TrainerConfig:
    """Of `Trainer`; device None is the GPU of this process where there is one.

    Args:
        loggers: who has a copy of the logs while they grow: "tensorboard", "wandb", or both.
    """

    device: str | None = None
    precision: str = "float32"
    ema: float | None = None
    compile: bool = False
    save_every: int = 500
    keep: int = 3
    log_every: int = 50
    loggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.loggers:
            check_name("loggers", name, LOGGERS)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on, but for the data itself."""

    tasks: TasksConfig
    schedule: Schedule
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method.name in LEARNABLE:
            for t, replacement in self.tasks.replacements.items():
                if replacement.model.out_features != self.model.out_features:
                    raise ValueError(
                        f"{self.method.name.upper()} has no junction, all its networks must give features of one "
                        f"width: model gives {self.model.out_features or 'what comes in'}, replacements.{t}.model "
                        f"{replacement.model.out_features or 'what comes in'}"
                    )


@dataclass(frozen=True, eq=False)
class _Data:
    train: Items
    query: Items
    gallery: Items
    augment: Callable[[Tensor, torch.Generator], Tensor] | None
    prepare: Preprocessing  # for extraction, where there is no augmentation


def train_run(
    config: RunConfig,
    folder: str | os.PathLike[str],
    *,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Trains all versions and judges them; called again with the same folder it goes on where it was stopped.

    In the folder: `run.json` (resolved configuration, fingerprint of the data), a folder for each pre-training and
    each task (`Trainer.fit`), in a task's the folder `model`, which `EmbeddingModel.from_pretrained` reads, and at the
    end `report.json`, which is returned.

    Args:
        config: read by `simplexfix.training.config.read_config`, or made.
        folder: of this run alone.
        on_step: called after every step.

    Raises:
        ValueError: the folder is of another configuration or other data; names what differs.
        ModuleNotFoundError: a package that a logger needs is missing.
    """
    check_loggers(config.trainer.loggers)
    folder = Path(folder)
    data = _load(config)
    facts = {
        "simplexfix": __version__,
        "config": json.loads(json.dumps(asdict(config))),
        "data": {name: getattr(data, name).fingerprint() for name in ("train", "query", "gallery")},
    }
    _agree_on(folder, facts)
    slots = SlotRegistry(config.method.slots)
    tasks, rest = _tasks(config, data.train)
    device = config.trainer.device or (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )
    options = {**asdict(config.trainer), "device": device}
    del options["loggers"]
    schedules = [_schedule(config, task, t) for t, task in enumerate(tasks)]
    log: RunLog | None = None

    def after_step(stage: str, place: str, schedule: Schedule, step: int) -> None:
        last = step == schedule.steps
        logged = log is not None and (last or step % config.trainer.log_every == 0)
        line = log.follow(place, last=last) if log is not None and logged else None
        on_step(Progress(stage, step, schedule.steps, schedule.batch, line))

    def trainer(namespace: str) -> Trainer:
        return Trainer(config.method.method(slots, namespace), augment=data.augment, **options)

    def backbone(model: ModelConfig) -> nn.Module:
        if model.kind == "convnet":
            return SmallConvNet(model.width, model.features)
        return FeatureMLP(data.train.inputs.shape[1], model.hidden)

    def pretrained(t: int, plan: ReplacementConfig) -> nn.Module:
        with seeded(mixed_seed(config.seed, t, 10)):
            made = backbone(plan.model)
            fresh = EmbeddingModel(made, trainer("pretraining").method.head(made.out_features))  # type: ignore[arg-type]
        model = trainer("pretraining").fit(
            fresh,
            rest.take((rest.labels < plan.classes).nonzero()[:, 0]),
            plan.schedule,
            classes=range(plan.classes),
            seed=mixed_seed(config.seed, t, 11),
            folder=folder / f"pretraining-{t:02d}",
            on_step=partial(after_step, f"pre-training for task {t}", f"pretraining-{t:02d}", plan.schedule),
        )
        return model.backbone if config.method.name in LEARNABLE else model  # whose classifier knows other classes

    def features(version: EmbeddingModel, items: Items) -> Tensor:
        batches = torch.split(items.inputs, 1024)
        return torch.cat([version.extract(data.prepare(batch).to(device)).cpu() for batch in batches])

    def remembered(version: EmbeddingModel, items: Items, generator: np.random.Generator) -> Tensor:
        if config.tasks.rehearsal == "herding":
            return herding_rows(features(version, items), items.labels, config.tasks.memory_per_class)
        return random_rows(items.labels, config.tasks.memory_per_class, generator)

    stages = train_versions(
        trainer("default"),
        tasks,
        partial(backbone, config.model),
        schedules,
        seed=config.seed,
        rehearsal=remembered if config.tasks.memory_per_class else None,
        replacements={t: partial(pretrained, t, plan) for t, plan in config.tasks.replacements.items()},
        hoc_reference=config.tasks.hoc_reference,
        folder=folder,
        on_step=lambda t, step: after_step(f"task {t}", f"task-{t:02d}", schedules[t], step),
    )
    queries: list[Tensor] = []
    galleries: list[Tensor] = []
    written: list[dict[str, str]] = []
    try:
        if processes.rank() == 0:
            log = RunLog(folder, [LOGGERS[name][0](folder, facts) for name in config.trainer.loggers])
        for t, version in enumerate(stages):
            place, name = f"task-{t:02d}/model", f"{config.method.name}, task {t}"
            version.preprocessing = data.prepare
            if processes.rank() == 0:
                identity = version.save_pretrained(folder / place, version=t, name=name)
            else:
                identity = version.identity(version=t, name=name)
            written.append({"folder": place, "fingerprint": identity.fingerprint})
            queries.append(features(version, data.query))
            galleries.append(features(version, data.gallery))
        if log is not None:
            log.catch_up()
    finally:
        if log is not None:
            log.close()
    report: dict[str, Any] = {"versions": written, "protocols": {}}
    for name, protocol in PROTOCOLS.items():
        matrix = compatibility_matrix(queries, galleries, data.query.labels, data.gallery.labels, protocol)
        report["protocols"][name] = {
            "matrix": [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()],
            "AC": average_compatibility(matrix) if len(matrix) > 1 else None,
            "AA": average_accuracy(matrix),
        }
    if processes.rank() == 0:
        write_whole(folder / "report.json", f"{json.dumps(report, indent=1)}\n".encode())
    return report


def _agree_on(folder: Path, facts: dict[str, Any]) -> None:
    """Writes down what this run is of, or compares it with what was written; how often it saves is free to change."""
    file = folder / "run.json"
    if processes.agreed(file.exists()):
        then = json.loads(file.read_text(encoding="utf-8"))
        free = {
            key: facts["config"]["trainer"][key] for key in ("device", "keep", "log_every", "loggers", "save_every")
        }
        then["config"]["trainer"].update(free)
        check_no_drift(then, facts, str(file))
    elif processes.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{json.dumps(facts, indent=1)}\n".encode())
    processes.meet()


def _load(config: RunConfig) -> _Data:
    if config.data.path is not None:
        path = Path(config.data.path)
        search = load_features(path)
        train, labels = (np.load(path / f"{name}.npy", mmap_mode="c") for name in ("train", "train_labels"))
        if (
            train.ndim != 2
            or train.dtype.kind != "f"
            or labels.shape != train.shape[:1]
            or labels.dtype.kind not in "iu"
        ):
            raise ValueError(
                f"{path}: train must be floating [N, d] and train_labels integers [N], got {train.dtype} "
                f"{list(train.shape)} and {labels.dtype} {list(labels.shape)}"
            )
        return _Data(
            Items(torch.from_numpy(train).float(), torch.from_numpy(labels.astype(np.int64))),
            Items(search.query, search.query_labels),
            Items(search.gallery, search.gallery_labels),
            None,
            Vectors(train.shape[1]),
        )
    omniglot = split_omniglot(Recipe(), config.seed)
    drawings = omniglot.train
    labels = torch.arange(len(drawings)).repeat_interleave(drawings.shape[1])
    return _Data(
        Items(drawings.flatten(0, 1), labels),
        omniglot.query["unseen"],
        omniglot.gallery["unseen"],
        RandomWarp(),
        Drawings(drawings.shape[-1]),
    )


def _tasks(config: RunConfig, train: Items) -> tuple[list[Task], Items]:
    """The tasks, and the items of classes that none of them brings, from 0 on, for pre-training."""
    plan = config.tasks
    classes = len(torch.unique(train.labels))
    if plan.kind == "instance_incremental":
        tasks, left = instance_incremental(train, plan.parts, seed=config.seed), 0
        rest = train.take(torch.empty(0, dtype=torch.int64))
    else:
        left = classes - sum(plan.counts)
        tasks = class_incremental(train, plan.counts + ((left,) if left > 0 else ()), seed=config.seed)
        rest = train.take(torch.empty(0, dtype=torch.int64))
        if left > 0:
            last = tasks.pop()
            rest = Items(last.items.inputs, last.items.labels - sum(plan.counts))
    for t, replacement in plan.replacements.items():
        if not 1 <= replacement.classes <= left:
            raise ValueError(
                f"replacements.{t}.classes must lie in [1, {left}], the classes that no task brings, "
                f"got {replacement.classes}"
            )
    return tasks, rest


def _schedule(config: RunConfig, task: Task, t: int) -> Schedule:
    if config.tasks.epochs is None:
        return config.schedule
    remembers = t > 0 and config.tasks.memory_per_class > 0
    rows = config.schedule.batch // 2 if remembers else config.schedule.batch
    return replace(config.schedule, steps=config.tasks.epochs * -(-len(task.items.labels) // rows))
