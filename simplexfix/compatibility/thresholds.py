"""Thresholds on the score: what an upgrade does to them, and what keeps them in place.

A service that accepts a match where its score >= threshold breaks without an error when the model moves: the new
model's scores lie elsewhere, and the old threshold lets in more strangers, or fewer friends.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import check_name, check_number
from ..labelled import Ids, LabelledItems, VersionFeatures, check_versions, read_ids
from ..retrieval.verification import (
    BINS,
    STEPS,
    OperatingPoint,
    VerificationResults,
    accept_rates,
    bin_pairs,
    tar_at_far,
)
from .statistics import Interval, check_options, percentiles

__all__ = ["Calibration", "ThresholdMove", "calibrate_scores", "upgrade_threshold"]

_EDGES = 256  # thresholds that a resample chooses from
_SPAN = 4.0  # they cover false-accept rates from a fourth of the old one to four times it
_RESAMPLES_AT_A_TIME = 64


@dataclass(frozen=True)
class ThresholdMove:
    """What `upgrade_threshold` found.

    Attributes:
        before: threshold and rates of the old queries.
        unmoved: rates of the new queries at the same threshold.
        after: threshold and rates of the new queries where their FAR is at most that of before.
        interval: of the threshold of `after`.
        far_interval: of the FAR of `unmoved`.
        tar_before_interval: of the TAR of `before`.
        tar_after_interval: of the TAR of `after`, with the doubt about its threshold.
    """

    before: OperatingPoint
    unmoved: OperatingPoint
    after: OperatingPoint
    interval: Interval
    far_interval: Interval
    tar_before_interval: Interval
    tar_after_interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under stable keys."""
        return {field.name: getattr(self, field.name)._asdict() for field in fields(self)}


