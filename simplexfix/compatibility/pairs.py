"""Effect of an upgrade on pair verification: scores of genuine and impostor pairs before and after."""

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

QUERIES, ITEMS = 2_000, 10_000  # largest sample; scoring its 20 million pairs six times takes seconds
FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
KEPT_FAR = 1e-3  # FAR at which a service is assumed to set its threshold
POINTS = 121  # points of the ROC curve, equally spaced in log(FAR)
HISTOGRAM_BINS = 100


@dataclass(frozen=True, eq=False)
class VersionPairs:
    """Pair verification of one version's queries in the gallery.

    Attributes:
        results: histograms of the scores of all pairs.
        area: area under the ROC curve.
        equal_error: operating point with the smallest |FAR - FRR|.
        points: for each rate in `fars`, the lowest threshold whose FAR does not exceed it.
        fars: those of 0.1, 0.01, ..., 1e-5 that at least ten impostor pairs correspond to.
        curve_far, curve_tar: ROC curve at points equally spaced in log(FAR).
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
        """Returns JSON values under stable keys."""
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
    """The result of `compare_pairs`: pair verification in the gallery of the old version.

    Attributes:
        queries, gallery: numbers of compared queries and gallery items.
        before: verification with the old version's queries.
        after: verification with the new version's queries; None for a single version.
        threshold: result of `upgrade_threshold` at a FAR of 1e-3; None for a single version, too few impostor pairs, or
            a measured FAR of 0.
    """

    queries: int
    gallery: int
    before: VersionPairs
    after: VersionPairs | None
    threshold: ThresholdMove | None

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values under stable keys."""
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
    """Compares pair verification with the old and with the new queries in the old gallery.

    At most 2,000 queries and 10,000 gallery items are used, sampled without replacement.

    Args:
        old: version whose gallery is searched.
        new: version of the same items that replaces it, or None.  If widths differ, the leading dimensions that
            queries and gallery share are compared.
        confidence: level of the confidence intervals of `threshold`, in (0, 1).
        generator: generator of the samples and of the bootstrap; None for `np.random.default_rng(0)`.

    Returns:
        The report, or None if there are no genuine or no impostor pairs.

    Raises:
        TypeError, ValueError: as in `upgrade_threshold`.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import compare_pairs
        >>> from simplexfix.labelled import LabelledItems
        >>> rng, labels = np.random.default_rng(0), np.arange(60) % 3
        >>> items = LabelledItems(labels, labels)
        >>> rows = np.eye(3)[labels] + 0.4 * rng.standard_normal((60, 3))
        >>> report = compare_pairs(items.version(rows, rows), None)
        >>> round(report.before.area, 2), report.before.fars
        (0.91, (0.1, 0.01))
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
    # the lowest thresholds whose FAR does not exceed the limits
    last = np.searchsorted(curve.far, limits, side="right") - 1
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
