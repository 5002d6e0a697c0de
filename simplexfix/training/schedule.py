"""The budget of one version: steps, batch, optimizer, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .._checks import check_name, check_positive
from .config import check_fits

__all__ = ["Schedule"]

_OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Schedule:
    """Steps, batch, optimizer and learning rate of one version: a linear warm-up, then a cosine decay.

        rate(step) = min(1, (step + 1) / max(1, warmup * steps))
                     * (f + (learning_rate - f) (1 + cos(pi step / steps)) / 2)

    f is `final_learning_rate`.  Every version starts the schedule again.

    Args:
        steps: number of optimizer steps, at least 1.
        learning_rate: maximum learning rate, above 0.
        batch: rows in a step, of all processes; half of them come from the memory if there is one.
        warmup: fraction of the steps, in [0, 1].
        weight_decay: weight decay of weight matrices and filters, at least 0; biases and normalisation have none.
        final_learning_rate: rate at the end of the decay, in [0, learning_rate].
        optimizer: "adamw" or "sgd".
        momentum: momentum of "sgd", in [0, 1).
        clip: maximum norm of the whole gradient, above 0; None for no clipping.
        accumulate: number of parts into which each process splits its rows of a batch, to save memory.  Losses that
            compare rows, and batch normalisation, use one part at a time.

    Raises:
        ValueError: a number is out of range, the optimizer is unknown, or `momentum` is set for "adamw".

    Example:
        >>> from simplexfix.training import Schedule
        >>> schedule = Schedule(100, 0.1)
        >>> tuple(round(schedule.at(step), 3) for step in (0, 9, 50, 99))
        (0.01, 0.098, 0.05, 0.0)
    """

    steps: int
    learning_rate: float
    batch: int = 128
    warmup: float = 0.1
    weight_decay: float = 0.05
    final_learning_rate: float = 0.0
    optimizer: str = "adamw"
    momentum: float = 0.9
    clip: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.accumulate < 1:
            raise ValueError(
                f"steps, batch and accumulate must be at least 1, got {self.steps}, {self.batch} and {self.accumulate}"
            )
        check_positive("learning_rate", self.learning_rate)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a fraction of the steps, in [0, 1], got {self.warmup}")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate must lie in [0, {self.learning_rate}], the learning rate, "
                f"got {self.final_learning_rate}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more and finite, got {self.weight_decay}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        check_name("optimizer", self.optimizer, _OPTIMIZERS)
        check_fits(self, "optimizer", {"momentum": ("sgd",)})
        if self.clip is not None:
            check_positive("clip", self.clip)

    def at(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        ramp = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        above = (self.learning_rate - self.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return ramp * (self.final_learning_rate + above)

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns a fused optimizer: others synchronize with the host to skip a step after a float16 overflow."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        sgd = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, fused=True)
        if self.momentum:
            # torch allocates these buffers uninitialised, and a first step that overflows would leave them so
            for p in trained:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
