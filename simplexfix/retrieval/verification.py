"""Pair verification: a threshold on the cosine decides whether two items have the same class.

A pair is a query and a gallery item.  It is genuine if both have the same class, else an impostor.  It is accepted if
its score is at least the threshold t.  All pairs are counted, and none is stored.

    TAR(t) = fraction of genuine pairs that are accepted
    FAR(t) = fraction of impostor pairs that are accepted
    FRR(t) = 1 - TAR(t)

Scores are those of `cosine_topk`, except for the last bit of about one score in 2^28, since float64 sums here have
another order.  A sum within the float64 rounding error below a threshold counts as that threshold.  So a cosine of 0 is
accepted at t = 0 in every summation order.  Scores are counted in bins of width 2^-16 from -1 to 1; at each bin edge
all rates are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .._checks import check_integer, check_number
from .._reference import unit_float32
from ..labelled import FeatureRows, Ids, Rows, VersionFeatures, check_versions, read_ids

__all__ = [
    "CrossValidation",
    "OperatingPoint",
    "RocCurve",
    "ScoreHistogram",
    "VerificationResults",
    "cross_validated_accuracy",
    "equal_error_rate",
    "pair_scores",
    "roc_curve",
    "score_histogram",
    "tar_at_far",
]

STEPS = 2**16  # bins between scores 0 and 1; a power of two, so that scaling a score by it is exact
# Score bins [-1, -1 + 2^-16), ..., [1, ...).  Scores that round to below -1 or above 1 count in the end bins.
BINS = 2 * STEPS + 1
_QUERY_ROWS, _GALLERY_ROWS = 1024, 4096  # rows of one product: 32 MB of float64


@dataclass(frozen=True, eq=False)
class VerificationResults:
    """Histograms of the scores of genuine and impostor pairs.

    Arrays are read-only.  Memory is 2 MB for any number of pairs.

    Attributes:
        genuine: [BINS] int64, number of genuine pairs per score bin.
        impostor: [BINS] int64, number of impostor pairs per score bin.
        excluded: number of pairs of an item with itself (equal ids), which are left out.
    """

    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]
    excluded: int

    @classmethod
    def compare(cls, version: VersionFeatures) -> VerificationResults:
        """Scores every query against every gallery item, in blocks.

            scores = F.normalize(query) @ F.normalize(gallery).T
            equal = query_labels[:, None] == gallery_labels
            genuine, impostor = histogram(scores[equal]), histogram(scores[~equal])

        Args:
            version: queries and gallery, as in `RetrievalResults.search`.  Pairs of an item with itself are left out.

        Raises:
            TypeError, ValueError: as in `RetrievalResults.search`.
        """
        counts = np.zeros(2 * BINS + 1, dtype=np.int64)
        for _, bins, same in bin_pairs(version):
            counts += np.bincount((bins + BINS * same).ravel(), minlength=len(counts))
        excluded = int((version.items.excluded >= 0).sum())
        results = cls(counts[BINS : 2 * BINS].copy(), counts[:BINS].copy(), excluded)
        for array in (results.genuine, results.impostor):
            array.flags.writeable = False
        return results

    @property
    def num_genuine(self) -> int:
        return int(self.genuine.sum())

    @property
    def num_impostor(self) -> int:
        return int(self.impostor.sum())

    def at(self, threshold: float) -> OperatingPoint:
        """Returns TAR and FAR at a threshold.

        Args:
            threshold: a cosine; it is rounded up to a multiple of 2^-16.

        Raises:
            TypeError: `threshold` is not a number.
            ValueError: `threshold` is nan, or there are no genuine or no impostor pairs.
        """
        check_number("threshold", threshold)
        if threshold != threshold:
            raise ValueError("threshold must be a number, got nan")
        return self.at_bin(int(np.clip(np.ceil(threshold * STEPS) + STEPS, 0, BINS)))

    def at_bin(self, bin: int) -> OperatingPoint:
        """Returns the rates if scores in this bin and above are accepted; bin BINS accepts nothing."""
        self.require_both()
        tar = int(self.genuine[bin:].sum()) / self.num_genuine
        far = int(self.impostor[bin:].sum()) / self.num_impostor
        return OperatingPoint(threshold_of(bin), tar, far)

    def require_both(self) -> None:
        """Raises ValueError if there are no genuine or no impostor pairs, so that a rate is undefined."""
        for kind, count in (("one class", self.num_genuine), ("two classes", self.num_impostor)):
            if not count:
                raise ValueError(f"a rate needs pairs of both kinds, got no pair of items of {kind}")

    def __repr__(self) -> str:
        return f"VerificationResults of {self.num_genuine} genuine and {self.num_impostor} impostor pairs"


class OperatingPoint(NamedTuple):
    """A threshold with its true-accept rate (TAR) and false-accept rate (FAR)."""

    threshold: float
    tar: float
    far: float


class RocCurve(NamedTuple):
    """Arrays [points] float64 in descending order of threshold; the first threshold is inf, which accepts nothing."""

    thresholds: NDArray[np.float64]
    tar: NDArray[np.float64]
    far: NDArray[np.float64]

    @property
    def area(self) -> float:
        """Returns the area under the curve by the trapezoidal rule; it does not depend on the number of threads."""
        return float((np.diff(self.far) * (self.tar[1:] + self.tar[:-1])).sum() / 2)


class ScoreHistogram(NamedTuple):
    """Pair counts per score bin.

    Attributes:
        edges: [bins + 1] float64 from -1 to 1.
        genuine, impostor: [bins] int64; the last bin includes its upper edge.
    """

    edges: NDArray[np.float64]
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]


class CrossValidation(NamedTuple):
    """Result of `cross_validated_accuracy`.

    Attributes:
        accuracy: mean over folds.
        standard_error: standard error of the mean.
        accuracies, thresholds: [folds] float64.
    """

    accuracy: float
    standard_error: float
    accuracies: NDArray[np.float64]
    thresholds: NDArray[np.float64]


def threshold_of(bin: int) -> float:
    """Returns the lower edge of a bin."""
    return (bin - STEPS) / STEPS


def accept_rates(results: VerificationResults) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns TAR and FAR, [BINS + 1] each, at the lower edge of each bin and above the last bin."""
    results.require_both()
    tar, far = (
        np.append(np.cumsum(counts[::-1])[::-1], 0) / counts.sum() for counts in (results.genuine, results.impostor)
    )
    return tar, far


