"""An index that is upgraded while it serves: vectors of several model versions are searched as one ranking."""

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
_NO_VERSION = -1  # no row has it: version numbers are at least 0
_WINDOW = 16  # a worker looks for unleased rows in this many batches of ids at a time
_POLL_SECONDS = 0.2  # between two polls for rows that are leased to other workers


@dataclass(frozen=True, eq=False)
class Hits:
    """Results of a search in a gallery: for each query its hits, best first.

    Attributes:
        scores: [Q, k] float32 cosines, descending; -inf for missing hits: fewer than k rows match.
        ids: [Q, k] int64; -1 for missing hits.
        versions: [Q, k] int64, of the model that made the vector; -1 for missing hits.
        thresholds: [Q, k] float64, of the pair of query version and vector version; nan if the gallery has none.
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    versions: NDArray[np.int64]
    thresholds: NDArray[np.float64]

    @property
    def accepted(self) -> NDArray[np.bool_]:
        """[Q, k] whether `scores >= thresholds`; False for missing hits.

        Raises:
            ValueError: the gallery has no threshold for these queries and the version of a hit.
        """
        there = self.ids >= 0
        unknown = there & np.isnan(self.thresholds)
        if unknown.any():
            version = int(self.versions[unknown][0])
            raise ValueError(
                f"the gallery has no threshold for these queries on vectors of version {version}: call set_thresholds "
                "with a threshold for every pair (query version, vector version)"
            )
        accepted: NDArray[np.bool_] = there & (self.scores >= self.thresholds)
        return accepted


class Gallery:
    """Stores vectors by id, each with its model's version, in a folder or a database.

    One model *serves*: the newest admitted one.  A newer compatible model serves as soon as it is admitted: its queries
    search the vectors of all versions as one ranking.  Then any number of workers replace old vectors, in any order.
    Replaced vectors are kept until their version is retired or the row is removed; `rollback` restores them, bit for
    bit.  Every call refuses models that were not admitted.

    Any thread may make any call at any time.  So may any process, except that only one process at a time may open a
    file of Milvus Lite.  Changes that returned survive a killed process, and its last call takes effect completely or
    not at all; only the search counts of the last seconds may be lost.  `Gallery.create` and `Gallery.open` return a
    gallery; `close` ends it.

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
        """Creates an empty gallery that this model serves.

        Args:
            url: the path of a new or empty folder; or, with the NAME of a new gallery,
                postgresql://USER@HOST:PORT/DATABASE#NAME, FILE.db#NAME (Milvus Lite) or http://HOST:PORT#NAME (Milvus).
            model: the first model: `EmbeddingModel.identity`, `read_identity(folder)` or `ModelIdentity.external`.
            threshold: minimum score of a match, a cosine in [-1, 1]; None: the gallery has no thresholds.
            count_traffic: whether to count the hits of each row, for `stale(order="traffic")`; searches then write
                at most once in five seconds.

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
        """Opens an existing gallery.

        Raises:
            FileNotFoundError: there is none.
            StoreError: the gallery cannot be reached or read, is damaged, or has another format.
            ModuleNotFoundError: the store's client is not installed.
        """
        return cls(open_store(url))

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def model(self) -> ModelIdentity:
        """The serving model."""
        return self._store.state().served_by.identity

    def add(self, ids: Ids, vectors: Rows, *, model: ModelIdentity, payload: Payload | None = None) -> None:
        """Adds rows: all of them or, after an error, none.

        Args:
            ids: [n] integers in [0, 2^63 - 2], each once, none of them in the gallery.
            vectors: [n, d] finite, as the model computes them; stored as float32, without normalisation.
            model: model that made the vectors, admitted and not rolled back.
            payload: one mapping per row, or columns (a mapping or a table), with JSON values.  The keys id, vector and
                version are reserved.

        Raises:
            StrangerError: the model may not add.
            TypeError, ValueError: an argument is invalid; the message names the row.
            StoreError: the store failed.
        """
        rows = read_vectors("vectors", vectors, self._checked(model, "add"))
        row_ids = read_unique_ids("ids", ids, len(rows))
        texts = read_payload(payload, len(rows))
        self._store.add(row_ids, rows, model.version, texts, lambda state: _state.check_member(state, model, "add"))

    def search(self, queries: Rows, k: int, *, model: ModelIdentity, where: Where | None = None) -> Hits:
        """Returns the k best rows for each query, of all versions, exactly.

            score(q, v) = n(q[:w]) . n(v)      # n(x) = x / |x|; v has w <= d numbers
            order by descending score, then by ascending id

        A score is summed in float64 and rounded to float32; rounded scores are ordered.  A vector narrower than the
        query is compared with the query's first w numbers.

        Args:
            queries: [Q, d] finite, as the model computes them.
            k: at least 1.
            model: model that made the queries, admitted and not retired.
            where: payload key -> value, or list of allowed values; a row must match every key.  Values are text
                without U+0000, finite numbers, bools and None; integers beyond 64 bits are compared as float64.

        Raises:
            StrangerError: the model may not search.
            TypeError, ValueError: an argument is invalid, or a stored vector is wider than the queries.
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
        if state.thresholds:  # read again: a hit may be of a version that was admitted during the search
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
        """Admits a model.  From now on it serves: its queries are accepted, and rows of other models are stale.

        Args:
            model: model that is compatible with every model of the gallery that is not retired.
            gate: result of `upgrade_gate` on features of the serving model and of this one, which must have the
                fingerprints of both.
            force: reason to admit the model without a passed gate, for the history.  An incompatible model is refused
                all the same.
            thresholds: (query version, vector version) -> a cosine, the `ThresholdMove` of `upgrade_threshold`, or
                None if such queries never come.  A gallery with thresholds needs every new pair.

        Raises:
            StrangerError: the model cannot search the gallery (the message has the reasons), another model has its
                version number, or the gallery has this model under another number.
            AdmissionError: the model is admitted already; the gate failed, judged other models or has no fingerprints;
                or there is neither gate nor reason.
            TypeError, ValueError: a threshold is missing or invalid, or its pair is unknown.
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
        """Sets thresholds: (query version, vector version) -> cosine, `ThresholdMove` or None, as in `admit`.

        Raises:
            TypeError, ValueError: a version is unknown, a value is outside [-1, 1], or a pair has no threshold.
        """

        def decide(state: State, rows: Mapping[int, int]) -> Change:
            new = _state.set_thresholds(state, thresholds)
            return Change(new, {"event": "thresholds", "thresholds": _pairs(new)})

        self._store.change(decide)

    def stale(
        self, *, order: str | Ids = "random", batch: int = 256, lease: float = 600.0
    ) -> Generator[NDArray[np.int64], None, None]:
        """Yields the ids of rows that are not by the serving model, in batches, for `replace`.

        Workers (threads or processes) share the rows: each batch is leased to one worker.  Rows that are still stale
        after `lease` seconds go to another worker.  The loop ends when every row is replaced or was yielded to this
        worker already, when the gallery is paused, or when another model serves.  Calling `stale` again continues with
        the rows that are left.  `close` of the generator ends the leases at once; `contextlib.closing` calls it, also
        after an error.

        Args:
            order: "random"; "traffic", rows that searches found most often first (`count_traffic` of `create`); or
                [n] ids, each once, all in the gallery: these rows alone, in this order.
            batch: ids at a time, at least 1.
            lease: duration of a batch's lease, in seconds.

        Raises:
            KeyError: an id that is not in the gallery.
            TypeError, ValueError: an argument is invalid, or order is "traffic" and the gallery does not count.
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
        """Replaces older vectors by those of the serving model, and keeps the older ones until `retire`.

        All rows are replaced or, after an error, none.  A search finds a row before, while and after it is replaced.

        Args:
            ids: [n], each once.  Rows by this model stay unchanged, so two workers may replace the same rows.  Rows
                that were removed while they were leased are skipped.
            vectors: [n, d] finite.
            model: the serving model.
            payload: as in `add`; None: the rows keep theirs.

        Returns:
            The number of replaced rows.

        Raises:
            StrangerError: the model does not serve.
            KeyError: an id is not in the gallery, and was not removed during a lease.
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
        """Makes the previous model serve again, and restores the rows that the present one replaced, bit for bit.

        Rows whose old vectors `retire` has deleted stay, like rows that the present model added: they are stale.  The
        rolled-back model may search until it is retired.

        Returns:
            The event of the history with `rows_restored`, and `rows_that_stay`, those of the rolled-back model.

        Raises:
            ValueError: there is no previous model that is not retired.
        """

        def decide(state: State, rows: Mapping[int, int]) -> Change:
            new, version = _state.roll_back(state), state.serving[-1]
            return Change(new, {"event": "rolled back", "version": version, "to": new.serving[-1]}, restore=version)

        return self._store.change(decide)

    def retire(self, version: int) -> dict[str, Any]:
        """Deletes the vectors of a version that `replace` has kept.  Its queries are refused from now on.

        Returns:
            The event of the history, with `old_rows_deleted`.

        Raises:
            ValueError: the version still has rows, serves, is already retired, or does not exist.
        """
        version = check_integer("version", version)

        def decide(state: State, rows: Mapping[int, int]) -> Change:
            new = _state.retire(state, version, rows)
            return Change(new, {"event": "retired", "version": version}, drop=version)

        return self._store.change(decide)

    def pause(self) -> None:
        """Ends every worker's `stale` after its present batch, until `resume`."""
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
        """Returns all events, oldest first; events are never edited or deleted.

        They are creation, admissions, thresholds, begun and finished backfills, pauses, rollbacks and retirements.

        Returns:
            A list of mappings of JSON values with `at`, the time in UTC as ISO 8601, `event`, and the event's fields.
        """
        return self._store.history()

    def ids(self) -> NDArray[np.int64]:
        """Returns [n] the ids of all rows, ascending."""
        return self._store.stale(_NO_VERSION, "id")

    def read(self, ids: Ids | None = None) -> StoredRows:
        """Returns rows as they are stored: ids, versions, vectors and payload.

        Args:
            ids: [n], each once, in the gallery; None: all rows, by id.

        Raises:
            KeyError: an id is not in the gallery.
            ValueError: the rows have several widths.
        """
        return self._store.read(None if ids is None else read_unique_ids("ids", ids))

    def mirror(self) -> CosineIndex:
        """Returns an index in memory of all present rows, of every version.

        Raises:
            ValueError: the rows have several widths; one index holds one width.
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
        """Returns the model if it may make this call; raises StrangerError if not."""
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
        mine: list[NDArray[np.int64]] = []  # batches that this worker got
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
                if len(mine) == got:  # others lease all rows that are left: wait for them
                    time.sleep(min(_POLL_SECONDS, lease))
        finally:
            if mine:
                self._store.release(worker)


def _worker_name() -> str:
    """Returns HOST/PROCESS/RANDOM, by which an operator finds the worker's process."""
    host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())  # it becomes a part of expressions in Milvus
    return f"{host}/{os.getpid()}/{uuid.uuid4().hex[:8]}"


def _begin_backfill(version: int, order: str, rows: int, worker: str) -> Callable[[State, Mapping[int, int]], Change]:
    event = {"event": "backfill", "version": version, "order": order, "stale": rows, "worker": worker}
    return lambda state, _: Change(state, event)


def _begins(event: Mapping[str, Any], version: int) -> bool:
    """Whether this event made the version serve."""
    if event["event"] == "rolled back":
        return bool(event["to"] == version)
    return event["event"] in ("created", "admitted") and event["version"] == version


def _pairs(state: State) -> list[dict[str, Any]]:
    return [
        {"queries": query, "vectors": vectors, "threshold": threshold}
        for (query, vectors), threshold in state.thresholds.items()
    ]
