"""The compatibility matrix of model versions, from features and labels alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_name
from ..retrieval import instance_accuracy, nearest_class_mean_accuracy
from ..retrieval._inputs import Features, Ids, Rows, read_labels
from ._passes import CellHits, class_mean_hits, nearest_item_hits

__all__ = ["compatibility_hits", "compatibility_matrix"]

Protocol = Callable[[Tensor, Tensor, Tensor, Tensor], float]
_Hits = Callable[[list[Features], list[Features], NDArray[np.int64], NDArray[np.int64]], CellHits]

# Protocols that are shares of right queries, and how their cells come from one pass over each version.
_BY_PASSES: dict[Protocol, _Hits] = {
    nearest_class_mean_accuracy: class_mean_hits,
    instance_accuracy: nearest_item_hits,
}


def compatibility_matrix(
    queries: Sequence[Rows],
    galleries: Sequence[Rows],
    query_labels: Ids,
    gallery_labels: Ids,
    protocol: Protocol,
    *,
    widths: str = "equal",
) -> NDArray[np.float64]:
    """Scores every version's queries on its own gallery and on those of the versions before.

        C[i, j] = protocol(queries[i], query_labels, galleries[j], gallery_labels)    for j <= i, else nan

    Each element of `queries` and `galleries` is asked for once: they may be sequences that extract.  With
    `nearest_class_mean_accuracy` each gallery is averaged once and each query read once; with `instance_accuracy` each
    gallery is normalised and encoded once.  Both read arrays in blocks, so that features may be mapped files larger
    than memory (`numpy.load(path, mmap_mode="r")`).  Any other protocol is called for each cell with whole tensors.

    Args:
        queries: T tensors or arrays [Q, d], the same queries by each version; float32, float64, float16, a tensor
            also bfloat16; finite.  The two protocols named above compare them in float32, whatever they are.
        galleries: T of [N, d], the same gallery by each version, extracted once and kept.
        query_labels: [Q] integers, any values.
        gallery_labels: [N] integers.
        protocol: of `simplexfix.retrieval`, or a function with the same arguments.
        widths: "equal": versions of different width are refused; "leading": they are compared on the leading
            dimensions that both have, min(d_i, d_j) of them.

    Returns:
        [T, T] float64, nan above the diagonal.

    Raises:
        TypeError: features are not floating, labels not integers; another protocol's features differ in dtype.
        ValueError: no version, unlike numbers of versions, of rows or of labels, versions of different width, or a
            row that holds nan or inf; by name.
    """
    versions = _Versions(queries, galleries, query_labels, gallery_labels, widths)
    size = len(versions.queries)
    matrix = np.full((size, size), np.nan)
    cells = versions.hits(protocol)
    if cells is not None:
        right = np.zeros((size, size), dtype=np.int64)
        for i, j, _, hits in cells:
            right[i, j] += np.count_nonzero(hits)
        lower = np.tril_indices(size)
        matrix[lower] = right[lower] / len(versions.query_labels)
        return matrix
    for i in range(size):
        for j in range(i + 1):
            matrix[i, j] = versions.score(protocol, i, j)
    return matrix


def compatibility_hits(
    queries: Sequence[Rows],
    galleries: Sequence[Rows],
    query_labels: Ids,
    gallery_labels: Ids,
    protocol: Protocol,
    *,
    widths: str = "equal",
) -> list[list[NDArray[np.bool_]]]:
    """Which queries are right in each cell: what intervals, tests and flips are made from, from the same T + T passes.

    Arguments and errors as of `compatibility_matrix`, whose cells are the means; memory T (T + 1) / 2 * Q bytes.

    Returns:
        T rows of lengths 1, 2, ..., T: hits[i][j], [Q] bool, of queries by version i on the gallery by version j.

    Raises:
        ValueError: `protocol` is not `nearest_class_mean_accuracy` or `instance_accuracy`.
    """
    versions = _Versions(queries, galleries, query_labels, gallery_labels, widths)
    cells = versions.hits(protocol, always=True)
    if cells is None:
        names = " or ".join(known.__name__ for known in _BY_PASSES)
        raise ValueError(f"protocol must be {names}, which are shares of right queries, got {protocol!r}")
    count = len(versions.query_labels)
    out = [[np.zeros(count, dtype=np.bool_) for _ in range(i + 1)] for i in range(len(versions.queries))]
    for i, j, begin, hits in cells:
        out[i][j][begin : begin + len(hits)] = hits
    return out


class _Versions:
    """Features of T versions and labels, checked before anything is computed; rows are looked at as they are read."""

    def __init__(
        self,
        queries: Sequence[Rows],
        galleries: Sequence[Rows],
        query_labels: Ids,
        gallery_labels: Ids,
        widths: str,
    ) -> None:
        check_name("widths", widths, ("equal", "leading"))
        if not len(queries) or len(queries) != len(galleries):
            raise ValueError(
                f"queries and galleries must be of the same versions, got {len(queries)} and {len(galleries)}"
            )
        self.queries = [Features(f"queries[{i}]", rows) for i, rows in enumerate(queries)]
        self.galleries = [Features(f"galleries[{i}]", rows) for i, rows in enumerate(galleries)]
        first = self.queries[0]
        for features in (self.queries, self.galleries):
            for version in features:
                if version.width != first.width and widths == "equal":
                    raise ValueError(
                        f"{version.name} has {version.width} columns, version 0 has {first.width}: features of "
                        'different width cannot be compared, but for their leading dimensions: widths="leading"'
                    )
                if len(version) != len(features[0]):
                    raise ValueError(
                        f"{version.name} has {len(version)} rows, {features[0].name} has {len(features[0])}: "
                        "all versions must be of the same items"
                    )
        self.query_labels = read_labels("query_labels", query_labels, "queries[0]", len(first))
        self.gallery_labels = read_labels("gallery_labels", gallery_labels, "galleries[0]", len(self.galleries[0]))
        self._query: tuple[int, Tensor] | None = None

    def hits(self, protocol: Protocol, *, always: bool = False) -> CellHits | None:
        """The cells' hits by passes over the versions; None where the protocol must be asked for each cell.

        Features on a GPU are left to the protocol, which searches there, unless hits are wanted `always`.
        """
        passes = _BY_PASSES.get(protocol)
        features = self.queries + self.galleries
        if passes is None or not (always or all(version.on_cpu for version in features)):
            return None
        return passes(self.queries, self.galleries, self.query_labels, self.gallery_labels)

    def score(self, protocol: Protocol, i: int, j: int) -> float:
        query, gallery = self.queries[i], self.galleries[j]
        if query.dtype != gallery.dtype:
            raise TypeError(
                f"{query.name} is {query.dtype}, {gallery.name} is {gallery.dtype}: this protocol is called with the "
                "features as they are, which must be of one dtype"
            )
        if self._query is None or self._query[0] != i:
            query.check_finite()
            self._query = i, query.tensor()
        if i == j:  # seen for the first time
            gallery.check_finite()
        rows, items = self._query[1], gallery.tensor()
        width = min(query.width, gallery.width)
        labels = (
            torch.from_numpy(ids.copy()).to(x.device)
            for ids, x in ((self.query_labels, rows), (self.gallery_labels, items))
        )
        return protocol(rows[:, :width], next(labels), items[:, :width], next(labels))
