"""Score thresholds: how an upgrade changes their error rates, and which new threshold keeps the false-accept rate.

A service may accept a match if its score is at least a threshold.  A new model has another score distribution, so the
old threshold accepts more impostors or fewer genuine matches, without any error message.
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

_EDGES = 256  # candidate thresholds of a resample, besides the threshold for all queries
_SPAN = 4.0  # candidates cover false-accept rates from 1 / 4 of the old rate to 4 times the old rate
_RESAMPLES_AT_A_TIME = 64


@dataclass(frozen=True)
class ThresholdMove:
    """The result of `upgrade_threshold`.

    Attributes:
        before: old threshold, and rates of the old queries at it.
        unmoved: rates of the new queries at the old threshold.
        after: lowest threshold at which the new queries' FAR is at most `before.far`, and rates at it.
        interval: confidence interval of the threshold of `after`.
        far_interval: confidence interval of the FAR of `unmoved`.
        tar_before_interval: confidence interval of the TAR of `before`.
        tar_after_interval: confidence interval of the TAR of `after`; it includes the uncertainty of the threshold.
    """

    before: OperatingPoint
    unmoved: OperatingPoint
    after: OperatingPoint
    interval: Interval
    far_interval: Interval
    tar_before_interval: Interval
    tar_after_interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values under stable keys."""
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
    """Returns the threshold at which the new model's queries have at most the old false-accept rate.

        before = rates of (old.query, old.gallery) at `threshold`, or at the lowest threshold with FAR <= far
        after  = rates of (new.query, gallery) at the lowest threshold with FAR <= before.far

    Confidence intervals are percentile intervals of a bootstrap over queries.  A query is resampled with all its pairs,
    old and new ones.  Pairs of one query are dependent, so resampling pairs would give intervals that are far too
    narrow.  Queries of one identity are dependent as well: put them into one group of `query_groups`, which is
    resampled as a whole.  The old threshold and the gallery are fixed, also if the threshold was found from `far`.

    Each resample selects one of up to 257 candidate thresholds, which cover new FARs from 1 / 4 of the old FAR to 4
    times the old FAR.  A threshold beyond them counts as the nearest candidate.

    Args:
        old: deployed version.
        new: version that replaces it, of the same items.  Pairs of an item with itself (equal ids) are left out.
        threshold: threshold of the service, rounded up to a multiple of 2^-16.  Give `threshold` or `far`, not both.
        far: false-accept rate at which the service's threshold was set, in [0, 1].
        gallery: "old" if the new queries search the old gallery, "new" if the gallery is re-extracted.
        query_groups: [Q] integers, at least 2 different ones; queries with equal numbers are resampled together, such
            as `query_labels` if classes are people.  None for independent queries.  The groups of the items are not
            used for this.
        widths: "equal" or "leading", as in `compatibility_matrix`.
        confidence, resamples, generator: as in `bootstrap_interval`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the versions do not fit each other, both or neither of `threshold` and `far` are given, the old
            threshold accepts no impostor pair, so that its FAR is unknown, or an option is out of range.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import upgrade_threshold
        >>> from simplexfix.labelled import LabelledItems
        >>> rng, labels = np.random.default_rng(0), np.arange(60) % 3
        >>> items = LabelledItems(labels, labels)
        >>> rows = np.eye(3)[labels] + 0.4 * rng.standard_normal((60, 3))
        >>> old = items.version(rows + 0.4 * rng.standard_normal((60, 3)), rows)
        >>> move = upgrade_threshold(old, items.version(rows, rows), far=0.05)
        >>> move.after.far <= move.before.far <= 0.05
        True
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
            f"no impostor pair is accepted at the threshold {before.threshold:.5f}: its false-accept rate is only "
            f"known to be below 1 in {old_results.num_impostor}; compare more items, or give a lower threshold"
        )
    held = round(before.threshold * STEPS) + STEPS
    _, rates = accept_rates(new_results)
    kept = int((rates <= before.far).argmax())
    first, last = int((rates <= _SPAN * before.far).argmax()), int((rates <= before.far / _SPAN).argmax())
    edges = np.unique(np.append(np.linspace(first, last, _EDGES).astype(np.int64), kept))

    # per group: numbers of impostor and genuine pairs, accepted at each candidate and in total
    was = _accepted(old, np.array([held]), groups)
    now = _accepted(new, np.append(edges, held), groups)
    drawn = was.shape[1]
    columns: list[list[NDArray[np.float64]]] = [[], [], [], []]
    for begin in range(0, resamples, _RESAMPLES_AT_A_TIME):
        number = min(_RESAMPLES_AT_A_TIME, resamples - begin)
        weights = rng.multinomial(drawn, np.full(drawn, 1 / drawn), size=number).astype(np.float64)
        old_false, old_true, new_false, new_true = (weights @ counts for counts in (*was, *now))
        # old and new have the same pairs, so comparing counts is comparing rates
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
    tars = [tar[np.isfinite(tar)] for tar in tars]  # the TAR of a resample without genuine pairs is undefined
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
    """A map from scores to probabilities of a genuine match, linear between points and constant outside of them.

    Attributes:
        scores: [points] float64, ascending.
        probabilities: [points] float64, non-decreasing.
        prior: fraction of genuine pairs for which the probabilities hold.
    """

    scores: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    prior: float

    def __call__(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Returns the probabilities of scores.

        Args:
            scores: finite numbers, any shape.

        Returns:
            float64 in the shape of `scores`.

        Raises:
            ValueError: a score is nan or inf.
        """
        values = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("scores hold nan or inf")
        return np.interp(values, self.scores, self.probabilities)


