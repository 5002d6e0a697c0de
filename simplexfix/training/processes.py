"""One of several processes, or the only one: the same calls for both."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["agreed", "gathered", "meet", "rank", "world"]


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def agreed(value: Any) -> Any:
    """The first process's value, on all of them."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gathered(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
