"""Counts in memory how often rows are found, and adds the counts to the store at intervals."""

from __future__ import annotations

import os
import threading
import time
import weakref

import numpy as np
from numpy.typing import NDArray

from .stores import Store

__all__ = ["Traffic"]

_SECONDS = 5.0  # between two writes
_MOST = 65_536  # ids in memory; if there are more, only the `_MOST // 2` ids with the highest counts stay


class Traffic:
    """Counts of hits by row id.  They are approximate: a killed process loses the counts since its last write."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._times: dict[int, int] = {}
        self._written = time.monotonic()
        _all.add(self)

    def count(self, ids: NDArray[np.int64]) -> None:
        """Adds 1 per occurrence of an id; -1 is skipped."""
        found, times = np.unique(ids[ids >= 0], return_counts=True)
        with self._lock:
            for id_, number in zip(found.tolist(), times.tolist(), strict=True):
                self._times[id_] = self._times.get(id_, 0) + number
            if len(self._times) > _MOST:
                most = sorted(self._times.items(), key=lambda entry: -entry[1])
                self._times = dict(most[: _MOST // 2])
            due = time.monotonic() - self._written >= _SECONDS
        if due:
            self.write()

    def write(self) -> None:
        """Adds the counts to the store.  If the store is busy, they stay in memory until the next write."""
        with self._lock:
            times, self._times, self._written = self._times, {}, time.monotonic()
        if times and not self._store.count_hits(
            np.fromiter(times, np.int64, len(times)), np.fromiter(times.values(), np.int64, len(times))
        ):
            with self._lock:
                for id_, number in times.items():
                    self._times[id_] = self._times.get(id_, 0) + number


_all: weakref.WeakSet[Traffic] = weakref.WeakSet()


def _begin_anew() -> None:
    """Replaces locks and counts in a forked child: threads that held a lock do not exist, the parent writes counts."""
    for traffic in _all:
        traffic._lock, traffic._times = threading.Lock(), {}


os.register_at_fork(after_in_child=_begin_anew)
