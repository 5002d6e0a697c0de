"""The training step, and all state that it changes."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._devices import to_device_async
from .._seeds import mixed_seed
from ..data.dataset_rows import DatasetRows
from ..data.reading import read_ahead
from ..methods import Method
from ..models import EmbeddingModel
from . import processes
from .checkpoint import CheckpointWarning
from .items import Items
from .old_model import OldModel
from .samplers import BalancedSampler
from .schedule import Schedule

__all__ = ["DTYPES", "Augment", "Steps"]

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SCALE = 2.0**16  # initial scale of the loss in float16
_LEAST_SCALE = 1e-4  # reached after 30 overflows in a row: such gradients are nan
_NEW_FOLDER = "in a new run folder: this one would repeat the same steps and fail again"

Augment = Callable[[Tensor, torch.Generator], Tensor]
_Request = tuple[Any, ...]  # step, part, and its rows of new and of remembered items
_Part = tuple[Tensor, Tensor, Tensor | None]  # inputs, labels, and old embeddings of the remembered items or None


class _Loss(nn.Module):
    """The method's loss as a module, which DistributedDataParallel can wrap."""

    def __init__(self, method: Method, model: EmbeddingModel, old: EmbeddingModel | None) -> None:
        super().__init__()
        self.model = model
        self.untrained = (method, old)  # a tuple, so that the old model is no submodule and is not trained

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        method, old = self.untrained
        return method.loss(self.model, input, target, old)


@dataclass(frozen=True)
class _PartReader:
    """Reads the inputs and labels of one part of a batch, in this process or another one.

    If the memory has references, it also returns old embeddings of the part's remembered items.  They are by one older
    version, which is drawn at random for each step.
    """

    items: Items
    memory: Items | None
    seed: int
    rank: int
    world_size: int
    accumulate: int

    def __call__(self, request: _Request) -> _Part:
        step, i, *rows = request
        inputs_and_labels = []
        remembered = None
        for half, items in enumerate(filter(None, (self.items, self.memory))):
            chosen = items.take(torch.from_numpy(rows[half]))
            seeds = None
            if isinstance(chosen.inputs, DatasetRows):  # seeds depend on the position in the batch of all processes
                positions = (self.rank + self.world_size * (i + self.accumulate * j) for j in range(len(rows[half])))
                seeds = [mixed_seed(self.seed, 5, step, half, position) for position in positions]
            inputs_and_labels.append((chosen.read(seeds), chosen.labels))
            if chosen.references is not None:
                remembered = chosen.references[:, mixed_seed(self.seed, 6, step) % chosen.references.shape[1]]
        if len(inputs_and_labels) == 1:
            return *inputs_and_labels[0], remembered
        inputs, labels = zip(*inputs_and_labels, strict=True)
        return torch.cat(inputs), torch.cat(labels), remembered


