"""Selects an adapter: candidates are scored on classes, or items, that were held out of their fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_fraction, check_integer, check_name
from ..compatibility.agreement import overlap
from ..compatibility.statistics import Interval, check_confidence, percentiles
from ..functional import cosine_topk
from ..labelled import Ids, LabelledItems
from ..retrieval.protocols import Protocol, read_protocol
from ._moments import Moments
from ._paired import Features, PairedFeatures
from .base import Adapter, AdapterMethod, QueryChange
from .chain import Chain, chain_of, read_versions
from .gallery_correction import GalleryCorrection
from .hoc_refined import HOCRefined
from .lambda_orthogonal import LambdaOrthogonal
from .local_correction import AFFINE, LocalCorrection
from .low_rank import LowRank
from .maps import unit
from .mlp import MLP
from .procrustes import Procrustes
from .ridge import Ridge
from .simplex_junction import SimplexJunction
from .slerp import Slerp
from .whitened_procrustes import WhitenedProcrustes

__all__ = ["Judged", "Selection", "select_adapter", "select_chain"]

QUERY_ENCODERS = ("new", "both")
STORED_VECTORS = ("map", "keep")
PARTS = 3  # number of parts of the classes, or of the items; each fold holds out one part
RESAMPLES = 1000
TOP = 10  # places that agreement compares
SHRINKAGE = (0.1, 0.3, 0.6)
STEPS = (30, 60, 120)
BETAS = (0.25, 0.5)  # beta of LocalCorrection
GALLERY_BETAS = (0.5, 0.75, 1.0)  # beta of GalleryCorrection
ALPHAS = tuple(round(0.1 * step, 1) for step in range(1, 10))

HELD_OUT, FITTED = 0, 1  # kinds of held-out queries: of held-out classes (or items without labels); of fitted classes
WHITENED = (WhitenedProcrustes, SimplexJunction)

Values = dict[tuple[int, int], NDArray[np.float64]]


@dataclass(frozen=True)
class Judged:
    """The scores of one candidate on the held-out items.

    Attributes:
        method: the candidate.
        score: mean over the cells of the compatibility matrix (AA); without labels the mean agreement of new queries in
            old galleries with the new encoder's own ranking.
        interval: interval of the score.
        matrix: [T, T], rows: query versions, columns: gallery versions; nan above the diagonal.
        gain: mean over pairs (new, old) of the score of new queries in the old gallery, minus the score of the old
            encoder alone.
        gain_interval: interval of the gain.
        losses: fraction of queries that the old encoder alone answers correctly, but the new encoder in the old gallery
            does not; nan without labels.
        kept: score of new queries in the old gallery as a fraction of the new encoder's score in its own gallery, the
            score after a full re-extraction; nan if that score is 0.
        agreement_with_old: without labels, agreement with the old encoder's own ranking; else nan.
    """

    method: AdapterMethod
    score: float
    interval: Interval
    matrix: NDArray[np.float64]
    gain: float
    gain_interval: Interval
    losses: float
    kept: float
    agreement_with_old: float

    def as_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON."""
        count = len(self.matrix)
        return {
            "method": self.method.described(),
            "score": self.score,
            "interval": list(self.interval),
            "matrix": [self.matrix[i, : i + 1].tolist() for i in range(count)],
            "gain": self.gain,
            "gain_interval": list(self.gain_interval),
            "losses": None if np.isnan(self.losses) else self.losses,
            "kept": None if np.isnan(self.kept) else self.kept,
            "agreement_with_old": None if np.isnan(self.agreement_with_old) else self.agreement_with_old,
        }


@dataclass(frozen=True, eq=False)
class Selection:
    """The result of `select_adapter` and `select_chain`.

    Attributes:
        winner: the candidate with the best score.
        table: all candidates, best first.
        better: whether the lower bound of the winner's `gain_interval` is above 0.  If not, keep the old encoder.  The
            interval does not correct for the selection of the winner on the same queries.
        old: score of the old encoder alone on the held-out items; without labels its agreement with the new encoder.
        chain: the winner, fitted on all items.
    """

    winner: Judged
    table: tuple[Judged, ...]
    better: bool
    old: float
    chain: Chain

    @property
    def adapter(self) -> Adapter:
        """The winner's adapter between the newest version and the oldest; for two versions it is the only one."""
        return self.chain.adapters[len(self.chain.own) - 1, 0]


