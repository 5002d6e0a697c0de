"""Task sequences, and the loop that trains a version per task: CL2R, and IAM-CL2R with replacements."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .._checks import check_name
from .._seeds import mixed_seed, seeded
from ..heads import SimplexHead
from ..methods import HOC, Method, ReadsOldEmbeddings
from ..models import EmbeddingModel
from . import processes
from .checkpoint import fingerprint, read_state, write_state
from .items import Items
from .junction import ALIGN, JUNCTIONS, aligned_with_older, with_rotation
from .references import with_references
from .resume import check_resumable, describe
from .schedule import Schedule
from .trainer import Trainer

__all__ = [
    "Task",
    "class_incremental",
    "class_order",
    "dataset_sequence",
    "instance_incremental",
    "train_versions",
]

_Selection = Callable[[EmbeddingModel, Items, np.random.Generator], Tensor]

REFERENCES = ("all", "deployed", "deployed_or_replacement", "replacement")


@dataclass(frozen=True, eq=False)
class Task:
    """The training data of one version.

    Args:
        items: new items.  Labels are class ids that are numbered from 0 in the order in which tasks add the classes.
        classes: range of all class ids up to this task, from 0.
    """

    items: Items
    classes: range


def class_order(labels: Tensor, *, seed: int) -> Tensor:
    """Returns the classes in a random order, in which a task sequence numbers them from 0.

    Args:
        labels: [N] int64 class ids.
        seed: seed of the order.

    Returns:
        [C] int64 distinct class ids of `labels`; entry i has id i in the task sequence.

    Example:
        >>> import torch
        >>> from simplexfix.training import class_order
        >>> class_order(torch.tensor([5, 5, 9, 7]), seed=0)
        tensor([9, 5, 7])
    """
    classes = torch.unique(labels)
    order: Tensor = classes[torch.from_numpy(np.random.default_rng(seed).permutation(len(classes)))]
    return order


def class_incremental(items: Items | Dataset[Any], counts: Sequence[int], *, seed: int) -> list[Task]:
    """Splits items into tasks; each task has new classes, in the order of `class_order`.

    Args:
        items: N labelled items, or a map-style dataset (`Items.from_dataset`).
        counts: number of new classes of each task, at least 1; classes beyond their sum are not used.
        seed: seed of the order of classes.

    Returns:
        One task per count, with all items of its new classes.

    Raises:
        TypeError: the dataset is not map-style, or its labels are not integers.
        ValueError: a count is below 1, or the sum exceeds the number of classes.

    Example:
        >>> import torch
        >>> from simplexfix.training import Items, class_incremental
        >>> items = Items(torch.randn(12, 4), torch.arange(12) % 4)
        >>> tasks = class_incremental(items, [2, 1], seed=0)
        >>> tuple((task.classes, len(task.items.labels)) for task in tasks)
        ((range(0, 2), 6), (range(0, 3), 3))
    """
    items = Items.of(items)
    order = class_order(items.labels, seed=seed)
    if not counts or min(counts) < 1 or sum(counts) > len(order):
        raise ValueError(
            f"counts must be one or more numbers of at least 1, with a sum of at most {len(order)}, the number of "
            f"classes; got {list(counts)}"
        )
    ids = _positions(items.labels, order)
    stops = np.cumsum(counts).tolist()
    return [
        Task(_renamed(items, ids, order, (ids >= stop - count) & (ids < stop)), range(stop))
        for count, stop in zip(counts, stops, strict=True)
    ]


def instance_incremental(items: Items | Dataset[Any], parts: int, *, seed: int) -> list[Task]:
    """Splits items into tasks that have all classes: every task has an equal fraction of each class's items.

    Args:
        items: N labelled items, or a map-style dataset (`Items.from_dataset`).
        parts: number of tasks, from 1 to the number of items of the smallest class.
        seed: seed of the split and of the order of classes.

    Returns:
        `parts` tasks, which have no item in common.

    Raises:
        TypeError: the dataset is not map-style, or its labels are not integers.
        ValueError: `parts` is out of range.

    Example:
        >>> import torch
        >>> from simplexfix.training import Items, instance_incremental
        >>> items = Items(torch.randn(12, 4), torch.arange(12) % 4)
        >>> tasks = instance_incremental(items, 3, seed=0)
        >>> tuple((task.classes, len(task.items.labels)) for task in tasks)
        ((range(0, 4), 4), (range(0, 4), 4), (range(0, 4), 4))
    """
    items = Items.of(items)
    order = class_order(items.labels, seed=seed)
    ids = _positions(items.labels, order)
    least = int(torch.bincount(ids).min())
    if not 1 <= parts <= least:
        raise ValueError(f"parts must lie in [1, {least}]: the smallest class has {least} items; got {parts}")
    drawn = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(ids)))
    part = torch.empty_like(ids)
    for c in range(len(order)):
        rows = drawn[ids[drawn] == c]
        part[rows] = torch.arange(len(rows)) * parts // len(rows)
    return [Task(_renamed(items, ids, order, part == t), range(len(order))) for t in range(parts)]


def dataset_sequence(sets: Sequence[Items | Dataset[Any]], *, seed: int) -> list[Task]:
    """Returns one task per data set; classes of different data sets are different, even if their ids are equal.

    Args:
        sets: labelled items or map-style datasets, with inputs of one shape and dtype.
        seed: seed of the order of classes within each data set.

    Raises:
        TypeError: a dataset is not map-style, or its labels are not integers.
        ValueError: `sets` is empty, or shapes or dtypes differ.

    Example:
        >>> import torch
        >>> from simplexfix.training import Items, dataset_sequence
        >>> items = Items(torch.randn(12, 4), torch.arange(12) % 4)
        >>> tuple(task.classes for task in dataset_sequence([items, items], seed=0))
        (range(0, 4), range(0, 8))
    """
    parts = [Items.of(items) for items in sets]
    kinds = {(tuple(items.inputs.shape[1:]), items.inputs.dtype) for items in parts}
    if len(kinds) != 1:
        found = ", ".join(f"{list(shape)} {dtype}" for shape, dtype in sorted(kinds, key=str)) or "none"
        raise ValueError(
            f"sets needs at least one data set, and all inputs must have the same shape and dtype, got {found}"
        )
    tasks: list[Task] = []
    known = 0
    names: tuple[str, ...] | None = ()
    for items in parts:
        order = class_order(items.labels, seed=seed)
        new = _names(items, order)
        names = None if names is None or new is None else names + new
        ids = _positions(items.labels, order) + known
        known += len(order)
        tasks.append(Task(Items(items.inputs, ids, names), range(known)))
    return tasks


def train_versions(
    trainer: Trainer,
    tasks: Sequence[Task],
    start: Callable[[], nn.Module],
    schedule: Schedule | Sequence[Schedule],
    *,
    seed: int,
    rehearsal: _Selection | None = None,
    replacements: Mapping[int, Callable[[], nn.Module]] | None = None,
    hoc_reference: str | None = None,
    replacement_junction: str | None = None,
    replacement_frozen: float | None = None,
    denoise: float = 0.0,
    align: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    on_step: Callable[[int, int], None] = lambda task, step: None,
) -> Iterator[EmbeddingModel]:
    """Yields a version per task as soon as it is trained: CL2R, or IAM-CL2R with replacements.

        model = start()
        for t, task in enumerate(tasks):
            if t in replacements: model = replacements[t]()
            model = fine-tune(model, task.items + memory, old=the version of t - 1)
            memory += rehearsal(model, task.items)

    With a folder, each task has a subfolder, and the same call resumes a stopped sequence.  Finished versions are read,
    and the current one resumes from its newest checkpoint (`Trainer.fit`).  Construct the method again for that call:
    its slot registry must be as at the beginning, without the classes of earlier tasks.

    Args:
        trainer: trainer with the method.
        tasks: tasks in order, from `class_incremental` and the like, or constructed.
        start: function that returns the first network: an `EmbeddingModel`, or a backbone with `out_features`, which
            gets a new head.
        schedule: one schedule for all tasks, or one for each.
        seed: seed of new weights, batches and the choice of remembered items.
        rehearsal: function (version, items, generator) -> indices [n] of items to remember; None for no memory.
        replacements: task number -> function that returns the replacement before this task, of any architecture.  An
            `EmbeddingModel` keeps its pre-trained head.  A backbone with `out_features` gets a new head, with a
            junction of its width and the same slots.
        hoc_reference: the old model in the loss of a replacement.
            "deployed": the deployed version; the very first version has no old model.
            "replacement": the replacement before its training on the task, as in the authors' code; it needs a trained
            head.
            "deployed_or_replacement": the deployed version, or for the first version the replacement before training.
            "all": the same as None, but in every task the old embeddings of remembered items are those by one older
            version, which is drawn uniformly for each batch.  The memory stores these embeddings, [N, versions, d]
            float32, without augmentation.  A step does not run the older versions, but they are kept to embed the items
            that each task adds to the memory.  "all" acts on methods whose loss calls `old(input)`, such as HOC and FD
            by cosine.
            None: for HOC "deployed_or_replacement" if the first replacement has a trained head, else "deployed"; for
            other methods "deployed".
        replacement_junction: "kept" leaves the junction of a replacement that follows a deployed version as it is;
            "aligned" turns it towards that version in closed form (`Trainer.fit`).  None: "aligned" for HOC with the
            simplex cross-entropy, a junction without bias and another reference than "replacement"; else "kept".
        replacement_frozen: fraction of the steps in which the backbone of such a replacement keeps its weights.  None:
            0.1 with an "aligned" junction, else 0.
        denoise: `denoise` of `Trainer.fit`, for every version with an old model.  Stored embeddings of "all" are moved
            towards the class means of their own version.
        align: "none" or "older".  "older" rotates the embeddings of every version from the second on after its
            training, in closed form, towards those of all older versions (`aligned_with_older`).  New and remembered
            items have half of the weight each.  The iterator yields the rotated versions; training, rehearsal and
            stored embeddings use the versions without rotations.  Older versions stay in memory, and each embeds the
            items once per task.  None: "older" for HOC with another reference than "replacement", else "none".
        folder: folder of the run; None to write nothing.
        on_step: function that is called after every step with the numbers of the task and of the step in it.

    Raises:
        ValueError: the number of schedules differs from that of tasks; a key of `replacements` is not a task, or the
            embeddings of a replacement have another width; an option has an unknown name; "replacement" is chosen, and
            a replacement has no trained head; "all" is chosen without rehearsal, or with a method that it cannot act
            on; an "aligned" junction is combined with "replacement"; the folder began with another `align`; "older" is
            chosen, and items are uint8 without preprocessing.
        TypeError: "older" is chosen, and versions have prefixes, such as OCA's.

    Example:
        >>> import torch
        >>> from simplexfix import SlotRegistry
        >>> from simplexfix.methods import HOC
        >>> from simplexfix.models import FeatureMLP
        >>> from simplexfix.training import Items, Schedule, Trainer, class_incremental, train_versions
        >>> labels = torch.arange(120) % 6
        >>> items = Items(torch.randn(6, 8)[labels] + torch.randn(120, 8), labels)
        >>> tasks = class_incremental(items, (2, 2, 2), seed=0)
        >>> trainer = Trainer(HOC(SlotRegistry(16), "default"))
        >>> wider = {2: lambda: FeatureMLP(8, hidden=(32,))}      # replaces the network before the third task
        >>> start, schedule = lambda: FeatureMLP(8), Schedule(5, 1e-2)
        >>> versions = train_versions(trainer, tasks, start, schedule, seed=0, replacements=wider)
        >>> tuple(version.extract(items.inputs).shape[1] for version in versions)
        (15, 15, 15)
    """
    hoc = isinstance(trainer.method, HOC)
    if hoc_reference is None and not hoc:
        hoc_reference = "deployed"
    if hoc_reference is not None:
        check_name("hoc_reference", hoc_reference, REFERENCES)
    if hoc_reference == "all" and rehearsal is None:
        raise ValueError(
            'hoc_reference="all" needs remembered items, but rehearsal is None; pass one, or hoc_reference="deployed"'
        )
    for option, chosen in (('hoc_reference="all"', hoc_reference == "all"), ("denoise", denoise != 0)):
        if chosen:
            _check_directions(option, trainer.method)
    if align is None:
        align = "older" if hoc and hoc_reference != "replacement" else "none"
    check_name("align", align, ALIGN)
    replacements = replacements or {}
    schedules = [schedule] * len(tasks) if isinstance(schedule, Schedule) else list(schedule)
    if len(schedules) != len(tasks):
        raise ValueError(
            f"schedule must be a Schedule, or a sequence of {len(tasks)}, one per task; got {len(schedules)}"
        )
    strangers = sorted(set(replacements) - set(range(len(tasks))))
    if strangers:
        raise ValueError(f"keys of replacements must be tasks 0 to {len(tasks) - 1}, got {strangers}")
    if replacement_junction is not None:
        check_name("replacement_junction", replacement_junction, JUNCTIONS)
    if replacement_junction == "aligned" and hoc_reference == "replacement":
        raise ValueError(
            'replacement_junction="aligned" excludes hoc_reference="replacement"; pass replacement_junction="kept", or '
            "another hoc_reference"
        )
    begin = partial(_replacement_options, trainer.method, hoc_reference, replacement_junction, replacement_frozen)
    return _versions(
        trainer,
        tasks,
        start,
        schedules,
        seed,
        rehearsal,
        replacements,
        hoc_reference,
        begin,
        denoise,
        align,
        folder,
        on_step,
    )


def _versions(
    trainer: Trainer,
    tasks: Sequence[Task],
    start: Callable[[], nn.Module],
    schedules: Sequence[Schedule],
    seed: int,
    rehearsal: _Selection | None,
    replacements: Mapping[int, Callable[[], nn.Module]],
    hoc_reference: str | None,
    begin: Callable[[EmbeddingModel], dict[str, Any]],
    denoise: float,
    align: str,
    folder: str | os.PathLike[str] | None,
    on_step: Callable[[int, int], None],
) -> Iterator[EmbeddingModel]:
    version: EmbeddingModel | None = None
    memory: Items | None = None
    # versions so far, without and with their rotations; filled only if they must embed items again
    trained: list[EmbeddingModel] = []
    deployed: list[EmbeddingModel] = []
    for t, (task, schedule) in enumerate(zip(tasks, schedules, strict=True)):
        parent, old = version, version
        if t in replacements or parent is None:
            make = replacements.get(t, start)
            with seeded(mixed_seed(seed, t, 0)):
                made = make()
            with seeded(mixed_seed(seed, t, 4)):  # a separate seed: make() draws less if it reads a trained network
                parent = _with_head(made, trainer, version)
            trained_head = version is None and isinstance(made, EmbeddingModel)
            own = {
                None: trained_head,
                "all": trained_head,
                "deployed": False,
                "deployed_or_replacement": version is None,
                "replacement": True,
            }
            if t in replacements and own[hoc_reference]:
                if not isinstance(made, EmbeddingModel):
                    raise ValueError(
                        f'hoc_reference="{hoc_reference}" needs a trained head, but replacements[{t}] returned a '
                        'backbone; let it return an EmbeddingModel, or pass hoc_reference="deployed"'
                    )
                old = copy.deepcopy(made).to(trainer.device).eval()
        place = None if folder is None else Path(folder) / f"task-{t:02d}"
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # seeds the network's own draws, such as dropout
            torch.manual_seed(mixed_seed(seed, t, 3, processes.rank()))
            if align == "older" and len(tasks) > 1:
                _check_embeddable(task.items, parent, trainer)
            version = trainer.fit(
                parent,
                task.items,
                schedule,
                classes=task.classes,
                seed=mixed_seed(seed, t, 1),
                memory=memory,
                old=old,
                denoise=denoise,
                **(begin(parent) if t in replacements and version is not None else {}),
                folder=place,
                on_step=partial(on_step, t),
            )
        aligned = _aligned(version, deployed, task, memory, trainer, align, place)
        if hoc_reference == "all" or align == "older":
            trained.append(version)
            deployed.append(aligned)
        if rehearsal is not None and t + 1 < len(tasks):
            embed = partial(with_references, versions=trained, trainer=trainer) if hoc_reference == "all" else None
            memory = _remembered(version, task, memory, rehearsal, mixed_seed(seed, t, 2), place, embed)
        yield aligned


def _check_embeddable(items: Items, model: EmbeddingModel, trainer: Trainer) -> None:
    """Checks that `align="older"` can embed the items.

    Raises:
        ValueError: items are uint8 images, and neither trainer nor model has a preprocessing.
    """
    if (trainer.preprocessing or model.preprocessing) is not None:
        return
    if items.take(torch.tensor([0])).read().dtype == torch.uint8:
        raise ValueError(
            'align="older" needs a preprocessing for uint8 items, but neither trainer nor model has one; pass '
            'Trainer(preprocessing=simplexfix.data.Normalize(...)), or align="none"'
        )


def _replacement_options(
    method: Method, reference: str | None, junction: str | None, frozen: float | None, replacement: EmbeddingModel
) -> dict[str, Any]:
    """Returns the options of `Trainer.fit` for a replacement that follows a deployed version."""
    if junction is None:
        head = replacement.head
        fits = isinstance(method, HOC) and method.classification is None
        fits = fits and isinstance(head, SimplexHead) and head.junction.bias is None
        junction = "aligned" if fits and reference != "replacement" else "kept"
    if frozen is None:
        frozen = 0.1 if junction == "aligned" else 0.0
    return {"junction": junction, "frozen": frozen}


def _aligned(
    version: EmbeddingModel,
    older: Sequence[EmbeddingModel],
    task: Task,
    memory: Items | None,
    trainer: Trainer,
    align: str,
    folder: Path | None,
) -> EmbeddingModel:
    """Returns the version to deploy.  The folder stores the rotation, because its bits may differ between machines."""
    file = None if folder is None else folder / "rotation.safetensors"
    there = file is not None and processes.broadcast(file.exists())
    if not there and (align == "none" or not older):
        return version
    started_with = {"align": align, "version": fingerprint(version.state_dict())}
    if file is not None and there:
        saved = read_state(file)
        check_resumable(saved["facts"], started_with, str(file))
        rotation: Tensor = saved["rotation"]
    else:
        parts = [task.items] if memory is None else [task.items, memory]

        def act() -> Tensor:
            aligned = aligned_with_older(
                version, older, *parts, preprocessing=trainer.preprocessing, workers=trainer.workers
            )
            return aligned.rotation.cpu()  # type: ignore[union-attr]

        rotation = processes.run_on_rank0(act)
        if file is not None and processes.rank() == 0:
            write_state(file, {"facts": started_with, "rotation": rotation})
    return with_rotation(version, rotation.to(trainer.device))


def _with_head(made: nn.Module, trainer: Trainer, before: EmbeddingModel | None) -> EmbeddingModel:
    if isinstance(made, EmbeddingModel):
        model = made
    elif isinstance(width := getattr(made, "out_features", None), int):
        model = EmbeddingModel(made, trainer.method.head(width))
    else:
        raise ValueError(
            "start and replacements must return an EmbeddingModel, or a backbone with an int attribute out_features, "
            f"the width of its output; got {type(made).__name__}"
        )
    fits = isinstance(trainer.method, ReadsOldEmbeddings)  # `fit_to_old` sets the width
    if before is not None and not fits and before.embedding_dim != model.embedding_dim:
        raise ValueError(
            f"a replacement's embeddings must be {before.embedding_dim} wide like those before, "
            f"got {model.embedding_dim}"
        )
    return model


def _remembered(
    version: EmbeddingModel,
    task: Task,
    memory: Items | None,
    rehearsal: _Selection,
    seed: int,
    folder: Path | None,
    embed: Callable[[Items], Items] | None = None,
) -> Items:
    """Returns the memory after a task: items of the task's classes are selected again, from remembered and new ones.

    Items of other classes stay.  The folder stores the memory, since the selection may differ between machines.  Items
    of datasets are stored as indices into the candidates.  `embed` adds references to items; they are stored, too.
    """
    file = None if folder is None else folder / "memory.safetensors"
    started_with = {"seed": seed, "rehearsal": describe(rehearsal)}
    if embed is not None:
        started_with["hoc_reference"] = "all"
    saved: dict[str, Any] | None = None
    if file is not None and processes.broadcast(file.exists()):
        saved = read_state(file)
        check_resumable(saved["facts"], started_with, str(file))
        if "inputs" in saved:
            return Items(saved["inputs"], saved["labels"], references=saved.get("references"))
    pool, kept = task.items, None
    if memory is not None:
        again = torch.isin(memory.labels, task.items.labels)
        pool, kept = memory.take(again.nonzero()[:, 0]).joined(pool), memory.take((~again).nonzero()[:, 0])
    if saved is None:
        # one process selects for all: features by another device may differ and change the selection
        rows = torch.tensor(processes.broadcast(rehearsal(version, pool, np.random.default_rng(seed)).tolist()))
    else:
        rows = saved["rows"]
    parts = [part for part in (kept, pool.take(rows.long())) if part is not None]
    if embed is not None and saved is None:
        parts = [embed(part) for part in parts if len(part.labels)] or parts
    result = reduce(Items.joined, parts)
    if saved is not None:
        result = replace(result, references=saved.get("references"))
    if file is not None and saved is None and processes.rank() == 0:
        in_memory = isinstance(result.inputs, Tensor)
        what = {"inputs": result.inputs, "labels": result.labels} if in_memory else {"rows": rows}
        references = {} if result.references is None else {"references": result.references}
        write_state(file, {"facts": started_with, **what, **references})
    return result


def _check_directions(option: str, method: Method) -> None:
    """Checks that the method's loss compares directions of embeddings with those of `old(input)`.

    Raises:
        ValueError: the loss does not compare them.
    """
    if isinstance(method, ReadsOldEmbeddings) or getattr(method, "distance", "cosine") != "cosine":
        raise ValueError(
            f"{option} needs a method that compares unit embeddings of old and new models of the same width, such as "
            f'HOC or FD(distance="cosine"); got {describe(method)["type"]}'
        )


def _positions(labels: Tensor, order: Tensor) -> Tensor:
    """Returns the position of each label in `order`."""
    ascending, places = order.sort()
    return places[torch.searchsorted(ascending, labels)]


def _names(items: Items, order: Tensor) -> tuple[str, ...] | None:
    return None if items.class_names is None else tuple(items.class_names[c] for c in order.tolist())


def _renamed(items: Items, ids: Tensor, order: Tensor, chosen: Tensor) -> Items:
    rows = chosen.nonzero()[:, 0]
    return Items(items.inputs[rows], ids[rows], _names(items, order))
