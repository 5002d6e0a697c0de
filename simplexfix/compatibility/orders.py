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
from ..retrieval._inputs import Features, Ids, Rows, read_ids, read_labels
from ..retrieval.protocols import class_sums
from .statistics import check_generator

__all__ = ["farthest_from_class_mean", "lowest_margin"]

ORDERS = ("random", "farthest_from_class_mean", "lowest_margin")
_BLOCK_NUMBERS = 2**23  # 64 MB of float64 for each of the rows and their templates


def farthest_from_class_mean(old_gallery: Rows, gallery_labels: Ids) -> NDArray[np.int64]:
    """The order that replaces outliers first: by distance from the template of the row's own class.

        template[c] = F.normalize(old_gallery[gallery_labels == c].mean(0))
        distance = 1 - F.normalize(old_gallery) . template[gallery_labels]          # farthest first

    Rows of equal distance, to float32, come by lower row.

    Args:
        old_gallery: [N, d], as of `backfill_curve`.
        gallery_labels: [N] integers.

    Returns:
        [N] int64 row numbers, a permutation.

    Raises:
        TypeError, ValueError: as `backfill_curve`.
    """
    return _ascending(_own_scores(*_with_templates(old_gallery, gallery_labels)))


def lowest_margin(old_gallery: Rows, gallery_labels: Ids) -> NDArray[np.int64]:
    """The order that replaces first what the old model puts nearest to, or into, another class.

        margin = row . template[own class]  -  max over other classes c of  row . template[c]       # lowest first

    Rows and templates are normalised, the templates as in `farthest_from_class_mean`; rows of equal margin come by
    lower row, and so do all where there is one class.  Arguments, result and errors as there.
    """
    rows, index, sums = _with_templates(old_gallery, gallery_labels)
    scores, nearest = cosine_topk(rows, sums, 2)
    other = torch.where(nearest[:, 0] == index, scores[:, 1], scores[:, 0])  # -inf where there is one class
    return _ascending(_own_scores(rows, index, sums).double() - other.double())


def read_order(
    order: str | Ids, old: Tensor, labels: NDArray[np.int64], generator: np.random.Generator | None
) -> tuple[str, NDArray[np.int64]]:
    """An order's name, "given" for a permutation, and its [N] rows.

    Raises:
        TypeError, ValueError: neither a name nor a permutation, or no generator.
    """
    if not isinstance(order, str):
        rows = read_ids("order", order, "old_gallery", len(old), unique=True).copy()
        bad = np.flatnonzero((rows < 0) | (rows >= len(old)))
        if len(bad):
            raise ValueError(f"order must hold the rows 0 to {len(old) - 1}, each once, got {rows[bad[0]]}")
        return "given", rows
    check_name("order", order, ORDERS)
    generator = check_generator(generator)
    if order == "random":
        return order, generator.permutation(len(old)).astype(np.int64)
    by_features = {"farthest_from_class_mean": farthest_from_class_mean, "lowest_margin": lowest_margin}
    return order, by_features[order](old, labels)


def _with_templates(old_gallery: Rows, gallery_labels: Ids) -> tuple[Tensor, Tensor, Tensor]:
    """[N, d] rows, [N] the place of each row's class, [C, d] sums of classes."""
    features = Features("old_gallery", old_gallery)
    labels = read_labels("gallery_labels", gallery_labels, "old_gallery", len(features))
    rows = features.block_tensor(0, len(features))
    return rows, *class_sums(rows, torch.tensor(labels, device=rows.device))[1:]


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
