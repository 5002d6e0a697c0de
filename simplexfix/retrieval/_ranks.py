"""The process group of a sharded gallery, with collective operations that also compare the ranks' arguments."""

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
    """Another process of the group died or did not answer in time; then no rank has a result."""


def shard_rows(n: int, rank: int, world_size: int) -> slice:
    """Returns the slice of gallery rows that belongs to one rank, in an even split by rank order.

        slice(n * rank // world_size, n * (rank + 1) // world_size)

    Args:
        n: number of rows of the whole gallery, at least 0.
        rank: in [0, world_size).
        world_size: number of processes.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
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
    """Context manager for the gloo process group of all processes that `torchrun` started.

        with process_group() as group:
            mine = shard_rows(len(gallery), group.rank(), group.size())
            scores, ids = sharded_cosine_topk(query, gallery[mine], k, group=group)

    The block ends with a barrier, so that an error on one rank fails all ranks.  Then the group is destroyed.

    Args:
        timeout: longest wait for the other ranks in one exchange; allow for uneven work between exchanges.

    Raises:
        ValueError: RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT is not in the environment, or a group exists already.
        RankDiedError: another process did not join, or died.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise ValueError(f"torch {torch.__version__} was built without gloo, by which processes share a gallery")
    try:
        dist.init_process_group("gloo", timeout=timeout)
    except RuntimeError as error:  # a ValueError names the missing environment variable and passes through
        raise RankDiedError(f"the processes could not form a group: {error}") from error
    # A gloo thread that takes the GIL during interpreter shutdown aborts the process.  A reference cycle, such as an
    # exception with its traceback, can keep the group and its threads alive until then; collect it before.
    atexit.register(gc.collect)
    try:
        ranks = Ranks(None)
        yield ranks.group
        ranks.wait()
    finally:
        dist.destroy_process_group()


class ShardInfo(NamedTuple):
    """Description of a rank's shard that all ranks exchange before the work begins."""

    same: dict[str, object]  # name -> value of properties that must be equal on all ranks
    rows: int  # number of rows of the shard
    classes: NDArray[np.int64] | None = None  # class ids in the shard
    leaves_out: bool = False  # whether the shard holds an item that is also a query


class Ranks:
    """Collective operations of this process in its group, on host tensors over gloo.

    Raises:
        ValueError: there is no process group, or it has no gloo backend.
        RankDiedError: from every collective operation, if another rank died or timed out.
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
            raise ValueError("this process is not in group: call this on the ranks of group only")
        backends = dist.get_backend_config(self.group)
        if "gloo" not in backends:
            raise ValueError(
                f'group must have the backend gloo for CPU tensors, got {backends}; pass backend="cpu:gloo,cuda:nccl"'
            )

    def agree(self, read: Callable[[], tuple[_Read, ShardInfo]]) -> tuple[_Read, list[ShardInfo]]:
        """Calls `read` on every rank; returns its result and the shard infos of all ranks in rank order.

        Raises:
            TypeError, ValueError: on every rank, the error of the first rank whose `read` raised.
            ValueError: a property in `same` differs between ranks.
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
                finally:  # break the cycle of traceback and frame, which would keep gloo's threads alive
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
        """All-gather: tensors of all ranks in rank order; shapes and dtypes must be equal."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._peers():
            dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def maximum(self, tensor: Tensor) -> Tensor:
        """All-reduce with the elementwise maximum, in place."""
        with self._peers():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def take_from_previous(self, tensor: Tensor) -> Tensor:
        """Receives the tensor from the previous rank, in place; rank 0 keeps its own."""
        if self.rank:
            with self._peers():
                dist.recv(tensor, group=self.group, group_src=self.rank - 1)
        return tensor

    def pass_to_next(self, tensor: Tensor) -> None:
        """Sends the tensor to the next rank; the last rank sends nothing."""
        if not self.is_last:
            with self._peers():
                dist.send(tensor, group=self.group, group_dst=self.rank + 1)

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def take_from_last(self, tensor: Tensor) -> Tensor:
        """Broadcasts the last rank's tensor, in place."""
        with self._peers():
            dist.broadcast(tensor, group=self.group, group_src=self.size - 1)
        return tensor

    def wait(self) -> None:
        """Barrier: blocks until all ranks have reached it."""
        with self._peers():
            dist.barrier(group=self.group)

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Converts gloo's errors (closed connection, timeout) to `RankDiedError`."""
        try:
            yield
        except RuntimeError as error:
            raise RankDiedError(
                f"rank {self.rank} of {self.size} lost another process, which ended or timed out; there is no "
                f"result, and this rank ends too.  See the other's output for the reason.  ({error})"
            ) from error
