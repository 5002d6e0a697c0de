"""Seeds, and context managers that restore the global random generators."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_generators", "mixed_seed", "renew_lock", "seed_generators", "seeded"]

_GLOBAL_GENERATOR = threading.RLock()  # reentrant: a function that builds a network may train another one inside


def mixed_seed(seed: int, *counters: int) -> int:
    """Returns an independent seed for each tuple of counters."""
    return int(np.random.SeedSequence([seed, *counters]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator, which initialises weights, and restores it afterwards; one thread at a time."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds GPU generators, which stay changed
        yield


@contextmanager
def kept_generators(seed: int) -> Iterator[None]:
    """Does what `seeded` does for the generators of NumPy and `random`, too, which datasets may use."""
    with seeded(seed):
        states = random.getstate(), np.random.get_state()
        seed_generators(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_generators(seed: int) -> None:
    """Seeds torch's CPU generator, NumPy's and that of `random`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def renew_lock() -> None:
    """Replaces the lock in a forked process, where the thread that may hold it does not exist."""
    global _GLOBAL_GENERATOR
    _GLOBAL_GENERATOR = threading.RLock()
