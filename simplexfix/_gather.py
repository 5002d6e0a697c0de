"""Differentiable all-gather of rows, for losses that compare rows across a global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_of(rows: Tensor, group: dist.ProcessGroup) -> int:
    """Returns this process's rank in the group, after a check that all processes have rows of one shape and dtype.

    Raises:
        ValueError: on every process, if shapes or dtypes differ.
    """
    mine = (list(rows.shape), str(rows.dtype))
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if any(other != mine for other in everyone):
        raise ValueError(f"all processes of the group must have batches of one shape and dtype, got {everyone}")
    return dist.get_rank(group)


def all_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gathers rows [B, ...] of W processes to [W B, ...] in rank order."""
    return _AllRows.apply(rows, group)  # type: ignore[no-any-return, no-untyped-call]


class _AllRows(torch.autograd.Function):
    """All-gather; the backward pass sums all processes' gradients of a row on the row's own process."""

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
        whole = gradient.contiguous().clone()  # copy: autograd's tensor must not be changed in place
        dist.all_reduce(whole, group=ctx.group)  # gloo has no reduce_scatter
        return whole.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)].clone(), None
