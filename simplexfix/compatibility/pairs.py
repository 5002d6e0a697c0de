"""What an upgrade does to a service that accepts matches above a threshold: pairs before and after, by their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..labelled import VersionFeatures, check_versions
from ..retrieval.verification import (
    OperatingPoint,
    VerificationResults,
    equal_error_rate,
    roc_curve,
    score_histogram,
    tar_at_far,
)
from .thresholds import ThresholdMove, upgrade_threshold

__all__ = ["PairReport", "VersionPairs", "compare_pairs"]

QUERIES, ITEMS = 2_000, 10_000  # drawn where there are more: six passes over 20 million pairs are seconds
FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
KEPT_FAR = 1e-3  # at which the service's threshold is taken to be
POINTS = 121  # of the curve, by equal factors of FAR
HISTOGRAM_BINS = 100


@dataclass(frozen=True, eq=False)
class VersionPairs:
    """One version's queries against the gallery.

    Attributes:
        results: counts of all pairs by score.
        area: under the ROC curve.
        equal_error: the point where FAR and FRR are nearest to each other.
        points: for each FAR of `fars`, the lowest threshold that stays below it.
        fars: 0.1, 0.01, ..., as far as there are ten impostor pairs to tell it by.
        curve_far, curve_tar: TAR over FAR at equal factors of FAR.
    """

    results: VerificationResults
    area: float
    equal_error: OperatingPoint
    points: tuple[OperatingPoint, ...]
    fars: tuple[float, ...]
    curve_far: NDArray[np.float64]
    curve_tar: NDArray[np.float64]

    @property
    def equal_error_rate(self) -> float:
        return (self.equal_error.far + 1 - self.equal_error.tar) / 2

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under stable keys."""
        histogram = score_histogram(self.results, HISTOGRAM_BINS)
        return {
            "genuine": self.results.num_genuine,
            "impostor": self.results.num_impostor,
            "area": self.area,
            "equal_error_rate": self.equal_error_rate,
            "tar_at_far": [
                {"limit": far, **point._asdict()} for far, point in zip(self.fars, self.points, strict=True)
            ],
            "roc": {"far": self.curve_far.tolist(), "tar": self.curve_tar.tolist()},
            "histogram": {name: counts.tolist() for name, counts in histogram._asdict().items()},
        }


@dataclass(frozen=True, eq=False)
class PairReport:
    """What `compare_pairs` found, on one gallery, that of the old version.

    Attributes:
        queries, gallery: items that were compared: all, or as many as were drawn.
        before: by the old version's queries.
        after: by the new version's; None where there is one version.
        threshold: what keeps a FAR of 1e-3; None where there is one version, or too few impostor pairs to tell.
    """

    queries: int
    gallery: int
    before: VersionPairs
    after: VersionPairs | None
    threshold: ThresholdMove | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under stable keys."""
        return {
            "queries": self.queries,
            "gallery": self.gallery,
            "before": self.before.as_dict(),
            "after": None if self.after is None else self.after.as_dict(),
            "threshold": None if self.threshold is None else self.threshold.as_dict(),
        }


def compare_pairs(
    old: VersionFeatures,
    new: VersionFeatures | None = None,
    *,
    confidence: float = 0.95,
    generator: np.random.Generator | None = None,
) -> PairReport | None:
    """Verification by the old queries and by the new ones, against the gallery as it is in service.

    Of more than 2,000 queries and 10,000 items so many are drawn, without replacement.

    Args:
        old: whose gallery is searched.
        new: of the same items; None: one version alone.  Where widths differ, the leading dimensions that queries and
            gallery have are compared.
        confidence: of the threshold's interval.
        generator: of what is drawn and of the bootstrap; None: `np.random.default_rng(0)`.

    Returns:
        None where all pairs are of one kind: of one class, or of two.

    Raises:
        TypeError, ValueError: as `upgrade_threshold`.
    """
    generator = np.random.default_rng(0) if generator is None else generator
    versions = check_versions([v for v in (old, new) if v is not None], ("old", "new")[: 1 + (new is not None)])
    items = versions[0].items
    drawn = [
        _draw(len(of), most, generator) for of, most in ((items.query_labels, QUERIES), (items.gallery_labels, ITEMS))
    ]
    versions = [version.take(*drawn) for version in versions]
    results = [VerificationResults.compare(versions[0].pair(version, "leading")) for version in versions]
    if not results[0].num_genuine or not results[0].num_impostor:
        return None
    found = [_summarise(counts) for counts in results]
    move = None
    kept = dict(zip(found[0].fars, found[0].points, strict=True)).get(KEPT_FAR)
    if len(found) > 1 and kept is not None and kept.far > 0:
        move = upgrade_threshold(*versions, far=KEPT_FAR, widths="leading", confidence=confidence, generator=generator)
    return PairReport(
        queries=len(versions[0].query),
        gallery=len(versions[0].gallery),
        before=found[0],
        after=found[1] if len(found) > 1 else None,
        threshold=move,
    )


def _summarise(results: VerificationResults) -> VersionPairs:
    curve = roc_curve(results)
    limits = np.geomspace(1 / results.num_impostor, 1, POINTS)
    last = np.searchsorted(curve.far, limits, side="right") - 1  # the lowest threshold whose FAR stays below
    fars = tuple(far for far in FARS if far * results.num_impostor >= 10)
    return VersionPairs(
        results=results,
        area=curve.area,
        equal_error=equal_error_rate(results),
        points=tuple(tar_at_far(results, far) for far in fars),
        fars=fars,
        curve_far=limits,
        curve_tar=curve.tar[last],
    )


def _draw(count: int, most: int, generator: np.random.Generator) -> NDArray[np.int64] | None:
    return None if count <= most else np.sort(generator.choice(count, most, replace=False))
