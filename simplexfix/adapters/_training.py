"""Gradient steps on drawn batches of paired features, for the methods without a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["descend", "draw"]


def descend(parameters: Sequence[Tensor], loss: Callable[[], Tensor], *, steps: int, learning_rate: float) -> None:
    """Adam with a cosine schedule down to 0, in place on leaf tensors that need gradients."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with torch.enable_grad():
        for _ in range(steps):
            value = loss()
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def draw(begin: int, end: int, batch: int, generator: torch.Generator) -> Tensor:
    """[batch] row numbers out of [begin, end), with repetition."""
    return torch.randint(begin, end, (batch,), generator=generator)
