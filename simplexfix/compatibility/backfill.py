"""Galleries between two versions: what a search finds while rows of the old model are replaced by rows of the new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .._checks import check_integer, check_name, check_number
from ..functional import cosine_topk
from ..retrieval._inputs import Features, Ids, Rows, read_labels
from ..retrieval.protocols import class_sums
from .gate import PROTOCOLS, match_widths
from .orders import read_order

__all__ = ["BackfillCurve", "backfill_curve", "mixed_topk"]

Protocol: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], float]


@dataclass(frozen=True, eq=False)
class BackfillCurve:
    """What `backfill_curve` found.  All arrays are read-only.

    Attributes:
        shares: [S] float64, of the gallery's rows by the new model: 0, ..., 1.
        scores: [S] float64, M at each.
        hits: [S, Q] bool, which queries were right; None where the protocol is a function.
        order: [N] int64, the gallery rows in the order in which they are replaced.
        order_name: what was asked for; "given" for a permutation.
        protocol: its name.
        queries: Q.
        absent: how many of them are of a class that the gallery lacks; they count as wrong throughout.
    """

    shares: NDArray[np.float64]
    scores: NDArray[np.float64]
    hits: NDArray[np.bool_] | None
    order: NDArray[np.int64]
    order_name: str
    protocol: str
    queries: int
    absent: int

    @property
    def area(self) -> float:
        """The integral of M over the share, by trapezoids: the mean score of a backfill at constant speed."""
        return float(np.diff(self.shares) @ (self.scores[1:] + self.scores[:-1]) / 2)

    @property
    def above_line(self) -> float:
        """What the order is worth: the area minus that of the straight line between the ends, `(M(0) + M(1)) / 2`."""
        return self.area - float(self.scores[0] + self.scores[-1]) / 2

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under stable keys; the permutation and the hits, which are long, stay out."""
        return {
            "protocol": self.protocol,
            "order": self.order_name,
            "gallery": len(self.order),
            "queries": self.queries,
            "queries_of_classes_not_in_gallery": self.absent,
            "shares": self.shares.tolist(),
            "scores": self.scores.tolist(),
            "area": self.area,
            "above_line": self.above_line,
        }


