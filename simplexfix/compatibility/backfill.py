"""Galleries between two versions: what a search finds while rows of the old model are replaced by rows of the new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .._checks import check_integer, check_name, check_number
from ..labelled import FeatureRows, Ids, VersionFeatures, check_versions, read_hits
from ..retrieval.mixed import Mixture, mixed_search
from ..retrieval.protocols import Hits, Protocol, read_protocol
from .orders import read_order

__all__ = ["BackfillCurve", "backfill_curve", "mixed_topk"]


@dataclass(frozen=True, eq=False)
class BackfillCurve:
    """What `backfill_curve` found.  All arrays are read-only.

    Attributes:
        shares: [S] float64, of the gallery's rows by the new model: 0, ..., 1.
        scores: [S] float64, M at each.
        hits: [S, Q] bool, which queries were right, or float64, what each scored; None where the protocol has only a
            score.
        order: [N] int64, the gallery rows, as they were given, in the order in which they are replaced.
        order_name: what was asked for; "given" for a permutation.
        protocol: its name.
        queries: Q.
        absent: how many of them have no relevant item in the gallery but themselves; they count as wrong, or score 0.
    """

    shares: NDArray[np.float64]
    scores: NDArray[np.float64]
    hits: Hits | None
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
    old: VersionFeatures,
    new: VersionFeatures,
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
            gallery = old.gallery.clone();  gallery[replaced] = new.gallery[replaced]
            scores[t] = protocol.score(items.version(new.query, gallery))

    Every step is a search of its own, exact; the ends are the protocol on the two pure galleries.  Means of classes are
    of the rows as they are, so where one model's are longer they weigh more: normalise both before where that is not
    meant.  An item that is a query itself, by its id, is left out as everywhere.

    With widths="leading" and models of different width, "instance" compares each row on the dimensions that it shares
    with the query, as `mixed_topk`.  "nearest_class_mean" adds up what the rows of a class have in each dimension, and
    a template is as wide as its widest row.  The ends are again those of the pure galleries.

    Args:
        old: by the model whose gallery is in service.
        new: by the one that replaces it, of the same items.
        order: "random"; "farthest_from_class_mean" or "lowest_margin", as the functions of these names say of the old
            gallery with labels; or [N] row numbers, each once.
        protocol: "nearest_class_mean", "instance", a metric of the ranking such as "ndcg@10", or such an object; or,
            for one width, a `Protocol` of your own.
        steps: S - 1, at least 1; a gallery with fewer rows takes one step per row.
        widths: "equal" or "leading", as of `compatibility_matrix`.
        generator: of the random order; None: `np.random.default_rng(0)`.

    Raises:
        TypeError, ValueError: versions that do not fit each other, nan or inf (by row), an order that is no
            permutation, or an option that is not as above.

    Reference:
        Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023, for curve and area.
    """
    protocol = read_protocol(protocol)
    old, new = check_versions((old, new), ("old", "new"))
    old.pair(new, widths)
    new.pair(new, "equal")
    items = old.items
    steps = check_integer("steps", steps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    measure = _measure(protocol, old, new)
    count = len(items.gallery_rows)
    order_name, rows = read_order(order, old, generator)

    replaced = [t * count // steps for t in range(steps + 1)] if steps < count else list(range(count + 1))
    scores, hits = [], []
    is_new = np.zeros(count, dtype=np.bool_)
    for number in replaced:
        is_new[rows[:number]] = True
        found = measure(is_new)
        if isinstance(found, float):
            scores.append(found)
        else:
            hits.append(found)
            scores.append(float(found.mean()))
    curve = BackfillCurve(
        shares=np.array(replaced) / count,
        scores=np.array(scores),
        hits=np.stack(hits) if hits else None,  # type: ignore[arg-type]  # of one dtype
        order=items.gallery_rows[rows],
        order_name=order_name,
        protocol=protocol.name,
        queries=len(items.query_rows),
        absent=int((items.num_relevant == 0).sum()),
    )
    for array in (curve.shares, curve.scores, curve.hits, curve.order):
        if array is not None:
            array.flags.writeable = False
    return curve


def mixed_topk(
    old: VersionFeatures,
    new: VersionFeatures,
    replaced: ArrayLike | Tensor,
    k: int,
    *,
    queries: str = "new",
    widths: str = "equal",
) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each query in a gallery of which some rows are by the new model: one ranking, exact.

        gallery = torch.where(replaced[:, None], new.gallery, old.gallery)
        scores, ids = cosine_topk(query, gallery, k)

    With widths="leading" a query and a row are compared on the dimensions that both have, w = min(d_query, d_row) of
    them, each normalised over these:

        score = F.normalize(query[i, :w]) . F.normalize(row[:w])

    So queries by either model can search a gallery on its way from one width to another.  No item is left out.

    Args:
        old, new: versions of the same items; rows that do not count are to be finite too (zeros will do).
        replaced: [N] bool, which rows are by the new model, of all that were given.
        k: at least 1.  Where the gallery has fewer rows, id -1 with score -inf follows.
        queries: by which model, "new" or "old".
        widths: "equal" or "leading".

    Returns:
        scores [Q, k] float32 descending, ids [Q, k] int64, gallery rows as given; order is by score, then by lower row.

    Raises:
        TypeError, ValueError: as `backfill_curve`; `replaced` is not bool or not one per row, or k below 1.
    """
    check_name("queries", queries, ("new", "old"))
    old, new = check_versions((old, new), ("old", "new"))
    by = new if queries == "new" else old
    for searched in (old, new):
        searched.pair(by, widths)
    is_new = read_hits("replaced", replaced, "whether each row is by the new model")
    rows, given = old.items.gallery_rows, old.items.given[1]
    if len(is_new) != given:
        raise ValueError(f"replaced must have shape [{given}], one per row, got {list(is_new.shape)}")
    mixture = Mixture.read(by.query, old.gallery, new.gallery)
    device = mixture.old.device
    scores, places = mixed_search(*mixture, torch.from_numpy(is_new[rows]).to(device), k)
    return scores, torch.tensor([*rows, -1], device=device)[places]  # place -1 is the last


def _measure(
    protocol: Protocol, old: VersionFeatures, new: VersionFeatures
) -> Callable[[NDArray[np.bool_]], Hits | float]:
    """The hits, or the score, as a function of which rows are replaced."""
    if protocol.mixed_hits is not None:
        return protocol.mixed_hits(old, new)
    if old.gallery.width != new.gallery.width:
        raise ValueError(
            f"{old.gallery.name} has {old.gallery.width} columns, {new.gallery.name} has {new.gallery.width}: "
            f"protocol {protocol.name!r}, which has no mixed_hits, needs one width"
        )
    mixture = Mixture.read(new.query, old.gallery, new.gallery)

    def score(replaced: NDArray[np.bool_]) -> float:
        gallery = FeatureRows("mixed gallery", mixture.gallery(replaced))
        value = protocol.score(VersionFeatures(old.items, new.query, gallery, name="mixed"))
        check_number(f"the score by {protocol.name}", value)
        return float(value)

    return score
