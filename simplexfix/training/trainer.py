"""Training one version: from scratch, or fine-tuned from another on new and remembered items.

A training with a folder survives its process: stopped at any moment and called again, it goes on from its newest
checkpoint, and what comes out is the same to the last bit as if it had never stopped.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._checks import check_name
from ..methods import Method
from ..models import EmbeddingModel
from . import processes
from .checkpoint import Checkpoints, CheckpointWarning, fingerprint, read_state, write_state
from .facts import check_no_drift, described
from .items import Items, RowBatches, mixed_seed, seeded
from .schedule import Schedule

__all__ = ["Trainer"]

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Trainer:
    """Trains versions by one method, on one device, or as one of several processes.

    Where `torch.distributed` has been initialised (under torchrun), every process calls the same: a step sees the
    same rows, augmented alike, as in one process with `accumulate` times as many parts, and gradients are averaged.
    Processes share the folder.  There is no wait for the device in a step, but every `log_every` steps and to save.

    Args:
        method: of `simplexfix.methods`.
        augment: (inputs [B, ...] on the device, a generator on the CPU) -> what the network takes; None for inputs as
            they are.
        device: where the networks are trained.
        precision: "float32", or "bfloat16" or "float16" of autocast; the latter with a loss scale.
        ema: None, or the share, in (0, 1), that the mean of the weights keeps in each step; the version then is
            that mean.
        compile: the backbone, by torch.compile.
        save_every: steps from checkpoint to checkpoint.
        keep: checkpoints that stay.
        log_every: steps from line to line of the log.

    Raises:
        ValueError: a name that is none of these, or a number out of its range.
    """

    def __init__(
        self,
        method: Method,
        *,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        ema: float | None = None,
        compile: bool = False,
        save_every: int = 500,
        keep: int = 3,
        log_every: int = 50,
    ) -> None:
        check_name("precision", precision, _DTYPES)
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"ema must be None or lie in (0, 1), got {ema}")
        if save_every < 1 or keep < 1 or log_every < 1:
            raise ValueError(
                f"save_every, keep and log_every must be at least 1, got {save_every}, {keep} and {log_every}"
            )
        self.method = method
        self.augment = augment
        self.device = torch.device(device)
        self.precision = precision
        self.ema = ema
        self.compile = compile
        self.save_every = save_every
        self.keep = keep
        self.log_every = log_every

    def fit(
        self,
        parent: EmbeddingModel,
        items: Items,
        schedule: Schedule,
        *,
        classes: range,
        seed: int,
        memory: Items | None = None,
        old: EmbeddingModel | None = None,
        folder: str | os.PathLike[str] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> EmbeddingModel:
        """A new version, trained from a copy of `parent`, which stays as it is.

        With a folder: where that holds the finished version it is read, where it holds checkpoints training goes on
        from the newest good one, and else begins.  `log.jsonl` there has a line for every `log_every` steps, each
        step once however often training was stopped; `version.safetensors` is the finished version.

        What the network itself draws, as dropout does, comes from torch's global generators: their state is part of
        every checkpoint and is set from it; at the beginning it is as the caller left it (`train_versions` seeds it).

        Args:
            parent: the version before, a replacement, or a fresh network.
            items: new inputs and class ids.
            schedule: budget and learning rate.
            classes: all class ids so far, 0 up to the last.
            seed: of batches, augmentation and new weights.
            memory: remembered items of earlier classes, half of every batch.
            old: the deployed version whose gallery is to stay searchable; it is not trained.
            folder: of this one version; None to keep nothing.
            on_step: called after every step.

        Returns:
            The version, in evaluation mode.

        Raises:
            ValueError: `old` is in training mode, a batch cannot be shared out evenly, or the folder is of a training
                that differs (configuration, data, parent or old model); names what differs.
            CheckpointError: the finished version's file is damaged.
            FloatingPointError: the loss is nan or infinite.

        Warns:
            CheckpointWarning: a damaged checkpoint is passed over, or training goes on with another number of
                processes, which the random numbers within the network depend on.
        """
        if old is not None and old.training:
            raise ValueError("old is in training mode: its batch statistics would change; call old.eval()")
        facts = {
            "schedule": asdict(schedule),
            "seed": seed,
            "classes": [classes.start, classes.stop],
            "precision": self.precision,
            "ema": self.ema,
            "compile": self.compile,
            "device": self.device.type,
            "augment": described(self.augment),
            "method": described(self.method),
        }
        if folder is not None:  # the data as well; it takes a moment
            facts["items"] = items.fingerprint()
            facts["memory"] = None if memory is None else memory.fingerprint()
            facts["parent"] = fingerprint(parent.state_dict())
            facts["old"] = None if old is None else fingerprint(old.state_dict())
        with seeded(seed):
            model = copy.deepcopy(parent)
            self.method.add_classes(model, classes)
        model.to(self.device)
        finished = None if folder is None else Path(folder) / "version.safetensors"
        if finished is not None and processes.agreed(finished.exists()):
            saved = read_state(finished)
            check_no_drift(saved["facts"], facts, str(finished))
            model.load_state_dict(saved["model"])
            return model.eval()
        run = _Run(self, model, old, items, memory, schedule, seed)
        checkpoints = None if folder is None else Checkpoints(folder, keep=self.keep)
        log = None if folder is None else _Log(Path(folder) / "log.jsonl")
        if checkpoints is not None and log is not None:
            newest = _newest(checkpoints)
            if newest is not None:
                check_no_drift(newest["facts"], facts, str(checkpoints.folder))
                run.load(newest["run"])
            log.cut(0 if newest is None else newest["log_bytes"])
        while run.step < schedule.steps:
            run.advance()
            last = run.step == schedule.steps
            if last or run.step % self.log_every == 0:
                line = run.report()
                if log is not None:
                    log.write(line)
            if checkpoints is not None and log is not None and (last or run.step % self.save_every == 0):
                run.mean_loss()  # no state of nan takes the place of a good one
                state = {"facts": facts, "run": run.state(), "log_bytes": log.synced()}
                if processes.rank() == 0:
                    checkpoints.save(run.step, state)
            on_step()
        model = run.finished()
        if finished is not None and checkpoints is not None:
            if processes.rank() == 0:
                write_state(finished, {"facts": facts, "model": model.state_dict()})
                checkpoints.clear()
            processes.meet()
        return model


class _Loss(nn.Module):
    """The method's loss as a module, for DistributedDataParallel to see its inputs and its gradients."""

    def __init__(self, method: Method, model: EmbeddingModel, old: EmbeddingModel | None) -> None:
        super().__init__()
        self.model = model
        self.frozen = (method, old)  # in a tuple: the old model's parameters are not for training

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        method, old = self.frozen
        return method.loss(self.model, input, target, old)


