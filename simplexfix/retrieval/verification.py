"""Pair verification: are two items of one class, judged by a score and a threshold?  All pairs, none of them held.

A pair is a query and a gallery item, genuine if they are of one class and an impostor otherwise; it is accepted where
its score >= threshold.

    TAR(t) = fraction of the genuine pairs that are accepted       FAR(t) = fraction of the impostors that are
    FRR(t) = 1 - TAR(t)

Scores are those of a search: the cosine of the float32 rows, each normalised, in float64, rounded to float32 (but for
the last bit of one score in about 2^28, where float64 sums in another order).  A sum that float64 cannot tell from a
threshold counts as that threshold, so that a cosine of 0 is accepted at 0 whatever order its products cancel in.
Pairs are counted between neighbouring thresholds 2^-16 apart, from -1 to 1: at each of those thresholds every rate here
is exact.
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

STEPS = 2**16  # thresholds between 0 and 1; a power of two, so that to scale a score by it rounds nothing
BINS = 2 * STEPS + 1  # of scores: [-1, -1 + 2^-16), ..., [1, ...), where what rounding leaves outside joins the ends
_QUERY_ROWS, _GALLERY_ROWS = 1024, 4096  # of one product: 32 MB of float64


@dataclass(frozen=True, eq=False)
class VerificationResults:
    """How many pairs score how high.  Arrays are read-only; memory is 2 MB, whatever the number of pairs.

    Attributes:
        genuine: [BINS] int64, pairs of one class whose score lies in each bin.
        impostor: [BINS] int64, the others.
        excluded: pairs of an item with itself, by id, that were left out.
    """

    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]
    excluded: int

    @classmethod
    def compare(cls, version: VersionFeatures) -> VerificationResults:
        """Scores every query with every gallery item, in blocks.

            scores = F.normalize(query) @ F.normalize(gallery).T
            genuine, impostor = (histogram(scores[same]) for same in (equal, ~equal))
            # with equal = query_labels[:, None] == gallery_labels

        Args:
            version: as of `RetrievalResults.search`; an item is no pair with itself.

        Raises:
            TypeError, ValueError: as there.
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
        """Both rates at a threshold, rounded up to a multiple of 2^-16.

        Raises:
            TypeError, ValueError: not a number, nan, or no pair of one of the two kinds.
        """
        check_number("threshold", threshold)
        if threshold != threshold:
            raise ValueError("threshold must be a number, got nan")
        return self.at_bin(int(np.clip(np.ceil(threshold * STEPS) + STEPS, 0, BINS)))

    def at_bin(self, bin: int) -> OperatingPoint:
        """The rates where what lies in this bin and above is accepted; BINS accepts nothing."""
        self.require_both()
        tar = int(self.genuine[bin:].sum()) / self.num_genuine
        far = int(self.impostor[bin:].sum()) / self.num_impostor
        return OperatingPoint(threshold_of(bin), tar, far)

    def require_both(self) -> None:
        """Raises ValueError where a rate would be a fraction of no pairs."""
        for kind, count in (("one class", self.num_genuine), ("two classes", self.num_impostor)):
            if not count:
                raise ValueError(f"there is no pair of items of {kind}, and so no such rate")

    def __repr__(self) -> str:
        return f"VerificationResults of {self.num_genuine} genuine and {self.num_impostor} impostor pairs"


class OperatingPoint(NamedTuple):
    """A threshold on the score, and the true- and false-accept rate there."""

    threshold: float
    tar: float
    far: float


class RocCurve(NamedTuple):
    """[points] float64 each, by descending threshold: the first is inf, which accepts nothing."""

    thresholds: NDArray[np.float64]
    tar: NDArray[np.float64]
    far: NDArray[np.float64]

    @property
    def area(self) -> float:
        """The area under TAR over FAR, by trapezoids; on any number of threads the same."""
        return float((np.diff(self.far) * (self.tar[1:] + self.tar[:-1])).sum() / 2)


class ScoreHistogram(NamedTuple):
    """edges: [bins + 1] float64 from -1 to 1; genuine, impostor: [bins] int64; the last bin holds its upper end."""

    edges: NDArray[np.float64]
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]


class CrossValidation(NamedTuple):
    """accuracy: mean over folds; standard_error: of that mean, nan for a single one; accuracies and thresholds:
    [folds] float64."""

    accuracy: float
    standard_error: float
    accuracies: NDArray[np.float64]
    thresholds: NDArray[np.float64]


def threshold_of(bin: int) -> float:
    """The least score of a bin."""
    return (bin - STEPS) / STEPS


