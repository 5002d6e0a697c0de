"""Interface of a gallery's stores.  `Gallery`, the only caller, has checked identities, thresholds and input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._state import Change, State

__all__ = ["Leased", "Overview", "Ranking", "Store", "StoreError", "StoredRows"]

Ranking: TypeAlias = "tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]"  # scores, ids and versions


class StoreError(RuntimeError):
    """Raised if a store failed, is damaged or cannot be reached; the message names it, and the number of rows."""


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a gallery.

    Attributes:
        ids: [n] int64.
        versions: [n] int64, of the model that made each vector.
        vectors: [n, d] float32, bit for bit as they were given.
        payload: one dict per row.
    """

    ids: NDArray[np.int64]
    versions: NDArray[np.int64]
    vectors: NDArray[np.float32]
    payload: list[dict[str, Any]]


@dataclass(frozen=True)
class Leased:
    """Rows that are leased to one worker of a backfill.

    Attributes:
        rows: number of rows.
        until: end of the last of the leases, in seconds since 1970.
    """

    worker: str
    rows: int
    until: float


@dataclass(frozen=True)
class Overview:
    """The gallery at one moment, without its rows.

    Attributes:
        state, history: as `Store.state` and `Store.history` return them.
        rows, old: version -> number of rows that are searched, and of replaced rows that are kept for a rollback.
        leased: one entry for each worker, in the order in which their leases end.
    """

    state: State
    history: Sequence[dict[str, Any]]
    rows: Mapping[int, int]
    old: Mapping[int, int]
    leased: Sequence[Leased]


class Store(Protocol):
    """Every method is one transaction: all of it happens, or, after an error, nothing.

    `allow(state)` and `decide(state, rows)` run inside the transaction, on its state, and raise to reject the call.
    `rows` maps each version to its number of rows.
    """

    url: str

    @classmethod
    def create(cls, url: str, state: State, event: dict[str, Any]) -> Store:
        """A new gallery with this state, and this event as the first of its history.

        Raises:
            FileExistsError: a gallery, or something else, is there.
            StoreError: the place cannot be written.
        """
        ...

    @classmethod
    def open(cls, url: str) -> Store:
        """Opens an existing gallery.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it cannot be read, is damaged, or of another format.
        """
        ...

    def state(self) -> State: ...

    def change(self, decide: Callable[[State, Mapping[int, int]], Change]) -> dict[str, Any]:
        """Puts a new state in place and adds its event to the history; returns the event, with numbers of rows.

        A change of the model that serves ends all leases.
        """
        ...

    def history(self) -> list[dict[str, Any]]: ...

    def overview(self) -> Overview: ...

    def add(
        self,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        version: int,
        payload: list[str] | None,
        allow: Callable[[State], None],
    ) -> None:
        """Adds rows; ValueError for an id that the gallery has already."""
        ...

    def replace(
        self,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        version: int,
        payload: list[str] | None,
        allow: Callable[[State], None],
    ) -> int:
        """Puts rows in place of those of other versions, which are kept, and returns how many.

        It leaves out rows of this version, and ids that were removed while they were leased.  It raises KeyError for
        other ids that are not there.
        """
        ...

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Deletes rows and the rows that they replaced; KeyError for an id that is not there."""
        ...

    def search(self, queries: NDArray[np.float32], k: int, where: Mapping[str, tuple[Any, ...]] | None) -> Ranking:
        """[Q, k] scores, ids and versions, by score, then by lower id; -inf, -1 and -1 where there are no more."""
        ...

    def read(self, ids: NDArray[np.int64] | None) -> StoredRows:
        """These rows, or all of them by id; KeyError for an id that is not there."""
        ...

    def stale(self, version: int, order: str | NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of rows of other versions: by "id"; by "traffic", most hits first; or those of given ids, in order.

        KeyError for a given id that is not there.
        """
        ...

    def claim(self, ids: NDArray[np.int64], limit: int, version: int, worker: str, seconds: float) -> NDArray[np.int64]:
        """Leases the first `limit` of these ids whose rows are of another version and not leased; returns the ids."""
        ...

    def release(self, worker: str) -> None:
        """Ends the leases of a worker."""
        ...

    def count_hits(self, ids: NDArray[np.int64], times: NDArray[np.int64]) -> bool:
        """Adds to the counts of rows; False, and nothing is added, where the store is busy."""
        ...

    def close(self) -> None: ...