def roc_curve(results: VerificationResults) -> RocCurve:
    """Returns the ROC curve: TAR and FAR at every threshold where one of them changes.

    Args:
        results: results of `VerificationResults.compare`.

    Raises:
        ValueError: there are no genuine or no impostor pairs.
    """
    tar, far = accept_rates(results)
    used = np.flatnonzero(results.genuine + results.impostor)[::-1]
    thresholds = np.append(np.inf, (used - STEPS) / STEPS)
    return RocCurve(thresholds, np.append(0.0, tar[used]), np.append(0.0, far[used]))


def tar_at_far(results: VerificationResults, far: float) -> OperatingPoint:
    """Returns the lowest threshold with a false-accept rate of at most `far`, and both rates at it.

    The threshold is a multiple of 2^-16.  A threshold between two multiples could accept at most the genuine pairs of
    one bin more.  If a model has collapsed, so that all scores lie in one bin, no pair is accepted.

    Args:
        results: results of `VerificationResults.compare`.
        far: in [0, 1]; 0 accepts no impostor pair.

    Raises:
        TypeError: `far` is not a number.
        ValueError: `far` is outside [0, 1]; it is above 0 but less than one impostor pair; or there are no genuine or
            no impostor pairs.
    """
    check_number("far", far)
    if not 0 <= far <= 1:
        raise ValueError(f"far is a fraction of impostor pairs, in [0, 1], got {far}")
    _, rates = accept_rates(results)
    if 0 < far < 1 / results.num_impostor:
        raise ValueError(
            f"far = {far:g} of {results.num_impostor} impostor pairs is less than one of them; "
            "compare more items, or ask for 0, at which none is accepted"
        )
    return results.at_bin(int((rates <= far).argmax()))


