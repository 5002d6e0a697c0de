"""Batches of training: half new rows, half rows of the rehearsal memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._seeds import mixed_seed, seeded
from .items import RowBatches

__all__ = ["BalancedSampler", "batch_sizes", "check_batch_norm"]


def batch_sizes(batch: int, remembers: bool, world_size: int, accumulate: int = 1) -> tuple[int, int]:
    """Returns the numbers of new and of remembered rows in a batch.

    Args:
        batch: rows in a batch, of all processes.
        remembers: whether there is a rehearsal memory.
        world_size: number of processes.
        accumulate: number of parts per process.

    Raises:
        ValueError: the batch is too small, or a number is not divisible by `world_size * accumulate`.  With unequal
            parts the mean of their gradients would not be the gradient of the batch.
    """
    sizes = (batch // 2, batch - batch // 2) if remembers else (batch, 0)
    if sizes[0] < 1:
        raise ValueError(f"batch must be at least 1, or at least 2 with remembered rows, got {batch}")
    if any(size % (world_size * accumulate) for size in sizes):
        parts = f" with {accumulate} parts each" if accumulate > 1 else ""
        raise ValueError(
            f"{sizes[0]} new and {sizes[1]} remembered rows of a batch are not divisible by {world_size} processes"
            f"{parts}: change batch, accumulate or the number of processes"
        )
    return sizes


def check_batch_norm(
    name: str, network: nn.Module, input: Tensor, *, batch: int, world_size: int, accumulate: int = 1
) -> None:
    """Checks that batch normalisation gets two rows or more in each part of a batch.

    Args:
        name: name of the network in the error message.
        network: the network; it is not changed.
        input: [1, ...] one preprocessed row on the network's device.
        batch, world_size, accumulate: as in `batch_sizes`.

    Raises:
        ValueError: a part has one row, and the network cannot train on one row.
    """
    parts = world_size * accumulate
    # SyncBatchNorm computes statistics over the rows of all processes
    kinds = [type(module) for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if batch // parts > 1 or not set(kinds) - {nn.SyncBatchNorm}:
        return
    with seeded(0), torch.no_grad():
        try:
            copy.deepcopy(network).train()(input)
        except ValueError as error:  # torch raises if a channel has a single value; a row with several pixels has more
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"batch must be at least {2 * parts}: {name} has batch normalisation, which needs two rows in each "
                f"part of a batch, and {batch} rows over {world_size} processes with {accumulate} parts each leave "
                "one; raise batch, lower accumulate, or train with fewer processes"
            ) from None


class BalancedSampler:
    """Endless iterator over batches (new rows, remembered rows), half of each; all rows are new without a memory.

    New and remembered rows each follow their own sequence of random permutations (`RowBatches`).  All batches have the
    same size, so a batch may span two epochs.  The batch of all processes does not depend on their number:

        rows of rank r of W = rows of the batch [r::W]

    So a state may be saved by one number of processes and loaded by another.

    Args:
        new: number of new rows, at least 1.
        remembered: number of remembered rows; 0 for no memory.
        batch: rows in a batch, of all processes; if it is odd, the remembered half is larger.
        seed: seed of both sequences.
        rank, world_size: rank of this process, and number of processes.

    Raises:
        ValueError: a number is out of range, or a half cannot be split evenly over the processes (`batch_sizes`).

    Example:
        >>> from simplexfix.training import BalancedSampler
        >>> new, remembered = next(BalancedSampler(1000, 200, 64, seed=0))
        >>> new.shape, remembered.shape
        (torch.Size([32]), torch.Size([32]))
    """

    def __init__(self, new: int, remembered: int, batch: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if new < 1 or remembered < 0:
            raise ValueError(f"new must be at least 1 and remembered at least 0, got {new} and {remembered}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), the processes, got {rank}")
        self.sizes = batch_sizes(batch, remembered > 0, world_size)
        self.rows = (new, remembered)
        self.rank = rank
        self.world_size = world_size
        self._orders = [
            RowBatches(rows, size, seed=mixed_seed(seed, number))
            for number, (rows, size) in enumerate(zip(self.rows, self.sizes, strict=True))
            if rows
        ]

    def __iter__(self) -> BalancedSampler:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Returns this rank's new rows and remembered rows of the next batch, int64."""
        taken = [next(order)[self.rank :: self.world_size] for order in self._orders]
        return taken[0], taken[1] if len(taken) == 2 else torch.empty(0, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state after the last batch, as tensors and plain values."""
        return {
            "rows": list(self.rows),
            "sizes": list(self.sizes),
            "orders": [order.state_dict() for order in self._orders],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state; the next batch is the one that would have followed.

        Raises:
            ValueError: the state has other numbers of rows or another batch.
        """
        for name, mine in (("rows", self.rows), ("sizes", self.sizes)):
            if list(state[name]) != list(mine):
                raise ValueError(
                    f"the state has {name} {list(state[name])} (new, remembered), but this sampler has {list(mine)}"
                )
        for order, saved in zip(self._orders, state["orders"], strict=True):
            order.load_state_dict(saved)
