"""Text of users, such as names of files, for terminals and pages."""

from __future__ import annotations

from pathlib import Path

__all__ = ["printable"]


def printable(name: str | Path) -> str:
    """The name with bytes that are no UTF-8 and control characters escaped."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
