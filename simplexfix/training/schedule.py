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
    """A linear warm-up and a cosine decay, anew for every version.

        rate(step) = min(1, (step + 1) / (warmup * steps)) * (f + (learning_rate - f) (1 + cos(pi step / steps)) / 2)

    with f the final learning rate.

    Args:
        steps: of the optimizer.
        learning_rate: its highest value.
        batch: rows of one step, of all processes together; half of them remembered where there is a memory.
        warmup: fraction of the steps.
        weight_decay: of weight matrices and filters; biases and normalisation have none.
        final_learning_rate: where the cosine ends.
        optimizer: "adamw", or "sgd" with momentum.
        momentum: of SGD.
        clip: largest norm of the whole gradient, or None.
        accumulate: parts that each process's rows of a batch are computed in, one after the other, for want of memory.
            Losses that compare rows, and batch normalisation, see one part at a time.

    Raises:
        ValueError: no steps, no rows, a learning rate that is not positive, a name that is none of these, or a number
            out of its range.
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
        """The learning rate of a step."""
        ramp = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        above = (self.learning_rate - self.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return ramp * (self.final_learning_rate + above)

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fused one: only these skip a step of overflown float16 gradients on the device, without asking the host."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        sgd = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, fused=True)
        if self.momentum:
            # torch's own buffers begin as memory that nobody has written, and stay so if the first step overflows
            for p in trained:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
