"""The compatibility matrix of model versions, computed from features and labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..labelled import VersionFeatures, check_versions, check_widths
from ..retrieval.protocols import Hits, Protocol, read_protocol

__all__ = ["compatibility_hits", "compatibility_matrix"]


def compatibility_matrix(
    versions: Sequence[VersionFeatures], protocol: str | Protocol = "nearest_class_mean", *, widths: str = "equal"
) -> NDArray[np.float64]:
    """Returns the compatibility matrix: the score of every version's queries in its own and in all older galleries.

        C[i, j] = protocol.score(versions[j].searched_by(versions[i]))    # for j <= i, else nan

    "nearest_class_mean" averages each gallery once and reads each query once; "instance" normalises and indexes each
    gallery once.  Both read features in blocks, so mapped files may be larger than memory.  Any other protocol is
    called once per cell.

    Args:
        versions: T versions of the same items, oldest first.  Features are compared in float32.
        protocol: a name of `simplexfix.retrieval.PROTOCOLS`, a ranking metric such as "ndcg@10" or "map", or a
            `Protocol`.
        widths: "equal" raises if widths differ, unless the older width is one of the newer version's `prefixes`; then
            its queries are cut to that width.  "leading" compares the min(d_i, d_j) leading dimensions.

    Returns:
        [T, T] float64, nan above the diagonal.

    Raises:
        TypeError: an entry is not a `VersionFeatures`, or `protocol` is neither a name nor a `Protocol`.
        ValueError: there is no version, items or widths differ, or a row holds nan or inf; the message names it.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import compatibility_matrix
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0, 1], [0, 0, 1])
        >>> gallery = np.array([[1.0, 0.1], [0.9, 0.3], [0.2, 1.0]])
        >>> old = items.version(np.array([[1.0, 0.0], [1.0, 0.9]]), gallery)
        >>> new = items.version(np.array([[1.0, 0.1], [0.1, 1.0]]), gallery)
        >>> compatibility_matrix([old, new])
        array([[0.5, nan],
               [1. , 1. ]])
    """
    protocol = read_protocol(protocol)
    versions = _read(versions, widths)
    size, count = len(versions), len(versions[0].items.query_rows)
    matrix = np.full((size, size), np.nan)
    # features on a GPU are scored cell by cell, by the protocol's search on that GPU
    on_cpu = all(rows.on_cpu for version in versions for rows in (version.query, version.gallery))
    if protocol.matrix_hits is not None and on_cpu:
        right = np.zeros((size, size), dtype=np.int64)
        for i, j, _, hits in protocol.matrix_hits(versions):
            right[i, j] += np.count_nonzero(hits)
        lower = np.tril_indices(size)
        matrix[lower] = right[lower] / count
        return matrix
    for i in range(size):
        for j in range(i + 1):
            matrix[i, j] = protocol.score(versions[j].pair(versions[i], "leading"))
    return matrix


def compatibility_hits(
    versions: Sequence[VersionFeatures], protocol: str | Protocol = "nearest_class_mean", *, widths: str = "equal"
) -> list[list[Hits]]:
    """Returns the hits of every cell of the compatibility matrix, for intervals, tests and flip rates.

        compatibility_matrix(...)[i, j] == hits[i][j].mean()

    The memory is T (T + 1) / 2 * Q bytes, or 8 times as much for float64 scores.

    Args:
        versions, protocol, widths: as in `compatibility_matrix`.

    Returns:
        T rows of lengths 1, 2, ..., T.  `hits[i][j]` is [Q] for queries of version i in the gallery of version j.  Its
        dtype is bool, or float64 in [0, 1] for ranking metrics such as "ndcg@10".

    Raises:
        TypeError, ValueError: as in `compatibility_matrix`.
        ValueError: the protocol has no hits.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import compatibility_hits
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0, 1], [0, 0, 1])
        >>> gallery = np.array([[1.0, 0.1], [0.9, 0.3], [0.2, 1.0]])
        >>> old = items.version(np.array([[1.0, 0.0], [1.0, 0.9]]), gallery)
        >>> new = items.version(np.array([[1.0, 0.1], [0.1, 1.0]]), gallery)
        >>> _, new_queries = compatibility_hits([old, new])
        >>> new_queries[0]
        array([ True,  True])
    """
    protocol = read_protocol(protocol, needs="hits")
    versions = _read(versions, widths)
    if protocol.matrix_hits is None:
        assert protocol.hits is not None
        return [
            [protocol.hits(old.pair(new, "leading")) for old in versions[: i + 1]] for i, new in enumerate(versions)
        ]
    count = len(versions[0].items.query_rows)
    out: list[list[Hits]] = [[np.zeros(count, dtype=np.bool_) for _ in range(i + 1)] for i in range(len(versions))]
    for i, j, begin, hits in protocol.matrix_hits(versions):
        out[i][j][begin : begin + len(hits)] = hits
    return out


def _read(versions: Sequence[VersionFeatures], widths: str) -> list[VersionFeatures]:
    """Checks items and widths of the versions before any computation; rows are checked later, as they are read."""
    checked = check_versions(versions)
    check_widths(checked, widths)
    return checked
