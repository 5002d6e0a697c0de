"""Seeds for every place that draws, and generators that are afterwards as they were."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_generators", "mixed_seed", "renew_lock", "seed_generators", "seeded"]

_GLOBAL_GENERATOR = threading.RLock()  # what makes a network may train one


def mixed_seed(seed: int, *counters: int) -> int:
    """A seed of its own for every tuple of counters."""
    return int(np.random.SeedSequence([seed, *counters]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generator of the CPU, which makes new weights, at a seed; as it was afterwards, one thread at a time."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would leave those of the GPUs at it
        yield


@contextmanager
def kept_generators(seed: int) -> Iterator[None]:
    """As `seeded`, with those of NumPy and `random`, which datasets draw from, too."""
    with seeded(seed):
        states = random.getstate(), np.random.get_state()
        seed_generators(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_generators(seed: int) -> None:
    """torch's of the CPU, NumPy's and that of `random`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def renew_lock() -> None:
    """Replaces the lock in a forked process: the thread that held it does not exist there."""
    global _GLOBAL_GENERATOR
    _GLOBAL_GENERATOR = threading.RLock()
