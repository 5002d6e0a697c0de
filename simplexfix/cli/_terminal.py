"""Standard output and error streams whose writes never raise, and text for them.

A missing character, a closed pipe or a full disk must not change a command's exit code.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["console", "criteria_text", "in_flags", "standard_streams", "write_error"]


class _Descriptor(io.FileIO):
    """A file descriptor that stores its first write error and drops all output after it."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextmanager
def standard_streams() -> Iterator[None]:
    """Replaces sys.stdout and sys.stderr by streams of the same encoding whose writes never raise.

    A character that the encoding lacks is escaped, as `\\u65e5`.  Streams without a file descriptor of this process,
    such as those of a test, only get the escapes.  `write_error` returns the first error of a stream.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _safe(sys.stdout), _safe(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def write_error(stream: TextIO) -> OSError | None:
    """Flushes the stream and returns the error of its first failed write; None for a closed pipe."""
    stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Descriptor) else None
    return None if isinstance(error, BrokenPipeError) else error


def _safe(stream: TextIO | None) -> TextIO:
    if stream is None:  # the descriptor was closed before Python started
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if stream is not sys.__stdout__ and stream is not sys.__stderr__:
        stream.reconfigure(errors="backslashreplace")
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.isatty() or stream.write_through,
    )


def console(stream: TextIO) -> Any:
    """Returns rich's console on a stream, with the width of the terminal, or COLUMNS if that is above 0."""
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=True, width=shutil.get_terminal_size().columns)


def criteria_text(criteria: Mapping[str, Any]) -> str:
    """Returns the average compatibility (AC) and average accuracy (AA, in percent) of a report as text."""
    ac = "-" if criteria["AC"] is None else f"{criteria['AC']:.2f}"
    return f"AC {ac} AA {100 * criteria['AA']:.1f}"


def in_flags(error: Exception) -> str:
    """Returns an error message with Python's options replaced by those of the command line."""
    return str(error).replace('widths="leading"', "--truncate")
