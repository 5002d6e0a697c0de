"""The compatibility matrix of model versions, from features and labels alone."""

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
    """Scores every version's queries on its own gallery and on those of the versions before.

        C[i, j] = protocol.score(versions[j].searched_by(versions[i]))    for j <= i, else nan

    With "nearest_class_mean" each gallery is averaged once and each query read once; with "instance" each gallery is
    normalised and encoded once.  Both read features in blocks, so that they may be mapped files larger than memory.
    Any other protocol is called for each cell.

    Args:
        versions: T of the same items, oldest first.  All features are compared in float32.
        protocol: a name or an object of `simplexfix.retrieval.PROTOCOLS`; a metric of the ranking, such as "ndcg@10" or
            "map"; or a `Protocol` of your own.
        widths: "equal": versions of different width are refused, but for a newer one with the older one's width among
            its `prefixes`, whose queries are cut to it; "leading": all are compared on the leading dimensions that both
            have, min(d_i, d_j) of them.

    Returns:
        [T, T] float64, nan above the diagonal.

    Raises:
        TypeError: not versions, or not a protocol.
        ValueError: no version, versions of other items or of different width, or a row that holds nan or inf; by name.
    """
    protocol = read_protocol(protocol)
    versions = _read(versions, widths)
    size, count = len(versions), len(versions[0].items.query_rows)
    matrix = np.full((size, size), np.nan)
    # features on a GPU are left to the protocol, which searches there
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
    """Which queries are right in each cell: what intervals, tests and flips are made from, from the same T + T passes.

    Arguments and errors as of `compatibility_matrix`, whose cells are the means; memory T (T + 1) / 2 * Q bytes.

    Returns:
        T rows of lengths 1, 2, ..., T: `hits[i][j]`, [Q], of queries by version i on the gallery by version j: bool, or
        float64 in [0, 1] where the protocol scores queries, as "ndcg@10" does (8 times the memory).

    Raises:
        ValueError: a protocol without hits.
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
    """Checked before anything is computed; rows are looked at as they are read."""
    checked = check_versions(versions)
    check_widths(checked, widths)
    return checked
