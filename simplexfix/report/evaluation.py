"""The evaluation of model versions: every number is computed once and kept in an `EvaluationReport`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_integer
from .._text import printable
from ..compatibility.backfill import BackfillCurve, backfill_curve
from ..compatibility.criteria import (
    CompatibilityTable,
    average_accuracy,
    average_compatibility,
    backward_compatibility,
    compatibility_table,
    flips,
    forward_compatibility,
    mean_gain,
)
from ..compatibility.inequalities import Violations, sampled_violations
from ..compatibility.matrix import compatibility_hits
from ..compatibility.orders import ORDERS
from ..compatibility.pairs import PairReport, compare_pairs
from ..compatibility.regressions import Regression, worst_regressions
from ..compatibility.statistics import bootstrap_cells, bootstrap_gain, check_confidence, paired_p_value
from ..compatibility.unrelated import unrelated_pairs, unrelated_remark
from ..labelled import LabelledItems, VersionFeatures, check_versions, ignoring
from ..retrieval.protocols import PROTOCOLS, Hits, Protocol, read_scored_protocol
from .verdict import Verdict, verdict

__all__ = ["Counts", "Criteria", "EvaluationReport", "Upgrade", "evaluate"]

BACKFILL_QUERIES = 5_000  # each of some 30 searches of whole galleries is by so many at most
BACKFILL_BYTES = 4 * 2**30  # of float32, of the galleries that it holds whole


@dataclass(frozen=True)
class Counts:
    """How much there was to judge by.

    Attributes:
        queries, gallery: items.
        classes: in the gallery; None where there are relevance judgements, as all numbers of classes.
        classes_not_in_gallery: of queries only.
        queries_of_classes_not_in_gallery: these queries, and those whose class has no item in the gallery but
            themselves, or that no item is judged relevant to; no version can find them, and they count as wrong, or
            score 0, for all.
        classes_without_queries: of the gallery only; nothing is known of them.
    """

    queries: int
    gallery: int
    classes: int | None
    classes_not_in_gallery: int | None
    queries_of_classes_not_in_gallery: int
    classes_without_queries: int | None


@dataclass(frozen=True)
class JudgementCounts:
    """Attributes: pairs: judged pairs; relevant: those of grade 1 or more; queries_left_out: without a judgement."""

    pairs: int
    relevant: int
    queries_left_out: int


@dataclass(frozen=True)
class QueriesInGallery:
    """Queries that are gallery items themselves.

    Attributes:
        left_out_by_id: those that ids name: the item is left out of the query's search and of the mean of its class.
        bit_equal: of each version, the other queries that have a gallery row of the same bits: most likely they find
            themselves, which no model can do wrong.  Zero rows, which are counted apart, are not among them.
    """

    left_out_by_id: int
    bit_equal: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"left_out_by_id": self.left_out_by_id, "bit_equal": list(self.bit_equal)}


@dataclass(frozen=True)
class Ignored:
    """Attributes: labels: that were ignored; queries, gallery: how many items of these labels were left out."""

    labels: tuple[int | str, ...]
    queries: int
    gallery: int

    def as_dict(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "queries": self.queries, "gallery": self.gallery}


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

    @classmethod
    def of(cls, matrix: NDArray[np.float64]) -> Criteria:
        """Those of a [T, T] matrix."""
        return cls(
            ac=average_compatibility(matrix),
            aa=average_accuracy(matrix),
            aa_t=tuple(average_accuracy(matrix, upto=t) for t in range(1, len(matrix) + 1)),
            bc=backward_compatibility(matrix),
            fc=forward_compatibility(matrix),
        )

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
        gains, losses: queries that the upgrade mends, and breaks; whose score it raises, and lowers.
        negative_flip_rate, positive_flip_rate: losses and gains as fractions of all queries.
        p_value: of McNemar's exact test on gains and losses; of the randomization test where queries have scores.
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
        return self.gain > 0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "compatible": self.compatible}


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What `evaluate` found; versions count from 0, oldest first.

    Attributes:
        names, dimensions: of the versions.
        prefixes: of the versions, by which they search older galleries.
        protocol, widths, confidence: as asked for.
        counts: of items and classes.
        judgements: of relevance judgements; None where items have labels.
        label_names: of classes by their numbers, where labels were names; else None.
        queries_in_gallery: queries that may find themselves.
        ignored: what `ignored_labels` left out.
        matrix: [T, T] float64, C[i, j] = score of queries by version i on the gallery by version j, nan for j > i.
        intervals: [T, T, 2] of each cell, nan for j > i.
        upgrades: all T (T - 1) / 2, by `new`, then by `old`.
        regressions: the worst queries of the last upgrade, from version T - 2 to T - 1 on the gallery of T - 2.
        backfill: what version T - 1 finds while its rows replace those of T - 2 in the gallery, one curve per order, by
            5,000 drawn queries where there are more; none for T = 1, and of galleries past 4 GiB.  In random order
            alone where there are relevance judgements.
        pairs: verification by the queries of T - 2 and of T - 1 against the gallery of T - 2; of one version where T =
            1; None where all pairs are of one kind, and where there are relevance judgements.
        violations: of the two inequalities by the last upgrade, by 5,000 drawn queries and 20,000 drawn gallery items
            where there are more, the same ones in every call; None for T = 1, for versions of different width of which
            the new one has no such prefix, and where there are relevance judgements.
        inputs: the files of the versions, or their names.
        zero_rows: [T, 2] rows of query and of gallery that are zero; they have no direction.
        seed: of the bootstrap and of what was drawn.
    """

    names: tuple[str, ...]
    dimensions: tuple[int, ...]
    prefixes: tuple[tuple[int, ...], ...]
    protocol: str
    widths: str
    confidence: float
    counts: Counts
    judgements: JudgementCounts | None
    label_names: tuple[str, ...] | None
    queries_in_gallery: QueriesInGallery
    ignored: Ignored
    matrix: NDArray[np.float64]
    intervals: NDArray[np.float64]
    upgrades: tuple[Upgrade, ...]
    regressions: tuple[Regression, ...]
    backfill: tuple[BackfillCurve, ...]
    pairs: PairReport | None
    violations: Violations | None
    inputs: tuple[str, ...]
    zero_rows: tuple[tuple[int, int], ...]
    seed: int

    @property
    def has_scores(self) -> bool:
        """Whether queries have scores in [0, 1], of a metric, and are not just right or wrong."""
        return self.protocol not in PROTOCOLS

    def class_name(self, label: int) -> str:
        """The name of a class where labels were names, else its number."""
        return str(label) if self.label_names is None else self.label_names[label]

    @property
    def verdict(self) -> Verdict:
        """What the last upgrade does to the gallery that is in service."""
        return verdict(self)

    @property
    def last_upgrade(self) -> Upgrade | None:
        """From the version before the last to the last; None for T = 1."""
        return self.upgrades[-1] if self.upgrades else None

    @property
    def successive_upgrades(self) -> tuple[Upgrade, ...]:
        """Those to the next version."""
        return tuple(upgrade for upgrade in self.upgrades if upgrade.new == upgrade.old + 1)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader must know of the scores: queries that find themselves, items left out, unrelated spaces."""
        found = []
        for name, count in zip(self.names, self.queries_in_gallery.bit_equal, strict=True):
            if count:
                found.append(
                    f"{name}: {count} of {self.counts.queries} queries have a gallery row of the same bits. They find "
                    "themselves, whatever the model, unless query_ids and gallery_ids say which items are the same."
                )
        if self.queries_in_gallery.left_out_by_id:
            found.append(
                f"{self.queries_in_gallery.left_out_by_id} queries are gallery items themselves, by their ids: each is "
                "left out of its own search and of the mean of its class."
            )
        if self.judgements is not None and self.judgements.queries_left_out:
            found.append(
                f"{self.judgements.queries_left_out} of {self.counts.queries + self.judgements.queries_left_out} "
                "queries have no relevance judgement and are left out."
            )
        if self.ignored.labels:
            found.append(
                f"{self.ignored.queries} queries and {self.ignored.gallery} gallery items of ignored labels "
                f"({', '.join(map(str, self.ignored.labels))}) are left out."
            )
        for i, (name, prefixes) in enumerate(zip(self.names, self.prefixes, strict=True)):
            used = sorted(set(self.dimensions[:i]) & set(prefixes))
            if used and self.widths == "equal":
                found.append(
                    f"{name} has {self.dimensions[i]} dimensions. Its queries search older galleries of "
                    f"{' and '.join(map(str, used))} by as many leading dimensions, as the version declares."
                )
        unrelated = self._unrelated
        if unrelated:
            pairs = ", ".join(f"{self.names[i]} in the gallery of {self.names[j]}" for i, j in unrelated)
            found.append(unrelated_remark(pairs))
        return tuple(found)

    @property
    def _unrelated(self) -> list[tuple[int, int]]:
        """Pairs (new, old) that find no more than chance, one in C classes, where both versions alone find more."""
        if not self.counts.classes:
            return []
        return unrelated_pairs(self.intervals[..., 0], 1 / self.counts.classes)

    @property
    def table(self) -> CompatibilityTable:
        """The empirical compatibility criterion of every upgrade, and its margin."""
        return compatibility_table(self.matrix)

    @property
    def criteria(self) -> Criteria:
        return Criteria.of(self.matrix)

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
                {"name": name, "dimensions": dimensions, "prefixes": list(prefixes)}
                for name, dimensions, prefixes in zip(self.names, self.dimensions, self.prefixes, strict=True)
            ],
            "protocol": self.protocol,
            "widths": self.widths,
            "confidence": self.confidence,
            "counts": asdict(self.counts),
            "judgements": None if self.judgements is None else asdict(self.judgements),
            "label_names": None if self.label_names is None else list(self.label_names),
            "queries_in_gallery": self.queries_in_gallery.as_dict(),
            "ignored": self.ignored.as_dict(),
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

    def to_html(self, images: Mapping[str, Sequence[Path]] | None = None) -> str:
        """The page: figures, tables and their explanation in one file that loads nothing from elsewhere.

        Args:
            images: as of `save`.

        Raises:
            ModuleNotFoundError: matplotlib or Pillow is missing.
            ValueError: as `save`.
        """
        from .folder import files_of

        return files_of(self, images)["report.html"].decode()

    def save(self, folder: str | os.PathLike[str], images: Mapping[str, Sequence[Path]] | None = None) -> None:
        """Writes report.json, report.html and figures; an older report in the folder is replaced as a whole.

        Args:
            folder: a new or empty folder, or one that holds a report and nothing else.
            images: paths of the images of "query" and, besides, of "gallery", one per item as it was given: the page
                shows the worst regressions by them.

        Raises:
            ModuleNotFoundError: matplotlib or Pillow is missing.
            OSError: the folder cannot be written; a report that was there is as before.
            ValueError: the folder holds something else; images that are not one per item or cannot be read.
        """
        from .folder import save

        save(self, Path(folder), images)


def evaluate(
    versions: Sequence[VersionFeatures],
    *,
    protocol: str | Protocol = "nearest_class_mean",
    widths: str = "equal",
    confidence: float = 0.95,
    ignored_labels: Sequence[int | str] = (),
    hits: Sequence[Sequence[Hits]] | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Judges T versions by the same queries and gallery, from features and labels or relevance judgements alone.

    Features are read as `compatibility_hits` reads them, T + T passes, and once more for rows that are in both; they
    may be mapped files.

    Args:
        versions: T of the same items, oldest first, of different names; one without a name is called v0, v1, ...
        protocol: "nearest_class_mean", "instance", a metric of the ranking such as "ndcg@10", or such an object.
        widths: "equal" or "leading", as of `compatibility_matrix`.
        confidence: of intervals, in (0, 1).
        ignored_labels: as of `LabelledItems`, beside those that the items ignore already.
        hits: of these versions by this protocol, as of `compatibility_hits`, where processes found them together;
            None: found here.
        seed: of the bootstrap, and of queries and items that are drawn where there are many; in [0, 2^31).

    Raises:
        TypeError, ValueError: as `compatibility_matrix`; names that are not T different ones; hits of
            something else; an option out of range.
    """
    protocol = read_scored_protocol(protocol)
    check_confidence(confidence)
    if not 0 <= check_integer("seed", seed) < 2**31:
        raise ValueError(f"seed must lie in [0, 2^31), got {seed}")
    versions = check_versions(versions)
    names = [str(version.name) for version in versions]
    if len(set(names)) != len(names):
        raise ValueError(f"names must be {len(versions)} different ones, one per version, got {names}")
    if len(ignored_labels):
        versions = ignoring(versions, ignored_labels)
    items, count = versions[0].items, len(versions[0].items.query_rows)
    labelled = items.judgements is None
    generator = np.random.default_rng(seed)
    if hits is None:
        hits = compatibility_hits(versions, protocol, widths=widths)
    intervals = bootstrap_cells(hits, confidence=confidence, generator=generator)
    if len(hits) != len(versions) or len(hits[0][0]) != count:
        raise ValueError(
            f"hits must be of {len(versions)} versions and {count} queries, got {len(hits)} and {len(hits[0][0])}"
        )
    matrix = np.full((len(hits), len(hits)), np.nan)
    for i, row in enumerate(hits):
        matrix[i, : i + 1] = [right.mean() for right in row]
    old, new = (versions[-2], versions[-1]) if len(versions) > 1 else (versions[-1], None)
    regressions: tuple[Regression, ...] = ()
    if new is not None:
        regressions = worst_regressions(old, new, hits[-2][-1], hits[-1][-2], protocol=protocol)
    upgrades = tuple(
        _upgrade(j, i, hits[j][j], hits[i][j], confidence, generator) for i in range(len(hits)) for j in range(i)
    )
    comparable = new is not None and old.fits(new) and old.fits(old)
    return EvaluationReport(
        names=tuple(names),
        dimensions=tuple(version.query.width for version in versions),
        prefixes=tuple(version.prefixes for version in versions),
        protocol=protocol.name,
        widths=widths,
        confidence=confidence,
        counts=_count(items),
        judgements=_count_judgements(items),
        label_names=items.label_names,
        queries_in_gallery=QueriesInGallery(
            int((items.excluded >= 0).sum()), tuple(version.bit_equal for version in versions)
        ),
        ignored=_ignored(items),
        matrix=matrix,
        intervals=intervals,
        upgrades=upgrades,
        regressions=regressions,
        backfill=() if new is None else _backfill(old, new, protocol, widths, generator),
        pairs=compare_pairs(old, new, confidence=confidence, generator=generator) if labelled else None,
        violations=sampled_violations(old, new) if labelled and new is not None and comparable else None,
        inputs=tuple(printable(version.name or "" if version.path is None else version.path) for version in versions),
        zero_rows=tuple(version.zero_rows for version in versions),
        seed=seed,
    )