def select_adapter(
    old: Features,
    new: Features,
    labels: Ids | None = None,
    *,
    sample: tuple[Features, Features] | None = None,
    candidates: Sequence[AdapterMethod] | None = None,
    query_encoders: str = "new",
    stored_vectors: str = "map",
    protocol: str | Protocol = "nearest_class_mean",
    seen_fraction: float = 0.0,
    folds: int = 1,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Selection:
    """Fits candidates, scores them on items held out of their fit, and fits the best one on all items.

        with labels:    a third of the classes is held out; half of their items are queries, half the gallery;
                        if seen_fraction > 0, a quarter of the items of each other class is held out, too, as queries,
                        and half of the items of these classes are their gallery
        without labels: a third of the items is held out; half of them are queries, half the gallery
        score = (1 - seen_fraction) AA(held-out classes) + seen_fraction AA(held-out items of the fitted classes)
                AA: mean over cells (old by old, new by old, new by new) of the protocol's score     with labels
              = overlap of the 10 nearest of new queries in the old gallery with those that the new encoder finds
                in a gallery of its own                                                               without labels

    Pass no items on which you will report scores: the selection would bias those scores.  Rows of the sample that equal
    a held-out query are left out of the fit.

    Args:
        old, new: [N, f_old], [N, f_new] floating, of the same items.
        labels: [N] integers or names; at least 6 classes of at least 2 items.
        sample: ([M, f_old], [M, f_new]) of further items without labels.
        candidates: methods to compare.  None: Procrustes, Ridge, LowRank, MLP, LambdaOrthogonal, WhitenedProcrustes
            and, with labels, SimplexJunction, some with several options; with labels HOCRefined from the best junction;
            and GalleryCorrection of the best method that has an affine query map.  With stored_vectors="keep" it is
            LocalCorrection instead, and all methods that map stored vectors are left out.
        query_encoders: "new": only the new encoder runs at query time; "both": the old one runs, too, and Slerp of the
            two best candidates, with a grid of alpha, is added to the candidates.
        stored_vectors: "map": methods that map stored vectors are candidates, too; "keep": only methods that leave the
            gallery as it is.
        protocol: "nearest_class_mean", "instance", or a `Protocol` with `hits`; with labels only.
        seen_fraction: fraction of the service's queries that concern the labelled classes, in [0, 1]; with labels only.
            0: all queries concern classes that are added later; 1: none does.
        folds: number of thirds that are held out in turn, 1 to 3; with more, scores vary less and time grows.
        confidence: confidence of the intervals, in (0, 1).
        seed: seed of the split and the bootstrap.
        device: device of the computation; None for that of the rows of `new`.

    Raises:
        TypeError, ValueError: as in `AdapterMethod.fit`; there are too few classes or items; an option is out of range.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import Procrustes, Ridge, select_adapter
        >>> labels = torch.arange(240) % 12
        >>> items = torch.randn(12, 32)[labels] + 0.5 * torch.randn(240, 32)
        >>> old, new = items @ torch.randn(32, 8), items @ torch.randn(32, 16)
        >>> selection = select_adapter(old, new, labels, candidates=[Procrustes(), Ridge(0.1)])
        >>> len(selection.table)
        2
        >>> selection.adapter(new).shape
        torch.Size([240, 8])
    """
    features = PairedFeatures.read((old, new), labels, sample, names=("old", "new"), device=device)
    return _select(
        features, candidates, query_encoders, stored_vectors, protocol, seen_fraction, folds, confidence, seed
    )


def select_chain(
    versions: Sequence[Features],
    labels: Ids | None = None,
    *,
    sample: Sequence[Features] | None = None,
    candidates: Sequence[AdapterMethod] | None = None,
    query_encoders: str = "new",
    stored_vectors: str = "map",
    protocol: str | Protocol = "nearest_class_mean",
    seen_fraction: float = 0.0,
    folds: int = 1,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Selection:
    """`select_adapter` for two versions or more, oldest first: one method for all pairs.

    Arguments and errors are those of `select_adapter`; `sample` has rows by each encoder.
    """
    features = read_versions(versions, labels, sample, device)
    return _select(
        features, candidates, query_encoders, stored_vectors, protocol, seen_fraction, folds, confidence, seed
    )


def _select(
    features: PairedFeatures,
    candidates: Sequence[AdapterMethod] | None,
    query_encoders: str,
    stored_vectors: str,
    protocol: str | Protocol,
    seen_fraction: float,
    folds: int,
    confidence: float,
    seed: int,
) -> Selection:
    check_name("query_encoders", query_encoders, QUERY_ENCODERS)
    check_name("stored_vectors", stored_vectors, STORED_VECTORS)
    keep = stored_vectors == "keep"
    protocol = read_protocol(protocol, needs="hits")
    if not 1 <= check_integer("folds", folds) <= PARTS:
        raise ValueError(f"folds must lie in [1, {PARTS}], got {folds}")
    check_fraction("seen_fraction", seen_fraction)
    given = {HELD_OUT: 1.0 - seen_fraction, FITTED: float(seen_fraction)}
    fractions = {HELD_OUT: 1.0} if features.labels is None else {kind: f for kind, f in given.items() if f}
    check_confidence(confidence)
    if candidates is not None and not candidates:
        raise ValueError("candidates must hold at least one method, or be None")
    shrinkages = SHRINKAGE if candidates is None else {m.g for m in candidates if isinstance(m, WHITENED)}
    splits = _splits(features, folds, seed, seen_fraction)
    parts = [_Fold(features, split, protocol, shrinkages, fractions) for split in splits]
    judge = _Judge(parts, fractions, confidence, seed)
    if candidates is None:
        judge.add([method for method in first_candidates(features) if not (keep and method.maps_gallery)])
        if features.labels is not None and not keep:
            start = next(row.method for row in judge.ranked() if isinstance(row.method, SimplexJunction))
            judge.add([HOCRefined(start, steps=steps) for steps in STEPS])
        corrected = next(row.method for row in judge.ranked() if isinstance(row.method, AFFINE))
        if keep:
            judge.add([LocalCorrection(corrected, beta=beta) for beta in BETAS])
        else:
            judge.add([GalleryCorrection(corrected, beta=beta) for beta in GALLERY_BETAS])
    else:
        for method in candidates:
            method.check(features)
            if keep and method.maps_gallery:
                raise ValueError(f'stored_vectors="keep" excludes {method.name}, which maps stored vectors: remove it')
        judge.add(candidates)
    if query_encoders == "both":
        bases = [row.method for row in judge.ranked() if not isinstance(row.method, Slerp)][:2]
        judge.add([Slerp(base, alpha) for base in bases for alpha in ALPHAS])
    table = tuple(judge.ranked())
    chain = chain_of(table[0].method, Moments(features))
    return Selection(table[0], table, table[0].gain_interval.low > 0, judge.old, chain)


def first_candidates(features: PairedFeatures) -> list[AdapterMethod]:
    """Returns the default candidates that need no other candidate's score; Adam trains two of them."""
    smallest = min(features.width(i) for i in range(len(features.versions)))
    methods: list[AdapterMethod] = [
        Procrustes(),
        *(Ridge(penalty) for penalty in (0.03, 0.3)),
        *(Ridge(penalty, "procrustes") for penalty in (0.3, 3.0)),
        LowRank(max(1, smallest // 2)),
        MLP(),
        LambdaOrthogonal(),
        *(WhitenedProcrustes(g) for g in SHRINKAGE),
    ]
    return methods if features.labels is None else [*methods, *(SimplexJunction(g) for g in SHRINKAGE)]


@dataclass(frozen=True)
class _Split:
    """Rows of the items that are fitted and of those that are held out.

    Attributes:
        fitted: rows that the methods are fitted on.
        kinds: one pair (rows of queries, rows of their gallery) for each kind of held-out queries.  The first kind is
            of held-out classes, or without labels of held-out items.  The second, of fitted classes, needs labels.
    """

    fitted: NDArray[np.int64]
    kinds: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]


def _splits(features: PairedFeatures, folds: int, seed: int, seen_fraction: float) -> Iterator[_Split]:
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(features.num_items)
    if features.labels is None:
        if features.num_items < 12:
            raise ValueError(f"{features.num_items} items are too few to hold out a third: pass at least 12")
        for fold in range(folds):
            out = order[fold::PARTS]
            yield _Split(np.setdiff1d(order, out), ((np.sort(out[1::2]), np.sort(out[::2])),))
        return
    sizes = np.bincount(features.labels)
    large = np.flatnonzero(sizes > 1)
    if len(large) < 2 * PARTS:
        raise ValueError(
            f"labels have {len(large)} classes of at least 2 items, at least {2 * PARTS} are needed to hold out a "
            "third of them; without labels a third of the items is held out"
        )
    part_of = np.full(len(sizes), PARTS)  # classes of one item are never held out
    part_of[rng.permutation(large)] = np.arange(len(large)) % PARTS
    in_class = order[np.argsort(features.labels[order], kind="stable")]  # items of a class together, in drawn order
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    part = part_of[features.labels[in_class]]
    for fold in range(folds):
        held = part == fold
        # a class is fitted in two of three folds; each holds out another quarter of its items
        quarter = np.where(part == (fold + 1) % PARTS, 1, 3)
        asks = np.where(held, place % 2 == 1, (place % 4 == quarter) & (seen_fraction > 0))
        kinds = [(held & asks, held & ~asks), (~held & asks, ~held & (place % 2 == 0))]
        yield _Split(
            np.sort(in_class[~held & ~asks]),
            tuple((np.sort(in_class[asking]), np.sort(in_class[searched])) for asking, searched in kinds),
        )


class _HeldOut:
    """Held-out queries of one kind, and the gallery that they search.

    Attributes:
        own: [Q] float64, mean score over all encoders but the oldest, each in a gallery of its own.
        alone: (new, old) -> [Q] float64, score of the old encoder in a gallery of its own: hits, or without labels
            agreement with the new encoder.
    """

    def __init__(
        self,
        features: PairedFeatures,
        asking: NDArray[np.int64],
        searched: NDArray[np.int64],
        protocol: Protocol,
    ) -> None:
        versions = range(len(features.versions))
        self._asking, self._searched = (
            [unit(version.take(at).whole().to(features.device), torch.float32) for version in features.versions]
            for at in (asking, searched)
        )
        self._mapped_by: AdapterMethod | None = None
        self._mapped: tuple[list[Tensor], list[Tensor]] = [], []
        self._protocol = protocol
        self._pairs = [(i, j) for i in versions for j in range(i)]
        if features.labels is None:
            self._items = None
            self._k = min(TOP, len(searched))
            self._rankings = [self._nearest(self._asking[i], self._searched[i]) for i in versions]
            self._itself = [overlap(found, found) for found in self._rankings]
            self.alone = {(i, j): overlap(self._rankings[j], self._rankings[i]) for i, j in self._pairs}
        else:
            self._items = LabelledItems(features.labels[asking], features.labels[searched])
            self._itself = [self._hits(self._asking[i], self._searched[i]) for i in versions]
            self.alone = {(i, j): self._itself[j] for i, j in self._pairs}
        self.own = np.mean(self._itself[1:], axis=0)

    def values(self, chain: Chain) -> tuple[Values, NDArray[np.float64]]:
        """Returns (new, old) -> [Q] float64 hits, or agreement with the new encoder's own ranking, for new >= old.

        The second result is the [Q] mean agreement with the old encoder's own ranking over all pairs, nan with labels.
        """
        queries, galleries = self._own_mapped(chain)
        cells: Values = {}
        with_old = []
        for i in range(len(queries)):
            for j in range(i + 1):
                if i == j and chain.own[i] is None:
                    cells[i, i] = self._itself[i]
                    continue
                query = queries[i]
                if i != j and not chain.method.common_space:
                    query = chain.adapters[i, j]._query(self._asking[i], queries[j])
                if self._items is not None:
                    cells[i, j] = self._hits(query, galleries[j])
                    continue
                found = self._nearest(query, galleries[j])
                cells[i, j] = overlap(found, self._rankings[i])
                if i != j:
                    with_old.append(overlap(found, self._rankings[j]))
        return cells, np.mean(with_old, axis=0) if with_old else np.full(len(queries[0]), np.nan)

    def _own_mapped(self, chain: Chain) -> tuple[list[Tensor], list[Tensor]]:
        """Returns queries and galleries as each version stores them; computed once for slerps of the same method."""
        method = chain.method
        while isinstance(method, QueryChange):  # it stores the same vectors as the method `of`
            method = method.of
        if method != self._mapped_by:
            queries, galleries = (
                [rows if own is None else own(rows) for own, rows in zip(chain.own, given, strict=True)]
                for given in (self._asking, self._searched)
            )
            self._mapped_by, self._mapped = method, (queries, galleries)
        return self._mapped

    def _nearest(self, query: Tensor, gallery: Tensor) -> NDArray[np.int64]:
        places: NDArray[np.int64] = cosine_topk(query, gallery, self._k)[1].cpu().numpy()
        return places

    def _hits(self, query: Tensor, gallery: Tensor) -> NDArray[np.float64]:
        assert self._items is not None
        assert self._protocol.hits is not None
        return self._protocol.hits(self._items.version(query, gallery)).astype(np.float64)


class _Fold:
    """One split: moments of the fitted items, and the held-out queries of each kind."""

    def __init__(
        self,
        features: PairedFeatures,
        split: _Split,
        protocol: Protocol,
        shrinkages: Collection[float],
        kinds: Collection[int],
    ) -> None:
        sample = None
        if features.sample is not None:
            asking = features.versions[0].take(np.concatenate([asking for asking, _ in split.kinds])).hashes()
            sample = np.flatnonzero(~np.isin(features.sample[0].hashes(), asking))
        self.moments = Moments(features.take(split.fitted, sample), shrinkages)
        self.kinds = {kind: _HeldOut(features, *split.kinds[kind], protocol) for kind in kinds}


class _Judge:
    """Scores candidates on all folds, with intervals from the same resampled queries.

    A mean over queries is the weighted mean of the kinds' means: `fractions` are the weights, which add up to 1.
    """

    def __init__(self, folds: Sequence[_Fold], fractions: Mapping[int, float], confidence: float, seed: int) -> None:
        self.folds = folds
        self.table: list[Judged] = []
        self.labelled = folds[0].moments.features.labels is not None
        self._fractions = fractions
        self._held_out = [fold.kinds[kind] for kind in fractions for fold in folds]
        self._kind = np.concatenate([np.full(len(f.kinds[kind].own), kind) for kind in fractions for f in folds])
        self._pairs = list(self._held_out[0].alone)
        self._confidence = confidence
        self._alone = {pair: np.concatenate([held.alone[pair] for held in self._held_out]) for pair in self._pairs}
        self._own = self._mean(np.concatenate([held.own for held in self._held_out]))
        rng = np.random.default_rng([seed, 1])
        weights = []
        for kind, fraction in fractions.items():
            queries = int((self._kind == kind).sum())
            drawn = rng.multinomial(queries, np.full(queries, 1 / queries), size=RESAMPLES)
            weights.append(fraction * (drawn / queries))
        # [RESAMPLES, Q] weights of the queries in each resample, in the order of _kind
        self._weights = np.concatenate(weights, axis=1)

    @property
    def old(self) -> float:
        return float(np.mean([self._mean(values) for values in self._alone.values()]))

    def add(self, methods: Sequence[AdapterMethod]) -> None:
        self.table += [self._judged(method) for method in methods]

    def ranked(self) -> list[Judged]:
        """Returns the scores, best first; equal ones stay in the order in which they were added."""
        return sorted(self.table, key=lambda row: -row.score)

    def _mean(self, values: NDArray[np.float64]) -> float:
        means = (fraction * values[self._kind == kind].mean() for kind, fraction in self._fractions.items())
        return float(sum(means))

    def _judged(self, method: AdapterMethod) -> Judged:
        chains = [chain_of(method, fold.moments) for fold in self.folds]
        found = [
            fold.kinds[kind].values(chain)
            for kind in self._fractions
            for fold, chain in zip(self.folds, chains, strict=True)
        ]
        cells = {cell: np.concatenate([values[cell] for values, _ in found]) for cell in found[0][0]}
        scored = list(cells.values()) if self.labelled else [cells[pair] for pair in self._pairs]
        score = np.mean(scored, axis=0)
        gain = np.mean([cells[pair] - self._alone[pair] for pair in self._pairs], axis=0)
        count = 1 + max(new for new, _ in self._pairs)
        matrix = np.full((count, count), np.nan)
        for cell, values in cells.items():
            matrix[cell] = self._mean(values)
        crossed = np.mean([matrix[pair] for pair in self._pairs])
        losses = np.mean([(self._alone[pair] > 0) & (cells[pair] == 0) for pair in self._pairs], axis=0)
        return Judged(
            method=method,
            score=self._mean(score),
            interval=percentiles(self._weights @ score, self._confidence),
            matrix=matrix,
            gain=self._mean(gain),
            gain_interval=percentiles(self._weights @ gain, self._confidence),
            losses=self._mean(losses) if self.labelled else np.nan,
            kept=float(crossed / self._own) if self._own else np.nan,
            agreement_with_old=self._mean(np.concatenate([with_old for _, with_old in found])),
        )
