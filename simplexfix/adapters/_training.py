"""Gradient steps on drawn batches of paired features, for the methods without a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._moments import Moments

__all__ = ["descend", "draw", "row_reader"]

_ROWS = 4096
KEPT_BYTES = 2**27  # limit of the rows of a version, and of the mapped ones, that `row_reader` stores


def descend(parameters: Sequence[Tensor], loss: Callable[[], Tensor], *, steps: int, learning_rate: float) -> None:
    """Adam with a cosine schedule down to 0, in place on leaf tensors that need gradients."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
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


def row_reader(
    moments: Moments, version: int, made: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """A function of [B] row numbers that returns the unit float32 rows of a version, mapped by `made` if it is given.

    Training draws the same rows many times.  They are computed once, for all methods, if all fit into `KEPT_BYTES`.
    """
    features = moments.features
    numbers = torch.arange(len(features))
    kept = None
    if 4 * len(features) * features.width(version) <= KEPT_BYTES:
        kept = moments.once(("rows", version), lambda: features.gather(version, numbers))

    def read(at: Tensor) -> Tensor:
        return features.gather(version, at) if kept is None else kept[at.to(kept.device)]

    if made is None:
        return read
    first = made(read(numbers[:1]))
    if 4 * len(features) * first.shape[1] > KEPT_BYTES:
        return lambda at: made(read(at))
    mapped = torch.cat([made(read(at)) for at in torch.split(numbers, _ROWS)])
    return lambda at: mapped[at.to(mapped.device)]
