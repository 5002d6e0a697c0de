"""The exact ranking of a snapshot: candidates come from Milvus, and their scores and order are computed here.

Milvus's scores are float32 and differ between Milvus Lite and a server.  It returns ties in any order, and a server
leaves out zero vectors.  So a search fetches more than k candidates, until no other row can be among the k best.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._common import too_wide
from ._milvus_client import chunks
from ._milvus_rows import ZERO, unpack
from ._milvus_snapshot import Snapshot
from ._versions_index import VersionsIndex
from .base import Ranking

__all__ = ["Searcher"]

_LIMIT = 16_384  # hits of one search by Milvus
_MORE = 8  # candidates beyond k
_ERROR = 1e-5  # error bound of a score by Milvus
_BYTES = 16 << 20  # of the vectors of one answer
_FIELDS = ["id", "scale", "bits", "vector"]


class Searcher:
    """Searches a snapshot; `condition`: an expression that rows must fulfil, or ""."""

    def __init__(self, snapshot: Snapshot, condition: str) -> None:
        self.snapshot = snapshot
        models, record = snapshot.state.models, snapshot.record
        self.widths = {version: models[version].identity.embedding_dim for version in record.rows}
        self.zeros = {version for version in record.rows if record.zeros.get(version, 0)}
        self.where = {version: " and ".join(filter(None, [record.live(version), condition])) for version in record.rows}

    def search(self, queries: NDArray[np.float32], k: int) -> Ranking:
        """Implements `Store.search`."""
        for version, width in self.widths.items():
            if width > queries.shape[1]:
                raise too_wide(queries.shape[1], version, width)
        size = max(1, min(256, _BYTES // (4 * queries.shape[1] * min(k + _MORE, _LIMIT))))
        found = [_Block(self, block, k).ranking() for block in chunks(queries, size)]  # type: ignore[arg-type]
        if not found:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64), np.zeros((0, k), np.int64)
        scores, ids, versions = (np.concatenate(column) for column in zip(*found, strict=True))
        return scores, ids, versions


class _Block:
    """The search of a block of queries."""

    def __init__(self, searcher: Searcher, queries: NDArray[np.float32], k: int) -> None:
        self._all = searcher
        self._queries, self._k = queries, k
        self._index = VersionsIndex()
        self._seen: dict[int, set[int]] = {version: set() for version in searcher.widths}

    def ranking(self) -> Ranking:
        limit = self._k + _MORE
        # upper bound of the scores of rows that were not fetched, by version and query
        bound = {version: np.full(len(self._queries), np.inf) for version in self._seen}
        for version in self._seen:
            self._take_zeros(version, bound[version])
        while True:
            found = self._index.search(self._queries, self._k, None)
            last = found[0][:, -1]
            missing = {version: np.flatnonzero((most >= last) & (most > -np.inf)) for version, most in bound.items()}
            if not any(len(some) for some in missing.values()):
                return found
            for version, some in missing.items():
                if not len(some):
                    continue
                if limit > _LIMIT:  # more ties than a search returns
                    self._take_all(version)
                    bound[version][:] = -np.inf
                else:
                    bound[version][some] = self._take_best(version, some, limit)
            limit = min(4 * limit, _LIMIT) if limit < _LIMIT else _LIMIT + 1

    def _take_best(self, version: int, some: NDArray[np.int64], limit: int) -> NDArray[np.float64]:
        """Fetches the best rows for some queries; returns the bound for all other rows."""
        queries = self._queries[some, : self._all.widths[version]].astype(np.float64)
        units = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
        where = self._all.where[version]
        if version in self._all.zeros:
            where = f"{where} and scale > {ZERO}"
        now = self._all.snapshot
        answers = now.connection.search(now.rows_of(version), units, limit, where, _FIELDS, now.stamp)
        rows: dict[int, dict[str, Any]] = {}
        for hits in answers:
            for hit in hits:
                row = hit["entity"]
                rows.setdefault(row["id"], row)
        self._put(version, list(rows.values()))
        return np.array([hits[-1]["distance"] + _ERROR if len(hits) >= limit else -np.inf for hits in answers])

    def _take_zeros(self, version: int, bound: NDArray[np.float64]) -> None:
        """Fetches rows that score 0: the k lowest ids of zero vectors and, if a query is zero, of all rows."""
        width = self._all.widths[version]
        of_zeros = ~self._queries[:, :width].any(axis=1)
        where = self._all.where[version]
        for needed, condition in (
            (version in self._all.zeros, f"{where} and scale == {ZERO}"),
            (bool(of_zeros.any()), where),
        ):
            if needed:
                now = self._all.snapshot
                found = now.connection.query(now.rows_of(version), condition, ["id"], now.stamp)
                self._fetch(version, sorted(row["id"] for row in found)[: self._k])
        bound[of_zeros] = -np.inf

    def _take_all(self, version: int) -> None:
        now, where = self._all.snapshot, self._all.where[version]
        found = now.connection.query(now.rows_of(version), where, ["id"], now.stamp)
        self._fetch(version, [row["id"] for row in found])

    def _fetch(self, version: int, ids: list[int]) -> None:
        some = [id_ for id_ in ids if id_ not in self._seen[version]]
        for part in chunks(some, 1024):
            self._put(version, self._all.snapshot.fetch(version, part, self._all.where[version]))

    def _put(self, version: int, rows: list[dict[str, Any]]) -> None:
        new = [row for row in rows if row["id"] not in self._seen[version]]
        if new:
            self._seen[version].update(row["id"] for row in new)
            self._index.put(version, np.array([row["id"] for row in new], dtype=np.int64), unpack(new))
