"""Training of one version: from scratch, or fine-tuned from another version on new and remembered items.

A training with a folder can be stopped at any moment.  The same call resumes it from the newest checkpoint, and the
result has the same bits as without the stop.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._checks import check_fraction, check_integer, check_name
from .._seeds import seeded
from ..data.inputs import Preprocessing
from ..data.reading import lost_readers_named
from ..heads import CubeHead, OrthoplexHead, SimplexHead, decode_state
from ..methods import Method, ReadsOldEmbeddings, Simplex
from ..models import EmbeddingModel
from . import processes
from .checkpoint import Checkpoints, CheckpointWarning, fingerprint, read_state, write_state
from .items import Items, embeddings_of
from .junction import JUNCTIONS, aligned_junction
from .locks import folder_lock
from .old_model import class_means, denoised
from .resume import check_resumable, describe
from .samplers import batch_sizes, check_batch_norm
from .schedule import Schedule
from .steps import DTYPES, Augment, Steps

__all__ = ["Trainer"]


class Trainer:
    """Trains versions by one method, on one device, or as one of several processes.

        trainer = Trainer(HOC(SlotRegistry(1024), "default"), device="cuda", precision="bfloat16")
        version = trainer.fit(parent, items, Schedule(1000, 1e-3), classes=range(10), seed=0)

    Under `torch.distributed`, such as with torchrun, every process makes the same call and uses the same folder.
    W processes compute the step of one process with W times as many parts: the same rows, the same augmentation, and
    the mean of the gradients.  The trainer synchronizes with the device every `log_every` steps and to save.  Within a
    step only a method may synchronize, such as to gather negatives.

    Args:
        method: a method of `simplexfix.methods`, or a custom one.
        augment: (inputs [B, ...] on the device, a generator on the CPU) -> inputs of the network; None for inputs
            unchanged.
        preprocessing: inputs -> inputs of the network, without augmentation; every version gets it as its
            `preprocessing`, and methods that read old embeddings, such as OCA, extract with it.  None keeps that of the
            parent.
        device: device of the training.
        precision: "float32", or "bfloat16" or "float16" for autocast; float16 uses a loss scale.
        ema: decay of an exponential moving average of the weights, in (0, 1); the version has the averaged weights.
            None for no average.
        compile: whether to compile the backbone with `torch.compile`.
        save_every: number of steps between checkpoints, at least 1.
        keep: number of checkpoints to keep, at least 1.
        log_every: number of steps between lines of the log, at least 1.
        workers: number of processes that prefetch items of datasets, for each training process; 0 for none.  Batches
            do not depend on it.

    Raises:
        ValueError: `precision` is unknown, or a number is out of range.

    Example:
        >>> import torch
        >>> from simplexfix import SlotRegistry
        >>> from simplexfix.methods import HOC
        >>> from simplexfix.models import FeatureMLP
        >>> from simplexfix.training import Items, Schedule, Trainer, class_incremental, train_versions
        >>> labels = torch.arange(120) % 6
        >>> items = Items(torch.randn(6, 8)[labels] + torch.randn(120, 8), labels)
        >>> tasks = class_incremental(items, (3, 3), seed=0)
        >>> trainer = Trainer(HOC(SlotRegistry(16), "default"))
        >>> versions = list(train_versions(trainer, tasks, lambda: FeatureMLP(8), Schedule(5, 1e-2), seed=0))
        >>> len(versions)
        2
    """

    def __init__(
        self,
        method: Method,
        *,
        augment: Augment | None = None,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        ema: float | None = None,
        compile: bool = False,
        save_every: int = 500,
        keep: int = 3,
        log_every: int = 50,
        workers: int = 0,
    ) -> None:
        check_name("precision", precision, DTYPES)
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"ema must be None or lie in (0, 1), got {ema}")
        if save_every < 1 or keep < 1 or log_every < 1:
            raise ValueError(
                f"save_every, keep and log_every must be at least 1, got {save_every}, {keep} and {log_every}"
            )
        if check_integer("workers", workers) < 0:
            raise ValueError(f"workers must be 0 or more processes, got {workers}")
        self.method = method
        self.augment = augment
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # devices of tensors have one
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.precision = precision
        self.ema = ema
        self.compile = compile
        self.save_every = save_every
        self.keep = keep
        self.log_every = log_every
        self.workers = workers

    def fit(
        self,
        parent: EmbeddingModel,
        items: Items | Dataset[Any],
        schedule: Schedule,
        *,
        classes: range,
        seed: int,
        memory: Items | None = None,
        old: EmbeddingModel | None = None,
        junction: str = "kept",
        frozen: float = 0.0,
        denoise: float = 0.0,
        folder: str | os.PathLike[str] | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> EmbeddingModel:
        """Returns a new version, trained from a copy of `parent`.

        With a folder, a finished version is read from `version.safetensors`; otherwise training resumes from the newest
        undamaged checkpoint, or begins.  `log.jsonl` has a line for every `log_every` steps, without duplicates after a
        stop.

        Random numbers of the network itself, such as dropout, come from torch's global generators.  Checkpoints store
        and restore the state of these; a new training uses the caller's state (`train_versions` seeds it).

        Args:
            parent: the version before, a replacement, or a fresh network.  Its rotation is not used.
            items: new inputs and class ids, or a map-style dataset that `Items.from_dataset` takes.
            schedule: budget and learning rate.
            classes: range of all class ids so far, from 0.
            seed: seed of batches, augmentation and new weights.
            memory: remembered items of earlier classes, half of every batch; None for no memory.
            old: the deployed version, in evaluation mode; its gallery must stay searchable.  It is not trained.  Its
                rotation is used; `train_versions` passes versions without one.
            junction: "kept" begins with the parent's junction.  "aligned" turns it towards `old` before the first step,
                in closed form, from the embeddings of new and remembered items (`aligned_junction`).
            frozen: fraction of the steps, in [0, 1), in which only the head is trained, not the backbone.
            denoise: eta, in [0, 1].  Unit embeddings u by `old` move towards the mean m of their class over new and
                remembered items: n((1 - eta) u + eta m), n(v) = v / |v|.  0 changes nothing.  It acts on methods whose
                loss calls `old(input)`.
            folder: folder of this version only; None to write nothing.
            on_step: function that is called after every step, and after its line of the log is written, with the
                number of the step, from 1 to `schedule.steps`.

        Returns:
            The version, in evaluation mode.

        Raises:
            TypeError: "aligned" is used for a head that is not a `SimplexHead`, or that has a bias.
            ValueError: `old` is in training mode; `old` is missing or has another width with "aligned"; a label is
                outside of `classes`; a batch cannot be split evenly, or leaves a single row for batch normalisation; or
                the folder belongs to another training (configuration, data, parent or old model), and the message lists
                the differences.
            FolderInUseError: another process trains in the folder.
            CheckpointError: the file of the finished version is damaged.
            ChildProcessError: a worker process was killed, such as by lack of memory.
            FloatingPointError: the loss, a weight or a batch statistic is nan or infinite, or float16 overflows in too
                many steps in a row.  Checkpoints stay.

        Warns:
            CheckpointWarning: a damaged checkpoint is skipped; the file system does not support locks; or training
                resumes on another kind of device, which changes the last bits, or with another number of processes,
                which changes the random numbers of the network.
        """
        items = Items.of(items)
        check_name("junction", junction, JUNCTIONS)
        check_fraction("frozen", frozen)
        if frozen == 1:
            raise ValueError("frozen must be below 1: with all steps the backbone would never learn")
        check_fraction("denoise", denoise)
        if junction == "aligned":
            self._check_aligned(parent, old)
        if old is not None and old.training:
            raise ValueError("old is in training mode: its batch statistics would change; call old.eval()")
        for name, part in (("items", items), ("memory", memory)):
            if part is None or not len(part.labels):
                continue
            least, most = int(part.labels.min()), int(part.labels.max())
            if least < classes.start or most >= classes.stop:  # losses do not check labels on a GPU
                raise ValueError(
                    f"labels of {name} must lie in [{classes.start}, {classes.stop}), the classes so far, "
                    f"got {least} to {most}"
                )
        remembers = memory is not None and len(memory.labels) > 0
        batch_sizes(schedule.batch, remembers, processes.world_size(), schedule.accumulate)
        self._check_batch_norm(parent, items, schedule)
        started_with = {
            "schedule": asdict(schedule),
            "seed": seed,
            "classes": [classes.start, classes.stop],
            "precision": self.precision,
            "ema": self.ema,
            "compile": self.compile,
            "device": self.device.type,
            "augment": describe(self.augment),
            "method": describe(self.method),
        }
        if old is not None and (junction == "aligned" or denoise or isinstance(self.method, ReadsOldEmbeddings)):
            started_with["preprocessing"] = describe(self.preprocessing or old.preprocessing)
        # only if they are not the defaults, since older checkpoints lack these keys
        started_with |= {"junction": junction} if junction != "kept" else {}
        started_with |= {"frozen": frozen} if frozen else {}
        started_with |= {"denoise": denoise} if denoise else {}
        if folder is not None:  # hashes the data and the models
            started_with["items"] = items.fingerprint()
            started_with["memory"] = None if memory is None else memory.fingerprint()
            started_with["parent"] = _fingerprint(parent)
            started_with["old"] = None if old is None else _fingerprint(old)
        if old is not None and next(old.parameters()).device != self.device:
            old = copy.deepcopy(old).to(self.device)
        finished = None if folder is None else Path(folder) / "version.safetensors"
        alone: AbstractContextManager[None] = nullcontext()
        if finished is not None and not processes.broadcast(finished.exists()):
            alone = folder_lock(finished.parent)
        with alone:
            with seeded(seed):
                model = copy.deepcopy(parent)
                model.rotation = None
                self.method.add_classes(model, classes)
                if old is not None and isinstance(self.method, ReadsOldEmbeddings):
                    self.method.fit_to_old(model, old)
            model.preprocessing = self.preprocessing or model.preprocessing
            model.to(self.device)
            if finished is not None and processes.broadcast(finished.exists()):  # another process may have finished it
                saved = read_state(finished)
                check_resumable(_on(self.device, saved["facts"]), started_with, str(finished))
                if processes.rank() == 0:  # a process may have been killed after writing the version
                    Checkpoints(finished.parent).clear()
                model.load_state_dict(saved["model"])
                return model.eval()
            means = None
            if old is not None and denoise:
                means = processes.run_on_rank0(partial(self._class_means, old, items, memory, classes.stop))
                if memory is not None and memory.references is not None:
                    stored = class_means(memory.references, memory.labels, classes.stop)
                    rows = denoised(memory.references, memory.labels, stored, denoise)
                    memory = replace(memory, references=rows)
            run = Steps(
                model,
                self.method,
                old,
                items,
                memory,
                schedule,
                seed=seed,
                augment=self.augment,
                device=self.device,
                precision=self.precision,
                ema=self.ema,
                compile=self.compile,
                workers=self.workers,
                frozen=round(frozen * schedule.steps),
                denoise=denoise,
                means=means,
            )
            begin = partial(self._begin, run, old, items, memory, junction)
            with closing(run), lost_readers_named():
                return self._done(run, started_with, finished, begin, on_step)

    def _check_batch_norm(self, parent: EmbeddingModel, items: Items, schedule: Schedule) -> None:
        if schedule.batch > processes.world_size() * schedule.accumulate or not len(items.labels):
            return
        device = next(parent.parameters()).device
        input = items.take(torch.tensor([0])).read().to(device)
        if self.augment is not None:
            input = self.augment(input, torch.Generator().manual_seed(0))
        split = {"batch": schedule.batch, "world_size": processes.world_size(), "accumulate": schedule.accumulate}
        check_batch_norm(f"the {type(parent.backbone).__name__}", parent.backbone, input, **split)

    def _check_aligned(self, parent: EmbeddingModel, old: EmbeddingModel | None) -> None:
        if old is None:
            raise ValueError(
                'junction="aligned" needs old, the deployed version, but old is None; pass it, or junction="kept"'
            )
        if not isinstance(self.method, Simplex) or not isinstance(parent.head, SimplexHead):
            raise TypeError(
                'junction="aligned" needs method Simplex or HOC and a model with a SimplexHead, got '
                f"{type(self.method).__name__} and {type(parent.head).__name__}"
            )
        if parent.head.junction.bias is not None:
            raise TypeError(
                'junction="aligned" needs a junction without bias, but the parent\'s has one; pass junction="kept"'
            )
        if old.embedding_dim != parent.embedding_dim:
            raise ValueError(
                f"old must have embeddings as wide as the new ones, {parent.embedding_dim}, got {old.embedding_dim}"
            )

    def _embeddings(
        self, model: EmbeddingModel, items: Items, memory: Items | None, preprocessing: Preprocessing | None
    ) -> tuple[Tensor, Tensor]:
        """Returns unit embeddings [N, d] and labels [N] of items and memory, without augmentation, on the CPU."""
        parts = [part for part in (items, memory) if part is not None and len(part.labels)]
        prepare = self.preprocessing or preprocessing
        found = [embeddings_of(part, model, preprocessing=prepare, workers=self.workers) for part in parts]
        return torch.cat(found), torch.cat([part.labels.cpu() for part in parts])

    def _class_means(self, old: EmbeddingModel, items: Items, memory: Items | None, classes: int) -> Tensor:
        return class_means(*self._embeddings(old, items, memory, old.preprocessing), classes)

    def _begin(self, run: Steps, old: EmbeddingModel | None, items: Items, memory: Items | None, junction: str) -> None:
        """Calls `read_old` and aligns the junction, on the first process; all others get its results."""
        method = self.method
        if old is None or not (junction == "aligned" or isinstance(method, ReadsOldEmbeddings)):
            return

        def act() -> Tensor | None:
            held, labels = self._embeddings(old, items, memory, old.preprocessing)
            if isinstance(method, ReadsOldEmbeddings):
                method.read_old(run.model, held, labels)
            if junction != "aligned":
                return None
            assert isinstance(method, Simplex)
            own, _ = self._embeddings(run.model, items, memory, old.preprocessing)
            weight = run.model.head.junction.weight  # type: ignore[union-attr]
            return aligned_junction(weight, own, held, method.slots.lookup(method.namespace, labels)).cpu()  # type: ignore[arg-type]

        weight = processes.run_on_rank0(act)  # DistributedDataParallel broadcasts buffers before the first step
        if weight is not None:
            run.set_initial(run.model.head.junction.weight, weight)  # type: ignore[union-attr, arg-type]

    def _done(
        self,
        run: Steps,
        started_with: dict[str, Any],
        finished: Path | None,
        begin: Callable[[], None],
        on_step: Callable[[int], None],
    ) -> EmbeddingModel:
        """Does all remaining steps and returns the version; `begin` is called before the first step."""
        newest: dict[str, Any] | None = None
        checkpoints = None if finished is None else Checkpoints(finished.parent, keep=self.keep)
        log = None if finished is None else _Log(finished.parent / "log.jsonl")
        if checkpoints is not None and log is not None:
            newest = _newest(checkpoints)
            if newest is not None:
                check_resumable(_on(self.device, newest["facts"]), started_with, str(checkpoints.folder))
                if newest["facts"]["device"] != self.device.type:
                    warnings.warn(
                        f"a training begun on {newest['facts']['device']} resumes on {self.device.type}: its results "
                        "will differ in the last bits",
                        CheckpointWarning,
                        stacklevel=3,
                    )
                run.load(newest["run"])
            log.cut(0 if newest is None else newest["log_bytes"])
        if newest is None:
            begin()
        while run.step < run.schedule.steps:
            run.advance()
            last = run.step == run.schedule.steps
            if last or run.step % self.log_every == 0:
                line = run.report()
                if log is not None:
                    log.write(line)
            saving = checkpoints is not None and run.step % self.save_every == 0
            if last or saving:
                run.check()  # raises before a checkpoint with nan could replace a good one
            if checkpoints is not None and log is not None and (last or saving):
                state = {"facts": started_with, "run": run.state(), "log_bytes": log.synced()}
                if processes.rank() == 0:
                    checkpoints.save(run.step, state)
            on_step(run.step)
        model = run.trained_model()
        if finished is not None and checkpoints is not None:
            if processes.rank() == 0:
                write_state(finished, {"facts": started_with, "model": model.state_dict()})
                checkpoints.clear()
            processes.barrier()
        return model


class _Log:
    """JSON lines of the first process; on resume the file is truncated to its size at the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, size: int) -> None:
        if processes.rank() == 0:
            with open(self.path, "a+b") as file:  # truncates to a whole line, also if the file is shorter than `size`
                file.seek(0)
                file.truncate(file.read(size).rfind(b"\n") + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        if processes.rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def synced(self) -> int:
        """Synchronizes the file with the disk and returns its size in bytes."""
        if processes.rank() != 0:
            return 0
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def _fingerprint(model: EmbeddingModel) -> str:
    """Fingerprints a model's state; the head's classes are decoded to a dict, their form in the first checkpoints."""
    state = model.state_dict()
    if isinstance(model.head, (CubeHead, OrthoplexHead, SimplexHead)):
        state["head._extra_state"] = decode_state(state["head._extra_state"])
    return fingerprint(state)


def _on(device: torch.device, started_with: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the description of a training with this device's type, which may change on resume."""
    return {**started_with, "device": device.type}


def _newest(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Returns the newest checkpoint; the first process chooses it, and all read the same file."""
    found = checkpoints.newest() if processes.rank() == 0 else None
    step = processes.broadcast(None if found is None else found[0])
    if step is None:
        return None
    return checkpoints.read(step) if found is None else found[1]
