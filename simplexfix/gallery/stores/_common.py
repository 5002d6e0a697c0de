"""Helpers of all stores: JSON, times, values of filters, and errors."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, TypeGuard

from .base import StoreError

__all__ = [
    "SEVERAL_WIDTHS", "as_json", "check_present", "comparable", "comparable_fields", "failure", "is_number", "stamped",
    "taken_id", "time_text", "too_wide",
]  # fmt: skip

SEVERAL_WIDTHS = "these rows have vectors of several widths: pass the ids of rows of one version"


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a number in JSON; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def comparable(number: float) -> float:
    """The number as filters compare it: an int within 64 bits, or else a float; infinite beyond float64's range."""
    if not -(2**63) <= number < 2**63:
        try:
            number = float(number)
        except OverflowError:
            return math.inf
    return int(number) if float(number).is_integer() and -(2**63) <= number < 2**63 else number


def comparable_fields(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a payload that have plain values; numbers are converted by `comparable`."""
    return {
        key: comparable(value) if is_number(value) else value
        for key, value in payload.items()
        if not isinstance(value, (dict, list))
    }


def stamped(event: dict[str, Any]) -> dict[str, Any]:
    """The event with the current time."""
    return {"at": time_text(time.time()), **event}


def time_text(seconds: float) -> str:
    """A time in UTC as ISO 8601, of seconds since 1970."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def failure(url: str, call: str, rows: int | None, reason: object) -> StoreError:
    """The error for a call that changed nothing."""
    count = "" if rows is None else f" {rows} rows"
    nothing = "" if rows is None else f"; none of the {rows} rows was taken, and the call can be repeated"
    return StoreError(f"the gallery in {url} cannot {call}{count}: {reason}{nothing}")


def taken_id(id_: int) -> ValueError:
    return ValueError(
        f"id {id_} is in the gallery already: `replace` puts a newer model's vector in its place, "
        "`remove` deletes the row"
    )


def check_present(absent: Iterable[int]) -> None:
    """Raises KeyError for the first of these ids, if there is one: all of them are missing in the gallery."""
    for id_ in absent:
        raise KeyError(f"id {id_} is not in the gallery")


def too_wide(queries: int, version: int, width: int) -> ValueError:
    return ValueError(
        f"queries are {queries} wide and rows of version {version} are {width}: search with a model of at least that "
        "width"
    )
