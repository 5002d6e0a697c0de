"""What every store writes and reports in the same form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

from .base import StoreError

__all__ = ["SEVERAL_WIDTHS", "absent_id", "as_json", "failure", "stamped", "taken_id", "too_wide"]

SEVERAL_WIDTHS = "these rows are by models of several widths: read those of one version at a time"


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def stamped(event: dict[str, Any]) -> dict[str, Any]:
    """The event of the history, with the time."""
    return {"at": datetime.now(timezone.utc).isoformat(timespec="seconds"), **event}


def failure(url: str, call: str, rows: int | None, reason: object) -> StoreError:
    """The error of a call of which nothing was done."""
    count = "" if rows is None else f" {rows} rows"
    nothing = "" if rows is None else f"; none of the {rows} rows was taken, and the call can be repeated"
    return StoreError(f"the gallery in {url} cannot {call}{count}: {reason}{nothing}")


def taken_id(id_: int) -> ValueError:
    return ValueError(
        f"id {id_} is in the gallery already: `replace` puts a newer model's vector in its place, "
        "`remove` deletes the row"
    )


def absent_id(absent: Iterable[int]) -> KeyError | None:
    """The error for the first of these ids; None without one."""
    return next((KeyError(f"id {id_} is not in the gallery") for id_ in absent), None)


def too_wide(queries: int, version: int, width: int) -> ValueError:
    return ValueError(
        f"queries are {queries} wide and rows of version {version} are {width}: search with a model of at least that "
        "width"
    )
