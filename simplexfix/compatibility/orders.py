"""Backfill orders: the order in which gallery rows are re-extracted.

An order must be chosen before re-extraction, so these functions use only the old features and the labels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _reference
from .._checks import check_name
from ..functional import cosine_topk
from ..labelled import Ids, VersionFeatures, check_versions, read_ids
from ..retrieval.class_means import class_sums
from .statistics import check_generator

__all__ = ["farthest_from_class_mean", "lowest_margin"]

ORDERS = ("random", "farthest_from_class_mean", "lowest_margin")
_BLOCK_NUMBERS = 2**23  # numbers per block: 64 MB of float64 for the rows, and as much for their templates


def farthest_from_class_mean(old: VersionFeatures) -> NDArray[np.int64]:
    """Returns the backfill order that replaces outliers first, by distance from the own class template.

        template[c] = F.normalize(old.gallery[gallery_labels == c].mean(0))
        distance = 1 - F.normalize(old.gallery) . template[gallery_labels]          # farthest first

    Rows with equal distances in float32 are ordered by ascending row.

    Args:
        old: version whose gallery is replaced; its queries are not read.

    Returns:
        [N] int64, a permutation of the rows that are not ignored.

    Raises:
        TypeError: `old` is not a `VersionFeatures`.
        ValueError: the items have no labels, or a row holds nan or inf.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import farthest_from_class_mean
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0], [0, 0, 0])
        >>> farthest_from_class_mean(items.version(np.ones((1, 2)), np.array([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]])))
        array([2, 1, 0])
    """
    return old.items.gallery_rows[_ascending(_own_scores(*_with_templates(old)))]


def lowest_margin(old: VersionFeatures) -> NDArray[np.int64]:
    """Returns the backfill order that first replaces rows which the old model places near or in another class.

        margin = row . template[own class]  -  max over other classes c of  row . template[c]       # lowest first

    Rows and templates are normalised, as in `farthest_from_class_mean`.  Rows with equal margins are ordered by
    ascending row; with a single class this applies to all rows.

    Args:
        old: version whose gallery is replaced; its queries are not read.

    Returns:
        [N] int64, a permutation of the rows that are not ignored.

    Raises:
        TypeError, ValueError: as in `farthest_from_class_mean`.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import lowest_margin
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0], [0, 0, 1])
        >>> lowest_margin(items.version(np.ones((1, 2)), np.array([[1.0, 0.0], [1.0, 0.9], [0.0, 1.0]])))
        array([1, 2, 0])
    """
    rows, index, sums = _with_templates(old)
    scores, nearest = cosine_topk(rows, sums, 2)
    other = torch.where(nearest[:, 0] == index, scores[:, 1], scores[:, 0])  # -inf if there is only one class
    return old.items.gallery_rows[_ascending(_own_scores(rows, index, sums).double() - other.double())]


def read_order(
    order: str | Ids, old: VersionFeatures, generator: np.random.Generator | None
) -> tuple[str, NDArray[np.int64]]:
    """Returns the name of an order ("given" for a permutation) and the indices [N] of its rows among items not ignored.

    Raises:
        TypeError, ValueError: `order` is neither a name nor a permutation, or `generator` is not a generator.
    """
    count, given = len(old.gallery), old.items.gallery_rows
    if not isinstance(order, str):
        rows = read_ids("order", order, old.gallery.name, count, unique=True)
        bad = np.flatnonzero(~np.isin(rows, given))
        if len(bad):
            ignored = ", except ignored ones," if old.items.ignored_labels else ""
            raise ValueError(f"order must hold each row from 0 to {given[-1]}{ignored} once, got {rows[bad[0]]}")
        return "given", np.searchsorted(given, rows)
    check_name("order", order, ORDERS)
    generator = check_generator(generator)
    if order == "random":
        return order, generator.permutation(count).astype(np.int64)
    by_features = {"farthest_from_class_mean": farthest_from_class_mean, "lowest_margin": lowest_margin}
    return order, np.searchsorted(given, by_features[order](old))


def _with_templates(old: VersionFeatures) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows [N, d], the class index of each row [N], and class sums [C, d]."""
    (old,) = check_versions([old], ["old"])
    rows = old.gallery.whole()
    classes = old.items.gallery_classes
    return rows, torch.from_numpy(classes.places).to(rows.device), class_sums(old.gallery, classes).float()


def _own_scores(rows: Tensor, index: Tensor, sums: Tensor) -> Tensor:
    """Returns the cosine [N] of each row with its class template, rounded to float32 as in a search."""
    templates = _reference.unit_float32(sums)
    scores = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    step = max(1, _BLOCK_NUMBERS // rows.shape[1])
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        unit = _reference.unit_float32(rows[part]).double()
        scores[part] = (unit * templates[index[part]]).sum(1).float()
    return scores


def _ascending(values: Tensor) -> NDArray[np.int64]:
    order: NDArray[np.int64] = values.argsort(stable=True).cpu().numpy()
    return order
