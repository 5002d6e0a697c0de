"""Evaluation of model versions: `evaluate` computes every number once and returns an `EvaluationReport`."""

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

BACKFILL_QUERIES = 5_000  # maximum number per backfill curve; the curves take about 30 searches of the gallery
BACKFILL_BYTES = 4 * 2**30  # maximum float32 size of both galleries; no curves are computed beyond it


@dataclass(frozen=True)
class Counts:
    """Numbers of items and classes in an evaluation.

    Numbers of classes are None if the items have relevance judgements.

    Attributes:
        queries, gallery: numbers of queries and gallery items.
        classes: number of classes in the gallery.
        classes_not_in_gallery: number of classes that only queries have.
        queries_of_classes_not_in_gallery: number of queries without a relevant gallery item other than themselves;
            they count as wrong, or score 0, for every version.
        classes_without_queries: number of classes that only the gallery has; they are not evaluated.
    """

    queries: int
    gallery: int
    classes: int | None
    classes_not_in_gallery: int | None
    queries_of_classes_not_in_gallery: int
    classes_without_queries: int | None


@dataclass(frozen=True)
class JudgementCounts:
    """Numbers of relevance judgements.

    Attributes:
        pairs: number of judged pairs.
        relevant: number of pairs with a grade of 1 or more.
        queries_left_out: number of queries without a judgement, which are left out.
    """

    pairs: int
    relevant: int
    queries_left_out: int


@dataclass(frozen=True)
class QueriesInGallery:
    """Numbers of queries that are gallery items themselves.

    Attributes:
        left_out_by_id: queries with the id of a gallery item, which is left out of the query's search and class mean.
        bit_equal: for each version, number of other queries with a bitwise equal gallery row.  Such a query most
            likely finds itself, with any model.  Rows of zeros do not count here.
    """

    left_out_by_id: int
    bit_equal: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"left_out_by_id": self.left_out_by_id, "bit_equal": list(self.bit_equal)}


@dataclass(frozen=True)
class Ignored:
    """Classes that `ignored_labels` left out.

    Attributes:
        labels: the ignored labels.
        queries, gallery: numbers of queries and gallery items that were left out.
    """

    labels: tuple[int | str, ...]
    queries: int
    gallery: int

    def as_dict(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "queries": self.queries, "gallery": self.gallery}


