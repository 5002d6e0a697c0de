"""The items of a run: reads them as configured, splits them into tasks, and holds some out for validation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import (
    Drawings,
    ImageFolderDataset,
    Normalize,
    Photographs,
    Preprocessing,
    RandomCropFlip,
    RandomWarp,
    Vectors,
    load_cifar10,
    load_cifar100,
    load_omniglot,
)
from ..labelled import VersionFeatures, load_rows
from .items import Items
from .run_config import DataConfig, RunConfig
from .scenario import Task, class_incremental, class_order, dataset_sequence, instance_incremental

__all__ = ["UNSEEN_ALPHABETS", "RunData", "load_run_data"]

UNSEEN_ALPHABETS = ("Korean", "Tagalog")  # of omniglot
_Search = tuple[Items, Items]  # query, gallery
_PARTS = ((0, "query"), (1, "gallery"))


@dataclass(frozen=True, eq=False)
class RunData:
    """The data of a run on labelled items.

    Attributes:
        tasks: one task per version.
        pretraining: items for pre-training replacements; their classes are 0, 1, ... in the seed's order.
        searched: name -> (query, gallery): the searches of `DataConfig`, and "validation" if items were held out.  Its
            queries are the held-out items, and its gallery is the training items.
        augment: (inputs, generator) -> inputs of the network, in training; None for the inputs unchanged.
        prepare: inputs -> inputs of the network for extraction, without augmentation.
    """

    tasks: list[Task]
    pretraining: Items
    searched: dict[str, _Search]
    augment: Callable[[Tensor, torch.Generator], Tensor] | None
    prepare: Preprocessing

    def fingerprint(self) -> dict[str, object]:
        """Returns a fingerprint of all items that the run depends on."""
        parts = {
            "pretraining": self.pretraining,
            **{f"task {t}": task.items for t, task in enumerate(self.tasks)},
            **{f"{name} {part}": pair[i] for name, pair in self.searched.items() for i, part in _PARTS},
        }
        return {name: items.fingerprint() for name, items in parts.items()}

    @property
    def inputs(self) -> int:
        """Number of features or channels, the argument of `ModelConfig.backbone`."""
        return int(self.tasks[0].items.inputs.shape[1])

    def first_inputs(self, count: int) -> Tensor:
        """Returns the inputs of at most `count` items of the first task."""
        items = self.tasks[0].items
        return items.take(torch.arange(min(count, len(items.labels)))).read()

    def class_names(self) -> dict[str, list[str]]:
        """Returns the class names of tasks, of pre-training and of each search, if the data has names."""
        parts = {"pretraining": self.pretraining, **{name: pair[1] for name, pair in self.searched.items()}}
        named = {name: list(items.class_names) for name, items in parts.items() if items.class_names}
        return {"tasks": list(names), **named} if (names := self.names_of(len(self.tasks) - 1)) else named

    def names_of(self, task: int) -> tuple[str, ...] | None:
        """Returns the names of all classes up to a task, or None."""
        names: tuple[str, ...] | None = self.tasks[task].items.class_names
        return names and names[: self.tasks[task].classes.stop]


def load_run_data(config: RunConfig) -> RunData:
    """Reads and splits the data of a run; the split depends only on the data and the seed.

    Raises:
        FileNotFoundError: data is missing.
        ValueError: data is damaged, inputs differ in shape, or the configuration needs more classes than there are.
    """
    plan = config.tasks
    sets, searched = _read(config.data, plan.sets or ("train",))
    sequence = dataset_sequence(sets, seed=config.seed) if plan.sets else []
    train = reduce(Items.joined, [task.items for task in sequence] or sets)
    if config.data.per_class is not None:
        train = train.take(_first_of_each_class(train.labels, config.data.per_class))
    rest = None if config.data.pretraining is None else _images(Path(config.data.pretraining), config.data)
    if plan.pretraining_from is not None:
        if rest is not None:
            raise ValueError("tasks.pretraining_from and data.pretraining exclude each other: set one of them")
        apart = train.labels >= plan.pretraining_from
        train, rest = train.take((~apart).nonzero()[:, 0]), train.take(apart.nonzero()[:, 0])
    for i, name in _PARTS:
        for items in (pair[i] for pair in searched.values()):
            if items.inputs.shape[1:] != train.inputs.shape[1:]:
                raise ValueError(
                    f"{name} has inputs of shape {list(items.inputs.shape[1:])}, training items have "
                    f"{list(train.inputs.shape[1:])}: extract both with one encoder"
                )
    held: Tensor | None = None
    if config.data.validation:
        held = _held_out(train.labels, config.data.validation, config.seed, train.class_names)
        validation = train.take(held.nonzero()[:, 0])
        train = train.take((~held).nonzero()[:, 0])
    if sequence:
        stops = [0, *(task.classes.stop for task in sequence)]
        tasks = [
            Task(train.take(((train.labels >= start) & (train.labels < stop)).nonzero()[:, 0]), range(stop))
            for start, stop in pairwise(stops)
        ]
    elif plan.kind == "instance_incremental":
        tasks = instance_incremental(train, plan.parts, seed=config.seed)
    else:
        left = len(torch.unique(train.labels)) - sum(plan.counts) if rest is None else 0
        tasks = class_incremental(train, plan.counts + ((left,) if left > 0 else ()), seed=config.seed)
        if left > 0:
            last = tasks.pop()
            names = last.items.class_names
            rest = Items(last.items.inputs, last.items.labels - sum(plan.counts), names and names[sum(plan.counts) :])
    learned = class_order(train.labels, seed=config.seed)
    if "seen" in searched:
        searched["seen"] = _of_classes(searched["seen"], learned[: tasks[0].classes.stop])
    if held is not None:
        searched["validation"] = _of_classes((validation, train), learned[: tasks[-1].classes.stop])
    if rest is None:
        rest = train.take(torch.empty(0, dtype=torch.int64))
    elif config.data.pretraining is not None or plan.pretraining_from is not None:
        (whole,) = class_incremental(rest, [len(torch.unique(rest.labels))], seed=config.seed)
        rest = whole.items
    classes = len(torch.unique(rest.labels))
    for t, replacement in plan.replacements.items():
        if replacement.classes > classes:
            raise ValueError(
                f"replacements.{t}.classes must lie in [0, {classes}], the classes for pre-training, "
                f"got {replacement.classes}"
            )
    return RunData(tasks, rest, searched, *_prepared(config.data, train.inputs))


def _read(config: DataConfig, names: Sequence[str]) -> tuple[list[Items], dict[str, _Search]]:
    """Returns the training data with these names, and the searches."""
    if config.path is None:
        return _omniglot()
    path = Path(config.path)
    if config.kind == "cifar":
        sets = (load_cifar100(path), load_cifar10(path, batches=config.query_batches), load_cifar10(path, "test"))
        train, query, gallery = (
            Items(torch.from_numpy(s.images), torch.from_numpy(s.labels), s.class_names) for s in sets
        )
        return [train], {"search": (query, gallery)}
    if config.kind == "images":
        _check_there(path, (*names, "query", "gallery"), "folders, each with a folder of images for every class")
        trained = [_images(path / name, config) for name in names]
        if len(trained) > 1:  # classes of different sets may have the same names
            trained = [
                replace(items, class_names=tuple(f"{name}/{c}" for c in items.class_names or ()))
                for name, items in zip(names, trained, strict=True)
            ]
        return trained, {"search": _searched_images(path, config)}
    files = [f"{name}{part}.npy" for name in (*names, "query", "gallery") for part in ("", "_labels")]
    _check_there(path, files, "features [N, d] and labels [N] of what is trained on and of what is searched")
    search = VersionFeatures.load(path)
    query = Items(search.query.tensor(), torch.tensor(search.items.query_labels))
    gallery = Items(search.gallery.tensor(), torch.tensor(search.items.gallery_labels))
    trained = [Items(rows.whole(), torch.tensor(labels)) for rows, labels in (load_rows(path, name) for name in names)]
    return trained, {"search": (query, gallery)}


def _omniglot() -> tuple[list[Items], dict[str, _Search]]:
    """Returns 12 drawings per character of six alphabets for training; "seen" has 8 others, "unseen" two alphabets."""
    omniglot = load_omniglot()
    images = torch.from_numpy(omniglot.images)
    unseen = torch.from_numpy(np.isin(np.array(omniglot.alphabets)[omniglot.alphabet_of], UNSEEN_ALPHABETS))
    seen_images, unseen_images = images[~unseen], images[unseen]
    searched = {
        "seen": (_drawings(seen_images[:, 16:]), _drawings(seen_images[:, 12:16])),
        "unseen": (_drawings(unseen_images[:, 10:]), _drawings(unseen_images[:, :10])),
    }
    return [_drawings(seen_images[:, :12])], searched


def _drawings(images: Tensor) -> Items:
    """Returns images [C, N, 28, 28] as C * N items of classes 0, 1, ..."""
    return Items(images.flatten(0, 1), torch.arange(len(images)).repeat_interleave(images.shape[1]))


def _of_classes(search: _Search, classes: Tensor) -> _Search:
    query, gallery = (items.take(torch.isin(items.labels, classes).nonzero()[:, 0]) for items in search)
    return query, gallery


def _check_there(path: Path, names: Sequence[str], expected: str) -> None:
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise FileNotFoundError(f"{path} has no {', '.join(missing)}; expected {expected}")


def _images(path: Path, config: DataConfig) -> Items:
    dataset = ImageFolderDataset(path, size=config.size)
    if config.workers is not None:
        return Items.from_dataset(dataset)
    needed, there = 3 * config.size**2 * len(dataset), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"{path} has {len(dataset)} images, which need {needed / 2**30:.1f} GiB of memory at data.size="
            f"{config.size}, and this machine has {there / 2**30:.1f}; data.workers=4, or another number, decodes "
            "images when they are needed"
        )
    folder = dataset.in_memory()
    return Items(torch.from_numpy(folder.images), torch.from_numpy(folder.labels), folder.class_names)


def _searched_images(path: Path, config: DataConfig) -> _Search:
    """Reads query and gallery; the folder names are the classes, and each side may lack some of them."""
    query, gallery = (_images(path / name, config) for name in ("query", "gallery"))
    names = tuple(sorted({*(query.class_names or ()), *(gallery.class_names or ())}))
    ids = {name: i for i, name in enumerate(names)}
    found = [
        Items(items.inputs, torch.tensor([ids[name] for name in items.class_names or ()])[items.labels], names)
        for items in (query, gallery)
    ]
    return found[0], found[1]


def _prepared(
    config: DataConfig, inputs: Any
) -> tuple[Callable[[Tensor, torch.Generator], Tensor] | None, Preprocessing]:
    side = inputs.shape[-1]
    if config.kind == "features":
        return None, Vectors(side)
    if config.kind == "omniglot":
        return RandomWarp(), Drawings(side)
    normalize = Normalize(config.mean, config.std)
    return RandomCropFlip(normalize, padding=side // 8), Photographs(side, normalize)


def _first_of_each_class(labels: Tensor, count: int) -> Tensor:
    rows = [(labels == c).nonzero()[:count, 0] for c in torch.unique(labels)]
    return torch.cat(rows).sort().values


def _held_out(labels: Tensor, fraction: float, seed: int, names: tuple[str, ...] | None) -> Tensor:
    """Returns a mask [N] of held-out items: a random `fraction` of each class, at least one item and never all."""
    drawn = torch.from_numpy(np.random.default_rng([seed, 2]).permutation(len(labels)))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c in torch.unique(labels).tolist():
        rows = drawn[labels[drawn] == c]
        if len(rows) < 2:
            name = f" ({names[c]})" if names else ""
            raise ValueError(f"validation needs two items of each class, class {c}{name} has one")
        held[rows[: min(len(rows) - 1, max(1, round(fraction * len(rows))))]] = True
    return held
