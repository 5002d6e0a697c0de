"""The upgrade gate: rules for a new model, the measured value of each, and the margin by which it passes or fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_name, check_number
from .._text import listed
from ..labelled import LabelledItems, VersionFeatures, check_versions
from ..retrieval.protocols import Hits, Protocol, read_protocol
from .agreement import agreement_protocol, read_agreement
from .criteria import flips, mean_gain
from .statistics import (
    Interval,
    bootstrap_gain,
    bootstrap_interval,
    check_confidence,
    check_generator,
    exact_interval,
    paired_p_value,
)
from .unrelated import unrelated_pairs

__all__ = ["DEFAULT_RULES", "GateResult", "Outcome", "Rule", "upgrade_gate"]

# kind -> the measured quantity, whether more of it is better, and the galleries that it applies to
KINDS: Mapping[str, tuple[str, bool, tuple[str, ...]]] = {
    "ecc": ("gain of the new queries on the old gallery", True, ("old",)),
    "max_nfr": ("negative flip rate", False, ("old", "new")),
    "max_tax": ("compatibility tax", False, ("new",)),
    "min_recall": ("score of the new queries", True, ("old", "new")),
}
SHOWN_CONFIDENCE = 0.95  # level of the reported interval if the rule has no confidence
EACH_GROUP = "*"


@dataclass(frozen=True)
class Rule:
    """One condition on an upgrade.

        ecc         M(new queries, old gallery) - M(old queries, old gallery) > limit
        max_nfr     fraction of queries that are right with (old queries, old gallery) and wrong with
                    (new queries, `gallery`) <= limit
        max_tax     M(unconstrained queries and gallery) - M(new queries and gallery) <= limit
        min_recall  M(new queries, `gallery`) >= limit

    M is the mean over queries of the protocol's hits or scores.  If a protocol has scores in [0, 1], such as "ndcg@10",
    `max_nfr` counts queries whose score falls.  With "agreement@10" the score is the fraction of the 10 nearest items
    that the new model also finds in its own gallery; all rules then apply to the old gallery.

        Rule("max_nfr", 0.02, confidence=0.95)

    Args:
        kind: "ecc", "max_nfr", "max_tax" or "min_recall".
        limit: a fraction, in [-1, 1]; required except for "ecc", where the default is 0.
        confidence: in (0, 1): the worse end of a two-sided interval must satisfy the condition.  With a limit of at
            least 0, "ecc" also requires p <= 1 - confidence, by `mcnemar_test` for hits and by `randomization_test` for
            scores; a handful of queries cannot satisfy that.  None: the measured value must satisfy the condition.
        gallery: "old" for the unchanged gallery, "new" for the re-extracted one; None for the first that `kind` allows.
        group: name of a group of queries; "*" applies the rule to each group; None to all queries together.

    Raises:
        TypeError: `limit` is not a number, or `group` is not a string.
        ValueError: `kind` or `gallery` is unknown, or a number is missing or out of range.
    """

    kind: str
    limit: float | None = None
    confidence: float | None = None
    gallery: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        check_name("kind", self.kind, KINDS)
        if self.limit is None:
            if self.kind != "ecc":
                raise ValueError(f"a rule of kind {self.kind!r} needs a limit")
            object.__setattr__(self, "limit", 0.0)
        check_number("limit", self.limit)  # type: ignore[arg-type]
        if isinstance(self.limit, bool):
            raise TypeError(f"limit must be a number, got {self.limit}")
        if not -1 <= self.limit <= 1:  # type: ignore[operator]
            raise ValueError(f"limit must lie in [-1, 1], got {self.limit}; write 5 % as 0.05")
        if self.confidence is not None:
            check_confidence(self.confidence)
        allowed = KINDS[self.kind][2]
        if self.gallery is None:
            object.__setattr__(self, "gallery", allowed[0])
        if self.gallery not in allowed:
            raise ValueError(f"gallery of kind {self.kind!r} must be {' or '.join(allowed)}, got {self.gallery!r}")
        if self.group is not None and not isinstance(self.group, str):
            raise TypeError(
                f"group must be a string, got {type(self.group).__name__}; groups are matched by their names"
            )


DEFAULT_RULES = (Rule("ecc", confidence=0.95),)


@dataclass(frozen=True)
class Outcome:
    """The result of one rule on one group of queries.

    Attributes:
        rule: the rule; its `group` may be "*".
        group: the group of this outcome; None for all queries.
        queries: number of queries in the group.
        value: the measured value, a fraction.
        low, high: two-sided interval of the value, at the rule's confidence or at 95 %: a paired bootstrap over queries
            for "ecc" and "max_tax", a bootstrap for "min_recall" of scores, and Clopper-Pearson's for "max_nfr" and
            "min_recall" of hits.
        p_value: for "ecc", of `mcnemar_test` for hits or `randomization_test` for scores; None for other rules.
        margin: distance of the compared number (value or end of the interval) from the limit; negative beyond it.
        passed: whether the rule holds.
    """

    rule: Rule
    group: str | None
    queries: int
    value: float
    low: float
    high: float
    p_value: float | None
    margin: float
    passed: bool

    @property
    def measured(self) -> str:
        """The measured quantity, in words."""
        what = KINDS[self.rule.kind][0]
        where = f" on the {self.rule.gallery} gallery" if self.rule.kind in ("max_nfr", "min_recall") else ""
        return what + where + (f", group {self.group}" if self.group is not None else "")

    @property
    def demand(self) -> str:
        """The required value, in words."""
        sign = ">" if self.rule.kind == "ecc" else ">=" if KINDS[self.rule.kind][1] else "<="
        sure = f" at {100 * self.rule.confidence:g} % confidence" if self.rule.confidence is not None else ""
        return f"{sign} {_percent(self.rule.limit or 0.0)}{sure}"

    @property
    def verdict(self) -> str:
        """Returns "passed", or the distance by which the rule failed, in words."""
        if self.passed:
            return "passed"
        if self.margin == 0:
            what = "" if self.rule.confidence is None else "lower end "
            return f"failed: {what}exactly at the limit, must exceed it"
        if self.margin > 0:
            return f"failed: p = {self.p_value:.3g}: too few queries changed"
        end = "" if self.rule.confidence is None else "lower end " if KINDS[self.rule.kind][1] else "upper end "
        side = "below" if KINDS[self.rule.kind][1] else "above"
        compared = _compared(self.rule, self.value, self.low, self.high)
        return f"failed: {end}{_percent(compared)}, {_percent(-self.margin)} {side} the limit"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "measured": self.measured, "demand": self.demand, "verdict": self.verdict}


@dataclass(frozen=True)
class GateResult:
    """The result of `upgrade_gate`.

    Attributes:
        outcomes: one outcome per rule; one per rule and group for rules with group "*".
        scores: M by queries and gallery: "old_on_old", "new_on_old" and, if a rule or `unrelated` needed them,
            "new_on_new" and "unconstrained".
        protocol: name of the protocol.
        queries, gallery: numbers of queries and gallery items.
        absent: number of queries without a relevant gallery item other than themselves; they count as wrong, or score
            0, for every model.  It is 0 for agreement.
        unjudged: number of queries without a relevance judgement, which were left out; None without judgements.
        bit_equal: for the old and the new version, number of queries with a bitwise equal gallery row that is not
            excluded by its id; most likely they find themselves.
        excluded: number of queries whose own gallery item, by id, was left out of their search.
        unrelated: whether the new queries score at chance in the old gallery, while each model scores above chance in
            its own gallery.  A score is at chance if the lower end of its 95 % interval does not exceed 1 / classes, or
            k / gallery items for agreement.  It is False with an adapter and with relevance judgements.
        fingerprints: fingerprints of the old model and of the new one, or of the adapter, as stored in their features;
            None if unknown.
    """

    outcomes: tuple[Outcome, ...]
    scores: dict[str, float]
    protocol: str
    queries: int
    gallery: int
    absent: int
    unjudged: int | None
    bit_equal: tuple[int, int]
    excluded: int
    unrelated: bool = False
    fingerprints: tuple[str | None, str | None] = (None, None)

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return all(outcome.passed for outcome in self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values under stable keys; `from_dict` is the inverse."""
        return {
            "passed": self.passed,
            "protocol": self.protocol,
            "queries": self.queries,
            "gallery": self.gallery,
            "queries_of_classes_not_in_gallery": self.absent,
            "queries_without_judgement": self.unjudged,
            "queries_in_gallery": {"left_out_by_id": self.excluded, "bit_equal": list(self.bit_equal)},
            "scores": dict(self.scores),
            "unrelated_spaces": self.unrelated,
            "fingerprints": list(self.fingerprints),
            "rules": [outcome.as_dict() for outcome in self.outcomes],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> GateResult:
        """Returns the result that `as_dict` described.

        Raises:
            ValueError: a key is missing, a rule has an unknown key, or `passed` contradicts the verdicts of the rules.
        """
        try:
            outcomes = tuple(_outcome(entry) for entry in saved["rules"])
            found = saved["queries_in_gallery"]
            bit_equal, fingerprints = (tuple(pair) for pair in (found["bit_equal"], saved["fingerprints"]))
            result = cls(
                outcomes=outcomes,
                scores=dict(saved["scores"]),
                protocol=saved["protocol"],
                queries=saved["queries"],
                gallery=saved["gallery"],
                absent=saved["queries_of_classes_not_in_gallery"],
                unjudged=saved["queries_without_judgement"],
                bit_equal=(bit_equal[0], bit_equal[1]),
                excluded=found["left_out_by_id"],
                unrelated=saved["unrelated_spaces"],
                fingerprints=(fingerprints[0], fingerprints[1]),
            )
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"this is not a result of the upgrade gate: {error!r}; `gate --out` writes one") from None
        if not outcomes or result.passed != saved["passed"]:
            raise ValueError('"passed" contradicts the rules: the result was edited; run the gate again')
        return result