def _backfill(
    old: VersionFeatures, new: VersionFeatures, protocol: Protocol, widths: str, generator: np.random.Generator
) -> tuple[BackfillCurve, ...]:
    if sum(4 * len(rows) * rows.width for rows in (old.gallery, new.gallery)) > BACKFILL_BYTES:
        return ()
    queries = len(new.query)
    drawn = None
    if queries > BACKFILL_QUERIES:
        drawn = np.sort(generator.choice(queries, BACKFILL_QUERIES, replace=False))
    old, new = (version.take(drawn) for version in (old, new))
    orders = ORDERS if old.items.judgements is None else ("random",)
    return tuple(
        backfill_curve(old, new, order=order, protocol=protocol, widths=widths, generator=generator) for order in orders
    )


def _upgrade(
    old: int,
    new: int,
    before: Hits,
    after: Hits,
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
        gain=mean_gain(before, after),
        low=interval.low,
        high=interval.high,
        gains=gains,
        losses=losses,
        negative_flip_rate=losses / queries,
        positive_flip_rate=gains / queries,
        p_value=paired_p_value(before, after, generator),
    )


def _count(items: LabelledItems) -> Counts:
    sizes, absent = (len(items.query_rows), len(items.gallery_rows)), int((items.num_relevant == 0).sum())
    if items.judgements is not None:
        return Counts(*sizes, None, None, absent, None)
    classes, asked = np.unique(items.gallery_labels), np.unique(items.query_labels)
    return Counts(
        *sizes,
        classes=len(classes),
        classes_not_in_gallery=int(np.isin(asked, classes, invert=True).sum()),
        queries_of_classes_not_in_gallery=absent,
        classes_without_queries=int(np.isin(classes, asked, invert=True).sum()),
    )


def _count_judgements(items: LabelledItems) -> JudgementCounts | None:
    if items.judged is None or items.num_unjudged is None:
        return None
    grades = items.judged.grades
    return JudgementCounts(pairs=len(grades), relevant=int((grades > 0).sum()), queries_left_out=items.num_unjudged)


def _ignored(items: LabelledItems) -> Ignored:
    if not items.ignored_labels:
        return Ignored((), 0, 0)
    queries, gallery = items.given
    return Ignored(items.ignored_labels, queries - len(items.query_rows), gallery - len(items.gallery_rows))