def upgrade_threshold(
    old: VersionFeatures,
    new: VersionFeatures,
    *,
    threshold: float | None = None,
    far: float | None = None,
    gallery: str = "old",
    query_groups: Ids | None = None,
    widths: str = "equal",
    confidence: float = 0.95,
    resamples: int = 2000,
    generator: np.random.Generator | None = None,
) -> ThresholdMove:
    """The threshold that keeps the old false-accept rate when the new model's queries come.

        before = rates of (old.query, old.gallery) at `threshold`, or at the lowest threshold with FAR <= far
        after  = rates of (new.query, gallery) at the lowest threshold with FAR <= before.far

    The intervals are a percentile bootstrap over queries, each with all its pairs, old and new of the same draw: pairs
    of one query depend on each other, and to resample pairs would promise far too much.  So do queries of one identity:
    name them in `query_groups`, which are drawn whole, or intervals are too narrow.  The old threshold is taken as the
    service's, also where it was found from `far`.  The ends are two of 257 thresholds between those at which the new
    FAR is 4 times and a fourth of the old one; where a resample needs one beyond, it counts as the end.  The gallery is
    taken as it is.

    Args:
        old: by the model in service.
        new: by the one that replaces it, of the same items.  A pair of an item with itself, by their ids, is left out.
        threshold: the service's, rounded up to a multiple of 2^-16; or
        far: the false-accept rate at which it was put.  One of the two.
        gallery: which the new queries search, "old", or "new" for an upgrade that re-extracts.
        query_groups: [Q] integers, which queries are drawn together, such as `query_labels` where classes are people;
            at least 2.  None: each by itself.  The items' groups, which may be few and large, are not taken for them.
        widths: "equal" or "leading", as of `compatibility_matrix`.
        confidence, resamples, generator: as of `bootstrap_interval`.

    Raises:
        TypeError, ValueError: versions that do not fit each other; both or neither of threshold and far;
            no impostor pair that the old threshold accepts, whose rate no one could keep; an option out of range.
    """
    if (threshold is None) == (far is None):
        raise ValueError("give one of threshold and far: the service's threshold, or its false-accept rate")
    rng = check_options(confidence, resamples, generator)
    check_name("gallery", gallery, ("old", "new"))
    old, new = check_versions((old, new), ("old", "new"))
    groups = _groups(query_groups, old.items)
    old, new = old.pair(old, widths), (old if gallery == "old" else new).pair(new, widths)
    old_results, new_results = VerificationResults.compare(old), VerificationResults.compare(new)
    before = tar_at_far(old_results, far) if threshold is None else old_results.at(threshold)  # type: ignore[arg-type]
    if before.far == 0:
        raise ValueError(
            f"no impostor pair is accepted at the threshold {before.threshold:.5f}, so that its false-accept rate is "
            f"unknown but for being below 1 in {old_results.num_impostor}: compare more items, or give a lower one"
        )
    held = round(before.threshold * STEPS) + STEPS
    _, rates = accept_rates(new_results)
    kept = int((rates <= before.far).argmax())
    first, last = int((rates <= _SPAN * before.far).argmax()), int((rates <= before.far / _SPAN).argmax())
    edges = np.unique(np.append(np.linspace(first, last, _EDGES).astype(np.int64), kept))

    # as many rows as groups: impostors and genuine pairs of each, accepted and in all
    was = _accepted(old, np.array([held]), groups)
    now = _accepted(new, np.append(edges, held), groups)
    drawn = was.shape[1]
    columns: list[list[NDArray[np.float64]]] = [[], [], [], []]
    for begin in range(0, resamples, _RESAMPLES_AT_A_TIME):
        number = min(_RESAMPLES_AT_A_TIME, resamples - begin)
        weights = rng.multinomial(drawn, np.full(drawn, 1 / drawn), size=number).astype(np.float64)
        old_false, old_true, new_false, new_true = (weights @ counts for counts in (*was, *now))
        # of the same pairs, so that counts compare as rates do
        enough = new_false[:, :-2] <= old_false[:, :1]
        enough[:, -1] = True
        chosen = enough.argmax(1)
        impostors, genuine = np.maximum(old_false[:, -1], 1), np.where(old_true[:, -1] > 0, old_true[:, -1], np.nan)
        found = new_true[np.arange(number), chosen]
        values = (
            (edges[chosen] - STEPS) / STEPS,
            new_false[:, -2] / impostors,
            old_true[:, 0] / genuine,
            found / genuine,
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    thresholds, unmoved, *tars = (np.concatenate(column) for column in columns)
    tars = [tar[np.isfinite(tar)] for tar in tars]  # a draw without a genuine pair says nothing of them
    if not len(tars[0]):
        raise ValueError(f"none of {resamples} resamples has a genuine pair: give more resamples, or smaller groups")
    return ThresholdMove(
        before=before,
        unmoved=new_results.at_bin(held),
        after=new_results.at_bin(kept),
        interval=percentiles(thresholds, confidence),
        far_interval=percentiles(unmoved, confidence),
        tar_before_interval=percentiles(tars[0], confidence),
        tar_after_interval=percentiles(tars[1], confidence),
    )


@dataclass(frozen=True, eq=False)
class Calibration:
    """A score's probability of being a genuine match: linear between these points, constant beyond the ends.

    Attributes:
        scores: [points] float64, ascending.
        probabilities: [points] float64, never descending.
        prior: the fraction of genuine pairs that they are for.
    """

    scores: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    prior: float

    def __call__(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Probabilities, in the shape of `scores`.

        Raises:
            ValueError: a score is nan or inf.
        """
        values = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("scores hold nan or inf")
        return np.interp(values, self.scores, self.probabilities)


def calibrate_scores(results: VerificationResults, *, prior: float | None = None) -> Calibration:
    """Isotonic regression of "genuine" on the score: what a score of each model means, in probabilities.

        minimise  sum over pairs of  weight * (p(score) - genuine)^2     over p that never fall with the score

    Scores of two models are not comparable, calibrated ones are.  Pairs of a bin, 2^-16 wide, count at its middle.

    Args:
        results: of `VerificationResults.compare`, of pairs that the models were not trained on.
        prior: the fraction of genuine pairs where the probabilities are to hold, in (0, 1): weights make it so.  None:
            as in `results`, where all pairs with a gallery are impostors but a few.

    Raises:
        TypeError, ValueError: a prior outside of (0, 1), or no pair of one of the two kinds.
        ModuleNotFoundError: scikit-learn is not installed (`pip install 'simplexfix[calibration]'`).

    Reference:
        Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass probability estimates", 2002.
    """
    results.require_both()
    pairs = results.num_genuine + results.num_impostor
    if prior is None:
        prior = results.num_genuine / pairs
    check_number("prior", prior)
    if not 0 < prior < 1:
        raise ValueError(f"prior is a fraction of genuine pairs and must lie in (0, 1), got {prior}")
    from sklearn.isotonic import IsotonicRegression  # an extra

    used = np.flatnonzero(results.genuine + results.impostor)
    genuine = results.genuine[used] * (prior / results.num_genuine)
    weight = genuine + results.impostor[used] * ((1 - prior) / results.num_impostor)
    middle = (used + 0.5 - STEPS) / STEPS
    fit = IsotonicRegression(y_min=0.0, y_max=1.0).fit(middle, genuine / weight, sample_weight=weight)
    return Calibration(fit.X_thresholds_.astype(np.float64), fit.y_thresholds_.astype(np.float64), float(prior))


def _groups(query_groups: Ids | None, items: LabelledItems) -> NDArray[np.int64]:
    """[Q] the number of each query's group, from 0."""
    if query_groups is None:
        return np.arange(len(items.query_labels))
    given = read_ids("query_groups", query_groups, "old.query", items.given[0])
    found, groups = np.unique(given[items.query_rows], return_inverse=True)
    if len(found) < 2:
        raise ValueError("query_groups must be at least 2: one says nothing of how they differ")
    return groups


def _accepted(given: VersionFeatures, edges: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """[2, G, E + 1] impostor and genuine pairs of each group: accepted at each edge, a bin, and above; and in all."""
    order = np.argsort(edges, kind="stable")
    count = len(edges)
    size = count + 2  # by how many edges a pair reaches, 0 to E; the last are pairs that are left out
    reached = np.searchsorted(edges[order], np.arange(2 * BINS + 1), side="right")
    reached[2 * BINS] = size - 1
    per_group = np.zeros((int(groups.max()) + 1, 2, size), dtype=np.int64)
    for rows, bins, same in bin_pairs(given):
        places = reached[bins] + size * same
        places += 2 * size * np.arange(len(places))[:, None]
        found = np.bincount(places.ravel(), minlength=2 * size * len(places)).reshape(-1, 2, size)
        np.add.at(per_group, groups[rows], found)
    out = np.empty((2, len(per_group), count + 1))
    at_least = np.cumsum(per_group[:, :, count::-1], axis=2)[:, :, ::-1].transpose(1, 0, 2)
    out[:, :, order] = at_least[:, :, 1:]
    out[:, :, count] = at_least[:, :, 0]
    return out
