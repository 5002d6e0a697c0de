"""Which adapter: candidates are judged on classes, or items, that were held out of their fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._checks import check_integer, check_name
from ..compatibility.agreement import overlap
from ..compatibility.statistics import Interval, check_confidence, percentiles
from ..functional import cosine_topk
from ..labelled import Ids, LabelledItems
from ..retrieval.protocols import Protocol, read_protocol
from ._moments import Moments
from ._paired import Features, PairedFeatures
from .base import Adapter, AdapterMethod
from .chain import Chain, chain_of, read_versions
from .hoc_refined import HOCRefined
from .lambda_orthogonal import LambdaOrthogonal
from .low_rank import LowRank
from .mlp import MLP
from .procrustes import Procrustes
from .ridge import Ridge
from .simplex_junction import SimplexJunction
from .slerp import Slerp
from .whitened_procrustes import WhitenedProcrustes

__all__ = ["Judged", "Selection", "select_adapter", "select_chain"]

QUERY_ENCODERS = ("new", "both")
STORED_VECTORS = ("map", "keep")
PARTS = 3  # parts of the classes, or of the items; one at a time is held out
RESAMPLES = 1000
TOP = 10  # places that agreement compares
SHRINKAGE = (0.1, 0.3, 0.6)
STEPS = (30, 60, 120)
ALPHAS = tuple(round(0.1 * step, 1) for step in range(1, 10))

Values = dict[tuple[int, int], NDArray[np.float64]]


@dataclass(frozen=True)
class Judged:
    """One candidate's scores on what was held out.

    Attributes:
        method: the candidate.
        score: mean over the cells of the compatibility matrix (AA); without labels the mean agreement of new queries in
            old galleries with the new encoder's own ranking.
        interval: of score.
        matrix: [T, T], rows: query versions, columns: gallery versions; nan above the diagonal.
        gain: mean over pairs (new, old) of the score of new queries in the old gallery, less that of the old encoder
            alone.
        gain_interval: of gain.
        losses: fraction of queries that the old encoder alone answers right and the new one, in the old gallery, wrong;
            nan without labels.
        kept: score of new queries in the old gallery as a fraction of the new encoder's own search of its own gallery:
            what is kept of a full re-extraction; nan where that search finds nothing.
        agreement_with_old: without labels, with the old encoder's own ranking; else nan.
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
        """For JSON."""
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
    """What `select_adapter` and `select_chain` return.

    Attributes:
        winner: the candidate with the best score.
        table: all candidates, best first.
        better: whether the winner's new queries find more in the old gallery than the old encoder does: the low end of
            its gain's interval is above 0.  Without that keep the old encoder.
        old: score of the old encoder alone on what was held out; without labels its agreement with the new encoder.
        chain: the winner, fitted on all items.
    """

    winner: Judged
    table: tuple[Judged, ...]
    better: bool
    old: float
    chain: Chain

    @property
    def adapter(self) -> Adapter:
        """The winner's adapter of the newest version and the oldest: of two versions the only one."""
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
    folds: int = 1,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Selection:
    """Fits candidates, judges them on what was held out of their fit, and fits the best one on all items.

        with labels:    a third of the classes is held out; half of their items are queries, half the gallery
        without labels: a third of the items is held out; half of them are queries, half the gallery
        score = mean over cells (old by old, new by old, new by new) of the protocol's score        with labels
              = overlap of the 10 nearest of new queries in the old gallery with those that the new encoder finds
                in a gallery of its own                                                               without labels

    Queries that are to be reported must not be among these items: they have no part in the choice.  Rows of the sample
    that are one of the held-out queries are left out of the fit.

    Args:
        old, new: [N, f_old], [N, f_new] floating, of the same items.
        labels: [N] integers or names; at least 6 classes of at least 2 items.
        sample: ([M, f_old], [M, f_new]) of further items without labels.
        candidates: None: procrustes, ridge, low rank, MLP, lambda-orthogonal, whitened procrustes and, with labels,
            simplex junction with a grid of shrinkages, then HOC steps from the best junction.
        query_encoders: "new": the new encoder alone runs at query time; "both": the old one as well, and slerp with a
            grid of alpha from the two best adapters is a candidate.
        stored_vectors: "map": methods that map stored vectors are candidates, too; "keep": only methods that leave the
            gallery as it is.
        protocol: "nearest_class_mean", "instance", or one with hits; with labels only.
        folds: 1 to 3, how many thirds are held out in turn: more take longer and are surer.
        confidence: of the intervals, in (0, 1).
        seed: of the split and the bootstrap.
        device: where it is computed; None: where the rows of `new` are.

    Raises:
        TypeError, ValueError: as `AdapterMethod.fit`; too few classes or items; an option out of its range.
    """
    features = PairedFeatures.read((old, new), labels, sample, names=("old", "new"), device=device)
    return _select(features, candidates, query_encoders, stored_vectors, protocol, folds, confidence, seed)


