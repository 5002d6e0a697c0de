"""One ranking over rows of several versions, in memory: an exact index for each version."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ...retrieval import CosineIndex
from ._common import too_wide
from .base import Ranking

__all__ = ["VersionsIndex", "merge_rankings"]

_MOST_DEAD = 1024  # dropped rows that stay in one index; a sixteenth of its rows if that is more


class VersionsIndex:
    """Rows by id, each of one version; any number of threads search while one changes it."""

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}
        self._turn = threading.Condition()
        self._searches = 0
        _all.add(self)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Blocks until no search runs; searches that begin during the change block until it ends."""
        with self._turn:
            self._turn.wait_for(lambda: not self._searches)
            yield

    @contextmanager
    def searching(self) -> Iterator[None]:
        with self._turn:
            self._searches += 1
        try:
            yield
        finally:
            with self._turn:
                self._searches -= 1
                self._turn.notify_all()

    def drop(self, ids: NDArray[np.int64]) -> None:
        """Drops rows; ids that the index does not hold are ignored."""
        for part in self._parts.values():
            part.drop(ids)
        self._parts = {version: part for version, part in self._parts.items() if len(part)}

    def put(self, version: int, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Adds rows; the index holds no row of these ids, or it was dropped."""
        if version not in self._parts:
            self._parts[version] = _Part(vectors.shape[1])
        self._parts[version].put(ids, vectors)

    def search(self, queries: NDArray[np.float32], k: int, include: Mapping[int, NDArray[np.int64]] | None) -> Ranking:
        """Implements `Store.search`; `include` maps each version to the ids that are searched."""
        rankings = []
        for version, part in self._parts.items():
            if part.dim > queries.shape[1]:
                raise too_wide(queries.shape[1], version, part.dim)
            if include is not None and version not in include:
                continue
            found = part.search(queries[:, : part.dim], k, None if include is None else include[version])
            rankings.append((*found, np.where(found[1] < 0, -1, version)))
        return merge_rankings(rankings, len(queries), k)


class _Part:
    """The rows of one version.  Dropped rows are excluded from searches, and removed many at a time."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._index = CosineIndex(dim)
        self._dead: dict[int, None] = {}
        self._excluded: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._index) - len(self._dead)

    def drop(self, ids: NDArray[np.int64]) -> None:
        self._dead.update((id_, None) for id_ in ids.tolist() if id_ in self._index)
        if len(self._dead) > max(_MOST_DEAD, len(self._index) // 16):
            self._index.remove(self._dead_ids())
            self._dead = {}
        self._excluded = None

    def put(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        again = [id_ for id_ in ids.tolist() if id_ in self._dead] if self._dead else []
        if again:
            self._index.remove(np.array(again))
            for id_ in again:
                del self._dead[id_]
            self._excluded = None
        self._index.add(vectors, ids)

    def search(
        self, queries: NDArray[np.float32], k: int, include: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if include is not None or not self._dead:
            return self._index.search(queries, k, include=include)
        excluded = self._excluded
        if excluded is None:  # two threads may both compute it, with the same result
            excluded = self._excluded = self._dead_ids()
        return self._index.search(queries, k, exclude=excluded)

    def _dead_ids(self) -> NDArray[np.int64]:
        return np.fromiter(self._dead, dtype=np.int64, count=len(self._dead))


def merge_rankings(rankings: list[Ranking], queries: int, k: int) -> Ranking:
    """The k best of several rankings [Q, *] of scores, ids and versions, by score, then by lower id."""
    if len(rankings) == 1:
        return rankings[0]
    empty = np.full((queries, k), -1, dtype=np.int64)
    rankings = [*rankings, (np.full((queries, k), -np.inf, dtype=np.float32), empty, empty)]
    scores, ids, versions = (np.concatenate(column, axis=1) for column in zip(*rankings, strict=True))
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    scores, ids, versions = (np.take_along_axis(column, order, axis=1) for column in (scores, ids, versions))
    return scores, ids, versions


_all: weakref.WeakSet[VersionsIndex] = weakref.WeakSet()


def _free_locks() -> None:
    """Frees the locks in a forked child: the threads that held them do not exist there."""
    for index in _all:
        index._turn, index._searches = threading.Condition(), 0


os.register_at_fork(after_in_child=_free_locks)