class _Run:
    """All that changes from step to step, and the step."""

    def __init__(
        self,
        trainer: Trainer,
        model: EmbeddingModel,
        old: EmbeddingModel | None,
        items: Items,
        memory: Items | None,
        schedule: Schedule,
        seed: int,
    ) -> None:
        self.schedule = schedule
        self.seed = seed
        self.augment = trainer.augment
        self.device = trainer.device
        self.dtype = _DTYPES[trainer.precision]
        self.rank, self.world = processes.rank(), processes.world()
        self.parts = schedule.accumulate * self.world
        sources = [items] if memory is None else [items, memory]
        new_rows = schedule.batch if memory is None else schedule.batch // 2
        sizes = (new_rows, schedule.batch - new_rows)
        if any(size % self.parts for size in sizes):
            raise ValueError(
                f"{sizes[0]} new and {sizes[1]} remembered rows of a batch cannot be shared out evenly over "
                f"{self.world} processes with {schedule.accumulate} parts each"
            )
        self.sources = [
            (source, RowBatches(len(source.labels), size, seed=mixed_seed(seed, number)))
            for number, (source, size) in enumerate(zip(sources, sizes, strict=False))
        ]
        self.model = model.train()
        if trainer.compile:
            model.backbone.compile()
        self.optimizer = schedule.optimizer_of(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=trainer.precision == "float16")
        self.loss: nn.Module = _Loss(trainer.method, model, old)
        if self.world > 1:
            self.loss = DistributedDataParallel(
                self.loss, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        self.ema = trainer.ema
        self.mean = [] if trainer.ema is None else [p.detach().clone() for p in model.parameters()]
        self.step = 0
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)  # of losses since the last report
        self.reported = 0
        self.clock = (time.perf_counter(), 0)

    def advance(self) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step)
        rows = [next(batches) for _, batches in self.sources]
        for i in range(self.schedule.accumulate):
            with self._gradients_sent(i + 1 == self.schedule.accumulate):
                input, target = self._part(rows, i * self.world + self.rank)
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    loss = self.loss(input, target) / self.schedule.accumulate
                self.scaler.scale(loss).backward()
            self.total += loss.detach()
        if self.schedule.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.model.parameters()], 1 - self.ema)
        self.step += 1

    def _gradients_sent(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self.loss, DistributedDataParallel):
            return nullcontext()
        return self.loss.no_sync()

    def _part(self, rows: list[Tensor], part: int) -> tuple[Tensor, Tensor]:
        """Every `parts`-th row from `part` on; its augmentation depends on step and part, not on who computes it."""
        taken = [source.take(r[part :: self.parts]) for (source, _), r in zip(self.sources, rows, strict=True)]
        batch = taken[0] if len(taken) == 1 else taken[0].joined(taken[1])
        input, target = batch.inputs, batch.labels
        if self.device.type == "cuda" and not input.is_cuda:  # from pinned memory, so that nobody waits for the copy
            input, target = input.pin_memory(), target.pin_memory()
        input, target = (tensor.to(self.device, non_blocking=True) for tensor in (input, target))
        if self.augment is not None:
            input = self.augment(input, torch.Generator().manual_seed(mixed_seed(self.seed, 2, self.step, part)))
        return input, target

    def mean_loss(self) -> float:
        """Since the last report, over all processes; waits for the device."""
        total = self.total.clone()
        if self.world > 1:
            dist.all_reduce(total)
        loss = total.item() / self.world / max(1, self.step - self.reported)
        if not math.isfinite(loss) and self.dtype != torch.float16:  # whose overflows the loss scale takes care of
            raise FloatingPointError(
                f"the loss of steps {self.reported} to {self.step - 1} is {loss}: a lower learning rate, a longer "
                "warm-up or clip may help"
            )
        return loss

    def report(self) -> dict[str, Any]:
        """A line of the log."""
        loss = self.mean_loss()
        self.total.zero_()
        self.reported = self.step
        now = time.perf_counter()
        (then, before), self.clock = self.clock, (now, self.step)
        return {
            "step": self.step,
            "loss": loss,
            "learning_rate": self.schedule.at(self.step - 1),
            "steps_per_second": round((self.step - before) / max(now - then, 1e-9), 3),
        }

    def finished(self) -> EmbeddingModel:
        with torch.no_grad():
            for p, mean in zip(self.model.parameters(), self.mean, strict=self.ema is not None):
                p.copy_(mean)
        self.model.backbone._compiled_call_impl = None
        if self.world > 1:  # statistics of batches are each process's own
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        return self.model.eval()

    def state(self) -> dict[str, Any]:
        """For `write_state`; all processes must call it, for each has random numbers of its own."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "mean": self.mean,
            "batches": [batches.state_dict() for _, batches in self.sources],
            "reported": self.reported,
            "processes": processes.gathered({"total": self.total.item(), "random": _random_state(self.device)}),
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for p, entries in self.optimizer.state.items():
            for name, value in entries.items():
                # in the parameter's own layout, as it had been: fused kernels walk both in order of memory
                if isinstance(value, Tensor) and value.shape == p.shape:
                    entries[name] = torch.empty_like(p).copy_(value)
        self.scaler.load_state_dict(saved["scaler"])
        for mean, value in zip(self.mean, saved["mean"], strict=True):
            mean.copy_(value)
        for (_, batches), state in zip(self.sources, saved["batches"], strict=True):
            batches.load_state_dict(state)
        self.reported = saved["reported"]
        self.clock = (time.perf_counter(), self.step)
        theirs = saved["processes"]
        if len(theirs) == self.world:
            self.total.fill_(theirs[self.rank]["total"])
            _set_random_state(theirs[self.rank]["random"], self.device)
        else:
            self.total.fill_(sum(process["total"] for process in theirs) / len(theirs))
            warnings.warn(
                f"{self.world} processes go on with a training of {len(theirs)}: what the network draws, as dropout "
                "does, will differ from what it would have drawn",
                CheckpointWarning,
                stacklevel=3,
            )


class _Log:
    """JSON lines, by the first process; cut back to where a checkpoint was, so that no step comes twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, size: int) -> None:
        if processes.rank() == 0:
            with open(self.path, "ab") as file:
                file.truncate(size)

    def write(self, line: Mapping[str, Any]) -> None:
        if processes.rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def synced(self) -> int:
        """Its size, once that has reached the disk."""
        if processes.rank() != 0:
            return 0
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _newest(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The first process chooses, all read the same."""
    found = checkpoints.newest() if processes.rank() == 0 else None
    step = processes.agreed(None if found is None else found[0])
    if step is None:
        return None
    return checkpoints.read(step) if found is None else found[1]
