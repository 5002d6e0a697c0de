"""Tests every rule of the upgrade gate against hand-computed values, and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simplexfix.compatibility import GateResult, Rule, exact_interval, upgrade_gate
from simplexfix.labelled import LabelledItems, VersionFeatures
from simplexfix.retrieval import PROTOCOLS

CLASSES = 4


def version(
    right: list[bool], labels: torch.Tensor, width: int = CLASSES, seed: int = 0, items: LabelledItems | None = None
) -> VersionFeatures:
    """Returns queries near their own class where `right`, else near the next one; each class has two gallery items."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.where(torch.tensor(right), labels, (labels + 1) % CLASSES)
    noise = 0.05 * torch.randn(len(labels), width, generator=generator)
    items = items or LabelledItems(labels, GALLERY_LABELS)
    return items.version(F.one_hot(shown, width).float() + noise, F.one_hot(GALLERY_LABELS, width).float())


def hits(pattern: str, times: int = 1) -> list[bool]:
    return [letter == "1" for letter in pattern] * times


LABELS = torch.arange(100) % CLASSES
GALLERY_LABELS = torch.arange(8) % CLASSES
# of 20 queries 10 stay right, 4 are gained, 1 is lost, 5 stay wrong
OLD, NEW = hits("1" * 10 + "0" * 4 + "1" + "0" * 5, 5), hits("1" * 10 + "1" * 4 + "0" + "0" * 5, 5)


def gate(*rules: Rule, old=OLD, new=NEW, query_groups=None, **options):
    labels = LABELS[: len(old)]
    items = LabelledItems(labels, GALLERY_LABELS, query_groups=query_groups)
    return upgrade_gate(version(old, labels, items=items), version(new, labels, seed=1), rules, **options)


def test_default_rule() -> None:
    result = upgrade_gate(version(OLD, LABELS), version(NEW, LABELS))
    (outcome,) = result.outcomes
    assert outcome.rule == Rule("ecc", limit=0.0, confidence=0.95, gallery="old")
    assert result.scores == {"old_on_old": 0.55, "new_on_old": 0.7}
    assert outcome.value == pytest.approx(0.15)
    assert 0.03 < outcome.low < 0.15 < outcome.high < 0.27
    # 20 gains, 5 losses: 2 (1 + 25 + 300 + 2300 + 12650 + 53130) / 2^25
    assert outcome.p_value == pytest.approx(2 * 68406 / 2**25)
    assert result.passed
    assert outcome.margin == outcome.low
    assert outcome.verdict == "passed"


def test_a_result_names_its_models_and_survives_json() -> None:
    items = LabelledItems(LABELS, GALLERY_LABELS)
    sides = [version(right, LABELS, seed=seed, items=items) for seed, right in enumerate((OLD, NEW))]
    named = [replace(side, fingerprint=text) for side, text in zip(sides, ("aa", "bb"), strict=True)]
    result = upgrade_gate(*named, [Rule("ecc", confidence=0.95), Rule("max_nfr", 0.01, group="*")])
    assert result.fingerprints == ("aa", "bb")
    assert upgrade_gate(sides[0], named[1]).fingerprints == (None, "bb")
    made = items.version(sides[0].query.rows, sides[0].gallery.rows, fingerprint="cc")
    assert upgrade_gate(made, named[1]).fingerprints == ("cc", "bb")
    saved = json.loads(json.dumps(result.as_dict()))
    assert GateResult.from_dict(saved) == result
    assert GateResult.from_dict(saved).as_dict() == result.as_dict()
    for change, message in (
        ({"passed": True}, '"passed" contradicts the rules: the result was edited'),
        ({"rules": []}, '"passed" contradicts the rules'),
        ({"rules": [{"rule": {"kind": "ecc"}}]}, "this is not a result of the upgrade gate: TypeError"),
        ({"fingerprints": ["aa"]}, "this is not a result of the upgrade gate: IndexError"),
    ):
        with pytest.raises(ValueError, match=message):
            GateResult.from_dict({**saved, **change})
    with pytest.raises(ValueError, match=r"not a result of the upgrade gate: KeyError\('rules'\); `gate --out` wr"):
        GateResult.from_dict({})


def test_each_rule_at_its_limit() -> None:
    assert gate(Rule("ecc", 0.149), Rule("max_nfr", 0.05), Rule("min_recall", 0.7)).passed
    result = gate(Rule("ecc", 0.16), Rule("max_nfr", 0.04), Rule("min_recall", 0.71), Rule("min_recall", 0.7))
    assert [outcome.passed for outcome in result.outcomes] == [False, False, False, True]
    assert [outcome.margin for outcome in result.outcomes] == pytest.approx([-0.01, -0.01, -0.01, 0.0])
    assert [outcome.value for outcome in result.outcomes] == pytest.approx([0.15, 0.05, 0.7, 0.7])
    assert not result.passed
    assert result.outcomes[1].verdict == "failed: 5.00 %, 1.00 % above the limit"
    assert result.outcomes[2].verdict == "failed: 70.00 %, 1.00 % below the limit"
    (tie,) = gate(Rule("ecc"), new=OLD).outcomes
    assert not tie.passed
    assert tie.verdict == "failed: exactly at the limit, must exceed it"


