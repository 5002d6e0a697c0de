"""Fits adapters from a new encoder to an old encoder's gallery and selects the best one on held-out items.

Exit codes: 0 if adapted new queries find more in the old gallery than old queries; 1 if no candidate is significantly
better than the old encoder; 2 for bad input.  With 0 and 1 the best candidate is written to the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .._text import printable
from ..adapters import Judged, Selection, select_adapter
from ..adapters.folder import check_adapter_folder
from ..labelled import check_versions
from ._features import read_labels, read_rows
from ._models import read_model
from ._terminal import in_flags

BETTER, NOT_BETTER, BAD_INPUT = 0, 1, 2


def run(arguments: argparse.Namespace) -> int:
    try:
        encoders = _encoders(arguments)
        check_adapter_folder(arguments.out)
        selection, labelled = _select(arguments)
        identity = selection.adapter.save_pretrained(arguments.out, **encoders)
    except (ValueError, TypeError) as error:
        print(f"simplexfix adapt: {printable(in_flags(error))}", file=sys.stderr)
        return BAD_INPUT
    if arguments.json:
        content = {
            "better": selection.better,
            "old": selection.old,
            "winner": selection.winner.as_dict(),
            "table": [row.as_dict() for row in selection.table],
            "score": f"AA, {arguments.protocol}" if labelled else "agreement with the new encoder",
            "maps_gallery": selection.adapter.maps_gallery,
            "fingerprint": identity.fingerprint,
            "version": identity.version,
            "out": str(arguments.out),
        }
        print(json.dumps(content, indent=1))
    else:
        print(_text(selection, labelled, arguments))
    return BETTER if selection.better else NOT_BETTER


def _encoders(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `Adapter.save_pretrained`: version, name, and the fingerprints of both encoders."""
    old, new = (None if path is None else read_model(path) for path in (arguments.old_model, arguments.new_model))
    number = arguments.number
    if number is None:
        number = 0 if old is None else old.version + 1
    if number < 0:
        raise ValueError(f"--version must be 0 or more, got {number}")
    return {
        "version": number,
        "name": arguments.name,
        "old": None if old is None else old.space or old.fingerprint,
        "new": None if new is None else new.fingerprint,
    }


def _select(arguments: argparse.Namespace) -> tuple[Selection, bool]:
    rows, versions = zip(*(read_rows(path) for path in (arguments.old, arguments.new)), strict=True)
    labels: Any = None
    if arguments.labels is not None:
        labels = read_labels(arguments.labels)
    elif versions[0] is not None and versions[1] is not None:
        labels = check_versions(versions)[0].items.gallery_labels
    sample = None
    if arguments.sample is not None:
        old, new = (read_rows(path)[0] for path in arguments.sample)
        sample = old, new
    selection = select_adapter(
        rows[0],
        rows[1],
        labels,
        sample=sample,
        query_encoders=arguments.query_encoders,
        stored_vectors=arguments.stored_vectors,
        protocol=arguments.protocol,
        seen_fraction=arguments.seen_fraction,
        folds=arguments.folds,
        confidence=arguments.confidence,
        seed=arguments.seed,
    )
    return selection, labels is not None


def _text(selection: Selection, labelled: bool, arguments: argparse.Namespace) -> str:
    winner, adapter = selection.winner, selection.adapter
    lines = _table(selection.table, labelled)
    old = f"{100 * selection.old:.1f} %"
    by = f"finds {old} by {arguments.protocol.replace('_', ' ')}" if labelled else f"agrees to {old} with the new one"
    lines.append(f"on held-out items, the old encoder alone {by}")
    kept = f"keeps {100 * winner.kept:.1f} % of a full re-extraction"
    breaks = f"; it breaks {100 * winner.losses:.1f} % of the queries" if labelled else ""
    lines.append(f"chosen: {_name(winner.method.described())}, which {kept}{breaks}")
    low, high = winner.gain_interval
    gain = f"{100 * winner.gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] on held-out items"
    if selection.better:
        lines.append(f"new queries find more in the old gallery than the old encoder does, {gain}: a gate would pass")
    else:
        lines.append(f"keep the old encoder: no candidate is shown to be better, {gain}: a gate would fail")
    mapped = "map stored vectors once with simplexfix embed --gallery"
    lines.append(f"{arguments.out}: {mapped if adapter.maps_gallery else 'stored vectors stay as they are'}")
    return "\n".join(lines)


def _table(rows: Sequence[Judged], labelled: bool) -> list[str]:
    score = "AA" if labelled else "agreement"
    header = ["method", f"{score} %", "interval", "new -> old %", "gain", "interval", "keeps", "breaks"]
    cells = [header, *map(_cells, rows)]
    if not labelled:
        cells = [row[:-1] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(_aligned, row, widths, range(len(row)))).rstrip() for row in cells]


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _cells(row: Judged) -> list[str]:
    return [
        _name(row.method.described()),
        f"{100 * row.score:.1f}",
        f"[{100 * row.interval.low:.1f}, {100 * row.interval.high:.1f}]",
        f"{100 * row.matrix[1, 0]:.1f}",
        f"{100 * row.gain:+.1f}",
        f"[{100 * row.gain_interval.low:+.1f}, {100 * row.gain_interval.high:+.1f}]",
        f"{100 * row.kept:.1f} %",
        f"{100 * row.losses:.1f} %",
    ]


# options in which the candidates of the grid differ
_SHOWN = ("of", "start", "alpha", "beta", "anchor", "g", "penalty", "rank", "steps")


def _name(described: Mapping[str, Any]) -> str:
    if described["name"] in ("mlp", "lambda_orthogonal"):
        return str(described["name"])
    options = [
        _name(described[key]) if isinstance(described[key], dict) else f"{key} {described[key]}"
        for key in _SHOWN
        if key in described
    ]
    return f"{described['name']} ({', '.join(options)})" if options else str(described["name"])
