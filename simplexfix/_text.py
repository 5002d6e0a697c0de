"""Escapes text of users, such as file names, for terminals and pages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["listed", "printable"]


def printable(name: str | Path) -> str:
    """Returns the name with control characters and bytes that are not UTF-8 escaped."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(values: Iterable[Any]) -> str:
    """Joins values for a message: at most the first 12, followed by "..."; "nothing" if there are none."""
    texts = list(map(str, values))
    return (", ".join(texts[:12]) + (", ..." if len(texts) > 12 else "")) or "nothing"