@dataclass(frozen=True)
class Criteria:
    """Summary numbers of a compatibility matrix; numbers about upgrades are nan for a single version.

    Attributes:
        ac: average compatibility (`simplexfix.compatibility.average_compatibility`).
        aa: average accuracy (`average_accuracy`).
        aa_t: average accuracy of the first t versions, t = 1 .. T.
        bc: backward compatibility (`backward_compatibility`).
        fc: forward compatibility (`forward_compatibility`).
    """

    ac: float
    aa: float
    aa_t: tuple[float, ...]
    bc: float
    fc: float

    @classmethod
    def of(cls, matrix: NDArray[np.float64]) -> Criteria:
        """Returns the criteria of a compatibility matrix [T, T]."""
        return cls(
            ac=average_compatibility(matrix),
            aa=average_accuracy(matrix),
            aa_t=tuple(average_accuracy(matrix, upto=t) for t in range(1, len(matrix) + 1)),
            bc=backward_compatibility(matrix),
            fc=forward_compatibility(matrix),
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers under the papers' names, with None for nan."""
        values = {"AC": self.ac, "AA": self.aa, "AA_t": list(self.aa_t), "BC": self.bc, "FC": self.fc}
        return {name: None if value != value else value for name, value in values.items()}  # nan != nan


@dataclass(frozen=True)
class Upgrade:
    """Effect of replacing version `old` by `new`, with the gallery of `old` unchanged.

    Attributes:
        old, new: indices of versions, old < new.
        before: score C[old, old] of the old queries in the old gallery.
        after: score C[new, old] of the new queries in the old gallery.
        gain: after - before.
        low, high: confidence interval of the gain, by a paired bootstrap over the queries.
        gains, losses: numbers of queries that become correct and incorrect, or whose score rises and falls.
        negative_flip_rate, positive_flip_rate: losses and gains as fractions of all queries.
        p_value: p-value of McNemar's exact test on gains and losses, or of a randomization test for scores.
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
        """Empirical compatibility criterion: new queries score higher than old queries in the old gallery."""
        return self.gain > 0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "compatible": self.compatible}


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """The result of `evaluate` for T versions, which are numbered from 0, oldest first.

    The last upgrade replaces version T - 2 by T - 1 and keeps the gallery of T - 2.

    Attributes:
        names, dimensions: name and embedding width of each version.
        prefixes: widths of older galleries that each version's queries can search.
        protocol, widths, confidence: the arguments of `evaluate`.
        counts: numbers of items and classes.
        judgements: numbers of relevance judgements; None if the items have labels.
        label_names: names of the label codes; None if labels were integers.
        queries_in_gallery: numbers of queries that are gallery items.
        ignored: classes and items that `ignored_labels` left out.
        matrix: [T, T] float64; C[i, j] is the score of version i's queries in version j's gallery, nan for j > i.
        intervals: [T, T, 2] float64, confidence interval of each cell, nan for j > i.
        upgrades: all T (T - 1) / 2 upgrades, ordered by `new`, then by `old`.
        regressions: queries that lose most by the last upgrade, worst first.
        backfill: scores of version T - 1 while its rows replace those of T - 2 in the gallery, one curve per
            replacement order (with relevance judgements the random order only), with at most 5,000 sampled queries.
            Empty for T = 1 and for galleries beyond 4 GiB.
        pairs: pair verification by the queries of T - 2 and of T - 1 in the gallery of T - 2, or of the only version.
            None if there are no genuine or no impostor pairs, or with relevance judgements.
        violations: violations of the two compatibility inequalities by the last upgrade, on at most 5,000 queries and
            20,000 gallery items, in a fixed sample.  None for T = 1, with relevance judgements, or if the widths
            differ and no prefix fits.
        inputs: file of each version, or its name.
        zero_rows: [T, 2], numbers of rows of zeros in query and gallery.
        seed: seed of the bootstrap and of all samples.
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
        """Whether queries have scores in [0, 1] of a ranking metric instead of hits."""
        return self.protocol not in PROTOCOLS

    def class_name(self, label: int) -> str:
        """Returns the name of a class, or its number if labels were integers."""
        return str(label) if self.label_names is None else self.label_names[label]

    @property
    def verdict(self) -> Verdict:
        """The effect of the last upgrade on the deployed gallery, in words."""
        return verdict(self)

    @property
    def last_upgrade(self) -> Upgrade | None:
        """Upgrade from version T - 2 to T - 1; None for T = 1."""
        return self.upgrades[-1] if self.upgrades else None

    @property
    def successive_upgrades(self) -> tuple[Upgrade, ...]:
        """Upgrades from each version to the next."""
        return tuple(upgrade for upgrade in self.upgrades if upgrade.new == upgrade.old + 1)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Warnings about the scores: queries that find themselves, items left out, unrelated embedding spaces."""
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
        """Pairs (new, old) with a score at chance level, 1 / C, though both versions alone score above it."""
        if not self.counts.classes:
            return []
        return unrelated_pairs(self.intervals[..., 0], 1 / self.counts.classes)

    @property
    def table(self) -> CompatibilityTable:
        """Empirical compatibility criterion of every upgrade, with its margin."""
        return compatibility_table(self.matrix)

    @property
    def criteria(self) -> Criteria:
        return Criteria.of(self.matrix)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values under stable keys; undefined values are None (above the diagonal, nan)."""
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
        """Returns the report as one self-contained HTML page with figures, tables and explanations.

        Args:
            images: as in `save`.

        Raises:
            ModuleNotFoundError: matplotlib or Pillow is not installed.
            ValueError: `images` are wrong, as in `save`.
        """
        from .folder import files_of

        return files_of(self, images)["report.html"].decode()

    def save(self, folder: str | os.PathLike[str], images: Mapping[str, Sequence[Path]] | None = None) -> None:
        """Writes report.json, report.html and figures to a folder; they replace an earlier report as a whole.

        Args:
            folder: a new or empty folder, or one that holds only a report.
            images: image paths under "query" and optionally "gallery", one per given item; the page then shows images
                of the worst regressions.

        Raises:
            ModuleNotFoundError: matplotlib or Pillow is not installed.
            OSError: the folder cannot be written; an earlier report is unchanged.
            ValueError: the folder holds something else, there is not one path per item, or an image cannot be read.
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
    """Evaluates T model versions on the same queries and gallery items, from their features.

    `compatibility_hits` reads the features, one more pass finds bitwise equal rows, and the numbers of the last upgrade
    take further passes over its two versions.  Features may be memory-mapped files.

    Args:
        versions: T versions of the same items, oldest first, with different names; missing names are v0, v1, ...
        protocol: "nearest_class_mean", "instance", a ranking metric such as "ndcg@10", or the `Protocol` of one.
        widths: "equal" or "leading", as in `compatibility_matrix`.
        confidence: level of the confidence intervals, in (0, 1).
        ignored_labels: classes to remove, in addition to those that the items ignore already.
        hits: the result of `compatibility_hits` for these versions and this protocol, for example from several
            processes; None to compute it here.
        seed: seed of the bootstrap and of sampled queries and items, in [0, 2^31).

    Returns:
        The report; `report.save("folder")` writes JSON, figures and an HTML page.

    Raises:
        TypeError, ValueError: versions, protocol or widths are wrong, as in `compatibility_matrix`.
        ValueError: names are not unique, `hits` do not fit the versions, or an option is out of range.

    Example:
        >>> import numpy as np
        >>> from simplexfix.labelled import LabelledItems
        >>> from simplexfix.report import evaluate
        >>> rng, labels = np.random.default_rng(0), np.arange(80) % 4
        >>> items = LabelledItems(labels, labels)
        >>> def features(noise):
        ...     return np.eye(4)[labels] + noise * rng.normal(size=(80, 4))
        >>> v0 = items.version(features(0.8), features(0.8), name="v0")
        >>> v1 = items.version(features(0.2), features(0.2), name="v1")
        >>> report = evaluate([v0, v1])
        >>> report.matrix.shape
        (2, 2)
        >>> report.last_upgrade.compatible                      # v1 scores higher than v0 in the gallery of v0
        True
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
