"""Rows of all processes of a group, differentiable: for losses that compare rows across a global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_of(rows: Tensor, group: dist.ProcessGroup) -> int:
    """This process's place in the group, once all agree on the shape and dtype of their rows.

    Raises:
        ValueError: on every process, where one's rows differ in number, width or dtype.
    """
    mine = (list(rows.shape), str(rows.dtype))
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if any(other != mine for other in everyone):
        raise ValueError(f"all processes of the group must have batches of one shape and dtype, got {everyone}")
    return dist.get_rank(group)


def all_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, ...] of each of W processes -> [W B, ...] in the order of their ranks, on all of them."""
    return _AllRows.apply(rows, group)  # type: ignore[no-any-return, no-untyped-call]


class _AllRows(torch.autograd.Function):
    """Backward: every process's gradient of these rows, added up on the process they came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [
            torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.contiguous().clone()  # what autograd hands out is not ours to add to
        dist.all_reduce(whole, group=ctx.group)  # gloo has no reduce_scatter
        return whole.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)].clone(), None