def calibrate_scores(results: VerificationResults, *, prior: float | None = None) -> Calibration:
    """Returns the calibration of scores to probabilities of a genuine match, by isotonic regression.

        minimise  sum over pairs of  weight * (p(score) - genuine)^2     over non-decreasing functions p

    Scores of two models are not comparable; calibrated scores are.  A pair counts at the centre of its score bin of
    width 2^-16.

    Args:
        results: results of `VerificationResults.compare` on pairs that the model was not trained on.
        prior: fraction of genuine pairs for which the probabilities should hold, in (0, 1); pairs are weighted
            accordingly.  None for the fraction in `results`, where almost all pairs are impostors.

    Raises:
        TypeError: `prior` is not a number.
        ValueError: `prior` is outside (0, 1), or there are no genuine or no impostor pairs.
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
    from sklearn.isotonic import IsotonicRegression  # optional package

    used = np.flatnonzero(results.genuine + results.impostor)
    genuine = results.genuine[used] * (prior / results.num_genuine)
    weight = genuine + results.impostor[used] * ((1 - prior) / results.num_impostor)
    middle = (used + 0.5 - STEPS) / STEPS
    fit = IsotonicRegression(y_min=0.0, y_max=1.0).fit(middle, genuine / weight, sample_weight=weight)
    return Calibration(fit.X_thresholds_.astype(np.float64), fit.y_thresholds_.astype(np.float64), float(prior))


def _groups(query_groups: Ids | None, items: LabelledItems) -> NDArray[np.int64]:
    """Returns the group of each query, [Q], numbered from 0."""
    if query_groups is None:
        return np.arange(len(items.query_labels))
    given = read_ids("query_groups", query_groups, "old.query", items.given[0])
    found, groups = np.unique(given[items.query_rows], return_inverse=True)
    if len(found) < 2:
        raise ValueError("query_groups must hold at least 2 different groups, got 1: groups are resampled as a whole")
    return groups


def _accepted(given: VersionFeatures, edges: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns counts [2, G, E + 1] of impostor and genuine pairs per group: accepted at each edge, then in total."""
    order = np.argsort(edges, kind="stable")
    count = len(edges)
    size = count + 2  # bins for the number of edges that a pair reaches, 0 to E, and one for pairs that are left out
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
