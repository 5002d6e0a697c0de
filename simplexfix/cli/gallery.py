"""Keeps a gallery through upgrades of its model: exit code 0, 1 where a backfill left rows, 2 on bad input."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import read_text, write_whole
from .._text import printable
from ..compatibility import GateResult
from ..gallery import Gallery, StoreError
from ..labelled import load_vectors
from ._models import read_model
from ._progress import bars

INCOMPLETE, BAD_INPUT = 1, 2


def run(arguments: argparse.Namespace) -> int:
    try:
        result = _ACTIONS[arguments.action](arguments)
    except (ValueError, TypeError, KeyError, StoreError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"simplexfix gallery {arguments.action}: {printable(str(text))}", file=sys.stderr)
        return BAD_INPUT
    print(json.dumps(result, indent=1) if arguments.json else _text(arguments, result))
    return INCOMPLETE if arguments.action == "backfill" and result["stale"] else 0


def _create(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.create(
        arguments.url,
        model=read_model(arguments.model),
        threshold=arguments.threshold,
        count_traffic=arguments.count_traffic,
    ) as gallery:
        return gallery.status()


def _add(arguments: argparse.Namespace) -> dict[str, Any]:
    rows, ids = _vectors_with_ids(arguments.vectors)
    payload = None
    if arguments.payload is not None:
        payload = _parsed(read_text(arguments.payload), str(arguments.payload))
        if not isinstance(payload, list):
            raise ValueError(f"{arguments.payload} must hold a list of objects, one for each vector")
    with Gallery.open(arguments.url) as gallery:
        gallery.add(ids, rows.tensor(), model=read_model(arguments.model), payload=payload)
        return {"added": len(ids), "rows": gallery.status()["rows"]}


def _search(arguments: argparse.Namespace) -> dict[str, Any]:
    rows, _ = load_vectors(arguments.vectors)
    where = None if arguments.where is None else _parsed(arguments.where, "--where")
    with Gallery.open(arguments.url) as gallery:
        hits = gallery.search(rows.tensor(), arguments.k, model=read_model(arguments.model), where=where)
    if arguments.out is not None:
        content = io.BytesIO()
        np.savez(content, **vars(hits))
        write_whole(arguments.out, content.getvalue())
    return {name: _plain(values) for name, values in vars(hits).items()}


def _status(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.open(arguments.url) as gallery:
        status = gallery.status()
        return {**status, "history": gallery.history()} if arguments.history else status


def _admit(arguments: argparse.Namespace) -> dict[str, Any]:
    gate = None
    if arguments.gate is not None:
        try:
            gate = GateResult.from_dict(_parsed(read_text(arguments.gate), str(arguments.gate)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{arguments.gate}: {error}") from None
    with Gallery.open(arguments.url) as gallery:
        gallery.admit(
            read_model(arguments.model), gate, force=arguments.force, thresholds=dict(arguments.threshold) or None
        )
        return gallery.status()


def _backfill(arguments: argparse.Namespace) -> dict[str, Any]:
    rows, ids = _vectors_with_ids(arguments.vectors)
    model, order = read_model(arguments.model), np.argsort(ids)
    replaced = missing = 0
    with Gallery.open(arguments.url) as gallery, _bar(gallery.status()["stale"]) as count:
        for batch in gallery.stale(order=arguments.order, batch=arguments.batch):
            place = order[np.searchsorted(ids, batch, sorter=order).clip(max=len(order) - 1)] if len(ids) else batch
            known = ids[place] == batch if len(ids) else np.zeros(len(batch), dtype=np.bool_)
            missing += int((~known).sum())
            if known.any():
                replaced += gallery.replace(batch[known], rows.take(place[known]).tensor(), model=model)
            count(len(batch))
        return {"replaced": replaced, "not_in_file": missing, "stale": gallery.status()["stale"]}


def _rollback(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.open(arguments.url) as gallery:
        return gallery.rollback()


def _retire(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.open(arguments.url) as gallery:
        return gallery.retire(arguments.version)


def _pause(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.open(arguments.url) as gallery:
        gallery.pause() if arguments.action == "pause" else gallery.resume()
        return gallery.status()


_ACTIONS = {
    "create": _create,
    "add": _add,
    "search": _search,
    "status": _status,
    "admit": _admit,
    "backfill": _backfill,
    "rollback": _rollback,
    "retire": _retire,
    "pause": _pause,
    "resume": _pause,
}


def _vectors_with_ids(path: Path) -> tuple[Any, Any]:
    rows, ids = load_vectors(path)
    if ids is None:
        raise ValueError(f"{path} has no ids: the gallery stores and replaces rows by them")
    return rows, ids


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from None


def _plain(values: NDArray[Any]) -> list[Any]:
    """For JSON, which has no inf and no nan: None in their place."""
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    rows: list[Any] = plain.tolist()
    return rows


@contextmanager
def _bar(rows: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; what it yields counts further rows."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    with bars(sys.stderr) as shown:
        task = shown.add_task("backfill", total=rows, figures="")
        yield lambda done: shown.advance(task, done)


def _text(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    action = arguments.action
    if action == "add":
        return f"added {result['added']} rows; the gallery has {result['rows']}"
    if action == "search":
        return "\n".join(
            f"query {query}: " + "  ".join(_hit(*hit) for hit in zip(*columns, strict=True) if hit[0] >= 0)
            for query, columns in enumerate(
                zip(result["ids"], result["scores"], result["versions"], result["thresholds"], strict=True)
            )
        )
    if action == "backfill":
        left = f"; {result['stale']} rows are stale, {result['not_in_file']} of this worker's were not in the file"
        return f"replaced {result['replaced']} rows" + (left if result["stale"] else "; no row is stale")
    if action == "rollback":
        stay = f"; {result['rows_that_stay']} rows that it has added stay" if result["rows_that_stay"] else ""
        return (
            f"version {result['to']} serves again, {result['rows_restored']} rows of version {result['version']} are "
            f"restored{stay}"
        )
    if action == "retire":
        return f"version {result['version']} is retired, its {result['old_rows_deleted']} old vectors are deleted"
    return _table(result)


def _hit(id_: int, score: float, version: int, threshold: float | None) -> str:
    below = " below its threshold" if threshold is not None and score < threshold else ""
    return f"{id_} {score:.4f} v{version}{below}"


def _table(status: dict[str, Any]) -> str:
    back = status["rolls_back_to"]
    lines = [
        f"{printable(status['url'])}: {status['rows']} rows, {status['stale']} stale, {status['leased']} leased"
        + ("; backfills are paused" if status["paused"] else ""),
        f"version {status['serving']} serves since {status['since']}; "
        + ("there is no rollback" if back is None else f"rollback leads to version {back}"),
    ]
    head = ("version", "name", "standing", "rows", "old rows", "width", "fingerprint")
    table = [head] + [
        (
            str(entry["version"]),
            printable(entry["name"]),
            entry["standing"],
            str(entry["rows"]),
            str(entry["old_rows"]),
            str(entry["embedding_dim"]),
            entry["fingerprint"][:12],
        )
        for entry in status["versions"]
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines += [
        f"threshold of queries of version {entry['queries']} on vectors of version {entry['vectors']}: "
        + ("none" if entry["threshold"] is None else f"{entry['threshold']:.5f}")
        for entry in status["thresholds"]
    ]
    lines += [_event(event) for event in status.get("history", ())]
    return "\n".join(lines)


def _event(event: dict[str, Any]) -> str:
    """One line; the gate result and the identity are in the JSON."""
    facts = {key: value for key, value in event.items() if key not in ("at", "event", "model", "gate", "thresholds")}
    if event.get("gate") is not None:
        facts["gate"] = "passed" if event["gate"]["passed"] else "failed"
    shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value is not None)
    return printable(f"{event['at']}  {event['event']}" + (f": {shown}" if shown else ""))
