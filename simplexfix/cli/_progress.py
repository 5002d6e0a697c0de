"""How far a run is, on a terminal or in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TextIO

from ..training import processes
from ..training.loggers import Progress

__all__ = ["progress_on"]

_SECONDS = 30.0  # between two lines of one stage


def progress_on(stream: TextIO) -> Callable[[Progress], None]:
    """For `train_run`: a bar where somebody looks, lines where not; by the first process."""
    return _Bar(stream) if stream.isatty() else _Lines(stream)


class _Bar:
    """Each stage's stays as it ended; loss and speed are those of the log, which alone waits for the device."""

    def __init__(self, stream: TextIO) -> None:
        from tqdm import tqdm

        self.make = tqdm
        self.stream = stream
        self.stage = ""
        self.bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if processes.rank() != 0:
            return
        if progress.stage != self.stage:
            self.stage = progress.stage
            self.bar = self.make(
                total=progress.steps,
                initial=progress.step - 1,
                desc=progress.stage,
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
        if progress.line is not None:
            self.bar.set_postfix_str(_figures(progress, progress.line["steps_per_second"]), refresh=False)
        self.bar.update(progress.step - self.bar.n)
        if progress.step == progress.steps:
            self.bar.close()


class _Lines:
    """One as each stage begins and ends, and now and then in between."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.stage = ""
        self.clock = 0.0

    def __call__(self, progress: Progress) -> None:
        if processes.rank() != 0:
            return
        now = time.monotonic()
        if progress.stage != self.stage:
            self.stage, self.clock = progress.stage, now
            again = f" from step {progress.step}" if progress.step > 1 else ""
            self._print(f"{progress.stage}: {progress.steps} steps of {progress.batch} items{again}")
        last = progress.step == progress.steps
        if progress.line is not None and (last or now - self.clock >= _SECONDS):
            self.clock = now
            speed = progress.line["steps_per_second"]
            left = timedelta(seconds=round((progress.steps - progress.step) / max(speed, 1e-9)))
            end = "" if last else f", {left} left"
            self._print(f"{progress.stage}: {progress.step}/{progress.steps}, {_figures(progress, speed)}{end}")

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def _figures(progress: Progress, speed: float) -> str:
    assert progress.line is not None
    loss = progress.line.get("loss")  # missing where it overflowed in float16
    return f"loss {'-' if loss is None else format(loss, '.4g')}, {speed * progress.batch:.0f} items/s"
