"""Handling of Ctrl-C, which other libraries may swallow or turn into another error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupts", "delayed"]


class Interrupts:
    """Context manager that counts interrupts; each still raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        # any other handler stays: a background command, for example, ignores SIGINT
        self._counts = self._before is signal.default_int_handler and _may_set_handlers()
        if self._counts:
            signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        if self._counts:
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, *_: Any) -> None:
        self.count += 1
        raise KeyboardInterrupt


@contextmanager
def delayed() -> Iterator[None]:
    """Delays Ctrl-C to the end of a block in which its exception would be swallowed or leave a call half done.

    A second Ctrl-C takes effect at once.  A signal mask is not enough: it applies to one thread, and another thread of
    the process may receive the signal.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or not _may_set_handlers():
        yield
        return
    came: list[tuple[int, Any]] = []

    def keep(number: int, frame: Any) -> None:
        came.append((number, frame))
        if len(came) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:  # also if the block raised another exception
            before(*came[0])


def _may_set_handlers() -> bool:
    return threading.current_thread() is threading.main_thread()
