"""The configuration of a run, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .._checks import check_fraction, check_name
from ..data import CIFAR100_MEAN, CIFAR100_STD
from ..models import FeatureLinear, FeatureMLP, ResNet18, SmallConvNet, TextEncoder, external_backbone
from ..models.external import LIBRARIES
from ..retrieval import PROTOCOLS
from .config import check_fits
from .junction import ALIGN, JUNCTIONS
from .loggers import LOGGERS
from .method_config import ER_PRETRAINED, SIMPLEX, MethodConfig
from .rehearsal import SELECTIONS
from .scenario import REFERENCES
from .schedule import Schedule

__all__ = [
    "ER_PRETRAINED",
    "NETWORKS",
    "SIMPLEX",
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "ReplacementConfig",
    "RunConfig",
    "TasksConfig",
    "TrainerConfig",
    "pretraining_folder",
]

DATA = ("cifar", "features", "images", "omniglot", "retrieval")
NETWORKS = ("convnet", "linear", "mlp", "resnet18", "text")

# option -> the choices that use it; all choices use the other options
_LABELLED = ("cifar", "features", "images", "omniglot")
_OF_DATA = {
    **dict.fromkeys(("per_class", "validation"), _LABELLED),
    **dict.fromkeys(("tokens", "hard_negatives"), ("retrieval",)),
    "query_batches": ("cifar",),
    **dict.fromkeys(("size", "workers"), ("images",)),
    **dict.fromkeys(("mean", "std", "pretraining"), ("cifar", "images")),
}
_OF_MODEL = {
    "width": ("convnet", "resnet18"),
    "features": ("convnet",),
    "hidden": ("mlp",),
    "stem": ("resnet18",),
    "pretrained": LIBRARIES,
    "path": ("text",),
}
_CLASSIFYING = ("class_incremental", "dataset_sequence", "instance_incremental")
_OF_TASKS = {
    "parts": ("instance_incremental",),
    **dict.fromkeys(
        (
            "pretraining_from",
            "memory_per_class",
            "rehearsal",
            "pretraining_folder",
            "hoc_reference",
            "replacement_junction",
            "replacement_frozen",
            "denoise",
            "align",
        ),
        _CLASSIFYING,
    ),
}


@dataclass(frozen=True)
class DataConfig:
    """The training data of a run, and the searches by which the report evaluates all versions.

        kind       in path                                               searches, by their names in the report
        omniglot   no path: it is part of the package                    "seen": other drawings of the first task's
                                                                         characters; "unseen": two alphabets that no
                                                                         version learned
        features   train [N, d], train_labels [N] and query, gallery,    "search": query, gallery
                   query_labels, gallery_labels as .npy files
        cifar      CIFAR-100 and CIFAR-10 in their binary version        "search": CIFAR-10, training images in its test
                                                                         images
        images     folders train, query and gallery, each with one       "search": query, gallery
                   folder of images per class
        retrieval  a folder for each of `tasks.sets`, in BEIR's layout   the test queries of each set in its corpus
                   (`load_retrieval_set`)

    Args:
        kind, path: as in the table.
        per_class: number of training items of each class, the first ones in the data; None for all.
        validation: fraction of each class, in [0, 1), that is held out of training, drawn by the seed.  The report also
            evaluates versions on these items, so that you can choose options without the search data.
        query_batches: cifar only: numbers (1 to 5) of the files of training images that serve as queries.
        size: images only: side in pixels to which images are scaled.
        mean, std: cifar and images only: mean and standard deviation of each channel, for pixels in [0, 1].  A network
            with pretrained weights needs the values of its own training.
        workers: images only: None decodes all images first and keeps them in memory, 3 * size^2 bytes each.  Otherwise
            this number of processes decodes them lazily; 0 decodes in the training process.
        tokens: retrieval with a text encoder only: tokens per text, at least 1; longer texts are cut off.
        hard_negatives: retrieval only: number of negatives per training query, the first ones of hard_negatives.tsv.
        pretraining: cifar and images only: None, or a folder with one folder of images per class.  Replacements are
            pre-trained on these images instead of on classes that no task uses.

    Raises:
        ValueError: a name is unknown, an option is out of range, or an option that `kind` does not use is set.
    """

    kind: str = "omniglot"
    path: str | None = None
    per_class: int | None = None
    validation: float = 0.0
    query_batches: tuple[int, ...] = (1, 2, 3, 4, 5)
    size: int = 32
    mean: tuple[float, ...] = CIFAR100_MEAN
    std: tuple[float, ...] = CIFAR100_STD
    workers: int | None = None
    tokens: int = 128
    hard_negatives: int = 0
    pretraining: str | None = None

    def __post_init__(self) -> None:
        check_name("kind", self.kind, DATA)
        if self.tokens < 1 or self.hard_negatives < 0:
            raise ValueError(
                f"tokens must be at least 1 and hard_negatives 0 or more, got {self.tokens} and {self.hard_negatives}"
            )
        if self.kind == "omniglot" and self.path is not None:
            raise ValueError(f'kind="omniglot" takes no path, its data is in the package; got {self.path!r}')
        if self.kind != "omniglot" and self.path is None:
            raise ValueError(f'kind="{self.kind}" needs path, the location of the data')
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {self.per_class}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is a fraction, in [0, 1), got {self.validation}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be 0 or more processes, or null to hold all in memory, got {self.workers}")
        check_fits(self, "kind", _OF_DATA)


@dataclass(frozen=True)
class ModelConfig:
    """The backbone of a model.

        kind                        network                         inputs
        convnet                     `SmallConvNet`                  drawings of omniglot
        linear                      `FeatureLinear`                 features
        mlp                         `FeatureMLP`                    features
        resnet18                    `ResNet18`                      images
        text                        `TextEncoder`                   texts of retrieval data sets
        timm:NAME, torchvision:NAME `external_backbone`             images

    Args:
        kind: as in the table.
        width: convnet and resnet18 only: channels of the first layers; None for 16 (convnet) and 64 (resnet18).
        features: convnet only: width of its output.
        hidden: mlp only: widths of the hidden layers.
        stem: resnet18 only: "imagenet" or "cifar".
        path: text only: folder of the encoder in Hugging Face's format.
        pretrained: timm and torchvision only: whether to load the library's default weights; it may download them.

    Raises:
        ValueError: a name is unknown, "text" has no path, or an option that `kind` does not use is set.
    """

    kind: str = "convnet"
    width: int | None = None
    features: int = 256
    hidden: tuple[int, ...] = ()
    stem: str = "imagenet"
    pretrained: bool = False
    path: str | None = None

    def __post_init__(self) -> None:
        if self.kind.partition(":")[0] not in LIBRARIES:
            check_name("kind", self.kind, (*NETWORKS, *(f"{library}:NAME" for library in LIBRARIES)))
        check_fits(self, "kind", _OF_MODEL)
        if self.kind == "text" and self.path is None:
            raise ValueError('kind="text" needs path, the folder of the encoder')

    def backbone(self, inputs: int) -> nn.Module:
        """Returns a new network with the attribute `out_features`.

        Args:
            inputs: number of features in a row, or of channels of an image.
        """
        if self.kind == "convnet":
            return SmallConvNet(self.width or 16, self.features)
        if self.kind == "linear":
            return FeatureLinear(inputs)
        if self.kind == "mlp":
            return FeatureMLP(inputs, self.hidden)
        if self.path is not None:
            return TextEncoder(self.path)
        if self.kind == "resnet18":
            return ResNet18(self.stem, width=self.width or 64, in_channels=inputs)
        return external_backbone(self.kind, pretrained=self.pretrained, in_channels=inputs)


@dataclass(frozen=True)
class ReplacementConfig:
    """A replacement: its network and its pre-training.

    Args:
        model: the network.
        classes: with source="apart", number of classes of pre-training, the first ones in the seed's order; 0 for no
            pre-training.
        schedule: schedule of pre-training; None for no pre-training.
        epochs: passes over the items of pre-training, instead of the schedule's steps; None for the steps.
        source: items of pre-training.  "apart": classes that no task uses, or those of `data.pretraining`.  "tasks":
            all items of the earlier tasks; classes keep their slots, and er, fd and bct keep the linear classifier.

    Raises:
        ValueError: `source` is unknown, "tasks" has no schedule or has `classes`, "apart" has only one of `classes` and
            `schedule`, `epochs` has no schedule, or a number is out of range.
    """

    model: ModelConfig
    classes: int = 0
    schedule: Schedule | None = None
    epochs: int | None = None
    source: str = "apart"

    def __post_init__(self) -> None:
        check_name("source", self.source, ("apart", "tasks"))
        check_fits(self, "source", {"classes": ("apart",)})
        if self.source == "tasks" and self.schedule is None:
            raise ValueError('source="tasks" needs schedule, the schedule of pre-training')
        if self.classes < 0:
            raise ValueError(f"classes must be 0 or more, got {self.classes}")
        if self.source == "apart" and (self.classes > 0) != (self.schedule is not None):
            raise ValueError("pre-training needs both classes and schedule: give both, or neither")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if self.epochs is not None and self.schedule is None:
            raise ValueError(f"epochs needs schedule, the schedule of pre-training; got epochs={self.epochs} alone")


@dataclass(frozen=True)
class TasksConfig:
    """The sequence of tasks, one per version.

    Args:
        kind: "class_incremental" with `counts`, "instance_incremental" with `parts`, "dataset_sequence" or
            "retrieval_sequence" with `sets`.
        counts: number of new classes of each task.
        parts: number of tasks into which the items of each class are split.
        sets: name of each task's data set, which is read instead of "train": a folder with one folder of images per
            class, or features NAME.npy and NAME_labels.npy.  Classes of different sets are different, even if their
            names are equal.  For a retrieval sequence, names of folders of retrieval data sets.
        pretraining_from: classes with this id or a larger one are reserved for pre-training.  None: pre-training uses
            the classes that no task uses, in the seed's order.
        epochs: passes over a task's new items, instead of the schedule's steps; None for the steps.
        schedules: task number -> schedule; other tasks have the run's schedule.
        memory_per_class: number of items of each class that rehearsal stores; 0 for no memory.
        rehearsal: selection of these items: "random" (`random_rows`) or "herding" (`herding_rows`).
        replacements: task number -> network that replaces the current one before this task.
        pretraining_folder: folder in which runs of several methods share pre-trained networks and their logs: in
            `simplex` those of hoc and simplex, in `linear` those of er, fd, bct, oca, asnn and nnp; None for the run's
            own folder.
        hoc_reference: as in `train_versions`, for hoc; "all" also for fd by cosine.  Other methods use the deployed
            version.
        replacement_junction, replacement_frozen: as in `train_versions`; "aligned" needs hoc or simplex.
        denoise: as in `train_versions`, for hoc, and fd by cosine.
        align: as in `train_versions`; "older" is not for oca.
    """

    kind: str = "class_incremental"
    counts: tuple[int, ...] = ()
    parts: int = 1
    sets: tuple[str, ...] = ()
    pretraining_from: int | None = None
    epochs: int | None = None
    schedules: dict[int, Schedule] = field(default_factory=dict)
    memory_per_class: int = 20
    rehearsal: str = "random"
    replacements: dict[int, ReplacementConfig] = field(default_factory=dict)
    pretraining_folder: str | None = None
    hoc_reference: str | None = None
    replacement_junction: str | None = None
    replacement_frozen: float | None = None
    denoise: float = 0.0
    align: str | None = None

    def __post_init__(self) -> None:
        check_name("kind", self.kind, (*_CLASSIFYING, "retrieval_sequence"))
        for option, meaning, kinds in (
            ("counts", "the number of new classes of each task", ("class_incremental",)),
            ("sets", "the data set of each task", ("dataset_sequence", "retrieval_sequence")),
        ):
            if (self.kind in kinds) != bool(getattr(self, option)):
                needs = f"needs {option}, {meaning}" if self.kind in kinds else f"takes no {option}"
                raise ValueError(f'kind="{self.kind}" {needs}')
        check_fits(self, "kind", _OF_TASKS)
        if self.sets and self.pretraining_from is not None:
            raise ValueError(
                "pretraining_from excludes sets; leave it out (images can be pre-trained on data.pretraining)"
            )
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        check_name("rehearsal", self.rehearsal, SELECTIONS)
        if self.hoc_reference is not None:
            check_name("hoc_reference", self.hoc_reference, REFERENCES)
        if self.replacement_junction is not None:
            check_name("replacement_junction", self.replacement_junction, JUNCTIONS)
        if self.replacement_frozen is not None and not 0 <= self.replacement_frozen < 1:
            raise ValueError(f"replacement_frozen is a fraction of steps, in [0, 1), got {self.replacement_frozen}")
        check_fraction("denoise", self.denoise)
        if self.align is not None:
            check_name("align", self.align, ALIGN)
        if self.memory_per_class < 0:
            raise ValueError(f"memory_per_class must be 0 or more, got {self.memory_per_class}")
        if 0 in self.replacements and self.replacements[0].source == "tasks":
            raise ValueError('replacements.0.source is "tasks", and no task is before task 0; take "apart"')

    @property
    def remembers(self) -> bool:
        """Whether rehearsal stores items; a retrieval sequence has no memory."""
        return self.memory_per_class > 0 and self.kind in _CLASSIFYING


@dataclass(frozen=True)
class TrainerConfig:
    """Options of `Trainer`.

    Args:
        device: a device of torch; None for this process's GPU, or the CPU if there is none.
        precision, ema, compile, save_every, keep, log_every: as in `Trainer`.
        loggers: names of loggers that receive a copy of the logs during training: "tensorboard", "wandb", or both.

    Raises:
        ValueError: the device or a logger is unknown.
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
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise ValueError(f"device must be one that torch knows, got {self.device!r}") from None
        for name in self.loggers:
            check_name("loggers", name, LOGGERS)


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run; the results depend only on it and the data.

    Args:
        tasks: the sequence of tasks.
        schedule: schedule of every task without its own schedule.
        data, model, method, trainer: options of each of these.
        protocols: names of `simplexfix.retrieval.PROTOCOLS`, by which versions are evaluated at the end.
        seed: seed of splits, weights, batches and memory, at least 0.

    Raises:
        ValueError: an option is out of range, or two options exclude each other; the message names them.

    Example:
        >>> from simplexfix.training import RunConfig, Schedule, TasksConfig
        >>> config = RunConfig(TasksConfig(counts=(60, 40)), Schedule(120, 3e-3))
        >>> config.method.name
        'hoc'
    """

    tasks: TasksConfig
    schedule: Schedule
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if not self.protocols:
            raise ValueError(f"protocols must name at least one of {', '.join(PROTOCOLS)}")
        for protocol in self.protocols:
            check_name("protocols", protocol, PROTOCOLS)
        reference = self.hoc_reference
        if reference == "all" and not self.tasks.memory_per_class:
            raise ValueError(
                'tasks.hoc_reference="all" needs remembered items, but tasks.memory_per_class is 0; set it to 1 or '
                'more, or take "deployed"'
            )
        directions = self.method.name == "hoc" or (self.method.name, self.method.distance) == ("fd", "cosine")
        for option, chosen in (('hoc_reference="all"', reference == "all"), ("denoise", self.tasks.denoise != 0)):
            if chosen and not directions:
                distance = f' with method.distance="{self.method.distance}"' if self.method.name == "fd" else ""
                raise ValueError(
                    f'tasks.{option} needs method.name="hoc", or "fd" with method.distance="cosine", '
                    f'got method.name="{self.method.name}"{distance}'
                )
        if reference in ("deployed_or_replacement", "replacement"):
            own = [t for t in self.tasks.replacements if t == 0 or reference == "replacement"]
            fresh = [t for t in own if self.tasks.replacements[t].schedule is None]
            if fresh:
                raise ValueError(
                    f'tasks.hoc_reference="{reference}" needs pre-trained replacements, but those of tasks '
                    f'{fresh} are not; give them classes and schedule, or set "deployed"'
                )
        if self.tasks.replacement_junction == "aligned" and (
            self.method.name not in SIMPLEX or self.method.classification != "cross_entropy"
        ):
            raise ValueError(
                'tasks.replacement_junction="aligned" needs method.name="hoc" or "simplex", and '
                f'method.classification="cross_entropy"; got "{self.method.name}" and '
                f'"{self.method.classification}"; set it to "kept"'
            )
        if self.tasks.align == "older" and self.method.name == "oca":
            raise ValueError(
                'method.name="oca" needs tasks.align="none": a rotation would mix the dimensions of the prefixes that '
                "older galleries use"
            )
        incremental = len(self.tasks.counts or self.tasks.sets) > 1
        if self.method.name == "oca" and incremental and not self.tasks.memory_per_class:
            raise ValueError(
                'method.name="oca" needs items of every class in every task, for its prototypes, but '
                "tasks.memory_per_class is 0; set it to 1 or more"
            )
        networks = [self.model, *(plan.model for plan in self.tasks.replacements.values())]
        pretrained = [network.kind for network in networks if network.pretrained]
        ours = self.data.mean == CIFAR100_MEAN or self.data.std == CIFAR100_STD
        if pretrained and ours and self.data.kind in _OF_DATA["mean"]:
            raise ValueError(
                f"set data.mean and data.std to those with which {pretrained[0]} was pre-trained; at least one is "
                "still CIFAR-100's.  timm has them in pretrained_cfg, torchvision in the weights' transforms(); most "
                "networks have [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225]"
            )
        if self.tasks.kind == "dataset_sequence" and self.data.kind not in ("features", "images"):
            raise ValueError(
                f'tasks.kind="dataset_sequence" needs data.kind="features" or "images", got {self.data.kind!r}'
            )
        self._check_retrieval()

    @property
    def hoc_reference(self) -> str | None:
        """The `hoc_reference` that `train_versions` gets: None for methods without this option."""
        reference = self.tasks.hoc_reference
        return reference if self.method.name == "hoc" or (self.method.name, reference) == ("fd", "all") else None

    def _check_retrieval(self) -> None:
        chosen = {
            'data.kind="retrieval"': self.data.kind == "retrieval",
            'tasks.kind="retrieval_sequence"': self.tasks.kind == "retrieval_sequence",
            'method.name="qdc"': self.method.name == "qdc",
        }
        if not any(chosen.values()):
            if self.model.kind == "text":
                raise ValueError('model.kind="text" needs data.kind="retrieval"')
            return
        missing = [choice for choice, made in chosen.items() if not made]
        if missing:
            raise ValueError(f"{', '.join(chosen)} belong together; {' and '.join(missing)} must be chosen too")
        if self.tasks.replacements:
            raise ValueError(
                'tasks.replacements must be empty with method.name="qdc": it models the drift of queries as a '
                "translation, which holds only between fine-tunes of one encoder"
            )
        if self.model.kind not in ("linear", "mlp", "text"):
            raise ValueError(
                f'data.kind="retrieval" needs model.kind="text", "linear" or "mlp", got {self.model.kind!r}'
            )
        if self.protocols != tuple(PROTOCOLS):
            raise ValueError(
                "protocols must be left out for a retrieval sequence, which is scored by its relevance judgements"
            )


def pretraining_folder(run: Path, shared: str | None, method: str) -> Path:
    """Returns the folder of pre-trained networks: the run's own, or the shared one for this method's kind of head."""
    return run if shared is None else Path(shared, "linear" if method in ER_PRETRAINED else "simplex")
