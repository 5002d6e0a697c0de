"""Ctrl-C, which code of other libraries may swallow or turn into another error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Counts the interrupts of a `with` statement; each raises KeyboardInterrupt, as without it."""

    def __init__(self) -> None:
        self.count = 0
        self._held = False

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        # another handler, or none for a command in the background, stays; only the main thread may set one
        self._counts = (
            self._before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        )
        if self._counts:
            signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        if self._counts:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The first interrupt is raised at the end: an import of torch may swallow it, and then runs on."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.count:
            raise KeyboardInterrupt

    def _interrupted(self, *_: Any) -> None:
        self.count += 1
        if not self._held or self.count > 1:
            raise KeyboardInterrupt