def backfill_curve(
    query: Rows,
    query_labels: Ids,
    old_gallery: Rows,
    new_gallery: Rows,
    gallery_labels: Ids,
    *,
    order: str | Ids = "random",
    protocol: str | Protocol = "nearest_class_mean",
    steps: int = 10,
    widths: str = "equal",
    generator: np.random.Generator | None = None,
) -> BackfillCurve:
    """The score of the new model's queries while the gallery is re-extracted, row by row, until all of it is new.

        for t in range(steps + 1):
            replaced = order[: t * N // steps]                      # shares[t] = len(replaced) / N
            gallery = old_gallery.clone();  gallery[replaced] = new_gallery[replaced]
            scores[t] = protocol(query, query_labels, gallery, gallery_labels)

    Every step is a search of its own, exact; the ends are the protocol on the two pure galleries.  Means of classes are
    of the rows as they are, so where one model's are longer they weigh more: normalise both before where that is not
    meant.

    With widths="leading" and models of different width, "instance" compares each row on the dimensions that it shares
    with the query, as `mixed_topk`.  "nearest_class_mean" adds up what the rows of a class have in each dimension, and
    a template is as wide as its widest row.  The ends are again those of the pure galleries.

    Args:
        query: [Q, d] by the new model; a tensor or array (a mapped file too) of floating, finite numbers; float64 is
            rounded to float32.
        query_labels: [Q] integer class ids.
        old_gallery, new_gallery: [N, d] each, the same items by either model.
        gallery_labels: [N] integers.
        order: "random"; "farthest_from_class_mean" or "lowest_margin", as the functions of these names say of the old
            gallery; or [N] row numbers, each once.
        protocol: "nearest_class_mean" or "instance", as of `simplexfix.retrieval`; or, for one width, a function with
            their arguments, tensors on the device of the features, whose result is a number, such as mAP.
        steps: S - 1, at least 1; a gallery with fewer rows takes one step per row.
        widths: "equal" or "leading", as of `upgrade_gate`.
        generator: of the random order; None: `np.random.default_rng(0)`.

    Raises:
        TypeError, ValueError: features or labels that do not fit each other, nan or inf (by row), an order that is no
            permutation, or an option that is not as above.

    Reference:
        Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023, for curve and area.
    """
    items = _Mixture(query, old_gallery, new_gallery, widths)
    if items.query.shape[1] != items.new.shape[1]:
        raise ValueError(
            f"query has {items.query.shape[1]} columns, new_gallery has {items.new.shape[1]}; "
            "both must be by the new model"
        )
    query_classes = read_labels("query_labels", query_labels, "query", len(items.query))
    gallery_classes = read_labels("gallery_labels", gallery_labels, "old_gallery", len(items.old))
    name, score = _scorer(protocol, items, _as_tensor(query_classes, items), _as_tensor(gallery_classes, items))
    steps = check_integer("steps", steps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    count = len(items.old)
    order_name, rows = read_order(order, items.old, gallery_classes, generator)

    replaced = [t * count // steps for t in range(steps + 1)] if steps < count else list(range(count + 1))
    scores, hits = [], []
    is_new = np.zeros(count, dtype=np.bool_)
    for number in replaced:
        is_new[rows[:number]] = True
        found = score(torch.from_numpy(is_new).to(items.old.device))
        if isinstance(found, Tensor):
            hits.append(found.cpu().numpy())
            scores.append(int(found.sum()) / len(found))
        else:
            scores.append(found)
    curve = BackfillCurve(
        shares=np.array(replaced) / count,
        scores=np.array(scores),
        hits=np.stack(hits) if hits else None,
        order=rows,
        order_name=order_name,
        protocol=name,
        queries=len(query_classes),
        absent=int(np.isin(query_classes, gallery_classes, invert=True).sum()),
    )
    for array in (curve.shares, curve.scores, curve.hits, curve.order):
        if array is not None:
            array.flags.writeable = False
    return curve


def mixed_topk(
    query: Rows,
    old_gallery: Rows,
    new_gallery: Rows,
    replaced: ArrayLike | Tensor,
    k: int,
    *,
    widths: str = "equal",
) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each query in a gallery of which some rows are by the new model: one ranking, exact.

        gallery = torch.where(replaced[:, None], new_gallery, old_gallery)
        scores, ids = cosine_topk(query, gallery, k)

    With widths="leading" a query and a row are compared on the dimensions that both have, w = min(d_query, d_row) of
    them, each normalised over these:

        score = F.normalize(query[i, :w]) . F.normalize(row[:w])

    So queries by either model can search a gallery on its way from one width to another.

    Args:
        query: [Q, d], as of `backfill_curve`, by the old or the new model.
        old_gallery, new_gallery: [N, d] each; rows that do not count are to be finite too (zeros will do).
        replaced: [N] bool, which rows are by the new model.
        k: at least 1.  Where the gallery has fewer rows, id -1 with score -inf follows.
        widths: "equal" or "leading".

    Returns:
        scores [Q, k] float32 descending, ids [Q, k] int64, gallery rows; order is by score, then by lower row.

    Raises:
        TypeError, ValueError: as `backfill_curve`; `replaced` is not bool or not one per row, or k below 1.
    """
    items = _Mixture(query, old_gallery, new_gallery, widths)
    is_new = replaced.detach().cpu().numpy() if isinstance(replaced, Tensor) else np.asarray(replaced)
    if is_new.dtype != np.bool_:
        raise TypeError(f"replaced must be bool, whether each row is by the new model, got {is_new.dtype}")
    if is_new.shape != (len(items.old),):
        raise ValueError(f"replaced must have shape [{len(items.old)}], one per row, got {list(is_new.shape)}")
    return _search(items.query, items.old, items.new, _as_tensor(is_new, items), k)


class _Mixture:
    """The three features of a mixed search as float32, checked against each other."""

    def __init__(self, query: Rows, old_gallery: Rows, new_gallery: Rows, widths: str) -> None:
        check_name("widths", widths, ("equal", "leading"))
        named = {"query": query, "old_gallery": old_gallery, "new_gallery": new_gallery}
        features = [Features(name, rows) for name, rows in named.items()]
        if len(features[1]) != len(features[2]):
            raise ValueError(
                "old_gallery and new_gallery must be of the same items, "
                f"got {len(features[1])} and {len(features[2])} rows"
            )
        self.query, self.old, self.new = (rows.block_tensor(0, len(rows)) for rows in features)
        for name, rows in (("old_gallery", self.old), ("new_gallery", self.new)):
            match_widths("query", self.query, name, rows, widths)


def _as_tensor(array: NDArray[Any], items: _Mixture) -> Tensor:
    return torch.tensor(array, device=items.old.device)


def _search(query: Tensor, old: Tensor, new: Tensor, replaced: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two searches, one ranking: a row's score does not depend on what else is in its gallery."""
    scores, ids = [], []
    for rows, counts in ((old, ~replaced), (new, replaced)):
        at = counts.nonzero()[:, 0]
        width = min(query.shape[1], rows.shape[1])
        found, places = cosine_topk(query[:, :width], rows[at, :width], k)
        scores.append(found)
        ids.append(torch.cat([at, at.new_tensor([-1])])[places])  # place -1 is the last
    all_ids, by_row = torch.cat(ids, 1).sort(dim=1)
    all_scores, by_score = torch.cat(scores, 1).gather(1, by_row).sort(dim=1, descending=True, stable=True)
    return all_scores[:, :k].contiguous(), all_ids.gather(1, by_score)[:, :k].contiguous()


def _scorer(
    protocol: str | Protocol, items: _Mixture, query_labels: Tensor, gallery_labels: Tensor
) -> tuple[str, Callable[[Tensor], Tensor | float]]:
    """The protocol's name, and its hits or score as a function of which rows are replaced."""
    shared = min(items.old.shape[1], items.new.shape[1])

    def gallery(replaced: Tensor) -> Tensor:
        """One matrix, where an old row has zeros beyond its own dimensions."""
        mixed = torch.zeros_like(items.new)
        mixed[:, :shared] = items.old[:, :shared]
        mixed[replaced] = items.new[replaced]
        return mixed

    def instance(replaced: Tensor) -> Tensor:
        _, nearest = _search(items.query, items.old, items.new, replaced, 1)
        return gallery_labels[nearest[:, 0]] == query_labels

    def nearest_class_mean(replaced: Tensor) -> Tensor:
        classes, index, sums = class_sums(gallery(replaced), gallery_labels)
        renewed = torch.zeros(len(classes), dtype=torch.bool, device=sums.device)
        renewed[index[replaced]] = True
        _, nearest = _search(items.query, sums[:, :shared], sums, renewed, 1)
        return classes[nearest[:, 0]] == query_labels

    if isinstance(protocol, str):
        check_name("protocol", protocol, PROTOCOLS)
        return protocol, {"instance": instance, "nearest_class_mean": nearest_class_mean}[protocol]
    if not callable(protocol):
        raise TypeError(f"protocol must be a name or a function, got {type(protocol).__name__}")
    if items.old.shape[1] != items.new.shape[1]:
        raise ValueError(
            f"old_gallery has {items.old.shape[1]} columns, new_gallery has {items.new.shape[1]}: a protocol that is a "
            f"function needs one width; {' and '.join(map(repr, PROTOCOLS))} can do with two"
        )
    name = getattr(protocol, "__name__", type(protocol).__name__)

    def score(replaced: Tensor) -> float:
        value = protocol(items.query, query_labels, gallery(replaced), gallery_labels)
        check_number(f"the score by {name}", value)
        return float(value)

    return name, score
