"""Training with random batches of paired features, for the methods without a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._moments import Moments

__all__ = ["descend", "draw", "row_reader"]

_ROWS = 4096
CACHE_BYTES = 2**27  # `row_reader` caches rows, and mapped rows, up to this size each


def descend(parameters: Sequence[Tensor], loss: Callable[[], Tensor], *, steps: int, learning_rate: float) -> None:
    """Minimises a loss by Adam with a cosine schedule down to 0; changes the leaf tensors `parameters` in place."""
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
    """Returns [batch] row numbers, drawn from [begin, end) with repetition."""
    return torch.randint(begin, end, (batch,), generator=generator)


def row_reader(
    moments: Moments, version: int, mapping: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """Returns a function from [B] row numbers to the unit float32 rows of a version, or to `mapping` of them.

    Training draws the same rows many times.  They are computed once, for all methods, if all fit into `CACHE_BYTES`.
    """
    features = moments.features
    numbers = torch.arange(len(features))
    cached = None
    if 4 * len(features) * features.width(version) <= CACHE_BYTES:
        cached = moments.once(("rows", version), lambda: features.gather(version, numbers))

    def read(at: Tensor) -> Tensor:
        return features.gather(version, at) if cached is None else cached[at.to(cached.device)]

    if mapping is None:
        return read
    first = mapping(read(numbers[:1]))
    if 4 * len(features) * first.shape[1] > CACHE_BYTES:
        return lambda at: mapping(read(at))
    mapped = torch.cat([mapping(read(at)) for at in torch.split(numbers, _ROWS)])
    return lambda at: mapped[at.to(mapped.device)]
