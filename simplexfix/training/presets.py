"""Configurations to start from, by name."""

from __future__ import annotations

from dataclasses import replace

from .run_config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    ReplacementConfig,
    RunConfig,
    TasksConfig,
    TrainerConfig,
)
from .schedule import Schedule

__all__ = ["PRESETS"]

# The CL2R protocol of arXiv 2405.02581.  `_iamcl2r` adds replacements, pre-trained on a folder with ImageNet at 32
# pixels.  The paper does not give the length of pre-training; 90 epochs are our choice.
_PAPER = RunConfig(
    data=DataConfig(kind="cifar", path="data", per_class=300),
    model=ModelConfig(kind="resnet18"),
    tasks=TasksConfig(counts=(10, *[15] * 6), epochs=70, hoc_reference="replacement"),
    schedule=Schedule(
        1,  # unused: tasks.epochs sets the number of steps
        1e-3,
        warmup=0.0,
        weight_decay=5e-4,
        final_learning_rate=1e-5,
        optimizer="sgd",
    ),
    trainer=TrainerConfig(precision="float16"),
)


def _replaced(
    at: tuple[int, ...], classes: tuple[int, ...], model: ModelConfig, epochs: tuple[int, ...]
) -> dict[int, ReplacementConfig]:
    schedule = Schedule(1, 0.1, weight_decay=5e-4, optimizer="sgd")
    return {t: ReplacementConfig(model, n, schedule, e) for t, n, e in zip(at, classes, epochs, strict=True)}


def _iamcl2r(counts: tuple[int, ...], at: tuple[int, ...]) -> RunConfig:
    data = replace(_PAPER.data, pretraining="data/imagenet32")
    replacements = _replaced(at, (100, 300, 600), _PAPER.model, (90,) * 3)
    return replace(_PAPER, data=data, tasks=replace(_PAPER.tasks, counts=counts, replacements=replacements))


def _paper_half() -> RunConfig:
    data = replace(_PAPER.data, query_batches=(1,), pretraining="data/tinyimagenet32")
    replacements = _replaced((0, 2, 4), (50, 100, 200), _NARROW, (30,) * 3)
    tasks = replace(_PAPER.tasks, replacements=replacements, hoc_reference=None)
    return replace(_PAPER, data=data, model=_NARROW, tasks=tasks, trainer=TrainerConfig())


_NARROW = ModelConfig(kind="resnet18", width=32)

PRESETS = {
    # `simplexfix demo` runs this preset, and two other methods on the same tasks.  The last of the four versions is a
    # wider network: trained from scratch on all earlier characters, then fine-tuned.
    "omniglot": RunConfig(
        tasks=TasksConfig(
            counts=(60, 40, 40, 45),
            memory_per_class=6,
            schedules={0: Schedule(150, 1e-2)},
            replacements={3: ReplacementConfig(ModelConfig(width=48), source="tasks", schedule=Schedule(400, 1e-2))},
        ),
        schedule=Schedule(120, 3e-3),
        method=MethodConfig(slots=256, normalize=True, scale=12.0, lambda_=0.5),
    ),
    "cl2r": _PAPER,
    "iamcl2r-7": _iamcl2r((10, *[15] * 6), (0, 2, 4)),
    "iamcl2r-31": _iamcl2r((10, *[3] * 30), (0, 10, 20)),
    # iamcl2r-7 for two cores: one seed of er, fd, bct, simplex and hoc takes 25 to 40 minutes.  The tasks use half of
    # the classes of CIFAR-100, pre-training the other half.
    "cpu-small": RunConfig(
        data=DataConfig(kind="cifar", path="data", per_class=300, query_batches=(1,)),
        model=_NARROW,
        tasks=TasksConfig(
            counts=(8, *[7] * 6),
            pretraining_from=50,
            epochs=8,
            replacements=_replaced((0, 2, 4), (20, 35, 50), _NARROW, (30, 20, 15)),
        ),
        schedule=Schedule(1, 1e-2, weight_decay=5e-4, optimizer="sgd"),
    ),
    # iamcl2r-7 for one core and a few hours.  Tasks, their epochs and the optimizer are the paper's.  Differences: half
    # the channels, pre-training for 30 epochs on 50, 100 and 200 classes of Tiny-ImageNet at 32 pixels, our default of
    # `hoc_reference`, 10,000 queries, and float32.
    "paper-half": _paper_half(),
}
