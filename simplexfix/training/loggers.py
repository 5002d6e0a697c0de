"""Copies of a training's log: TensorBoard, Weights & Biases, a progress bar.

Trainings write to `log.jsonl` of each stage alone, which has every step once however often a training was stopped.  On
resume the log is replayed from the start: no line is lost or duplicated in the copies.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .._files import write_whole

__all__ = ["LOGGERS", "Logger", "Progress", "RunLog", "check_loggers"]

Line = Mapping[str, Any]
_WANDB_NAME = 128  # characters at most


@dataclass(frozen=True)
class Progress:
    """One step of a run.

    Args:
        stage: in words.
        step, steps: its number, from 1 on, and the last one's.
        batch: rows of each.
        line: what the log has to say of it, where that has a line for it.
    """

    stage: str
    step: int
    steps: int
    batch: int
    line: Line | None


class Logger(Protocol):
    """Who wants a copy of the log."""

    def begin(self, stage: str, finished: bool) -> None:
        """The lines of this stage follow, from the first on; an earlier process may have passed some on already, and
        if that finished the stage all of them."""
        ...

    def log(self, line: Line) -> None:
        """One line of the stage that was begun last."""
        ...

    def end(self) -> None:
        """The stage has no more lines; what was passed on is safe from the death of the process after this."""
        ...

    def close(self) -> None:
        """No more stages, or an error."""
        ...


class RunLog:
    """Reads the logs of a run's stages while they grow.

    Args:
        places: the folder of each stage, in the order in which they come.
        loggers: who wants a copy.
    """

    def __init__(self, places: Mapping[str, Path], loggers: Sequence[Logger] = ()) -> None:
        self.places = places
        self.loggers = loggers
        self.stage = ""
        self.read = 0  # bytes of its log
        self.done: set[str] = set()

    def follow(self, stage: str, *, last: bool) -> Line | None:
        """Passes on what is new in a stage's log, and returns the newest line.

        To be called first when the stage's training has begun, which cuts off what a killed one had logged too far.
        """
        if stage != self.stage:
            self.catch_up(before=stage)
            self._begin(stage, finished=False)
        lines = self._new_lines()
        if last:
            self._end()
        return lines[-1] if lines else None

    def catch_up(self, *, before: str | None = None) -> None:
        """Passes on the logs of stages that earlier processes finished; of all, or of those before one."""
        for stage, place in self.places.items():
            if stage == before:
                return
            if stage not in self.done and (place / "log.jsonl").exists():
                self._begin(stage, finished=True)
                self._new_lines()
                self._end()

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

    def _begin(self, stage: str, finished: bool) -> None:
        self.stage, self.read = stage, 0
        for logger in self.loggers:
            logger.begin(stage, finished)

    def _new_lines(self) -> list[Line]:
        path = self.places[self.stage] / "log.jsonl"
        with open(path, "rb") as file:
            file.seek(self.read)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        self.read += len(content)
        try:
            lines = [json.loads(line) for line in content.splitlines()]
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; remove it, training goes on without its lines") from error
        for line in lines:
            for logger in self.loggers:
                logger.log(line)
        return lines

    def _end(self) -> None:
        self.done.add(self.stage)
        for logger in self.loggers:
            logger.end()


class _TensorBoard:
    """A TensorBoard run for each stage, `tensorboard/STAGE` in the run's folder, with the stage's steps."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder / "tensorboard"
        self.writer: Any = None

    def begin(self, stage: str, finished: bool) -> None:
        self.writer = None
        place = self.folder / stage
        if not (finished and any(place.glob("events.*"))):
            # from step 0 on, what is in older files counts no more
            self.writer = _summary_writer()(str(place), purge_step=0)

    def log(self, line: Line) -> None:
        if self.writer is not None:
            for key, value in line.items():
                if key != "step":
                    self.writer.add_scalar(key, value, line["step"])

    def end(self) -> None:
        self.close()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class _WandB:
    """One run of Weights & Biases for a whole run, its id kept in `wandb-id`; metrics are `STAGE/loss` and so on.

    Steps are counted over all stages in lines of the log; those that the run has already are not sent again.  Where and
    how (project, entity, offline) is for wandb's own environment variables to say.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        file = folder / "wandb-id"
        if not file.exists():
            write_whole(file, uuid.uuid4().hex[:16].encode())
        self.run = _wandb().init(
            id=file.read_text(),
            name=folder.resolve().name[:_WANDB_NAME],
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )
        self.known = self.run.step
        self.lines = 0
        self.stage = ""

    def begin(self, stage: str, finished: bool) -> None:
        self.stage = stage
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, line: Line) -> None:
        if self.lines >= self.known:
            self.run.log({f"{self.stage}/{key}": value for key, value in line.items()}, step=self.lines)
        self.lines += 1

    def end(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "trainer.loggers has tensorboard: pip install 'simplexfix[tensorboard]'", name=error.name
        ) from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "trainer.loggers has wandb: pip install 'simplexfix[wandb]'", name=error.name
        ) from error
    return wandb


# name -> what makes it of a run's folder and record, and what it needs
LOGGERS: dict[str, tuple[Callable[[Path, Mapping[str, Any]], Logger], Callable[[], Any]]] = {
    "tensorboard": (_TensorBoard, _summary_writer),
    "wandb": (_WandB, _wandb),
}


def check_loggers(names: Sequence[str]) -> None:
    """Before a run begins.

    Raises:
        ModuleNotFoundError: a package is missing; names the extra that brings it.
    """
    for name in names:
        LOGGERS[name][1]()
