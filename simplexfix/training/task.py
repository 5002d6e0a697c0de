"""Training one version: from scratch, or fine-tuned from another on new and remembered items."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_positive
from ..methods import Method
from ..models import EmbeddingModel
from .items import Items, row_batches, seeded

__all__ = ["Schedule", "train_version"]


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine decay to zero.

    Args:
        steps: batches.
        learning_rate: its highest value.
        batch: rows; half of them remembered where there is a memory.
        warmup: share of the steps.
        weight_decay: of weight matrices and filters; biases and normalisation have none.

    Raises:
        ValueError: no steps, no rows, a learning rate that is not positive, or a warm-up outside [0, 1].
    """

    steps: int
    learning_rate: float
    batch: int = 128
    warmup: float = 0.1
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
        check_positive("learning_rate", self.learning_rate)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, in [0, 1], got {self.warmup}")

    def at(self, step: int) -> float:
        """The learning rate of a step."""
        ramp = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        return self.learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def train_version(
    parent: EmbeddingModel,
    method: Method,
    items: Items,
    schedule: Schedule,
    *,
    classes: range,
    seed: int,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    memory: Items | None = None,
    old: EmbeddingModel | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> EmbeddingModel:
    """A new version, trained from a copy of `parent`, which stays as it is.

    Args:
        parent: the version before, a replacement, or a fresh network.
        method: of `simplexfix.methods`.
        items: new inputs and class ids.
        schedule: budget and learning rate.
        classes: all class ids so far, 0 up to the last.
        seed: of batches, augmentation and new weights; the global generators are left alone.
        augment: (inputs [B, ...], generator) -> what the network takes.
        memory: remembered items of earlier classes, half of every batch.
        old: the deployed version whose gallery is to stay searchable; it is not trained.
        on_step: called after every step.

    Returns:
        The version, in evaluation mode.

    Raises:
        ValueError: `old` is in training mode.
    """
    if old is not None and old.training:
        raise ValueError("old is in training mode: its batch statistics would change; call old.eval()")
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model = copy.deepcopy(parent)
        method.add_classes(model, classes)
    model.train()
    new_rows = schedule.batch if memory is None else schedule.batch // 2
    draw_new = row_batches(len(items.labels), new_rows, generator)
    draw_old = None if memory is None else row_batches(len(memory.labels), schedule.batch - new_rows, generator)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        batch = items.take(next(draw_new))
        if memory is not None and draw_old is not None:
            batch = batch.joined(memory.take(next(draw_old)))
        loss = method.loss(model, augment(batch.inputs, generator), batch.labels, old)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step()
    return model.eval()
