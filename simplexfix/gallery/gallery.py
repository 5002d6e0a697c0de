"""A gallery that outlives its models: vectors of several versions, searched as one ranking while they are replaced."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_integer, check_name, check_positive
from ..compatibility import GateResult
from ..labelled import Ids, Rows
from ..models import ModelIdentity
from ..retrieval import CosineIndex
from . import _state
from ._input import Payload, Where, read_payload, read_unique_ids, read_vectors, read_where
from ._state import Change, State, Thresholds
from ._traffic import Traffic
from .stores import Store, StoredRows, create_store, open_store
from .stores._common import time_text

__all__ = ["Gallery", "Hits"]

ORDERS = ("random", "traffic")
_NO_VERSION = -1  # no row has it: versions count from 0
_WINDOW = 16  # batches that a worker looks through for rows that nobody has
_POLL_SECONDS = 0.2  # between two polls for rows that are leased to other workers


@dataclass(frozen=True, eq=False)
class Hits:
    """Results of a search in a gallery: for each query its hits, best first.

    Attributes:
        scores: [Q, k] float32 cosines, descending; -inf where the gallery has no more.
        ids: [Q, k] int64; -1 where it has no more.
        versions: [Q, k] int64, of the model that made the vector; -1 where it has no more.
        thresholds: [Q, k] float64, of the pair of query version and vector version; nan where the gallery has none.
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    versions: NDArray[np.int64]
    thresholds: NDArray[np.float64]

    @property
    def accepted(self) -> NDArray[np.bool_]:
        """[Q, k] whether `scores >= thresholds`; False where the gallery has no more.

        Raises:
            ValueError: a row was found for whose version there is no threshold.
        """
        there = self.ids >= 0
        unknown = there & np.isnan(self.thresholds)
        if unknown.any():
            version = int(self.versions[unknown][0])
            raise ValueError(
                f"the gallery has no threshold for these queries on vectors of version {version}: "
                "give it with set_thresholds"
            )
        accepted: NDArray[np.bool_] = there & (self.scores >= self.thresholds)
        return accepted