def accept_rates(results: VerificationResults) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[BINS + 1] TAR and FAR at the least score of each bin, and above all of them."""
    results.require_both()
    tar, far = (
        np.append(np.cumsum(counts[::-1])[::-1], 0) / counts.sum() for counts in (results.genuine, results.impostor)
    )
    return tar, far


def roc_curve(results: VerificationResults) -> RocCurve:
    """TAR over FAR at every threshold where either changes.

    Raises:
        ValueError: no pair of one of the two kinds.
    """
    tar, far = accept_rates(results)
    used = np.flatnonzero(results.genuine + results.impostor)[::-1]
    thresholds = np.append(np.inf, (used - STEPS) / STEPS)
    return RocCurve(thresholds, np.append(0.0, tar[used]), np.append(0.0, far[used]))


def tar_at_far(results: VerificationResults, far: float) -> OperatingPoint:
    """The lowest threshold, of multiples of 2^-16, whose FAR is at most `far`, and both rates there.

    A threshold between two multiples might accept more genuine pairs, by those of one bin at most; of a model that has
    collapsed, whose scores all lie within 2^-16, none would be left.

    Args:
        results: of `VerificationResults.compare`.
        far: in [0, 1]; 0 accepts no impostor at all.

    Raises:
        TypeError: `far` is no number.
        ValueError: outside of [0, 1]; above 0, but less than one impostor pair, which these pairs cannot tell from 0;
            or no pair of one of the two kinds.
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
    """The operating point where FAR and FRR are nearest to each other, the lowest threshold of equals.

    The equal error rate is `(far + 1 - tar) / 2` there, which is either of them wherever they meet.

    Raises:
        ValueError: no pair of one of the two kinds.
    """
    tar, far = accept_rates(results)
    return results.at_bin(int(np.abs(far - (1 - tar)).argmin()))


def score_histogram(results: VerificationResults, bins: int = 100) -> ScoreHistogram:
    """Counts in wider bins, for pictures.

    Args:
        results: of `VerificationResults.compare`.
        bins: from 1 to 2^17; edges are rounded to multiples of 2^-16.

    Raises:
        TypeError, ValueError: not such a number.
    """
    bins = check_integer("bins", bins)
    if not 1 <= bins <= 2 * STEPS:
        raise ValueError(f"bins must lie between 1 and {2 * STEPS}, got {bins}")
    at = np.arange(bins + 1) * (2 * STEPS) // bins
    genuine, impostor = (np.add.reduceat(counts, at[:-1]) for counts in (results.genuine, results.impostor))
    return ScoreHistogram((at - STEPS) / STEPS, genuine, impostor)


def pair_scores(first: Rows, second: Rows) -> NDArray[np.float32]:
    """Scores of given pairs.

        scores = (F.normalize(first) * F.normalize(second)).sum(1)

    Args:
        first, second: [P, d] rows of each pair, as of `RetrievalResults.search`.

    Returns:
        [P] float32.

    Raises:
        TypeError, ValueError: as there, or unlike shapes.
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
    """The accuracy of a list of pairs by cross-validation, as of Labeled Faces in the Wild.

        for f in folds:
            threshold[f] = argmax over t of mean( (scores >= t) == same )      on the pairs of all other folds
            accuracy[f]  = mean( (scores >= threshold[f]) == same )            on the pairs of f

    Args:
        scores: [P] finite numbers, higher for pairs that are more alike.
        same: [P] bool, whether a pair is of one class.
        folds: how many of neighbouring pairs, as equal in size as can be, at least 2; or [P] integers, the fold of
            each pair.

    Returns:
        With the threshold, of the scores of the other folds and inf, the lowest of the best.

    Raises:
        TypeError, ValueError: lengths that differ, a score that is nan or inf, `same` not bool, or fewer than two folds
            or fewer pairs than folds.

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
    below = np.append(0, np.cumsum(np.where(same[order], -1, 1)))  # right minus wrong of what is rejected
    gain = below[np.append(first, len(scores))]
    return float(np.append(candidates, np.inf)[gain.argmax()])


def bin_pairs(version: VersionFeatures) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.bool_]]]:
    """(which queries, [rows, columns] bins, [rows, columns] whether of one class).

    The bin of a pair that is left out is 2 BINS, and it is of two classes.
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
            # a product rounds differently in each shape; where its sum belongs on a threshold, it may fall below
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
    """What a float64 sum of d products of unit rows errs by at most, in any order."""
    return 1.01 * (d + 4) * 2.0**-53


def _as_array(values: ArrayLike | Tensor) -> NDArray[np.generic]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
