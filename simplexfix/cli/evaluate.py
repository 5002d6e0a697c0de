"""Evaluates model versions from features and labels, and writes a report: numbers, figures, one page of HTML.

Each version is a file or folder for `VersionFeatures.load`.  All versions have the same items, and the oldest comes
first.  One folder may hold all versions; their names then give the order.  Figures need the extra `cli`.  Under
`torchrun` each process searches its part of every gallery, and the first one writes the same report.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._files import read_text
from .._text import printable
from ..compatibility.statistics import check_confidence
from ..labelled import RelevanceJudgements, VersionFeatures, check_versions, check_widths, find_versions, is_version
from ..report import EvaluationReport, evaluate
from ..report.folder import check_replaceable, content_of
from ..retrieval import PROTOCOLS, RankDiedError, process_group, shard_rows
from ..retrieval._ranks import Ranks, ShardInfo
from ..retrieval.protocols import Hits, read_protocol
from ._heat_map import heat_map, marks
from ._terminal import console, in_flags

NOT_EVALUATED = 2  # bad input, or another process of the group died


def run(arguments: argparse.Namespace) -> int:
    from ..report import figures  # noqa: F401  # before anything is computed: a missing package is reported at once

    rank = 0
    try:
        rank = _of_torchrun("RANK", "0")
        if _of_torchrun("WORLD_SIZE", "1") == 1:
            _write(arguments, _read(arguments), None)
        else:
            with process_group() as group:
                _evaluate_together(arguments, Ranks(group))
    except (ValueError, TypeError) as error:
        if rank == 0:  # all ranks raise the same error
            print(f"simplexfix evaluate: {in_flags(error)}", file=sys.stderr)
        return NOT_EVALUATED
    except RankDiedError as error:
        print(f"simplexfix evaluate: rank {rank}: {error}", file=sys.stderr)
        return NOT_EVALUATED
    return 0


def _of_torchrun(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ValueError(
            f"the environment variable {name}, which torchrun sets, must be an integer, got {text!r}; unset it"
        )
    return int(text)


def _evaluate_together(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Searches on all ranks, each in its rows of every gallery; the first rank writes the report.

    An error on one rank is raised on all, with the same message.
    """

    if arguments.protocol not in PROTOCOLS:
        raise ValueError(
            f"--protocol {arguments.protocol} runs in one process: start it without torchrun, or use "
            f"{' or '.join(PROTOCOLS)}"
        )

    def read() -> tuple[_Input, ShardInfo]:
        try:
            return _read(arguments, first=ranks.rank == 0), ShardInfo({}, 0)
        except OSError as error:
            raise ValueError(str(error)) from error

    given, _ = ranks.agree(read)
    hits = _hits_of_ranks(given.versions, arguments.protocol, ranks)

    def write() -> tuple[None, ShardInfo]:
        try:
            if ranks.rank == 0:
                _write(arguments, given, hits)
        except OSError as error:
            raise ValueError(str(error)) from error
        return None, ShardInfo({}, 0)

    ranks.agree(write)


class _Input(NamedTuple):
    paths: list[Path]
    versions: list[VersionFeatures]
    images: dict[str, list[Path]]


def _read(arguments: argparse.Namespace, *, first: bool = True) -> _Input:
    """Reads and checks all inputs; `first` is True on the process that writes."""
    check_confidence(arguments.confidence)
    read_protocol(arguments.protocol)
    judgements = None if arguments.qrels is None else RelevanceJudgements.load(arguments.qrels)
    if arguments.gallery_images is not None and arguments.images is None:
        raise ValueError("--gallery-images needs --images: it is shown beside the queries")
    if first:
        check_replaceable(arguments.out)
    paths = version_paths(arguments.versions)
    if first and paths != arguments.versions:
        names = ", ".join(printable(path.name) for path in paths)
        print(f"simplexfix evaluate: by name, oldest first: {names}", file=sys.stderr)
    versions = check_versions(
        [
            VersionFeatures.load(path, name=name, ignored_labels=arguments.ignored_labels, judgements=judgements)
            for path, name in zip(paths, short_names(paths), strict=True)
        ]
    )
    check_widths(versions, arguments.widths)
    for version in versions if first else ():
        for part, zeros in zip(("query", "gallery"), version.zero_rows, strict=True):
            if zeros:
                print(
                    f"simplexfix evaluate: {printable(version.label)}: {zeros} rows of {part} are all zeros: "
                    "each matches the first class or row; check the extraction",
                    file=sys.stderr,
                )
    images = {
        part: _read_paths(path, part, versions[0].items.given[part == "gallery"])
        for part, path in (("query", arguments.images), ("gallery", arguments.gallery_images))
        if path is not None and first
    }
    return _Input(paths, versions, images)


