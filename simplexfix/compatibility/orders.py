"""Which rows of a gallery to re-extract first.

An order must be chosen before anything is extracted anew: these need the old features and the labels, nothing else.
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
_BLOCK_NUMBERS = 2**23  # 64 MB of float64 for each of the rows and their templates


def farthest_from_class_mean(old: VersionFeatures) -> NDArray[np.int64]:
    """The order that replaces outliers first: by distance from the template of the row's own class.

        template[c] = F.normalize(old.gallery[gallery_labels == c].mean(0))
        distance = 1 - F.normalize(old.gallery) . template[gallery_labels]          # farthest first

    Rows of equal distance, to float32, come by lower row.

    Args:
        old: the version whose gallery is replaced; its queries are not read.

    Returns:
        [N] int64 row numbers as they were given, a permutation of those that are not ignored.

    Raises:
        TypeError, ValueError: as `backfill_curve`.
    """
    return old.items.gallery_rows[_ascending(_own_scores(*_with_templates(old)))]


def lowest_margin(old: VersionFeatures) -> NDArray[np.int64]:
    """The order that replaces first what the old model puts nearest to, or into, another class.

        margin = row . template[own class]  -  max over other classes c of  row . template[c]       # lowest first

    Rows and templates are normalised, the templates as in `farthest_from_class_mean`; rows of equal margin come by
    lower row, and so do all where there is one class.  Arguments, result and errors as there.
    """
    rows, index, sums = _with_templates(old)
    scores, nearest = cosine_topk(rows, sums, 2)
    other = torch.where(nearest[:, 0] == index, scores[:, 1], scores[:, 0])  # -inf where there is one class
    return old.items.gallery_rows[_ascending(_own_scores(rows, index, sums).double() - other.double())]


def read_order(
    order: str | Ids, old: VersionFeatures, generator: np.random.Generator | None
) -> tuple[str, NDArray[np.int64]]:
    """An order's name, "given" for a permutation, and the [N] places of its rows among those that count.

    Raises:
        TypeError, ValueError: neither a name nor a permutation, or no generator.
    """
    count, given = len(old.gallery), old.items.gallery_rows
    if not isinstance(order, str):
        rows = read_ids("order", order, old.gallery.name, count, unique=True)
        bad = np.flatnonzero(~np.isin(rows, given))
        if len(bad):
            ignored = ", but for ignored ones" if old.items.ignored_labels else ""
            raise ValueError(f"order must hold the rows 0 to {given[-1]}{ignored}, each once, got {rows[bad[0]]}")
        return "given", np.searchsorted(given, rows)
    check_name("order", order, ORDERS)
    generator = check_generator(generator)
    if order == "random":
        return order, generator.permutation(count).astype(np.int64)
    by_features = {"farthest_from_class_mean": farthest_from_class_mean, "lowest_margin": lowest_margin}
    return order, np.searchsorted(given, by_features[order](old))


def _with_templates(old: VersionFeatures) -> tuple[Tensor, Tensor, Tensor]:
    """[N, d] rows, [N] the place of each row's class, [C, d] sums of classes."""
    (old,) = check_versions([old], ["old"])
    rows = old.gallery.whole()
    classes = old.items.gallery_classes
    return rows, torch.from_numpy(classes.places).to(rows.device), class_sums(old.gallery, classes).float()


def _own_scores(rows: Tensor, index: Tensor, sums: Tensor) -> Tensor:
    """[N] float32 cosine of each row with the template of its class, as a search would give it."""
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
