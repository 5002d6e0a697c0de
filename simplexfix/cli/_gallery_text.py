"""Formats a gallery's status and history for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._text import printable

__all__ = ["history_lines", "status_text"]


def status_text(status: dict[str, Any]) -> str:
    """Returns the serving version, the progress of the backfill, tables of versions and thresholds, and any history."""
    serving, back = status["serving"], status["rolls_back_to"]
    name = next(entry["name"] for entry in status["versions"] if entry["version"] == serving)
    lines = [
        f"{printable(status['url'])}: {status['rows']} rows"
        + ("; searches are counted" if status["counts_traffic"] else "")
        + ("; backfills are paused" if status["paused"] else ""),
        f"{_named(serving, name)} serves since {status['since']}; "
        + ("there is no rollback" if back is None else f"rollback leads to version {back}"),
    ]
    if status["stale"]:
        done = status["rows"] - status["stale"]
        lines.append(
            f"backfill: {done} of {status['rows']} rows are by version {serving} ({100 * done // status['rows']} %), "
            f"{status['stale']} are stale, and workers have {status['leased']} of them"
        )
    if status["workers"]:
        lines += _table(
            ("worker", "rows", "lease ends"),
            [(printable(each["worker"]), each["rows"], each["until"]) for each in status["workers"]],
        )
    lines += _table(
        ("version", "name", "standing", "rows", "old rows", "width", "fingerprint"),
        [
            (
                entry["version"],
                printable(entry["name"]),
                "serves" if entry["version"] == serving else entry["standing"],
                entry["rows"],
                entry["old_rows"],
                entry["embedding_dim"],
                entry["fingerprint"][:12],
            )
            for entry in status["versions"]
        ],
    )
    if status["thresholds"]:
        by_pair = {(entry["queries"], entry["vectors"]): entry["threshold"] for entry in status["thresholds"]}
        live = sorted({version for pair in by_pair for version in pair})
        lines += _table(
            ("thresholds", *(f"vectors of version {version}" for version in live)),
            [(f"queries of {query}", *(_threshold(by_pair[query, vectors]) for vectors in live)) for query in live],
        )
    return "\n".join(lines + history_lines(status.get("history", ())))


def history_lines(history: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a line for each event; below an admission stands a line for each rule of its gate."""
    names = {event["version"]: event["model"]["name"] for event in history if "model" in event}
    lines = []
    for event in history:
        lines.append(f"{event['at']}  {_event(event, names)}")
        if event.get("gate") is not None:
            lines += [
                f"  gate: {rule['measured']} {rule['value']:.1%}, demanded {rule['demand']}: {rule['verdict']}"
                for rule in event["gate"]["rules"]
            ]
    return [printable(line) for line in lines]


def _event(event: dict[str, Any], names: dict[int, str]) -> str:
    version = _named(event["version"], names.get(event["version"], "")) if "version" in event else ""
    kind = event["event"]
    if kind == "created":
        threshold = event["threshold"]
        return f"created: {version} serves" + ("" if threshold is None else f", with threshold {threshold:g}")
    if kind == "admitted":
        reasons = [] if event["gate"] is None else [f"the gate {'passed' if event['gate']['passed'] else 'failed'}"]
        reasons += [] if event["force"] is None else [f"by force: {event['force']}"]
        return f"admitted: {version} serves in place of version {event['before']}; {'; '.join(reasons)}"
    if kind == "backfill":
        return (
            f"backfill: worker {event['worker']} began, {event['stale']} rows were stale for {version}, "
            f"order {event['order']}"
        )
    if kind == "backfill finished":
        return f"backfill finished: every row is by {version}"
    if kind == "rolled back":
        stay = f", {event['rows_that_stay']} that it has added stay" if event["rows_that_stay"] else ""
        return (
            f"rolled back: version {event['to']} serves in place of {version}; {event['rows_restored']} rows are "
            f"restored{stay}"
        )
    if kind == "retired":
        return f"retired: {version}; {event['old_rows_deleted']} old vectors are deleted"
    if kind == "thresholds":
        pairs = (f"{pair['queries']}:{pair['vectors']}={_threshold(pair['threshold'])}" for pair in event["thresholds"])
        return f"thresholds: {', '.join(pairs)}"
    return str(kind)


def _named(version: int, name: str) -> str:
    return f"version {version}" + (f" ({name})" if name else "")


def _threshold(threshold: float | None) -> str:
    return "none" if threshold is None else f"{threshold:.5f}"


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