def test_confidence_applies_to_the_worse_end() -> None:
    nfr, recall = exact_interval(5, 100), exact_interval(70, 100)
    result = gate(
        Rule("max_nfr", nfr.high + 1e-6, confidence=0.95),
        Rule("max_nfr", nfr.high - 1e-6, confidence=0.95),
        Rule("min_recall", recall.low - 1e-6, confidence=0.95),
        Rule("min_recall", recall.low + 1e-6, confidence=0.95),
        Rule("max_nfr", 0.06, confidence=0.5),
    )
    assert [outcome.passed for outcome in result.outcomes] == [True, False, True, False, False]
    assert (result.outcomes[0].low, result.outcomes[0].high) == nfr
    assert (result.outcomes[2].low, result.outcomes[2].high) == recall
    assert "upper end" in result.outcomes[1].verdict
    assert "lower end" in result.outcomes[3].verdict


def test_few_queries_prove_nothing() -> None:
    """Four gains of four queries: the bootstrap interval is [1, 1], but p = 1/8."""
    few = {"old": hits("0000"), "new": hits("1111")}
    (outcome,) = gate(Rule("ecc", confidence=0.95), **few).outcomes
    assert (outcome.value, outcome.low, outcome.high, outcome.p_value) == (1.0, 1.0, 1.0, pytest.approx(0.125))
    assert not outcome.passed
    assert outcome.verdict == "failed: p = 0.125: too few queries changed"
    assert gate(Rule("ecc", confidence=0.8), **few).passed
    (outcome,) = gate(Rule("max_nfr", 0.01, confidence=0.95), old=hits("1111"), new=hits("1111")).outcomes
    assert outcome.value == 0
    assert not outcome.passed  # four queries do not prove that nothing breaks either


def test_tax_against_an_unconstrained_model() -> None:
    # a model of another width, with its own gallery
    unconstrained = version(hits("1" * 16 + "0" * 4, 5), LABELS, width=7)
    result = gate(Rule("max_tax", 0.1), Rule("max_tax", 0.09), unconstrained=unconstrained)
    assert [outcome.value for outcome in result.outcomes] == pytest.approx([0.1, 0.1])
    assert [outcome.passed for outcome in result.outcomes] == [True, False]
    assert result.scores == pytest.approx(
        {"old_on_old": 0.55, "new_on_old": 0.7, "new_on_new": 0.7, "unconstrained": 0.8}
    )
    with pytest.raises(ValueError, match="'max_tax' needs features of an unconstrained model"):
        gate(Rule("max_tax", 0.1))


def test_the_new_gallery() -> None:
    """The new model is right in a rotated space: it loses everything on the old gallery and nothing on its own."""
    old, right = version(OLD, LABELS), version(hits("1" * 20, 5), LABELS)
    rotated = old.items.version(right.query.rows.roll(1, 1), right.gallery.rows.roll(1, 1))
    rules = [
        Rule(kind, limit, gallery=g) for kind, limit in (("min_recall", 0.9), ("max_nfr", 0.1)) for g in ("old", "new")
    ]
    result = upgrade_gate(old, rotated, rules)
    assert [outcome.value for outcome in result.outcomes] == [0.0, 1.0, 0.55, 0.0]
    assert [outcome.passed for outcome in result.outcomes] == [False, True, False, True]


def test_groups() -> None:
    names = np.array(["day", "night"])[np.arange(100) % 20 // 10]
    result = gate(
        Rule("min_recall", 0.9, group="day"), Rule("min_recall", 0.4, group="*"), Rule("max_nfr", 0.0, group="*"),
        query_groups=names,
    )  # fmt: skip
    seen = [(outcome.group, outcome.queries, round(outcome.value, 6), outcome.passed) for outcome in result.outcomes]
    assert seen == [
        ("day", 50, 1.0, True),
        ("day", 50, 1.0, True),
        ("night", 50, 0.4, True),
        ("day", 50, 0.0, True),
        ("night", 50, 0.1, False),
    ]
    assert "group night" in result.outcomes[-1].measured
    # without groups, the classes are the groups
    per_class = gate(Rule("min_recall", 0.0, group="*"))
    assert [outcome.group for outcome in per_class.outcomes] == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="there is no group 'dusk'; groups of queries are day, night"):
        gate(Rule("ecc", group="dusk"), query_groups=names)


