"""Escapes text of users, such as file names, for terminals and pages."""

from __future__ import annotations

from pathlib import Path

__all__ = ["printable"]


def printable(name: str | Path) -> str:
    """Returns the name with control characters and bytes that are not UTF-8 escaped."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
