"""Everything that is said about model versions, computed once: what `simplexfix evaluate` prints, draws and writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_name
from ..retrieval import instance_accuracy, nearest_class_mean_accuracy
from ..retrieval._inputs import Features, Ids, Rows, read_labels
from .backfill import BackfillCurve, backfill_curve
from .criteria import (
    CompatibilityTable,
    average_accuracy,
    average_compatibility,
    backward_compatibility,
    compatibility_table,
    flips,
    forward_compatibility,
)
from .inequalities import Violations, sampled_violations
from .matrix import Protocol, compatibility_hits
from .orders import ORDERS
from .pairs import PairReport, compare_pairs
from .regressions import Regression, take_rows, worst_regressions
from .statistics import bootstrap_cells, bootstrap_gain, check_confidence, mcnemar_test

__all__ = ["Counts", "Criteria", "EvaluationReport", "Upgrade", "evaluate_versions"]

PROTOCOLS: Mapping[str, Protocol] = {
    "nearest_class_mean": nearest_class_mean_accuracy,
    "instance": instance_accuracy,
}
BACKFILL_QUERIES = 5_000  # each of some 30 searches of whole galleries is by so many at most
BACKFILL_BYTES = 4 * 2**30  # of float32, of the galleries that it holds whole


@dataclass(frozen=True)
class Counts:
    """How much there was to judge by.

    Attributes:
        queries, gallery: items.
        classes: in the gallery.
        classes_not_in_gallery: of queries only.
        queries_of_classes_not_in_gallery: these queries; no version can find them, and they count as wrong for all.
        classes_without_queries: of the gallery only; nothing is known of them.
    """

    queries: int
    gallery: int
    classes: int
    classes_not_in_gallery: int
    queries_of_classes_not_in_gallery: int
    classes_without_queries: int


@dataclass(frozen=True)
class Criteria:
    """The matrix in a few numbers; nan where there is no upgrade.

    Attributes:
        ac: `average_compatibility`.
        aa: `average_accuracy`.
        aa_t: that of the first t versions, t = 1 .. T.
        bc: `backward_compatibility`.
        fc: `forward_compatibility`.
    """

    ac: float
    aa: float
    aa_t: tuple[float, ...]
    bc: float
    fc: float

    def as_dict(self) -> dict[str, Any]:
        """Under the papers' names; None for nan."""
        values = {"AC": self.ac, "AA": self.aa, "AA_t": list(self.aa_t), "BC": self.bc, "FC": self.fc}
        return {name: None if value != value else value for name, value in values.items()}  # nan alone is not itself