def upgrade_gate(
    old: VersionFeatures,
    new: VersionFeatures,
    rules: Sequence[Rule] = DEFAULT_RULES,
    *,
    protocol: str | Protocol = "nearest_class_mean",
    widths: str = "equal",
    adapted: VersionFeatures | None = None,
    unconstrained: VersionFeatures | None = None,
    generator: np.random.Generator | None = None,
) -> GateResult:
    """Judges an upgrade by rules, from features with or without labels.

        score of (queries, gallery) = mean over queries of the protocol's hits
        "agreement@k": | top-k(query, gallery) and top-k(new query, new gallery) | / k

    Agreement needs no labels.  It is the fraction of the results of a full re-extraction that a search of the current
    gallery returns.  Both galleries then hold the same sample of items, the new one re-extracted.

        result = upgrade_gate(old, new, [Rule("ecc", confidence=0.95), Rule("max_nfr", 0.02)])
        result.passed, [outcome.verdict for outcome in result.outcomes]

    Args:
        old: version of the deployed model.
        new: version of the model that replaces it, of the same items.  Groups of rules are the items' `query_groups`,
            or the classes if there are none.  Items with relevance judgements have no classes.
        rules: at least one; the default is "ecc" at 95 % confidence.
        protocol: "nearest_class_mean", "instance", a ranking metric such as "ndcg@10", "agreement@k", or a `Protocol`
            with hits.
        widths: "equal" or "leading", as in `compatibility_matrix`.
        adapted: new queries and old gallery after an adapter (`simplexfix.adapters.adapted_version`); they are used for
            searches of new queries in the old gallery.
        unconstrained: version of a model that was trained without compatibility, of the same items, for "max_tax".
        generator: random generator of the bootstrap; None for `np.random.default_rng(0)`.

    Returns:
        The outcomes of all rules, and the scores.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: versions do not fit each other, there are no rules, or a rule needs a version, groups or a gallery
            that are not given.

    Reference:
        docs/design/math.md.  The criterion is from Shen et al., "Towards Backward-Compatible Representation Learning",
        2020.

    Example:
        >>> import numpy as np
        >>> from simplexfix.compatibility import upgrade_gate
        >>> from simplexfix.labelled import LabelledItems
        >>> rng, labels = np.random.default_rng(0), np.arange(200) % 5
        >>> items = LabelledItems(labels, labels)
        >>> rows = np.eye(5)[labels]
        >>> old, new = rows + rng.standard_normal((200, 5)), rows + 0.1 * rng.standard_normal((200, 5))
        >>> result = upgrade_gate(items.version(old, old), items.version(new, new))
        >>> result.passed
        True
    """
    k = read_agreement(protocol)
    if k is None:
        protocol = read_protocol(protocol, needs="hits")
    check_name("widths", widths, ("equal", "leading"))
    if not rules:
        raise ValueError("rules must hold at least one rule")
    given = {"old": old, "new": new, "adapted": adapted, "unconstrained": unconstrained}
    roles = [role for role, version in given.items() if role in ("old", "new") or version is not None]
    checked = check_versions([given[role] for role in roles], roles)  # type: ignore[misc]
    versions = dict(zip(roles, checked, strict=True))
    items = versions["old"].items
    if k is not None:
        elsewhere = next((rule for rule in rules if rule.gallery != "old"), None)
        if elsewhere is not None:
            raise ValueError(
                f"{protocol} measures agreement with the new gallery, so rules apply to the old gallery only: remove "
                f"the rule of kind {elsewhere.kind!r} for the {elsewhere.gallery} gallery"
            )
        protocol = agreement_protocol(versions["new"].pair(versions["new"], widths), k)
    assert isinstance(protocol, Protocol)
    find = protocol.hits
    assert find is not None
    groups = _groups(items) if any(rule.group is not None for rule in rules) else np.empty(0, dtype=str)
    # every outcome uses the same seed, so that it does not depend on other rules
    seed = int(check_generator(generator).integers(2**63))

    found: dict[str, Hits] = {}

    def hits(searcher: str, searched: str) -> Hits:
        name = searcher if searcher == "unconstrained" else f"{searcher}_on_{searched}"
        if name not in found:
            if searcher not in versions:
                raise ValueError("a rule of kind 'max_tax' needs features of an unconstrained model")
            if "adapted" in versions and name == "new_on_old":
                searcher = searched = "adapted"
            found[name] = find(versions[searched].pair(versions[searcher], widths))
        return found[name]

    before = hits("old", "old")
    hits("new", "old")
    outcomes = []
    for rule in rules:
        if rule.kind == "max_tax":
            pair = hits("new", "new"), hits("unconstrained", "unconstrained")
        else:
            pair = before, hits("new", rule.gallery or "old")
        for group, members in _members(rule, groups):
            outcomes.append(_judge(rule, group, pair[0][members], pair[1][members], np.random.default_rng(seed)))
    chance = _chance(items, k)
    unrelated = adapted is None and chance is not None and _are_unrelated(hits, chance, seed)
    return GateResult(
        outcomes=tuple(outcomes),
        scores={name: float(right.mean()) for name, right in found.items()},
        protocol=protocol.name,
        queries=len(items.query_rows),
        gallery=len(items.gallery_rows),
        absent=0 if k is not None else int((items.num_relevant == 0).sum()),
        unjudged=items.num_unjudged,
        bit_equal=(versions["old"].bit_equal, versions["new"].bit_equal),
        excluded=int((items.excluded >= 0).sum()),
        unrelated=unrelated,
        fingerprints=(versions["old"].fingerprint, (versions.get("adapted") or versions["new"]).fingerprint),
    )


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    """Returns the outcome that `as_dict` described; the texts are computed again."""
    values = {key: value for key, value in entry.items() if key not in ("measured", "demand", "verdict")}
    return Outcome(**{**values, "rule": Rule(**values["rule"])})