def equal_error_rate(results: VerificationResults) -> OperatingPoint:
    """Returns the operating point with the smallest |FAR - FRR|; the lowest threshold if several have it.

        equal error rate = (far + 1 - tar) / 2          # FAR and FRR themselves where they are equal

    Args:
        results: results of `VerificationResults.compare`.

    Raises:
        ValueError: there are no genuine or no impostor pairs.
    """
    tar, far = accept_rates(results)
    return results.at_bin(int(np.abs(far - (1 - tar)).argmin()))


def score_histogram(results: VerificationResults, bins: int = 100) -> ScoreHistogram:
    """Returns pair counts in wider bins, for plots.

    Args:
        results: results of `VerificationResults.compare`.
        bins: number of bins, from 1 to 2^17; edges are rounded to multiples of 2^-16.

    Raises:
        TypeError: `bins` is not an integer.
        ValueError: `bins` is out of range.
    """
    bins = check_integer("bins", bins)
    if not 1 <= bins <= 2 * STEPS:
        raise ValueError(f"bins must lie between 1 and {2 * STEPS}, got {bins}")
    at = np.arange(bins + 1) * (2 * STEPS) // bins
    genuine, impostor = (np.add.reduceat(counts, at[:-1]) for counts in (results.genuine, results.impostor))
    return ScoreHistogram((at - STEPS) / STEPS, genuine, impostor)


def pair_scores(first: Rows, second: Rows) -> NDArray[np.float32]:
    """Returns the cosine of each pair of rows.

        scores = (F.normalize(first) * F.normalize(second)).sum(1)

    Args:
        first, second: [P, d] floating, finite: tensors, arrays, memory-mapped files or columns of vectors.

    Returns:
        [P] float32.

    Raises:
        TypeError: rows are not floating.
        ValueError: the shapes differ, or a row holds nan or inf.
    """
    a, b = FeatureRows("first", first), FeatureRows("second", second)
    if (len(a), a.width) != (len(b), b.width):
        raise ValueError(f"first and second must have the same shape, got {[len(a), a.width]} and {[len(b), b.width]}")
    scores = np.empty(len(a), dtype=np.float32)
    for begin in range(0, len(a), _GALLERY_ROWS):
        end = min(len(a), begin + _GALLERY_ROWS)
        x, y = (unit_float32(rows.block_tensor(begin, end)).double() for rows in (a, b))
        scores[begin:end] = (x * y).sum(1).float().cpu().numpy()
    return scores


