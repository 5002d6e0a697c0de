"""Which rows make the batch of a step: new ones, and as many remembered ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._seeds import mixed_seed, seeded
from .items import RowBatches

__all__ = ["BalancedSampler", "batch_sizes", "check_lone_row"]


def batch_sizes(batch: int, remembers: bool, world: int, accumulate: int = 1) -> tuple[int, int]:
    """New and remembered rows of a batch, which processes and parts share evenly.

    Raises:
        ValueError: they cannot: the mean of their gradients would not be that of the batch.
    """
    sizes = (batch // 2, batch - batch // 2) if remembers else (batch, 0)
    if sizes[0] < 1:
        raise ValueError(f"batch must hold a row, and two where some are remembered, got {batch}")
    if any(size % (world * accumulate) for size in sizes):
        parts = f" with {accumulate} parts each" if accumulate > 1 else ""
        raise ValueError(
            f"{sizes[0]} new and {sizes[1]} remembered rows of a batch cannot be shared out evenly over {world} "
            f"processes{parts}"
        )
    return sizes


def check_lone_row(
    name: str, network: nn.Module, input: Tensor, *, batch: int, world: int, accumulate: int = 1
) -> None:
    """Every part of a batch has the same number of rows; batch normalisation cannot train on parts of one.

    Args:
        name: of the network, for the message.
        network: left as it is.
        input: [1, ...], as the network takes it, on its device.
        batch, world, accumulate: rows of a batch, of so many processes, with so many parts each.

    Raises:
        ValueError: parts have one row, and the network does not take that in training.
    """
    parts = world * accumulate
    # statistics over all processes have more rows
    kinds = [type(module) for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if batch // parts > 1 or not set(kinds) - {nn.SyncBatchNorm}:
        return
    with seeded(0), torch.no_grad():
        try:
            copy.deepcopy(network).train()(input)
        except ValueError as error:  # by torch where a channel has one value; an image has more
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"batch must be at least {2 * parts}: {name} has batch normalisation, which needs two rows in each "
                f"part of a batch, and {batch} rows over {world} processes with {accumulate} parts each leave one; "
                "raise batch, lower accumulate, or train with fewer processes"
            ) from None


class BalancedSampler:
    """Endless batches of (new rows, remembered rows): half and half, all of them new where there is no memory.

        new rows          every one once, in random order, before any comes again: an epoch
        remembered rows   the same, apart, at their own pace

    Batches are all of one size, so the last one of an epoch holds the first rows of the next where the size does not
    divide the number of rows.  The batch is that of all processes together and does not depend on how many there are:

        rows of rank r of W = rows of the batch [r::W]

    so a state that any number of processes saved, any number can go on from.

    Args:
        new: how many new rows there are, at least 1.
        remembered: how many remembered ones; 0 for no memory.
        batch: rows of one batch, of all processes; of an odd number one more is remembered than new.
        seed: of both orders.
        rank, world: this process, of so many.

    Raises:
        ValueError: a number out of its range, or halves that cannot be shared out evenly over the processes: the mean
            of their gradients would not be that of the batch.
    """

    def __init__(self, new: int, remembered: int, batch: int, *, seed: int, rank: int = 0, world: int = 1) -> None:
        if new < 1 or remembered < 0:
            raise ValueError(f"new must be at least 1 and remembered at least 0, got {new} and {remembered}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, {world}), the processes, got {rank}")
        self.sizes = batch_sizes(batch, remembered > 0, world)
        self.rows = (new, remembered)
        self.rank = rank
        self.world = world
        self._orders = [
            RowBatches(rows, size, seed=mixed_seed(seed, number))
            for number, (rows, size) in enumerate(zip(self.rows, self.sizes, strict=True))
            if rows
        ]

    def __iter__(self) -> BalancedSampler:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """This rank's rows, [new / W] and [remembered / W] int64."""
        taken = [next(order)[self.rank :: self.world] for order in self._orders]
        return taken[0], taken[1] if len(taken) == 2 else torch.empty(0, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Where it is, between any two batches, in tensors and plain values."""
        return {
            "rows": list(self.rows),
            "sizes": list(self.sizes),
            "orders": [order.state_dict() for order in self._orders],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, to the same batches as if it had never stopped.

        Raises:
            ValueError: the state is of other numbers of rows or of another batch.
        """
        for name, mine in (("rows", self.rows), ("sizes", self.sizes)):
            if list(state[name]) != list(mine):
                raise ValueError(f"the state is of {name} {list(state[name])} (new, remembered), here are {list(mine)}")
        for order, saved in zip(self._orders, state["orders"], strict=True):
            order.load_state_dict(saved)
