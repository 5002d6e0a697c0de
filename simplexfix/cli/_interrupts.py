"""Handling of Ctrl-C, which other libraries may swallow or turn into another error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Context manager that counts interrupts; each still raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.count = 0
        self._held = False

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        # Keep any other handler (a background command ignores SIGINT); only the main thread may set one.
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
        """Delays the first interrupt to the end of the block, since an import of torch may swallow the exception."""
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
