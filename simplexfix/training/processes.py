"""Collective operations that also work without a process group."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["barrier", "broadcast", "gathered", "rank", "run_on_rank0", "world_size"]

_T = TypeVar("_T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Returns the first process's value on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def run_on_rank0(act: Callable[[], _T]) -> _T:
    """Calls `act` on the first process and returns its result on every one.

    Other processes wait up to a year; the timeout of the default group does not apply.
    """
    if not dist.is_initialized():
        return act()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    try:
        values: list[Any] = [act() if rank() == 0 else None]
        dist.broadcast_object_list(values, group=group)
    finally:
        dist.destroy_process_group(group)
    return values[0]  # type: ignore[no-any-return]


def gathered(value: Any) -> list[Any]:
    """Returns the values of all processes in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
