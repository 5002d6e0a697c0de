"""Backfilling: search quality while gallery rows of the old model are replaced by rows of the new model."""

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
    """The result of `backfill_curve`; all arrays are read-only.

    Attributes:
        fractions: [S] float64, fraction of gallery rows by the new model at each step, from 0 to 1.
        scores: [S] float64, score M at each step.
        hits: [S, Q] bool (correct queries) or float64 (scores of queries); None if the protocol has only a score.
        order: [N] int64, gallery rows in the order of their replacement.
        order_name: name of the order; "given" for a permutation.
        protocol: name of the protocol.
        queries: Q, number of queries.
        absent: number of queries without a relevant gallery item other than themselves; they count as wrong, or
            score 0.
    """

    fractions: NDArray[np.float64]
    scores: NDArray[np.float64]
    hits: Hits | None
    order: NDArray[np.int64]
    order_name: str
    protocol: str
    queries: int
    absent: int

    @property
    def area(self) -> float:
        """Integral of the score over the fraction, by trapezoids: the mean score of a backfill at constant speed."""
        return float(np.diff(self.fractions) @ (self.scores[1:] + self.scores[:-1]) / 2)

    @property
    def above_line(self) -> float:
        """Benefit of the order: the area minus that of a straight line between the ends, `(M(0) + M(1)) / 2`."""
        return self.area - float(self.scores[0] + self.scores[-1]) / 2

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values under stable keys, without the long arrays `order` and `hits`."""
        return {
            "protocol": self.protocol,
            "order": self.order_name,
            "gallery": len(self.order),
            "queries": self.queries,
            "queries_of_classes_not_in_gallery": self.absent,
            "fractions": self.fractions.tolist(),
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
    """Returns the score of the new model's queries while the gallery is re-extracted step by step.

        for t in range(steps + 1):
            replaced = order[: t * N // steps]                      # fractions[t] = len(replaced) / N
            gallery = old.gallery.clone();  gallery[replaced] = new.gallery[replaced]
            scores[t] = protocol.score(items.version(new.query, gallery))

    Each step is an exact search.  The first score is that of the old gallery, and the last that of the new one.  Class
    means use rows without normalisation, so a model with longer rows has more weight; normalise both models' rows to
    avoid that.  A gallery item with the query's own id is left out.

    With widths="leading" and different widths, "instance" compares each row on the dimensions that it shares with the
    query, as in `mixed_topk`.  "nearest_class_mean" sums the rows of a class in each dimension, so a template is as
    wide as its widest row.

    Args:
        old: version whose gallery is deployed.
        new: version that replaces it, of the same items.
        order: "random"; "farthest_from_class_mean" or "lowest_margin", the results of the functions with these names;
            or [N] row numbers, a permutation.
        protocol: "nearest_class_mean", "instance", a ranking metric such as "ndcg@10", or a `Protocol`.  A protocol
            without `mixed_hits` requires equal widths.
        steps: number of steps, at least 1; with more steps than gallery rows N, one step per row.
        widths: "equal" or "leading", as in `compatibility_matrix`.
        generator: generator of the random order; None for `np.random.default_rng(0)`.

    Returns:
        The curve with S = min(steps, N) + 1 points.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the versions do not fit each other, a row holds nan or inf, the order is not a permutation, or an
            option is out of range.

    Reference:
        Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023, for curve and area.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import backfill_curve
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0, 1], [0, 0, 1])
        >>> gallery = np.array([[1.0, 0.1], [0.9, 0.3], [0.2, 1.0]])
        >>> old = items.version(np.array([[1.0, 0.0], [1.0, 0.9]]), gallery)
        >>> new = items.version(np.array([[1.0, 0.1], [0.1, 1.0]]), gallery)
        >>> backfill_curve(old, new, protocol="instance", steps=3).scores
        array([1., 1., 1., 1.])
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
        fractions=np.array(replaced) / count,
        scores=np.array(scores),
        hits=np.stack(hits) if hits else None,  # type: ignore[arg-type]  # of one dtype
        order=items.gallery_rows[rows],
        order_name=order_name,
        protocol=protocol.name,
        queries=len(items.query_rows),
        absent=int((items.num_relevant == 0).sum()),
    )
    for array in (curve.fractions, curve.scores, curve.hits, curve.order):
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
    """Returns the k nearest rows of each query in a gallery of old and new rows, in one exact ranking.

        gallery = torch.where(replaced[:, None], new.gallery, old.gallery)
        scores, ids = cosine_topk(query, gallery, k)

    With widths="leading" a query and a row are compared on their w = min(d_query, d_row) common leading dimensions:

        score = F.normalize(query[i, :w]) . F.normalize(row[:w])

    So queries by either model can search a gallery during a change of width.  Items with the query's id are not left
    out.

    Args:
        old, new: versions of the same items.  Rows of both must be finite, also those that the gallery does not use
            (use zeros for rows that are not extracted yet).
        replaced: [N] bool, true for gallery rows by the new model; one per given row.
        k: at least 1.  If k exceeds N, the remaining places hold id -1 and score -inf.
        queries: model of the queries, "new" or "old".
        widths: "equal" or "leading", as in `compatibility_matrix`.

    Returns:
        scores [Q, k] float32 in descending order, and ids [Q, k] int64, gallery rows; equal scores are ordered by
        ascending row.

    Raises:
        TypeError, ValueError: versions or options are wrong, as in `backfill_curve`.
        ValueError: `replaced` has a wrong shape, or k is below 1.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import mixed_topk
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0, 1], [0, 0, 1])
        >>> gallery = np.array([[1.0, 0.1], [0.9, 0.3], [0.2, 1.0]])
        >>> old = items.version(np.array([[1.0, 0.0], [1.0, 0.9]]), gallery)
        >>> new = items.version(np.array([[1.0, 0.1], [0.1, 1.0]]), gallery)
        >>> scores, ids = mixed_topk(old, new, [True, False, False], 2)
        >>> ids.tolist()
        [[0, 1], [2, 1]]
    """
    check_name("queries", queries, ("new", "old"))
    old, new = check_versions((old, new), ("old", "new"))
    by = new if queries == "new" else old
    for searched in (old, new):
        searched.pair(by, widths)
    is_new = read_hits("replaced", replaced, "true for rows by the new model")
    rows, given = old.items.gallery_rows, old.items.given[1]
    if len(is_new) != given:
        raise ValueError(f"replaced must have shape [{given}], one per row, got {list(is_new.shape)}")
    mixture = Mixture.read(by.query, old.gallery, new.gallery)
    device = mixture.old.device
    scores, places = mixed_search(*mixture, torch.from_numpy(is_new[rows]).to(device), k)
    return scores, torch.tensor([*rows, -1], device=device)[places]  # index -1 selects the appended -1


def _measure(
    protocol: Protocol, old: VersionFeatures, new: VersionFeatures
) -> Callable[[NDArray[np.bool_]], Hits | float]:
    """Returns a function from [N] bool (replaced rows) to the hits, or to the score of protocols without hits."""
    if protocol.mixed_hits is not None:
        return protocol.mixed_hits(old, new)
    if old.gallery.width != new.gallery.width:
        raise ValueError(
            f"{old.gallery.name} has {old.gallery.width} columns, {new.gallery.name} has {new.gallery.width}: "
            f"protocol {protocol.name!r} cannot score galleries of two widths; use models of one width, or "
            "give Protocol the argument mixed_hits"
        )
    mixture = Mixture.read(new.query, old.gallery, new.gallery)

    def score(replaced: NDArray[np.bool_]) -> float:
        gallery = FeatureRows("mixed gallery", mixture.gallery(replaced))
        value = protocol.score(VersionFeatures(old.items, new.query, gallery, name="mixed"))
        check_number(f"the score by {protocol.name}", value)
        return float(value)

    return score