def _compared(rule: Rule, value: float, low: float, high: float) -> float:
    """Returns the number that is compared with the limit: the value, or the worse end of its interval."""
    if rule.confidence is None:
        return value
    return low if KINDS[rule.kind][1] else high


def _judge(rule: Rule, group: str | None, before: Hits, after: Hits, generator: np.random.Generator) -> Outcome:
    count, sure, more_is_better = len(before), rule.confidence or SHOWN_CONFIDENCE, KINDS[rule.kind][1]
    limit, p_value = rule.limit or 0.0, None
    interval: Interval
    if rule.kind in ("ecc", "max_tax"):
        value = mean_gain(before, after)
        interval = bootstrap_gain(before, after, confidence=sure, generator=generator)
        p_value = paired_p_value(before, after, generator) if rule.kind == "ecc" else None
    elif rule.kind == "min_recall" and after.dtype != np.bool_:
        value = float(after.mean())
        interval = bootstrap_interval(after, confidence=sure, generator=generator)
    else:
        times = flips(before, after)[1] if rule.kind == "max_nfr" else int(after.sum())
        value = times / count
        interval = exact_interval(times, count, confidence=sure)
    compared = _compared(rule, value, *interval)
    margin = compared - limit if more_is_better else limit - compared
    passed = margin > 0 if rule.kind == "ecc" else margin >= 0
    if p_value is not None and rule.confidence is not None and limit >= 0:
        # a few queries that all improve give an interval of width 0, but the exact test still gives a large p
        passed = passed and p_value <= 1 - rule.confidence
    return Outcome(rule, group, count, value, interval.low, interval.high, p_value, margin, passed)