def select_chain(
    versions: Sequence[Features],
    labels: Ids | None = None,
    *,
    sample: Sequence[Features] | None = None,
    candidates: Sequence[AdapterMethod] | None = None,
    query_encoders: str = "new",
    stored_vectors: str = "map",
    protocol: str | Protocol = "nearest_class_mean",
    folds: int = 1,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Selection:
    """`select_adapter` for two versions or more, oldest first: one method for all pairs.

    Arguments and errors as there; `sample` has rows by each encoder.
    """
    features = read_versions(versions, labels, sample, device)
    return _select(features, candidates, query_encoders, stored_vectors, protocol, folds, confidence, seed)


def _select(
    features: PairedFeatures,
    candidates: Sequence[AdapterMethod] | None,
    query_encoders: str,
    stored_vectors: str,
    protocol: str | Protocol,
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
    check_confidence(confidence)
    if candidates is not None and not candidates:
        raise ValueError("candidates must hold at least one method, or be None")
    parts = [_HeldOut(features, part, protocol) for part in _splits(features, folds, seed)]
    judge = _Judge(parts, confidence, seed)
    if candidates is None:
        judge.add([method for method in closed_forms(features) if not (keep and method.maps_gallery)])
        if features.labels is not None and not keep:
            start = next(row.method for row in judge.ranked() if isinstance(row.method, SimplexJunction))
            judge.add([HOCRefined(start, steps=steps) for steps in STEPS])
        if query_encoders == "both":
            bases = [row.method for row in judge.ranked()[:2]]
            judge.add([Slerp(base, alpha) for base in bases for alpha in ALPHAS])
    else:
        for method in candidates:
            method.check(features)
            if keep and method.maps_gallery:
                raise ValueError(f'stored_vectors="keep" leaves out {method.name}, which maps them: drop it')
        judge.add(candidates)
    table = tuple(judge.ranked())
    chain = chain_of(table[0].method, Moments(features))
    return Selection(table[0], table, table[0].gain_interval.low > 0, judge.old, chain)


def closed_forms(features: PairedFeatures) -> list[AdapterMethod]:
    """The candidates that do not begin at another one's result."""
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
    """Rows of items: those of the fit, the held-out queries and the held-out gallery."""

    fitted: NDArray[np.int64]
    asking: NDArray[np.int64]
    searched: NDArray[np.int64]


def _splits(features: PairedFeatures, folds: int, seed: int) -> Iterator[_Split]:
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(features.num_items)
    if features.labels is None:
        if features.num_items < 12:
            raise ValueError(f"{features.num_items} items are too few to hold out a third: pass at least 12")
        for fold in range(folds):
            out = order[fold::PARTS]
            yield _Split(np.setdiff1d(order, out), np.sort(out[1::2]), np.sort(out[::2]))
        return
    sizes = np.bincount(features.labels)
    large = np.flatnonzero(sizes > 1)
    if len(large) < 2 * PARTS:
        raise ValueError(
            f"labels have {len(large)} classes of at least 2 items, at least {2 * PARTS} are needed to hold out a "
            "third of them; without labels a third of the items is held out"
        )
    classes = rng.permutation(large)
    in_class = order[np.argsort(features.labels[order], kind="stable")]  # items of a class together, in drawn order
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    for fold in range(folds):
        held = np.isin(features.labels[in_class], classes[fold::PARTS])
        asks = held & (place % 2 == 1)
        yield _Split(np.sort(in_class[~held]), np.sort(in_class[asks]), np.sort(in_class[held & ~asks]))


class _HeldOut:
    """One split: moments of the fitted items, and the scores of a chain on the others."""

    def __init__(self, features: PairedFeatures, split: _Split, protocol: Protocol) -> None:
        sample = None
        if features.sample is not None:
            asking = features.versions[0].take(split.asking).hashes()
            sample = np.flatnonzero(~np.isin(features.sample[0].hashes(), asking))
        self.moments = Moments(features.take(split.fitted, sample))
        self.count = len(features.versions)
        rows = [
            tuple(version.take(at).whole().to(features.device) for version in features.versions)
            for at in (split.asking, split.searched)
        ]
        self.asking, self.searched = rows
        identity = Chain(Procrustes(), (None,) * self.count, {})
        if features.labels is None:
            self._k = min(TOP, len(split.searched))
            self._rankings = [self._nearest(identity, i, i) for i in range(self.count)]
            self._values: Callable[[Chain, int, int], NDArray[np.float64]] = self._agreement
        else:
            self._items = LabelledItems(features.labels[split.asking], features.labels[split.searched])
            self._protocol = protocol
            self._values = self._hits
        self.alone = [self._values(identity, i, i) for i in range(self.count)]

    def values(self, chain: Chain) -> Values:
        """[Q] of each cell (new, old), new >= old: right or wrong, or the agreement with the new encoder's ranking."""
        return {(i, j): self._values(chain, i, j) for i in range(self.count) for j in range(i + 1)}

    def agreement_with(self, chain: Chain | None, new: int, old: int, ranking: int) -> NDArray[np.float64]:
        """[Q] overlap of the nearest items with those that another version finds by itself; None: of `old` alone."""
        found = self._rankings[old] if chain is None else self._nearest(chain, new, old)
        return overlap(found, self._rankings[ranking])

    def _agreement(self, chain: Chain, new: int, old: int) -> NDArray[np.float64]:
        return overlap(self._nearest(chain, new, old), self._rankings[new])

    def _nearest(self, chain: Chain, new: int, old: int) -> NDArray[np.int64]:
        gallery = chain.gallery(old, self.searched[old])
        places: NDArray[np.int64] = cosine_topk(chain.query(new, old, self.asking), gallery, self._k)[1].cpu().numpy()
        return places

    def _hits(self, chain: Chain, new: int, old: int) -> NDArray[np.float64]:
        gallery = chain.gallery(old, self.searched[old])
        version = self._items.version(chain.query(new, old, self.asking), gallery)
        assert self._protocol.hits is not None
        return self._protocol.hits(version).astype(np.float64)


class _Judge:
    """Scores candidates on all splits, with intervals from the same resampled queries."""

    def __init__(self, parts: Sequence[_HeldOut], confidence: float, seed: int) -> None:
        self.parts = parts
        self.table: list[Judged] = []
        self.labelled = parts[0].moments.features.labels is not None
        self._pairs = [(i, j) for i in range(parts[0].count) for j in range(i)]
        self._confidence = confidence
        self._alone = {
            (i, j): np.concatenate(
                [part.alone[j] if self.labelled else part.agreement_with(None, i, j, i) for part in parts]
            )
            for i, j in self._pairs
        }  # of the old encoder alone
        self._own = np.concatenate([np.mean(part.alone[1:], axis=0) for part in parts]).mean()
        queries = len(self._alone[1, 0])
        rng = np.random.default_rng([seed, 1])
        self._weights = rng.multinomial(queries, np.full(queries, 1 / queries), size=RESAMPLES) / queries

    @property
    def old(self) -> float:
        return float(np.mean(list(self._alone.values())))

    def add(self, methods: Sequence[AdapterMethod]) -> None:
        self.table += [self._judged(method) for method in methods]

    def ranked(self) -> list[Judged]:
        """Best first; of equal scores the one that was added first."""
        return sorted(self.table, key=lambda row: -row.score)

    def _judged(self, method: AdapterMethod) -> Judged:
        chains = [chain_of(method, part.moments) for part in self.parts]
        found = [part.values(chain) for part, chain in zip(self.parts, chains, strict=True)]
        cells = {cell: np.concatenate([values[cell] for values in found]) for cell in found[0]}
        scored = list(cells.values()) if self.labelled else [cells[pair] for pair in self._pairs]
        score = np.mean(scored, axis=0)
        gain = np.mean([cells[pair] - self._alone[pair] for pair in self._pairs], axis=0)
        matrix = np.full((self.parts[0].count,) * 2, np.nan)
        for cell, values in cells.items():
            matrix[cell] = values.mean()
        crossed = np.mean([cells[pair] for pair in self._pairs])
        losses = np.mean([(self._alone[pair] > 0) & (cells[pair] == 0) for pair in self._pairs])
        with_old = np.nan
        if not self.labelled:
            pairs = [
                (part, chain, i, j) for part, chain in zip(self.parts, chains, strict=True) for i, j in self._pairs
            ]
            with_old = float(np.mean([part.agreement_with(chain, i, j, j).mean() for part, chain, i, j in pairs]))
        return Judged(
            method=method,
            score=float(score.mean()),
            interval=percentiles(self._weights @ score, self._confidence),
            matrix=matrix,
            gain=float(gain.mean()),
            gain_interval=percentiles(self._weights @ gain, self._confidence),
            losses=float(losses) if self.labelled else np.nan,
            kept=float(crossed / self._own) if self._own else np.nan,
            agreement_with_old=with_old,
        )
