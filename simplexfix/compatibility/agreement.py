"""Agreement, a score without labels: the fraction of a re-extracted gallery's top k that the old gallery returns."""

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
    """Returns the fraction of each query's top k that two searches have in common.

        agreement[q] = | top-k(found.query[q], found.gallery) and top-k(reference.query[q], reference.gallery) | / k

    Args:
        found: queries and the gallery that they search; `old.searched_by(new)` for new queries in the old gallery.
        reference: version of the same items to compare with, such as the new queries with their own gallery.
        k: number of places to compare, at least 1 and less than the number of gallery items.

    Returns:
        [Q] in [0, 1].  An item with the id of the query is in neither ranking.

    Raises:
        TypeError, ValueError: the versions have different items, or k is out of range; the message names the argument.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import topk_agreement
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0, 1], [0, 0, 1])
        >>> gallery = np.array([[1.0, 0.1], [0.9, 0.3], [0.2, 1.0]])
        >>> old = items.version(np.array([[1.0, 0.0], [1.0, 0.9]]), gallery)
        >>> new = items.version(np.array([[1.0, 0.1], [0.1, 1.0]]), gallery)
        >>> topk_agreement(old.searched_by(new), new, k=2)
        array([1., 1.])
    """
    found, reference = check_versions((found, reference), ("found", "reference"))
    hits = agreement_protocol(reference, check_integer("k", k)).hits
    assert hits is not None
    return np.asarray(hits(found), dtype=np.float64)


def read_agreement(protocol: object) -> int | None:
    """Returns k of "agreement@k", and None for other protocols."""
    name = _NAME.fullmatch(protocol) if isinstance(protocol, str) else None
    return None if name is None else int(name[1])


def agreement_protocol(reference: VersionFeatures, k: int) -> Protocol:
    """Returns the protocol that scores queries by their agreement with the reference's search of its own gallery.

    Raises:
        ValueError: k is out of range, as in `topk_agreement`.
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
    """Returns for each row of `found` the fraction of its entries that are in the same row of `other`: [Q].

    Args:
        found, other: [Q, k] non-negative integers, distinct within each row.
    """
    # A different offset for each row makes all entries distinct, so that one call of isin compares all rows.
    apart = np.arange(len(found))[:, None] * (1 + max(found.max(initial=0), other.max(initial=0)))
    shared: NDArray[np.float64] = np.isin(found + apart, other + apart).mean(axis=1)
    return shared