def _chance(items: LabelledItems, k: int | None) -> float | None:
    """Returns the score of queries that find items at random, for classes of equal size; None without classes."""
    if k is not None:
        return k / len(items.gallery_rows)
    return 1 / len(items.gallery_classes.ids) if items.has_labels else None


def _are_unrelated(hits: Callable[[str, str], Hits], chance: float, seed: int) -> bool:
    def low(searcher: str, searched: str) -> float:
        return bootstrap_interval(hits(searcher, searched), generator=np.random.default_rng(seed)).low

    ends = np.array([[low("old", "old"), np.nan], [low("new", "old"), np.inf]])
    if not unrelated_pairs(ends, chance):  # the new gallery need not be searched
        return False
    ends[1, 1] = low("new", "new")
    return bool(unrelated_pairs(ends, chance))


def _groups(items: LabelledItems) -> NDArray[np.str_]:
    if items.query_groups is not None:
        return items.query_groups.astype(str)
    if items.label_names is not None:
        return np.array(items.label_names)[items.query_labels]
    if not items.has_labels:
        what = "have no classes" if items.judgements is None else "with relevance judgements have no classes"
        raise ValueError(f"a rule for groups needs query_groups: items {what}")
    return items.query_labels.astype(str)


def _members(rule: Rule, groups: NDArray[np.str_]) -> list[tuple[str | None, NDArray[np.bool_] | slice]]:
    if rule.group is None:
        return [(None, slice(None))]
    names = sorted(set(groups.tolist()))
    if rule.group != EACH_GROUP:
        if rule.group not in names:
            raise ValueError(f"there is no group {rule.group!r}; groups of queries are {listed(names)}")
        names = [rule.group]
    return [(name, groups == name) for name in names]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