class Steps:
    """One training of one model: `advance` does a step, `state` and `load` are for checkpoints.

    Args:
        model: model on the device; it is trained in place.
        method, old, items, memory, schedule, seed: as in `Trainer.fit`.
        augment, device, precision, ema, compile, workers: as in `Trainer`.
        frozen: number of first steps in which the backbone keeps its weights.
        denoise, means: as in `OldModel`.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        method: Method,
        old: EmbeddingModel | None,
        items: Items,
        memory: Items | None,
        schedule: Schedule,
        *,
        seed: int,
        augment: Augment | None,
        device: torch.device,
        precision: str,
        ema: float | None,
        compile: bool,
        workers: int,
        frozen: int = 0,
        denoise: float = 0.0,
        means: Tensor | None = None,
    ) -> None:
        self.schedule = schedule
        self.frozen = frozen
        self.seed = seed
        self.augment = augment
        self.device = device
        self.dtype = DTYPES[precision]
        self.rank, self.world_size = processes.rank(), processes.world_size()
        self.reader = _PartReader(items, memory, seed, self.rank, self.world_size, schedule.accumulate)
        from_dataset = any(isinstance(part.inputs, DatasetRows) for part in (items, memory) if part is not None)
        self.workers = workers if from_dataset else 0
        self.parts: Generator[_Part, None, None] | None = None
        self.old = None
        stored = memory is not None and memory.references is not None
        if old is not None and (stored or means is not None):
            old = self.old = OldModel(old, denoise, means)
        remembered = 0 if memory is None else len(memory.labels)
        self.sampler = BalancedSampler(
            len(items.labels), remembered, schedule.batch, seed=seed, rank=self.rank, world_size=self.world_size
        )
        self.model = model.train()
        if compile:
            model.backbone.compile()
        self.optimizer = schedule.optimizer_of(model)
        self.scaler = torch.amp.GradScaler(self.device.type, _SCALE, enabled=precision == "float16")
        self.loss: nn.Module = _Loss(method, model, old)
        if self.world_size > 1:
            self.loss = DistributedDataParallel(
                self.loss, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        self.ema = ema
        self.mean = [] if ema is None else [p.detach().clone() for p in model.parameters()]
        # Names of buffers that may hold batch statistics.  A buffer with infinities, such as a mask, holds none.
        self.statistics = {n for n, b in model.named_buffers() if b.is_floating_point() and b.isfinite().all()}
        self.step = 0
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)  # of losses since the last report
        self.reported = 0  # step of the last report
        self.clock = (time.perf_counter(), 0)  # time and step of the last report

    def advance(self) -> None:
        """Does one optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step)
        if self.parts is None:  # the copy of the sampler is made before the sampler advances
            self.parts = read_ahead(self.reader, self._requests(copy.deepcopy(self.sampler)), workers=self.workers)
        next(self.sampler)
        for i in range(self.schedule.accumulate):
            with self._gradient_synchronization(last_part=i + 1 == self.schedule.accumulate):
                input, target = self._part(self.parts, i)
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    loss = self.loss(input, target) / self.schedule.accumulate
                self.scaler.scale(loss).backward()
            self.total += loss.detach()
        if self.step < self.frozen:
            for p in self.model.backbone.parameters():
                p.grad = None  # the optimizer skips it: neither weight decay nor momentum changes
        if self.schedule.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.model.parameters()], 1 - self.ema)
        self.step += 1

    @torch.no_grad()
    def set_initial(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets a parameter before the first step; the moving average of the weights starts from it, too."""
        parameter.copy_(value)
        for p, mean in zip(self.model.parameters(), self.mean, strict=self.ema is not None):
            mean.copy_(p)

    def _gradient_synchronization(self, *, last_part: bool) -> AbstractContextManager[None]:
        """Averages gradients over the processes only in the last part of a batch."""
        if last_part or not isinstance(self.loss, DistributedDataParallel):
            return nullcontext()
        return self.loss.no_sync()

    def _requests(self, ahead: BalancedSampler) -> Iterator[_Request]:
        """Yields the parts of all remaining steps, from a copy of the sampler, so that workers can prefetch them."""
        for step, rows in zip(range(self.step, self.schedule.steps), ahead, strict=False):
            for i in range(self.schedule.accumulate):
                yield step, i, *(r[i :: self.schedule.accumulate].numpy() for r in rows)

    def _part(self, parts: Iterator[_Part], i: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and labels of part i: every `accumulate`-th of this rank's rows, from the i-th on."""
        input, target, remembered = next(parts)
        input, target = to_device_async(input, self.device), to_device_async(target, self.device)
        if self.old is not None:
            self.old.set_batch(target, None if remembered is None else to_device_async(remembered, self.device))
        if self.augment is not None:
            # number over all processes: W processes augment like one process with W times as many parts
            part = i * self.world_size + self.rank
            input = self.augment(input, torch.Generator().manual_seed(mixed_seed(self.seed, 2, self.step, part)))
        return input, target

    def close(self) -> None:
        """Ends the worker processes."""
        if self.parts is not None:
            self.parts.close()

    def mean_loss(self) -> float | None:
        """Returns the mean loss since the last report, over all processes; None if it overflowed in float16.

        It synchronizes with the device.

        Raises:
            FloatingPointError: the loss is nan or infinite.  In float16 such steps are skipped; the error is raised
                only if all steps, or too many in a row, were skipped.
        """
        total = self.total.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        loss = total.item() / self.world_size / max(1, self.step - self.reported)
        if self.dtype != torch.float16:
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of steps {self.reported} to {self.step - 1} is {loss}: a lower learning rate, a longer "
                    f"warm-up or clip may help, {_NEW_FOLDER}"
                )
            return loss
        scale = self.scaler.get_scale()
        if scale < _LEAST_SCALE or (self.step == self.schedule.steps and scale == _SCALE * 0.5**self.step):
            raise FloatingPointError(
                f"gradients overflow float16 or are nan: too many steps were skipped before step {self.step}, and the "
                f"loss scale fell to {scale:.2g}: a lower learning rate, clip or precision bfloat16 may help, "
                f"{_NEW_FOLDER}"
            )
        return loss if math.isfinite(loss) else None

    def check(self) -> None:
        """Checks loss, weights and batch statistics; it synchronizes with the device.

        Raises:
            FloatingPointError: one of them is nan or infinite.
        """
        self.mean_loss()
        values: dict[str, Tensor] = dict(self.model.named_parameters())
        values.update((name, b) for name, b in self.model.named_buffers() if name in self.statistics)
        finite = torch.stack([value.detach().isfinite().all() for value in values.values()]).int()
        if self.world_size > 1:  # batch statistics differ between the processes
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if finite.all():
            return
        name = list(values)[int(finite.argmin())]
        if name not in self.statistics:
            raise FloatingPointError(
                f"a weight is nan or infinite after step {self.step - 1}, because its gradient was: lower the learning "
                f"rate or clip the gradient, {_NEW_FOLDER}"
            )
        raise FloatingPointError(
            f"{name} is nan or infinite after step {self.step - 1}, because activations were: with float16 try "
            f"precision bfloat16, {_NEW_FOLDER}"
        )

    def report(self) -> dict[str, Any]:
        """Returns a line of the log and starts a new mean of losses."""
        loss = self.mean_loss()
        self.total.zero_()
        self.reported = self.step
        now = time.perf_counter()
        (last_time, last_step), self.clock = self.clock, (now, self.step)
        return {
            "step": self.step,
            **({} if loss is None else {"loss": loss}),  # JSON has no nan
            "learning_rate": self.schedule.at(self.step - 1),
            "steps_per_second": round((self.step - last_step) / max(now - last_time, 1e-9), 3),
        }

    def trained_model(self) -> EmbeddingModel:
        """Returns the model in evaluation mode, with the moving average of the weights if there is one."""
        with torch.no_grad():
            for p, mean in zip(self.model.parameters(), self.mean, strict=self.ema is not None):
                p.copy_(mean)
        self.model.backbone._compiled_call_impl = None
        if self.world_size > 1:  # batch statistics differ between the processes: all get those of rank 0
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        return self.model.eval()

    def state(self) -> dict[str, Any]:
        """Returns the state for `write_state`.  All processes must call it: it gathers their random states."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "mean": self.mean,
            "sampler": self.sampler.state_dict(),
            "reported": self.reported,
            "processes": processes.gathered({"total": self.total.item(), "random": _random_state(self.device)}),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restores a state; warns if another number of processes saved it."""
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for p, entries in self.optimizer.state.items():
            for name, value in entries.items():
                # in the parameter's memory layout: fused kernels iterate over both in memory order
                if isinstance(value, Tensor) and value.shape == p.shape:
                    entries[name] = torch.empty_like(p).copy_(value)
        self.scaler.load_state_dict(saved["scaler"])
        for mean, value in zip(self.mean, saved["mean"], strict=True):
            mean.copy_(value)
        self.sampler.load_state_dict(saved["sampler"])
        self.reported = saved["reported"]
        self.clock = (time.perf_counter(), self.step)
        per_process = saved["processes"]
        if len(per_process) == self.world_size:
            self.total.fill_(per_process[self.rank]["total"])
            _set_random_state(per_process[self.rank]["random"], self.device)
        else:
            self.total.fill_(sum(process["total"] for process in per_process) / len(per_process))
            warnings.warn(
                f"{self.world_size} processes resume a training of {len(per_process)}: random numbers that the network "
                "draws, such as dropout's, will differ from those of an uninterrupted training",
                CheckpointWarning,
                stacklevel=3,
            )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