@dataclass(frozen=True)
class Upgrade:
    """Version `new` takes the place of `old` and searches its gallery, which stays as it was.

    Attributes:
        old, new: versions, old < new.
        before: C[old, old].
        after: C[new, old].
        gain: after - before.
        low, high: the gain's interval, a paired bootstrap over the queries.
        gains, losses: queries that the upgrade mends, and breaks.
        negative_flip_rate, positive_flip_rate: losses and gains as shares of all queries.
        p_value: of McNemar's exact test on gains and losses.
    """

    old: int
    new: int
    before: float
    after: float
    gain: float
    low: float
    high: float
    gains: int
    losses: int
    negative_flip_rate: float
    positive_flip_rate: float
    p_value: float

    @property
    def compatible(self) -> bool:
        """The empirical compatibility criterion: the new queries find more in the old gallery than the old ones."""
        return self.gains > self.losses

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "compatible": self.compatible}


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What `evaluate_versions` found; versions count from 0, oldest first.

    Attributes:
        names, dimensions: of the versions.
        protocol, widths, confidence: as asked for.
        counts: of items and classes.
        matrix: [T, T] float64, C[i, j] = score of queries by version i on the gallery by version j, nan for j > i.
        intervals: [T, T, 2] of each cell, nan for j > i.
        upgrades: all T (T - 1) / 2, by `new`, then by `old`.
        regressions: the worst queries of the last upgrade, from version T - 2 to T - 1 on the gallery of T - 2.
        backfill: what version T - 1 finds while its rows replace those of T - 2 in the gallery, one curve per order, by
            5,000 drawn queries where there are more; none for T = 1, and of galleries past 4 GiB.
        pairs: verification by the queries of T - 2 and of T - 1 against the gallery of T - 2; of one version where T =
            1; None where all pairs are of one kind.
        violations: of the two inequalities by the last upgrade, by 5,000 drawn queries and 20,000 drawn gallery items
            where there are more, the same ones in every call; None for T = 1 and for versions of different width.
    """

    names: tuple[str, ...]
    dimensions: tuple[int, ...]
    protocol: str
    widths: str
    confidence: float
    counts: Counts
    matrix: NDArray[np.float64]
    intervals: NDArray[np.float64]
    upgrades: tuple[Upgrade, ...]
    regressions: tuple[Regression, ...]
    backfill: tuple[BackfillCurve, ...]
    pairs: PairReport | None
    violations: Violations | None

    @property
    def last_upgrade(self) -> Upgrade | None:
        """From the version before the last to the last; None for T = 1."""
        return self.upgrades[-1] if self.upgrades else None

    @property
    def successive_upgrades(self) -> tuple[Upgrade, ...]:
        """Those to the next version."""
        return tuple(upgrade for upgrade in self.upgrades if upgrade.new == upgrade.old + 1)

    @property
    def table(self) -> CompatibilityTable:
        """The empirical compatibility criterion of every upgrade, and its margin."""
        return compatibility_table(self.matrix)

    @property
    def criteria(self) -> Criteria:
        return Criteria(
            ac=average_compatibility(self.matrix),
            aa=average_accuracy(self.matrix),
            aa_t=tuple(average_accuracy(self.matrix, upto=t) for t in range(1, len(self.matrix) + 1)),
            bc=backward_compatibility(self.matrix),
            fc=forward_compatibility(self.matrix),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under stable keys; None where there is nothing: above the diagonal, AC of one version."""
        size, (compatible, margins) = len(self.matrix), self.table
        p_values = {(upgrade.new, upgrade.old): upgrade.p_value for upgrade in self.upgrades}
        pairs = [(i, j) for i in range(size) for j in range(size)]

        def lower(values: Mapping[tuple[int, int], Any]) -> list[list[Any]]:
            return [[values.get((i, j)) for j in range(size)] for i in range(size)]

        last = self.last_upgrade
        return {
            "versions": [
                {"name": name, "dimensions": dimensions}
                for name, dimensions in zip(self.names, self.dimensions, strict=True)
            ],
            "protocol": self.protocol,
            "widths": self.widths,
            "confidence": self.confidence,
            "counts": asdict(self.counts),
            "matrix": lower({(i, j): float(self.matrix[i, j]) for i, j in pairs if j <= i}),
            "intervals": lower({(i, j): self.intervals[i, j].tolist() for i, j in pairs if j <= i}),
            "criteria": self.criteria.as_dict(),
            "compatible": lower({(i, j): bool(compatible[i, j]) for i, j in pairs if j < i}),
            "margins": lower({(i, j): float(margins[i, j]) for i, j in pairs if j < i}),
            "p_values": lower(p_values),
            "upgrades": [upgrade.as_dict() for upgrade in self.upgrades],
            "regressions": None
            if last is None
            else {
                "old": last.old,
                "new": last.new,
                "count": last.losses,
                "worst": [regression.as_dict() for regression in self.regressions],
            },
            "backfill": None
            if last is None or not self.backfill
            else {"old": last.old, "new": last.new, "curves": [curve.as_dict() for curve in self.backfill]},
            "pairs": None if self.pairs is None else self.pairs.as_dict(),
            "violations": None
            if last is None or self.violations is None
            else {"old": last.old, "new": last.new, **self.violations.as_dict()},
        }


