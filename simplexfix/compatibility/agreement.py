"""Without labels: how much of the ranking in a re-extracted gallery the new queries find in the old one."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from .._checks import check_integer
from ..labelled import VersionFeatures, check_versions
from ..retrieval.protocols import Protocol
from ..retrieval.results import nearest_places

__all__ = ["agreement_protocol", "overlap", "read_agreement", "topk_agreement"]

_NAME = re.compile(r"agreement@([0-9]{1,9})")


def topk_agreement(found: VersionFeatures, reference: VersionFeatures, *, k: int = 10) -> NDArray[np.float64]:
    """How much of each query's top k of one search is in the top k of another.

        agreement[q] = | top-k(found.query[q], found.gallery) and top-k(reference.query[q], reference.gallery) | / k

    Args:
        found: queries and the gallery that they search; `old.searched_by(new)` for new queries in the old gallery.
        reference: of the same items, as the new version with the gallery that it has extracted itself.
        k: places that are compared, at least 1 and less than the gallery has items.

    Returns:
        [Q] in [0, 1]: an item with the id of the query is in neither ranking.

    Raises:
        TypeError, ValueError: versions of other items, by name; k out of its range.
    """
    found, reference = check_versions((found, reference), ("found", "reference"))
    hits = agreement_protocol(reference, check_integer("k", k)).hits
    assert hits is not None
    return np.asarray(hits(found), dtype=np.float64)


def read_agreement(protocol: object) -> int | None:
    """k of "agreement@k"; None: the protocol is of another kind."""
    name = _NAME.fullmatch(protocol) if isinstance(protocol, str) else None
    return None if name is None else int(name[1])


def agreement_protocol(reference: VersionFeatures, k: int) -> Protocol:
    """What queries score by their agreement with the reference's search of its own gallery.

    Raises:
        ValueError: as `topk_agreement`.
    """
    items = reference.items
    others = len(items.gallery_rows) - int((items.excluded >= 0).any())
    if not 1 <= k < others:
        raise ValueError(
            f"agreement@{k} needs k of at least 1 and more than k gallery items beside the query, got {others}: "
            "give more items, or take a smaller k"
        )
    own = nearest_places(reference, k)
    return Protocol(f"agreement@{k}", hits=lambda pair: overlap(nearest_places(pair, k), own))


def overlap(found: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
    """[Q] fraction of each row's numbers that the other's row holds, too; [Q, k] each, 0 or more, unlike in a row."""
    # numbers of unlike rows must differ; then one search finds those of all rows
    apart = np.arange(len(found))[:, None] * (1 + max(found.max(initial=0), other.max(initial=0)))
    shared: NDArray[np.float64] = np.isin(found + apart, other + apart).mean(axis=1)
    return shared
