"""The processes that share a gallery: `torchrun` starts them, they check that all are alike, they end together."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_integer

__all__ = ["RankDiedError", "Ranks", "ShardInfo", "process_group", "shard_rows"]

_Read = TypeVar("_Read")


class RankDiedError(RuntimeError):
    """Another process of the group died, or did not answer in time: there is no result, on any rank."""


def shard_rows(n: int, rank: int, world_size: int) -> slice:
    """The rows of one rank where n rows are shared out evenly, in rank order.

        slice(n * rank // world_size, n * (rank + 1) // world_size)

    Args:
        n: rows of the whole gallery, at least 0.
        rank: in [0, world_size).
        world_size: number of processes.

    Raises:
        TypeError: not integers.
        ValueError: out of range.
    """
    n, rank, world_size = (
        check_integer(name, value) for name, value in (("n", n), ("rank", rank), ("world_size", world_size))
    )
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size), got {rank} of {world_size}")
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


@contextmanager
def process_group(*, timeout: timedelta = timedelta(minutes=30)) -> Iterator[dist.ProcessGroup]:
    """The group of all processes that `torchrun` started, over gloo, from its environment; left on the way out.

        with process_group() as group:
            mine = shard_rows(len(gallery), group.rank(), group.size())
            scores, ids = sharded_cosine_topk(query, gallery[mine], k, group=group)

    At the end of the block the ranks wait for each other, so that one that fails in it, on whatever, fails all.

    Args:
        timeout: how long a rank waits for the others, who may have more to do in between than it has.

    Raises:
        ValueError: RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT is not in the environment, or there is a group already.
        RankDiedError: a process did not come, or is gone.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise ValueError(f"torch {torch.__version__} was built without gloo, by which processes share a gallery")
    try:
        dist.init_process_group("gloo", timeout=timeout)
    except RuntimeError as error:  # ValueError says what the environment lacks
        raise RankDiedError(f"the processes did not come together: {error}") from error
    # gloo's threads end with the group, and one that asks for the GIL of an interpreter that ends aborts the process:
    # what a circle still holds (a caller's exception, by its traceback) goes while they may have it.
    atexit.register(gc.collect)
    try:
        ranks = Ranks(None)
        yield ranks.group
        ranks.wait()
    finally:
        dist.destroy_process_group()


class ShardInfo(NamedTuple):
    """What a rank tells the others of its shard before work begins."""

    same: dict[str, object]  # what all must have alike, by the name that an error gives it
    rows: int  # of its shard
    classes: NDArray[np.int64] | None = None  # that its shard holds
    leaves_out: bool = False  # whether its shard holds a query itself


class Ranks:
    """One process's view of its group.  Tensors travel through the host, on which gloo carries all it needs.

    Raises:
        ValueError: no such group, or one without gloo.
        RankDiedError: from every method, where a peer is gone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "there is no process group: start the processes with torchrun and work inside of "
                "`with simplexfix.retrieval.process_group():`"
            )
        whole = dist.group.WORLD
        assert whole is not None
        self.group = whole if group is None else group
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group must hold this process")
        backends = dist.get_backend_config(self.group)
        if "gloo" not in backends:
            raise ValueError(f'group must have gloo for the host\'s tensors, got {backends}; e.g. "cpu:gloo,cuda:nccl"')

    def agree(self, read: Callable[[], tuple[_Read, ShardInfo]]) -> tuple[_Read, list[ShardInfo]]:
        """What this rank read, and the information of all ranks, in rank order; or the same error on every rank.

        Raises:
            TypeError, ValueError: that `read` raised on the first rank on which it did; ranks that are not alike.
        """
        mine: tuple[_Read, ShardInfo] | None = None
        refusal: tuple[bool, str] | None = None
        cause: Exception | None = None
        try:
            mine = read()
        except (TypeError, ValueError) as error:
            refusal, cause = (isinstance(error, TypeError), str(error)), error
        everyone: list[Any] = [None] * self.size
        with self._peers():
            dist.all_gather_object(everyone, (refusal, mine and mine[1]), group=self.group)
        for rank, (refused, _) in enumerate(everyone):
            if refused:
                try:
                    raise (TypeError if refused[0] else ValueError)(f"rank {rank}: {refused[1]}") from cause
                finally:  # its traceback holds this frame: a circle, in which gloo's threads outlive the group
                    cause = None
        infos: list[ShardInfo] = [info for _, info in everyone]
        for name, expected in infos[0].same.items():
            for rank, info in enumerate(infos):
                if info.same.get(name) != expected:
                    got = f"{expected} on rank 0 and {info.same.get(name)} on rank {rank}"
                    raise ValueError(f"all ranks must have the same {name}, got {got}")
        assert mine is not None
        return mine[0], infos

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor, in rank order; all of one shape and dtype."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._peers():
            dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def maximum(self, tensor: Tensor) -> Tensor:
        """Element by element over the ranks, in place."""
        with self._peers():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def take_from_previous(self, tensor: Tensor) -> Tensor:
        """What the rank before passed on, in place; the first keeps its own."""
        if self.rank:
            with self._peers():
                dist.recv(tensor, group=self.group, group_src=self.rank - 1)
        return tensor

    def pass_to_next(self, tensor: Tensor) -> None:
        """The last keeps it."""
        if not self.is_last:
            with self._peers():
                dist.send(tensor, group=self.group, group_dst=self.rank + 1)

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def take_from_last(self, tensor: Tensor) -> Tensor:
        """The last rank's tensor, in place."""
        with self._peers():
            dist.broadcast(tensor, group=self.group, group_src=self.size - 1)
        return tensor

    def wait(self) -> None:
        """Until all ranks have come here."""
        with self._peers():
            dist.barrier(group=self.group)

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """All that gloo raises in our calls: a closed connection, or a wait that ran out."""
        try:
            yield
        except RuntimeError as error:
            raise RankDiedError(
                f"rank {self.rank} of {self.size} lost a peer, which died or did not answer in time; there is no "
                f"result, and this rank ends too.  The peer's own output says why.  ({error})"
            ) from error