def _hits_of_ranks(versions: Sequence[VersionFeatures], protocol: str, ranks: Ranks) -> list[list[Hits]]:
    """Returns the hits of `compatibility_hits`, computed by all ranks in float32, each in its rows of the galleries."""
    find = PROTOCOLS[protocol].sharded_hits
    assert find is not None
    mine = np.arange(len(versions[0].gallery))[shard_rows(len(versions[0].gallery), ranks.rank, ranks.size)]
    shards = [version.take(gallery=mine) for version in versions]
    return [[find(old.pair(new, "leading"), ranks.group) for old in shards[: i + 1]] for i, new in enumerate(shards)]


def _write(arguments: argparse.Namespace, given: _Input, hits: list[list[Hits]] | None) -> None:
    report = evaluate(
        given.versions,
        protocol=arguments.protocol,
        widths=arguments.widths,
        confidence=arguments.confidence,
        hits=hits,
        seed=arguments.seed,
    )
    report.save(arguments.out, given.images)
    if arguments.json:
        print(json.dumps(content_of(report), indent=1, allow_nan=False))
    else:
        _print(report, arguments.out)


def version_paths(given: Sequence[Path]) -> list[Path]:
    """Returns the paths of the versions, oldest first; those in a single folder that is not a version itself."""
    if len(given) > 1 or not given[0].is_dir() or is_version(given[0]):
        return list(given)
    return find_versions(given[0])


def short_names(paths: Sequence[Path]) -> list[str]:
    """Returns distinct names: the stems of the files, else their names, else their paths."""
    for names in ([path.name if path.is_dir() else path.stem for path in paths], [path.name for path in paths]):
        names = [printable(name) for name in names]
        if len(set(names)) == len(paths) and all(names):
            return names
    names = [printable(path) for path in paths]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise ValueError(f"{again} is given twice: each version once, oldest first")
    return names


def _read_paths(file: Path, part: str, count: int) -> list[Path]:
    """Reads image paths, one per line, relative to the file's folder.

    Raises:
        ValueError: the file is not text, or the number of lines differs from the number of items.
    """
    try:
        lines = read_text(file).splitlines()
    except ValueError as error:
        raise ValueError(f"{file} must be text in UTF-8, a path per line: {error}") from None
    if len(lines) != count:
        raise ValueError(f"{file} has {len(lines)} lines, {part} has {count} rows: one image path per line")
    return [file.parent / line for line in lines]


def _print(report: EvaluationReport, out: Path) -> None:
    from rich.markup import escape

    terminal = console(sys.stdout)
    counts = report.counts
    judged = report.judgements
    of = f"of {counts.classes} classes" if judged is None else f"and {judged.pairs} relevance judgements"
    terminal.print(
        f"{counts.queries} queries, {counts.gallery} gallery items {of}, {report.protocol.replace('_', ' ')}"
    )
    if counts.queries_of_classes_not_in_gallery:
        absent = counts.classes_not_in_gallery
        lacks = f"; classes that the gallery lacks: {absent}" if absent else ""
        what = "other gallery item of their class" if judged is None else "item that is judged relevant"
        wrong = "score 0" if report.has_scores else "count as wrong"
        terminal.print(
            f"[yellow]{counts.queries_of_classes_not_in_gallery} queries have no {what} and {wrong}{lacks}[/yellow]"
        )
    for remark in report.remarks:
        terminal.print(f"[yellow]{escape(remark)}[/yellow]")
    terminal.print("\nScore in percent. Rows: query version. Columns: gallery version\n")
    terminal.print(heat_map(report.matrix, report.names, terminal))
    if report.upgrades:
        mark = marks(terminal)
        terminal.print(f"{mark[True]} finds more than the version that made the gallery, {mark[False]} does not\n")
    c = report.criteria
    change = {name: "-" if value != value else f"{100 * value:+.2f}" for name, value in (("BC", c.bc), ("FC", c.fc))}
    shown = {"AC": "-" if c.ac != c.ac else f"{c.ac:.3f}", "AA": f"{100 * c.aa:.2f} %", **change}
    terminal.print("   ".join(f"[bold]{name}[/bold] {value}" for name, value in shown.items()))
    upgrade = report.last_upgrade
    breaks, mends = ("get worse", "get better") if report.has_scores else ("break", "mend")
    if upgrade is not None:
        terminal.print(
            f"{escape(report.names[upgrade.old])} -> {escape(report.names[upgrade.new])} on the old gallery: "
            f"{100 * upgrade.before:.2f} % -> {100 * upgrade.after:.2f} %, gain {100 * upgrade.gain:+.2f} "
            f"[{100 * upgrade.low:+.2f}, {100 * upgrade.high:+.2f}], {upgrade.losses} queries {breaks}, "
            f"{upgrade.gains} {mends}, p = {upgrade.p_value:.3g}"
        )
    terminal.print(f"\n[bold]{escape(report.verdict.words)}[/bold]")
    terminal.print(f"{escape(str(out / 'report.html'))}, report.json and figures are written")
