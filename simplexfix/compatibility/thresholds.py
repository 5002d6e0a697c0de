"""Thresholds on the score: what an upgrade does to them, and what keeps them in place.

A service that accepts a match where its score >= threshold breaks without an error when the model moves: the new
model's scores lie elsewhere, and the old threshold lets in more strangers, or fewer friends.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import check_number
from ..retrieval._inputs import Ids, Rows, SearchInput
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
    """

    before: OperatingPoint
    unmoved: OperatingPoint
    after: OperatingPoint
    interval: Interval
    far_interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under stable keys."""
        return {field.name: getattr(self, field.name)._asdict() for field in fields(self)}


def upgrade_threshold(
    old_query: Rows,
    new_query: Rows,
    query_labels: Ids,
    gallery: Rows,
    gallery_labels: Ids,
    *,
    threshold: float | None = None,
    far: float | None = None,
    new_gallery: Rows | None = None,
    query_ids: Ids | None = None,
    gallery_ids: Ids | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    generator: np.random.Generator | None = None,
) -> ThresholdMove:
    """The threshold that keeps the old false-accept rate when the new model's queries come.

        before = rates of (old_query, gallery) at `threshold`, or at the lowest threshold with FAR <= far
        after  = rates of (new_query, gallery) at the lowest threshold with FAR <= before.far

    The interval is a percentile bootstrap over queries, each with all its pairs, old and new of the same draw: pairs of
    one query depend on each other, and to resample pairs would promise far too much.  Its ends are two of 257
    thresholds between those at which the new FAR is 4 times and a fourth of the old one; where a resample needs one
    beyond, it counts as the end.  The gallery is taken as it is.

    Args:
        old_query, new_query: [Q, d], the same queries by each model; as of `RetrievalResults.search`.
        query_labels: [Q] integers.
        gallery: [N, d] by the old model.
        gallery_labels: [N] integers.
        threshold: the service's, rounded up to a multiple of 2^-16; or
        far: the false-accept rate at which it was put.  One of the two.
        new_gallery: [N, d], for an upgrade that re-extracts: what the new queries search; None: `gallery`.
        query_ids, gallery_ids: pairs of an item with itself are left out, as of `RetrievalResults.search`.
        confidence, resamples, generator: as of `bootstrap_interval`.

    Raises:
        TypeError, ValueError: features, labels or ids that do not fit, as there; both or neither of threshold and far;
            no impostor pair that the old threshold accepts, whose rate no one could keep; an option out of range.
    """
    if (threshold is None) == (far is None):
        raise ValueError("give one of threshold and far: the service's threshold, or its false-accept rate")
    rng = check_options(confidence, resamples, generator)
    old = SearchInput.read(old_query, query_labels, gallery, gallery_labels, query_ids, gallery_ids)
    new = SearchInput.read(
        new_query, query_labels, gallery if new_gallery is None else new_gallery, gallery_labels, query_ids, gallery_ids
    )
    old_results, new_results = VerificationResults.of(old), VerificationResults.of(new)
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

    was = _accepted_impostors(old, np.array([held]))
    now = _accepted_impostors(new, np.append(edges, held))
    queries = len(was[1])
    chosen, unmoved = [], []
    for begin in range(0, resamples, _RESAMPLES_AT_A_TIME):
        number = min(_RESAMPLES_AT_A_TIME, resamples - begin)
        weights = rng.multinomial(queries, np.full(queries, 1 / queries), size=number).astype(np.float64)
        old_far = (weights @ was[0])[:, 0] / np.maximum(weights @ was[1], 1)
        new_far = (weights @ now[0]) / np.maximum(weights @ now[1], 1)[:, None]
        enough = new_far[:, :-1] <= old_far[:, None]
        enough[:, -1] = True
        chosen.append(enough.argmax(1))
        unmoved.append(new_far[:, -1])
    return ThresholdMove(
        before=before,
        unmoved=new_results.at_bin(held),
        after=new_results.at_bin(kept),
        interval=percentiles((edges[np.concatenate(chosen)] - STEPS) / STEPS, confidence),
        far_interval=percentiles(np.concatenate(unmoved), confidence),
    )


@dataclass(frozen=True, eq=False)
class Calibration:
    """A score's probability of being a genuine match: linear between these points, constant beyond the ends.

    Attributes:
        scores: [points] float64, ascending.
        probabilities: [points] float64, never descending.
        prior: the share of genuine pairs that they are for.
    """

    scores: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    prior: float

    def __call__(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Probabilities, in the shape of `scores`.

        Raises:
            ValueError: a score is nan.
        """
        values = np.asarray(scores, dtype=np.float64)
        if np.isnan(values).any():
            raise ValueError("scores hold nan")
        return np.interp(values, self.scores, self.probabilities)


def calibrate_scores(results: VerificationResults, *, prior: float | None = None) -> Calibration:
    """Isotonic regression of "genuine" on the score: what a score of each model means, in probabilities.

        minimise  sum over pairs of  weight * (p(score) - genuine)^2     over p that never fall with the score

    Scores of two models are not comparable, calibrated ones are.  Pairs of a bin, 2^-16 wide, count at its middle.

    Args:
        results: of `VerificationResults.compare`, of pairs that the models were not trained on.
        prior: the share of genuine pairs where the probabilities are to hold, in (0, 1): weights make it so.  None: as
            in `results`, where all pairs with a gallery are impostors but a few.

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
        raise ValueError(f"prior is a share of genuine pairs and must lie in (0, 1), got {prior}")
    from sklearn.isotonic import IsotonicRegression  # an extra

    used = np.flatnonzero(results.genuine + results.impostor)
    genuine = results.genuine[used] * (prior / results.num_genuine)
    weight = genuine + results.impostor[used] * ((1 - prior) / results.num_impostor)
    middle = (used + 0.5 - STEPS) / STEPS
    fit = IsotonicRegression(y_min=0.0, y_max=1.0).fit(middle, genuine / weight, sample_weight=weight)
    return Calibration(fit.X_thresholds_.astype(np.float64), fit.y_thresholds_.astype(np.float64), float(prior))


def _accepted_impostors(
    given: SearchInput, edges: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[Q, E] impostor pairs of each query at each edge, a bin, and above; [Q] its impostor pairs in all."""
    order = np.argsort(edges, kind="stable")
    count = len(edges)
    not_impostor = count + 1
    reached = np.searchsorted(edges[order], np.arange(2 * BINS + 1), side="right")  # how many of the edges a bin has
    reached[2 * BINS] = not_impostor  # a pair that is left out
    per_query = np.zeros((len(given.query), count + 2))
    for rows, bins, same in bin_pairs(given):
        places = np.where(same, not_impostor, reached[bins])
        places += np.arange(len(places))[:, None] * (count + 2)
        per_query[rows] += np.bincount(places.ravel(), minlength=len(places) * (count + 2)).reshape(-1, count + 2)
    accepted = np.empty((len(per_query), count))
    accepted[:, order] = np.cumsum(per_query[:, count:0:-1], axis=1)[:, ::-1]
    return accepted, per_query[:, :not_impostor].sum(axis=1)