def cross_validated_accuracy(
    scores: ArrayLike | Tensor, same: ArrayLike | Tensor, *, folds: int | Ids = 10
) -> CrossValidation:
    """Returns the verification accuracy on a list of pairs by cross-validation, as in Labeled Faces in the Wild.

        for f in folds:
            threshold[f] = argmax over t of mean( (scores >= t) == same )      on the pairs of all other folds
            accuracy[f]  = mean( (scores >= threshold[f]) == same )            on the pairs of f

    Args:
        scores: [P] finite numbers, higher for more similar pairs.
        same: [P] bool, whether a pair has one class.
        folds: number of folds of consecutive pairs, at least 2, as equal in size as possible; or [P] integers, the
            fold of each pair.

    Returns:
        Accuracies and thresholds of the folds.  Candidate thresholds are the scores of the other folds and inf; the
        lowest of the best is taken.

    Raises:
        TypeError: `same` is not bool, or `folds` is not an integer.
        ValueError: lengths differ, a score is nan or inf, or there are fewer than two folds or fewer pairs than folds.

    Reference:
        Huang et al., "Labeled Faces in the Wild", 2007; 10 folds.
    """
    values = _as_array(scores).astype(np.float64)
    genuine = _as_array(same)
    if genuine.dtype != np.bool_:
        raise TypeError(f"same must be bool, whether a pair is of one class, got {genuine.dtype}")
    if values.ndim != 1 or values.shape != genuine.shape:
        raise ValueError(f"scores and same must have shape [P], got {list(values.shape)} and {list(genuine.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"scores row {int(np.isfinite(values).argmin())} holds nan or inf")
    of = _fold_of_each_pair(folds, len(values))
    thresholds, accuracies = [], []
    for fold in np.unique(of):
        held_out = of == fold
        thresholds.append(_best_threshold(values[~held_out], genuine[~held_out]))
        accuracies.append(np.mean((values[held_out] >= thresholds[-1]) == genuine[held_out]))
    of_folds = np.array(accuracies)
    error = float(of_folds.std(ddof=1) / np.sqrt(len(of_folds)))
    return CrossValidation(float(of_folds.mean()), error, of_folds, np.array(thresholds))


def _fold_of_each_pair(folds: int | Ids, count: int) -> NDArray[np.int64]:
    if np.ndim(folds) == 0 and not isinstance(folds, Tensor):
        number = check_integer("folds", folds)  # type: ignore[arg-type]
        if not 2 <= number <= count:
            raise ValueError(f"folds must lie between 2 and the number of pairs, {count}, got {number}")
        return np.arange(count) * number // count
    of = read_ids("folds", folds, "scores", count)
    if len(np.unique(of)) < 2:
        raise ValueError("folds must be at least 2: a threshold is chosen on the other ones")
    return of


def _best_threshold(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    order = np.argsort(scores)
    candidates, first = np.unique(scores[order], return_index=True)
    below = np.append(0, np.cumsum(np.where(same[order], -1, 1)))  # correct minus wrong decisions on the rejected pairs
    gain = below[np.append(first, len(scores))]
    return float(np.append(candidates, np.inf)[gain.argmax()])


def bin_pairs(version: VersionFeatures) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.bool_]]]:
    """Yields (slice of queries, bins [rows, columns], [rows, columns] bool: same class) for blocks of pairs.

    A pair that is left out has bin 2 BINS and counts as of different classes.
    """
    (version,) = check_versions([version], [""])
    pair = version.pair(version, "equal")
    query, gallery, items = pair.query, pair.gallery, pair.items
    for begin in range(0, len(query), _QUERY_ROWS):
        rows = slice(begin, min(len(query), begin + _QUERY_ROWS))
        q = unit_float32(query.block_tensor(rows.start, rows.stop)).double()
        for first in range(0, len(gallery), _GALLERY_ROWS):
            columns = slice(first, min(len(gallery), first + _GALLERY_ROWS))
            g = unit_float32(gallery.block_tensor(columns.start, columns.stop)).double()
            # Rounding depends on the product's shape: a score on a bin edge may fall below it, so add the error bound.
            steps = (q @ g.T).add_(_error(q.shape[1])).float().mul_(STEPS).floor_().clamp_(-STEPS, STEPS)
            bins = steps.to(torch.int64).add_(STEPS).cpu().numpy()
            same = items.query_labels[rows, None] == items.gallery_labels[columns]
            out = items.excluded[rows] - first
            left_out = np.flatnonzero((out >= 0) & (out < bins.shape[1]))
            bins[left_out, out[left_out]] = 2 * BINS
            same[left_out, out[left_out]] = False
            yield rows, bins, same
    query.release()
    gallery.release()


def _error(d: int) -> float:
    """Returns an error bound of a float64 dot product of two unit rows of d numbers, for any summation order."""
    return 1.01 * (d + 4) * 2.0**-53


def _as_array(values: ArrayLike | Tensor) -> NDArray[np.generic]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