def test_protocols_and_widths() -> None:
    generator = torch.Generator().manual_seed(3)
    labels, gallery_labels = torch.arange(200) % 10, torch.arange(80) % 10
    clear = 1.2 * F.one_hot(torch.arange(280) % 10, 16)
    rows = [torch.randn(280, 16, generator=generator) + clear for _ in range(2)]
    wide = torch.cat([rows[1], torch.randn(280, 4, generator=generator)], 1)
    items = LabelledItems(labels, gallery_labels)
    old, new = (items.version(x[:200], x[200:]) for x in (rows[0], wide))
    for name, protocol in PROTOCOLS.items():
        rules = [Rule("ecc"), Rule("min_recall", 0.0, gallery="new")]
        result = upgrade_gate(old, new, rules, protocol=name, widths="leading")
        assert result.scores == {
            "old_on_old": protocol.score(old),
            "new_on_old": protocol.score(items.version(wide[:200, :16], rows[0][200:])),
            "new_on_new": protocol.score(new),
        }
    with pytest.raises(ValueError, match=r"new.query has 20 columns, old.gallery has 16: features of different width"):
        upgrade_gate(old, new)


def test_result_as_json_and_absent_classes() -> None:
    labels = LABELS.clone()
    labels[:7] = 2**40
    items = LabelledItems(labels, GALLERY_LABELS)
    result = upgrade_gate(version(OLD, LABELS, items=items), version(NEW, LABELS, items=items))
    plain = json.loads(json.dumps(result.as_dict()))
    assert plain["queries_of_classes_not_in_gallery"] == 7
    assert (plain["queries"], plain["gallery"], plain["protocol"]) == (100, 8, "nearest_class_mean")
    assert plain["rules"][0]["rule"] == {
        "kind": "ecc", "limit": 0.0, "confidence": 0.95, "gallery": "old", "group": None
    }  # fmt: skip
    assert plain["rules"][0]["demand"] == "> 0.00 % at 95 % confidence"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "acc"}, ValueError, "kind must be one of 'ecc', 'max_nfr', 'max_tax', 'min_recall', got 'acc'"),
        ({"kind": "max_nfr"}, ValueError, "a rule of kind 'max_nfr' needs a limit"),
        ({"kind": "max_nfr", "limit": 2}, ValueError, r"limit must lie in \[-1, 1\], got 2"),
        ({"kind": "max_nfr", "limit": float("nan")}, ValueError, "limit must lie in"),
        ({"kind": "max_nfr", "limit": "2"}, TypeError, "limit must be a number, got str"),
        ({"kind": "ecc", "confidence": 95}, ValueError, "confidence must lie between 0 and 1"),
        ({"kind": "ecc", "gallery": "new"}, ValueError, "gallery of kind 'ecc' must be old, got 'new'"),
        ({"kind": "ecc", "group": 3}, TypeError, "group must be a string, got int"),
    ],
)
def test_bad_rules(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Rule(**arguments)


def test_bad_input() -> None:
    old, new = version(OLD, LABELS), version(NEW, LABELS)
    other = version(NEW, (LABELS + 1) % CLASSES)
    for change, error, message in (
        (
            {"new": other},
            ValueError,
            "old and new must be of the same items in the same order: query_labels at 0",
        ),
        ({"new": None}, TypeError, "new must be a VersionFeatures, got NoneType"),
        ({"rules": []}, ValueError, "rules must hold at least one rule"),
        ({"protocol": "x"}, ValueError, "protocol must be one of"),
        ({"widths": "x"}, ValueError, "widths must be one of"),
    ):
        with pytest.raises(error, match=message):
            upgrade_gate(**{"old": old, "new": new, **change})
    with pytest.raises(TypeError, match="query_groups must be integers or names, got float64"):
        LabelledItems(LABELS, GALLERY_LABELS, query_groups=[1.5] * 100)
    with pytest.raises(ValueError, match=r"query has 100 rows, query_groups has shape \[1\]"):
        LabelledItems(LABELS, GALLERY_LABELS, query_groups=[1])


def test_an_outcome_does_not_depend_on_other_rules() -> None:
    rules = [Rule("ecc", confidence=float(sure)) for sure in np.linspace(0.5, 0.98, 25)]
    assert gate(*rules).outcomes == tuple(gate(rule).outcomes[0] for rule in rules)
    other = gate(*rules, generator=np.random.default_rng(9)).outcomes
    assert {(o.low, o.high) for o in other} != {(o.low, o.high) for o in gate(*rules).outcomes}


def test_the_verdict_names_a_lower_end_on_the_limit() -> None:
    (outcome,) = gate(Rule("ecc", confidence=0.95)).outcomes
    (on_it,) = gate(Rule("ecc", limit=outcome.low, confidence=0.95)).outcomes
    assert on_it.verdict == "failed: lower end exactly at the limit, must exceed it"
