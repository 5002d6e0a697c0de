"""Shows the progress of a run: bars on a terminal, lines in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

from ..training import processes
from ..training.loggers import Progress
from ._terminal import console

__all__ = ["bars", "counted", "progress_on"]

_SECONDS = 30.0  # shortest time between two lines of a stage


@contextmanager
def progress_on(stream: TextIO) -> Iterator[Callable[[Progress], None]]:
    """Yields the progress callback for `train_run`; only the first process prints."""
    shown = _Bars(stream) if stream.isatty() else _Lines(stream)
    try:
        yield shown if processes.rank() == 0 else lambda progress: None
    finally:
        shown.close()


@contextmanager
def counted(stream: TextIO, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a loop over rows: a bar on a terminal, at most a line every 30 seconds elsewhere.

    Yields:
        A function to call with the number of rows that are done.
    """
    if stream.isatty():
        with bars(stream) as shown:
            task = shown.add_task(what, total=total, figures="")
            yield lambda done: shown.update(task, completed=done)
        return
    begun = clock = time.monotonic()
    first: int | None = None

    def line(done: int) -> None:
        nonlocal clock, first
        now = time.monotonic()
        first = done if first is None else first
        if now - clock < _SECONDS:
            return
        clock = now
        speed = (done - first) / (now - begun)
        left = "" if speed <= 0 else f", {timedelta(seconds=round((total - done) / speed))} left"
        print(f"{what}: {done}/{total}, {speed:.0f} rows/s{left}", file=stream, flush=True)

    yield line


def bars(stream: TextIO) -> Any:
    """Returns a `rich.progress.Progress`; its tasks have a field `figures`, the text after the bar."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}:", markup=False),
        progress.TextColumn("{task.percentage:>3.0f} %"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        progress.TextColumn("{task.fields[figures]}", markup=False),
        console=console(stream),
    )


class _Bars:
    """Progress bars, one per stage; finished bars stay visible.

    Loss and speed come from lines of the log, so that the bars cause no additional synchronization with the device.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.stage = ""
        self.bar: Any = None  # only the current one is live: a run may have more stages than a terminal has lines

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self.stage:
            self.close()
            self.stage = progress.stage
            self.bar = bars(self.stream)
            self.task = self.bar.add_task(progress.stage, total=progress.steps, completed=progress.step - 1, figures="")
            self.bar.start()
        if progress.line is not None:
            self.bar.update(self.task, figures=_figures(progress, progress.line["steps_per_second"]))
        self.bar.update(self.task, completed=progress.step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class _Lines:
    """Progress lines: at the start and end of each stage, and at most every 30 seconds in between."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.stage = ""
        self.clock = 0.0

    def __call__(self, progress: Progress) -> None:
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

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def _figures(progress: Progress, speed: float) -> str:
    assert progress.line is not None
    loss = progress.line.get("loss")  # missing after an overflow in float16
    return f"loss {'-' if loss is None else format(loss, '.4g')}, {speed * progress.batch:.0f} items/s"
