"""Labelled items in memory, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._devices import sent

__all__ = ["Items", "RowBatches", "mixed_seed", "seeded"]

_GLOBAL_GENERATOR = threading.RLock()  # what makes a network may train one
_FINGERPRINT_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Items:
    """Inputs [N, ...] of any dtype and their class ids [N] int64."""

    inputs: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> Items:
        return Items(self.inputs[sent(rows, self.inputs.device)], self.labels[sent(rows, self.labels.device)])

    def joined(self, other: Items) -> Items:
        return Items(torch.cat([self.inputs, other.inputs]), torch.cat([self.labels, other.labels]))

    def fingerprint(self) -> dict[str, Any]:
        """Shape, dtype and a checksum of all labels and of 4096 rows of inputs, evenly spread (all, if not more)."""
        step = max(1, -(-len(self.labels) // _FINGERPRINT_ROWS))
        digest = hashlib.sha256()
        for tensor in (self.labels, self.inputs[::step]):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        dtype = str(self.inputs.dtype).removeprefix("torch.")
        return {"shape": list(self.inputs.shape), "dtype": dtype, "sha256": digest.hexdigest()}


class RowBatches:
    """Endless batches of `size` row numbers: every row once, in random order, before any comes again.

    Args:
        rows: how many there are.
        size: of a batch.
        seed: of the order.

    Raises:
        ValueError: no rows, or batches of none.
    """

    def __init__(self, rows: int, size: int, *, seed: int) -> None:
        if rows < 1 or size < 1:
            raise ValueError(f"rows and size must be positive, got {rows} and {size}")
        self.rows = rows
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> RowBatches:
        return self

    def __next__(self) -> Tensor:
        while len(self._left) < self.size:
            self._left = torch.cat([self._left, torch.randperm(self.rows, generator=self._generator)])
        batch, self._left = self._left[: self.size], self._left[self.size :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"generator": self._generator.get_state(), "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._generator.set_state(state["generator"])
        self._left = state["left"]


def mixed_seed(seed: int, *counters: int) -> int:
    """A seed of its own for every tuple of counters."""
    return int(np.random.SeedSequence([seed, *counters]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generator of the CPU, which makes new weights, at a seed; as it was afterwards, one thread at a time."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would leave those of the GPUs at it
        yield