class Gallery:
    """Vectors by id, each with the version of the model that made it, over a store.

    A newer compatible model is admitted, and serves at once: its queries search vectors of all versions as one ranking.
    Then workers replace old vectors, in any order and number, and nothing is lost until a version is retired:
    `rollback` brings the old vectors back, bit for bit.  Models that were not admitted are refused in every call.

    Threads may call anything at any time.  So may processes, except that a file of Milvus Lite belongs to one process.
    A killed process loses no call that returned, and leaves all of its last call or nothing.  `Gallery.create` and
    `Gallery.open` make a gallery; `close` ends it.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from simplexfix.gallery import Gallery
        >>> from simplexfix.models import ModelIdentity
        >>> rng, model = np.random.default_rng(0), ModelIdentity.external("vendor/embed", "2024-01", 8)
        >>> rows = rng.standard_normal((100, 8))
        >>> with tempfile.TemporaryDirectory() as folder, Gallery.create(folder, model=model) as gallery:
        ...     gallery.add(np.arange(100), rows, model=model)
        ...     hits = gallery.search(rows[:3], 2, model=model)
        >>> hits.ids[:, 0]
        array([0, 1, 2])
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._traffic = Traffic(store)

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        *,
        model: ModelIdentity,
        threshold: float | None = None,
        count_traffic: bool = False,
    ) -> Gallery:
        """A new, empty gallery, which this model serves.

        Args:
            url: the path of a new or empty folder; or, with the NAME of a new gallery,
                postgresql://USER@HOST:PORT/DATABASE#NAME, FILE.db#NAME (Milvus Lite) or http://HOST:PORT#NAME (Milvus).
            model: the first model: `EmbeddingModel.identity`, `read_identity(folder)` or `ModelIdentity.external`.
            threshold: the least score of a match, a cosine in [-1, 1]; None: the gallery has no thresholds.
            count_traffic: whether searches are counted, for `stale(order="traffic")`: a write every five seconds.

        Raises:
            FileExistsError: the folder is not empty, or the name is taken.
            StoreError: the store cannot be reached or written.
            ModuleNotFoundError: the store's client is not installed.
            TypeError, ValueError: an argument is not as above.
        """
        state = _state.found(model, threshold, counts_traffic=bool(count_traffic))
        event = {"event": "created", "version": model.version, "model": model.to_dict(), "threshold": threshold}
        return cls(create_store(url, state, event))

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> Gallery:
        """The gallery that is there.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it cannot be reached or read, is damaged, or of another format.
            ModuleNotFoundError: the store's client is not installed.
        """
        return cls(open_store(url))

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def model(self) -> ModelIdentity:
        """The model that serves."""
        return self._store.state().served_by.identity

    def add(self, ids: Ids, vectors: Rows, *, model: ModelIdentity, payload: Payload | None = None) -> None:
        """Adds rows: all of them or, after an error, none.

        Args:
            ids: [n] integers in [0, 2^63 - 2], each once, none of them in the gallery.
            vectors: [n, d] finite, as the model makes them; kept as float32, as they are.
            model: model that made the vectors, admitted and not rolled back.
            payload: a mapping for each row, or a mapping or table of columns, of JSON values; no key id, vector or
                version.

        Raises:
            StrangerError: the model may not add.
            TypeError, ValueError: an argument is not as above; by row.
            StoreError: the store failed.
        """
        rows = read_vectors("vectors", vectors, self._checked(model, "add"))
        row_ids = read_unique_ids("ids", ids, len(rows))
        texts = read_payload(payload, len(rows))
        self._store.add(row_ids, rows, model.version, texts, lambda state: _state.check_member(state, model, "add"))

    def search(self, queries: Rows, k: int, *, model: ModelIdentity, where: Where | None = None) -> Hits:
        """The k best rows for each query, of all versions, exactly.

            score(q, v) = n(q[:w]) . n(v) in float64       # n(x) = x / |x|; v has w <= d numbers
            order by score, then by lower id

        A vector narrower than the query is compared with the query's first w numbers.

        Args:
            queries: [Q, d] finite, as the model makes them.
            k: at least 1.
            model: model that made the queries, admitted and not retired.
            where: payload key -> value, or list of values of which the row has one; all keys must hold.  Text
                without U+0000, finite numbers, bools and None; integers beyond 64 bits are compared as float64.

        Raises:
            StrangerError: the model may not search.
            TypeError, ValueError: an argument is not as above.
            StoreError: the store failed.
        """
        state = self._store.state()
        _state.check_member(state, model, "search")
        given = read_vectors("queries", queries, model)
        k = check_integer("k", k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        scores, ids, versions = self._store.search(given, k, read_where(where))
        if state.counts_traffic:
            self._traffic.count(ids)
        thresholds = np.full(ids.shape, np.nan)
        if state.thresholds:  # of now: a version that was admitted since may have been found
            for (query, version), threshold in self._store.state().thresholds.items():
                if query == model.version and threshold is not None:
                    thresholds[versions == version] = threshold
        return Hits(scores, ids, versions, thresholds)

    def admit(
        self,
        model: ModelIdentity,
        gate: GateResult | None = None,
        *,
        force: str | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        """Admits a model, which serves from now on: its queries may come, and rows of others are stale.

        Args:
            model: model that is compatible with every model of the gallery that is not retired.
            gate: result of `upgrade_gate` on features of exactly the model that serves and this one, with their
                fingerprints.
            force: reason to admit the model without a passed gate; the history stores it.  It does not make a model
                compatible.
            thresholds: (query version, vector version) -> threshold, the `ThresholdMove` of `upgrade_threshold`, or
                None for queries that never come; for a gallery with thresholds all pairs that are new.

        Raises:
            StrangerError: the model cannot search the gallery; with the reasons.
            AdmissionError: the gate failed, judged other models, or there is neither gate nor reason.
            TypeError, ValueError: thresholds are missing, or of other pairs.
        """

        def decide(state: State, rows: Mapping[int, int]) -> Change:
            new = _state.admit(state, model, gate, force, thresholds or {})
            event = {
                "event": "admitted",
                "version": model.version,
                "model": model.to_dict(),
                "before": state.serving[-1],
                "gate": None if gate is None else gate.as_dict(),
                "force": force,
                "thresholds": _pairs(new),
            }
            return Change(new, event)

        self._store.change(decide)

    def set_thresholds(self, thresholds: Thresholds) -> None:
        """Sets thresholds: (query version, vector version) -> threshold, `ThresholdMove` or None, as of `admit`.

        Raises:
            TypeError, ValueError: a pair of versions that are not there, no cosine, or pairs without a threshold.
        """

        def decide(state: State, rows: Mapping[int, int]) -> Change:
            new = _state.set_thresholds(state, thresholds)
            return Change(new, {"event": "thresholds", "thresholds": _pairs(new)})

        self._store.change(decide)

    def stale(
        self, *, order: str | Ids = "random", batch: int = 256, lease: float = 600.0
    ) -> Generator[NDArray[np.int64], None, None]:
        """Ids of rows that are not by the model that serves, batch by batch, for `replace`.

        Workers, threads or processes, share the rows: each batch is leased to the worker that got it.  If that one
        has not replaced it in time, another worker gets it.  The loop ends when each row is replaced or was given to
        this worker already, or when the gallery is paused or another model serves.  A new loop continues.  `close`
        of the generator ends the leases at once; `contextlib.closing` calls it, also after an error.

        Args:
            order: "random"; "traffic", rows that searches found most often first (`count_traffic` of `create`); or
                [n] ids, each once, all in the gallery: these rows alone, in this order.
            batch: ids at a time, at least 1.
            lease: seconds for which a batch is this worker's.

        Raises:
            KeyError: an id that is not in the gallery.
            TypeError, ValueError: an argument is not as above; order "traffic" without counts.
        """
        batch = check_integer("batch", batch)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        check_positive("lease", lease)
        if isinstance(order, str):
            check_name("order", order, ORDERS)
            if order == "traffic" and not self._store.state().counts_traffic:
                raise ValueError('order "traffic" needs Gallery.create(..., count_traffic=True); take "random"')
            return self._batches(order, "traffic" if order == "traffic" else "id", batch, lease)
        return self._batches("given", read_unique_ids("order", order), batch, lease)

    def replace(self, ids: Ids, vectors: Rows, *, model: ModelIdentity, payload: Payload | None = None) -> int:
        """Puts vectors of the model that serves in place of older ones, which are kept until `retire`.

        All rows are replaced or, after an error, none.  A search finds a row before, while and after it is replaced.

        Args:
            ids: [n], each once.  Rows that are by this model already stay as they are, so two workers may do the same
                rows; rows that were removed while a worker had them are left out.
            vectors: [n, d] finite.
            model: the one that serves.
            payload: as of `add`; None: the rows keep theirs.

        Returns:
            How many rows were replaced.

        Raises:
            StrangerError: the model does not serve.
            KeyError: an id is not in the gallery.
            TypeError, ValueError, StoreError: as `add`.
        """
        rows = read_vectors("vectors", vectors, self._checked(model, "replace"))
        row_ids = read_unique_ids("ids", ids, len(rows))
        texts = read_payload(payload, len(rows))

        def allow(state: State) -> None:
            _state.check_member(state, model, "replace")

        return self._store.replace(row_ids, rows, model.version, texts, allow)

    def remove(self, ids: Ids) -> None:
        """Deletes rows for good, with the vectors that they replaced: all of them or, after an error, none.

        Raises:
            KeyError: an id is not in the gallery.
        """
        self._store.remove(read_unique_ids("ids", ids))

    def rollback(self) -> dict[str, Any]:
        """Makes the model before serve again, and puts back every vector, version and payload that was replaced.

        Rows that the new model has added stay, and are stale.  The new model may search on, until it is retired.

        Returns:
            The event of the history: `rows_restored`, and `rows_that_stay` of the new model.

        Raises:
            ValueError: no model has served before, or it was retired.
        """

        def decide(state: State, rows: Mapping[int, int]) -> Change:
            new, version = _state.roll_back(state), state.serving[-1]
            return Change(new, {"event": "rolled back", "version": version, "to": new.serving[-1]}, restore=version)

        return self._store.change(decide)

    def retire(self, version: int) -> dict[str, Any]:
        """Deletes the kept vectors of a version; its queries are refused from now on, and nothing rolls back to it.

        Returns:
            The event of the history, with `old_rows_deleted`.

        Raises:
            ValueError: rows of the version are in the gallery, it serves, or there is no such version.
        """
        version = check_integer("version", version)

        def decide(state: State, rows: Mapping[int, int]) -> Change:
            new = _state.retire(state, version, rows)
            return Change(new, {"event": "retired", "version": version}, drop=version)

        return self._store.change(decide)

    def pause(self) -> None:
        """Makes every worker's `stale` end after its batch, until `resume`."""
        self._set_paused(True)

    def resume(self) -> None:
        """Lets `stale` give rows again."""
        self._set_paused(False)

    def status(self) -> dict[str, Any]:
        """Returns a summary of the gallery as plain JSON values.

        Returns:
            `url`; `serving`, the version; `since` when; `rolls_back_to`, a version or None; `paused`; `rows`, and of
            them `stale` and `leased` to workers; `workers`, a list of `worker`, its `rows`, and `until`, when its lease
            ends, the earliest first; `versions`, a list of `version`, `name`, `fingerprint`, `embedding_dim`,
            `standing`, `rows` and `old_rows`, which were replaced and are kept; `thresholds`, a list of `queries`,
            `vectors` and `threshold`; `counts_traffic`.
        """
        now = self._store.overview()
        state, serving = now.state, now.state.serving[-1]
        since = next(event["at"] for event in reversed(now.history) if _begins(event, serving))
        return {
            "url": self.url,
            "serving": serving,
            "since": since,
            "rolls_back_to": state.serving[-2] if len(state.serving) > 1 else None,
            "paused": state.paused,
            "rows": sum(now.rows.values()),
            "stale": sum(number for version, number in now.rows.items() if version != serving),
            "leased": sum(each.rows for each in now.leased),
            "workers": [
                {"worker": each.worker, "rows": each.rows, "until": time_text(each.until)} for each in now.leased
            ],
            "versions": [
                {
                    "version": version,
                    "name": member.identity.name,
                    "fingerprint": member.identity.fingerprint,
                    "embedding_dim": member.identity.embedding_dim,
                    "standing": member.standing,
                    "rows": now.rows.get(version, 0),
                    "old_rows": now.old.get(version, 0),
                }
                for version, member in state.models.items()
            ],
            "thresholds": _pairs(state),
            "counts_traffic": state.counts_traffic,
        }

    def history(self) -> list[dict[str, Any]]:
        """Every change of models, thresholds and backfills, oldest first, as plain JSON values: nothing edits it.

        Returns:
            A list of mappings with `at`, the time in UTC as ISO 8601, `event`, and what belongs to it.
        """
        return self._store.history()

    def ids(self) -> NDArray[np.int64]:
        """[n] the ids of all rows, ascending."""
        return self._store.stale(_NO_VERSION, "id")

    def read(self, ids: Ids | None = None) -> StoredRows:
        """Rows as they are stored: ids, versions, vectors and payload.

        Args:
            ids: [n], each once, in the gallery; None: all rows, by id.

        Raises:
            KeyError: an id is not in the gallery.
            ValueError: rows of several widths.
        """
        return self._store.read(None if ids is None else read_unique_ids("ids", ids))

    def mirror(self) -> CosineIndex:
        """An index in memory of all rows as they are now, whatever their version.

        Raises:
            ValueError: rows of several widths, which one index does not hold.
        """
        rows = self._store.read(None)
        index = CosineIndex(rows.vectors.shape[1] if len(rows.ids) else self.model.embedding_dim)
        if len(rows.ids):
            index.add(rows.vectors, rows.ids)
        return index

    def close(self) -> None:
        """Writes the counts of searches, and closes the store's files or connections; a later call opens them again."""
        self._traffic.write()
        self._store.close()

    def __enter__(self) -> Gallery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Gallery({self.url!r})"

    def _checked(self, model: ModelIdentity, call: str) -> ModelIdentity:
        """The model, before its vectors are read."""
        _state.check_member(self._store.state(), model, call)
        return model

    def _set_paused(self, paused: bool) -> None:
        def decide(state: State, rows: Mapping[int, int]) -> Change:
            return Change(replace(state, paused=paused), {"event": "paused" if paused else "resumed"})

        self._store.change(decide)

    def _batches(
        self, name: str, order: str | NDArray[np.int64], batch: int, lease: float
    ) -> Generator[NDArray[np.int64], None, None]:
        state = self._store.state()
        target, worker = state.serving[-1], _worker_name()
        mine: list[NDArray[np.int64]] = []  # what this worker was given
        try:
            while True:
                found = self._store.stale(target, order)
                left = found[~np.isin(found, np.concatenate(mine))] if mine else found
                if not len(left):
                    return
                if name == "random":
                    left = np.random.default_rng().permutation(left)
                got = len(mine)
                at = 0
                while at < len(left):
                    state = self._store.state()
                    if state.paused or state.serving[-1] != target:
                        return
                    window = left[at : at + _WINDOW * batch]
                    claimed = self._store.claim(window, batch, target, worker, lease)
                    full = len(claimed) == batch
                    at += int(np.flatnonzero(window == claimed[-1])[0]) + 1 if full else len(window)
                    if not len(claimed):
                        continue
                    if not mine:
                        self._store.change(_begin_backfill(target, name, len(found), worker))
                    mine.append(claimed)
                    yield claimed
                if len(mine) == got:  # others have all that is left: theirs until they replace it, or its time is over
                    time.sleep(min(_POLL_SECONDS, lease))
        finally:
            if mine:
                self._store.release(worker)


def _worker_name() -> str:
    """HOST/PROCESS/RANDOM: an operator finds the process of a worker by it."""
    host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())  # it becomes a part of expressions in Milvus
    return f"{host}/{os.getpid()}/{uuid.uuid4().hex[:8]}"


def _begin_backfill(version: int, order: str, rows: int, worker: str) -> Callable[[State, Mapping[int, int]], Change]:
    event = {"event": "backfill", "version": version, "order": order, "stale": rows, "worker": worker}
    return lambda state, _: Change(state, event)


def _begins(event: Mapping[str, Any], version: int) -> bool:
    """Whether the version serves since this event."""
    if event["event"] == "rolled back":
        return bool(event["to"] == version)
    return event["event"] in ("created", "admitted") and event["version"] == version


def _pairs(state: State) -> list[dict[str, Any]]:
    return [
        {"queries": query, "vectors": vectors, "threshold": threshold}
        for (query, vectors), threshold in state.thresholds.items()
    ]
