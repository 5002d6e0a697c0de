"""Judges an upgrade by rules, for a pipeline: exit code 0 if it passes, 1 if a rule fails, 2 for bad input.

OLD and NEW are files or folders for `VersionFeatures.load`: features of the same items by the two models.  Rules per
group read the array `query_groups`; without it, the classes are the groups.  The default rule is the ECC at 95 %
confidence: the new queries find more in the old gallery than the old queries.  --agreement needs no labels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._files import read_text, unique_keys, write_whole
from .._text import printable
from ..compatibility import DEFAULT_RULES, GateResult, Outcome, Rule, upgrade_gate
from ..compatibility.unrelated import unrelated_remark
from ..labelled import LabelledItems, RelevanceJudgements, VersionFeatures
from ..retrieval.protocols import PROTOCOLS, read_protocol
from ._features import read_rows
from ._models import read_model
from ._terminal import in_flags

PASSED, FAILED, BAD_INPUT = 0, 1, 2
DRAWN = 5_000  # at most this many items of an .npy file serve as queries


def run(arguments: argparse.Namespace) -> int:
    try:
        result = _judge(arguments)
    except (ValueError, TypeError) as error:
        print(f"simplexfix gate: {printable(in_flags(error))}", file=sys.stderr)
        return BAD_INPUT
    report = json.dumps(result.as_dict(), indent=1)
    if arguments.out is not None:
        write_whole(arguments.out, f"{report}\n".encode())
    print(report if arguments.json else _text(result))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        try:
            with open(summary, "a", encoding="utf-8") as file:  # other steps have written to it
                file.write(_markdown(result))
        except OSError as error:  # the verdict stands
            print(f"simplexfix gate: no summary was written: {error}", file=sys.stderr)
    return PASSED if result.passed else FAILED


def _judge(arguments: argparse.Namespace) -> GateResult:
    rules = _rules(arguments)
    if arguments.agreement is None:
        read_protocol(arguments.protocol)
    if arguments.adapter is not None and arguments.new_model is not None:
        raise ValueError(
            "--adapter is the model to deploy: leave out --new-model; "
            "`simplexfix adapt` takes --old-model and --new-model"
        )
    judgements = None if arguments.qrels is None else RelevanceJudgements.load(arguments.qrels)
    if arguments.unconstrained is None and any(rule.kind == "max_tax" for rule in rules):
        raise ValueError(
            "a rule of kind max_tax needs features of a model trained without compatibility: "
            "pass them with --unconstrained"
        )
    old, new = (_version(path, arguments, judgements) for path in (arguments.old, arguments.new))
    unconstrained = None
    if arguments.unconstrained is not None:
        unconstrained = _version(arguments.unconstrained, arguments, judgements)
    if arguments.old_model is not None:
        old = replace(old, fingerprint=read_model(arguments.old_model).fingerprint)
    if arguments.new_model is not None:
        new = replace(new, fingerprint=read_model(arguments.new_model).fingerprint)
    adapted = None if arguments.adapter is None else _adapted(arguments.adapter, old, new)
    return upgrade_gate(
        old,
        new,
        rules,
        protocol=arguments.protocol,
        widths=arguments.widths,
        adapted=adapted,
        unconstrained=unconstrained,
        generator=np.random.default_rng(arguments.seed),
    )


def _version(path: Path, arguments: argparse.Namespace, judgements: RelevanceJudgements | None) -> VersionFeatures:
    if path.suffix == ".npy" and arguments.agreement is not None:
        return _items_alone(path, arguments.seed)
    return VersionFeatures.load(
        path,
        ignored_labels=arguments.ignored_labels,
        judgements=judgements,
        needs_labels=arguments.agreement is None,
    )


def _items_alone(path: Path, seed: int) -> VersionFeatures:
    """Reads features of items: all items are the gallery, and up to DRAWN of them are queries for the other items."""
    rows, _ = read_rows(path)
    count = len(rows)
    drawn = np.sort(np.random.default_rng(seed).permutation(count)[:DRAWN])
    items = LabelledItems.without_labels(len(drawn), count, query_ids=drawn, gallery_ids=np.arange(count))
    return replace(VersionFeatures(items, rows.take(drawn), rows), name=path.stem, path=path)


def _adapted(folder: Path, old: VersionFeatures, new: VersionFeatures) -> VersionFeatures:
    from ..adapters import Adapter, adapted_version

    adapter = Adapter.from_pretrained(folder)
    return adapted_version(adapter, old, new, fingerprint=read_model(folder).fingerprint)


def _rules(arguments: argparse.Namespace) -> list[Rule]:
    rules = [] if arguments.rules is None else _rules_of_file(arguments.rules)
    sure = arguments.confidence
    if arguments.ecc:
        rules.append(Rule("ecc", confidence=0.95 if sure is None else sure))
    for kind in ("max_nfr", "max_tax", "min_recall"):
        limit = getattr(arguments, kind)
        if limit is not None:
            try:
                rules.append(Rule(kind, limit, confidence=sure))
            except ValueError as error:
                raise ValueError(f"--{kind.replace('_', '-')}: {error}") from None
    if not rules:
        rules = list(DEFAULT_RULES) if sure is None else [Rule("ecc", confidence=sure)]
    return rules


def _rules_of_file(path: Path) -> list[Rule]:
    content = _parse(path)
    entries = content.get("rules") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"rules"}:
        raise ValueError(f'{path} must hold {{"rules": [...]}} with at least one rule and nothing else')
    known = [field.name for field in fields(Rule)]
    rules = []
    for at, entry in enumerate(entries):
        if not isinstance(entry, dict) or "kind" not in entry:
            raise ValueError(f"{path}: rule {at} must have a kind")
        unknown = sorted(set(entry) - set(known))
        if unknown:
            raise ValueError(f"{path}: rule {at} has the unknown key {', '.join(unknown)}; keys are {', '.join(known)}")
        try:
            rules.append(Rule(**entry))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: rule {at}: {error}") from None
    return rules


def _parse(path: Path) -> Any:
    try:
        text = read_text(path)
        if path.suffix != ".toml":
            return json.loads(text, object_pairs_hook=unique_keys)
        try:
            import tomllib
        except ModuleNotFoundError:
            raise ValueError("TOML needs Python 3.11: write the rules as JSON") from None
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _interval(outcome: Outcome) -> str:
    return f"[{100 * outcome.low:.2f}, {100 * outcome.high:.2f}]"


def _scores(result: GateResult) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {100 * score:.2f} %" for name, score in result.scores.items())


def _counts(result: GateResult) -> str:
    judged = result.unjudged is not None
    what = "item that is judged relevant" if judged else "other gallery item of their class"
    wrong = "count as wrong" if result.protocol in PROTOCOLS else "score 0"
    absent = f"; {result.absent} queries have no {what} and {wrong}" if result.absent else ""
    if result.unjudged:
        absent += f"; {result.unjudged} queries have no relevance judgement and are left out"
    itself = (
        f"; for {result.excluded} queries the gallery item with the same id is left out of the search"
        if result.excluded
        else ""
    )
    if any(result.bit_equal):
        itself += (
            f"; {max(result.bit_equal)} queries equal a gallery row bit for bit and probably find themselves: "
            "add the arrays query_ids and gallery_ids to leave these rows out"
        )
    counts = f"{result.queries} queries, {result.gallery} gallery items, {result.protocol.replace('_', ' ')}"
    return counts + absent + itself


def _remarks(result: GateResult) -> list[str]:
    return [unrelated_remark("the new queries in the old gallery")] if result.unrelated else []


def _text(result: GateResult) -> str:
    lines = [_counts(result), _scores(result), *_remarks(result)]
    for outcome in result.outcomes:
        lines.append(
            f"{'pass' if outcome.passed else 'FAIL'}  {printable(outcome.measured)}: {100 * outcome.value:.2f} % "
            f"{_interval(outcome)}, must be {outcome.demand}" + ("" if outcome.passed else f"; {outcome.verdict}")
        )
    failed = sum(not outcome.passed for outcome in result.outcomes)
    lines.append("the upgrade passes" if not failed else f"the upgrade fails {failed} of {len(result.outcomes)} rules")
    return "\n".join(lines)


def _markdown(result: GateResult) -> str:
    rows = [
        f"| {'✅' if outcome.passed else '❌'} | {_cell(outcome.measured)} | {100 * outcome.value:.2f} % | "
        f"{_interval(outcome)} | {outcome.demand} | {_cell(outcome.verdict)} |"
        for outcome in result.outcomes
    ]
    return "\n".join(
        [
            f"### Upgrade gate: {'passed' if result.passed else 'failed'}",
            "",
            "| | measured | value | interval | must be | |",
            "| --- | --- | ---: | --- | --- | --- |",
            *rows,
            "",
            " ".join([f"{_scores(result)}. {_counts(result)}.", *_remarks(result)]),
            "",
            "",
        ]
    )


def _cell(text: str) -> str:
    """Escapes text for a cell of a Markdown table: names of groups may have bars, line ends or tags."""
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())