def evaluate_versions(
    queries: Sequence[Rows],
    galleries: Sequence[Rows],
    query_labels: Ids,
    gallery_labels: Ids,
    *,
    names: Sequence[str] | None = None,
    protocol: str = "nearest_class_mean",
    widths: str = "equal",
    confidence: float = 0.95,
    hits: Sequence[Sequence[NDArray[np.bool_]]] | None = None,
    generator: np.random.Generator | None = None,
) -> EvaluationReport:
    """Judges T versions by the same queries and gallery, from features and labels alone.

    Features are read as `compatibility_hits` reads them, T + T passes; they may be mapped files.

    Args:
        queries: T of [Q, d], oldest version first.
        galleries: T of [N, d], each as its version extracted it.
        query_labels: [Q] integers, any values.
        gallery_labels: [N] integers.
        names: T different names; None: v0, v1, ...
        protocol: "nearest_class_mean" or "instance".
        widths: "equal" or "leading", as of `compatibility_matrix`.
        confidence: of intervals, in (0, 1).
        hits: of these features by this protocol, as of `compatibility_hits`, where processes found them together;
            None: found here.
        generator: of the bootstrap; None: `np.random.default_rng(0)`.

    Raises:
        TypeError, ValueError: as `compatibility_matrix`; names that are not T different ones; hits of
            something else; an option out of range.
    """
    check_name("protocol", protocol, PROTOCOLS)
    check_confidence(confidence)
    names = [f"v{i}" for i in range(len(queries))] if names is None else list(names)
    if len(names) != len(queries) or len(set(names)) != len(names):
        raise ValueError(f"names must be {len(queries)} different ones, one per version, got {names}")
    generator = np.random.default_rng(0) if generator is None else generator
    if hits is None:
        hits = compatibility_hits(queries, galleries, query_labels, gallery_labels, PROTOCOLS[protocol], widths=widths)
    intervals = bootstrap_cells(hits, confidence=confidence, generator=generator)
    if len(hits) != len(queries) or len(hits[0][0]) != len(queries[0]):
        raise ValueError(
            f"hits must be of {len(queries)} versions and {len(queries[0])} queries, got {len(hits)} and "
            f"{len(hits[0][0])}"
        )
    labels = read_labels("query_labels", query_labels, "queries[0]", len(queries[0]))
    item_labels = read_labels("gallery_labels", gallery_labels, "galleries[0]", len(galleries[0]))
    matrix = np.full((len(hits), len(hits)), np.nan)
    for i, row in enumerate(hits):
        matrix[i, : i + 1] = [right.mean() for right in row]
    regressions: tuple[Regression, ...] = ()
    if len(hits) > 1:
        before, after = hits[-2][-1], hits[-1][-2]
        regressions = worst_regressions(
            queries[-1], galleries[-2], labels, item_labels, before, after, protocol=protocol
        )
    upgrades = tuple(
        _upgrade(old, new, hits[old][old], hits[new][old], confidence, generator)
        for new in range(len(hits))
        for old in range(new)
    )
    dimensions = tuple(Features("query", rows).width for rows in queries)
    return EvaluationReport(
        names=tuple(names),
        dimensions=dimensions,
        protocol=protocol,
        widths=widths,
        confidence=confidence,
        counts=_count(labels, item_labels),
        matrix=matrix,
        intervals=intervals,
        upgrades=upgrades,
        regressions=regressions,
        backfill=_backfill(queries, galleries, labels, item_labels, protocol, widths, generator),
        pairs=compare_pairs(
            queries[max(0, len(hits) - 2)],
            queries[-1] if len(hits) > 1 else None,
            labels,
            galleries[max(0, len(hits) - 2)],
            item_labels,
            confidence=confidence,
            generator=generator,
        ),
        violations=sampled_violations(queries[-1], queries[-2], galleries[-2], labels, item_labels)
        if len(hits) > 1 and len({*dimensions[-2:], Features("gallery", galleries[-2]).width}) == 1
        else None,
    )


def _backfill(
    queries: Sequence[Rows],
    galleries: Sequence[Rows],
    labels: NDArray[np.int64],
    item_labels: NDArray[np.int64],
    protocol: str,
    widths: str,
    generator: np.random.Generator,
) -> tuple[BackfillCurve, ...]:
    """Of the last upgrade."""
    if len(galleries) < 2 or sum(4 * math.prod(gallery.shape) for gallery in galleries[-2:]) > BACKFILL_BYTES:
        return ()
    query = queries[-1]
    if len(labels) > BACKFILL_QUERIES:
        drawn = np.sort(generator.choice(len(labels), BACKFILL_QUERIES, replace=False))
        query, labels = take_rows(query, drawn), labels[drawn]
    return tuple(
        backfill_curve(
            query,
            labels,
            galleries[-2],
            galleries[-1],
            item_labels,
            order=order,
            protocol=protocol,
            widths=widths,
            generator=generator,
        )
        for order in ORDERS
    )


def _upgrade(
    old: int,
    new: int,
    before: NDArray[np.bool_],
    after: NDArray[np.bool_],
    confidence: float,
    generator: np.random.Generator,
) -> Upgrade:
    gains, losses, queries = flips(before, after)
    interval = bootstrap_gain(before, after, confidence=confidence, generator=generator)
    return Upgrade(
        old=old,
        new=new,
        before=float(before.mean()),
        after=float(after.mean()),
        gain=(gains - losses) / queries,
        low=interval.low,
        high=interval.high,
        gains=gains,
        losses=losses,
        negative_flip_rate=losses / queries,
        positive_flip_rate=gains / queries,
        p_value=mcnemar_test(before, after).p_value,
    )


def _count(labels: NDArray[np.int64], item_labels: NDArray[np.int64]) -> Counts:
    classes, asked = np.unique(item_labels), np.unique(labels)
    return Counts(
        queries=len(labels),
        gallery=len(item_labels),
        classes=len(classes),
        classes_not_in_gallery=int(np.isin(asked, classes, invert=True).sum()),
        queries_of_classes_not_in_gallery=int(np.isin(labels, classes, invert=True).sum()),
        classes_without_queries=int(np.isin(classes, asked, invert=True).sum()),
    )
