"""Labelled items in memory, and the order in which training sees them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Items", "row_batches", "seeded"]

_GLOBAL_GENERATOR = threading.Lock()


@dataclass(frozen=True, eq=False)
class Items:
    """Inputs [N, ...] of any dtype and their class ids [N] int64."""

    inputs: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> Items:
        return Items(self.inputs[rows], self.labels[rows])

    def joined(self, other: Items) -> Items:
        return Items(torch.cat([self.inputs, other.inputs]), torch.cat([self.labels, other.labels]))


def row_batches(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of `size` row numbers: every row once, in random order, before any comes again."""
    if rows < 1 or size < 1:
        raise ValueError(f"rows and size must be positive, got {rows} and {size}")
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[:size]
        left = left[size:]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator, which makes new weights, at a seed; as it was afterwards, one thread at a time."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
