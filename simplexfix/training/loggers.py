"""Copies the log of a training to TensorBoard, Weights & Biases or a progress bar.

A stage is one pre-training or one task.  Its log is `log.jsonl`, which has one line per logged step, also if the
training was stopped and resumed.  On resume the log is replayed from the start, so the copies have each line once.
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
_WANDB_NAME_LENGTH = 128  # longest name of a run that wandb accepts, in characters


@dataclass(frozen=True)
class Progress:
    """One finished step of a run, for progress callbacks.

    Args:
        stage: title of the stage, such as "task 0".
        step: number of the step, from 1.
        steps: number of steps in the stage.
        batch: rows in a step.
        line: the newest line of the log, if the step wrote one; else None.
    """

    stage: str
    step: int
    steps: int
    batch: int
    line: Line | None


class Logger(Protocol):
    """Receives a copy of the log."""

    def begin(self, stage: str, finished: bool) -> None:
        """Begins a stage.  `log` then receives all its lines, also those that an earlier process passed to the logger.

        Args:
            stage: name of the stage, such as "task-00".
            finished: whether the stage's log is complete.  An earlier process may have passed all, some or none of it.
        """
        ...

    def log(self, line: Line) -> None:
        """Receives one line of the current stage."""
        ...

    def end(self) -> None:
        """Ends the current stage.

        When this returns, the stage's lines must be stored, unless the logger itself detects after a restart which
        lines are missing.
        """
        ...

    def close(self) -> None:
        """Ends the run; it is also called after an error."""
        ...


class RunLog:
    """Reads the logs of a run's stages while they grow, and passes the lines to loggers.

    Args:
        folders: folder of each stage, in order.
        loggers: receivers of the lines.
    """

    def __init__(self, folders: Mapping[str, Path], loggers: Sequence[Logger] = ()) -> None:
        self.folders = folders
        self.loggers = loggers
        self.stage = ""
        self.bytes_read = 0  # in the log of the current stage
        self.finished_stages: set[str] = set()

    def follow(self, stage: str, *, last: bool) -> Line | None:
        """Passes the new lines of a stage's log to the loggers; returns the newest one, or None.

        Call it only after the stage's training has begun: a resumed training first truncates its log.
        """
        if stage != self.stage:
            self.catch_up(before=stage)
            self._begin(stage, finished=False)
        lines = self._new_lines()
        if last:
            self._end()
        return lines[-1] if lines else None

    def catch_up(self, *, before: str | None = None) -> None:
        """Passes the logs of finished stages to the loggers: of all stages, or of those before `before`."""
        for stage, folder in self.folders.items():
            if stage == before:
                return
            if stage not in self.finished_stages and (folder / "log.jsonl").exists():
                self._begin(stage, finished=True)
                self._new_lines()
                self._end()

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

    def _begin(self, stage: str, finished: bool) -> None:
        self.stage, self.bytes_read = stage, 0
        for logger in self.loggers:
            logger.begin(stage, finished)

    def _new_lines(self) -> list[Line]:
        path = self.folders[self.stage] / "log.jsonl"
        with open(path, "rb") as file:
            file.seek(self.bytes_read)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]  # the last line may be incomplete
        self.bytes_read += len(content)
        try:
            lines = [json.loads(line) for line in content.splitlines()]
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; remove it, training goes on without its lines") from error
        for line in lines:
            for logger in self.loggers:
                logger.log(line)
        return lines

    def _end(self) -> None:
        self.finished_stages.add(self.stage)
        for logger in self.loggers:
            logger.end()


class _TensorBoard:
    """Writes one TensorBoard run per stage to `tensorboard/STAGE` in the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder / "tensorboard"
        self.writer: Any = None

    def begin(self, stage: str, finished: bool) -> None:
        self.writer = None
        folder = self.folder / stage
        if not (finished and any(folder.glob("events.*"))):
            # purge_step=0 makes TensorBoard ignore the events of older files
            self.writer = _summary_writer()(str(folder), purge_step=0)

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
    """Sends all stages to one run of Weights & Biases; metrics are `STAGE/loss` and so on.

    The file `wandb-id` holds the id of that run.  Its steps are line numbers, counted over all stages; lines that the
    run already has are not sent again.  wandb's environment variables set project, entity and offline mode.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        file = folder / "wandb-id"
        if not file.exists():
            write_whole(file, uuid.uuid4().hex[:16].encode())
        self.run = _wandb().init(
            id=file.read_text(),
            name=folder.resolve().name[:_WANDB_NAME_LENGTH],
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )
        self.lines_sent = self.run.step  # number of lines that earlier processes sent
        self.lines = 0
        self.stage = ""

    def begin(self, stage: str, finished: bool) -> None:
        self.stage = stage
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, line: Line) -> None:
        if self.lines >= self.lines_sent:
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


# name -> (constructor from the run's folder and configuration, function that imports the logger's package)
LOGGERS: dict[str, tuple[Callable[[Path, Mapping[str, Any]], Logger], Callable[[], Any]]] = {
    "tensorboard": (_TensorBoard, _summary_writer),
    "wandb": (_WandB, _wandb),
}


def check_loggers(names: Sequence[str]) -> None:
    """Checks that the packages of these loggers are installed.

    Raises:
        ModuleNotFoundError: a package is missing; the message has the install command.
    """
    for name in names:
        LOGGERS[name][1]()
