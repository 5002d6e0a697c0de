"""Tests that TensorBoard and wandb get each line of `log.jsonl` once, after any number of stops; and progress bars."""

from __future__ import annotations

import builtins
import io
import json
import re
import sys
import types
from contextlib import suppress
from pathlib import Path

import jobs
import numpy as np
import pytest

from simplexfix.cli import main
from simplexfix.cli._progress import progress_on
from simplexfix.training import Progress, RunConfig, train_run
from simplexfix.training.loggers import RunLog


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return jobs.write_features(tmp_path_factory.mktemp("features"))


def configuration(features: Path, *loggers: str) -> RunConfig:
    return jobs.small_run(features, trainer={"save_every": 5, "log_every": 3, "loggers": list(loggers)})


STAGES = ["task-00", "pretraining-01", "task-01"]


class StopError(Exception):
    pass


def train_and_stop(config: RunConfig, folder: Path, after: int) -> None:
    count = iter(range(1, 99))

    def on_step(progress: Progress) -> None:
        if next(count) == after:
            raise StopError

    with pytest.raises(StopError):
        train_run(config, folder, on_step=on_step)


def logged(folder: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("left", "steps"), [(None, [6, 9, 12, 13]), (-9, [3, 6, 9, 12, 13]), (40, [6, 9, 12, 13])])
def test_a_shortened_log_continues_with_whole_lines(tmp_path, features, left: int | None, steps: list[int]) -> None:
    config = configuration(features)
    train_and_stop(config, tmp_path, 7)  # the checkpoint is of step 5; lines are of steps 3 and 6
    log = tmp_path / "task-00" / "log.jsonl"
    content = log.read_bytes()
    log.unlink()
    if left is not None:
        log.write_bytes(content[:left])
    train_run(config, tmp_path)
    assert [line["step"] for line in logged(tmp_path, "task-00")] == steps


def test_a_damaged_log_is_refused(tmp_path, features) -> None:
    log = RunLog({"task-00": tmp_path})
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 3}\n\0\0{"step": 6}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged: .*remove it"):
        log.catch_up()


@pytest.mark.parametrize("after", [(), (4,), (13, 1), (8, 14, 5)])
def test_tensorboard_shows_each_line_of_the_log_once(tmp_path, features, after: tuple[int, ...]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = configuration(features, "tensorboard")
    for steps in after:
        train_and_stop(config, tmp_path, steps)
    train_run(config, tmp_path)
    train_run(config, tmp_path)  # finished: nothing to add
    for stage in STAGES:
        lines = logged(tmp_path, stage)
        assert [line["step"] for line in lines] == [3, 6, 9, 12, 13]
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / stage)).Reload()
        assert sorted(events.Tags()["scalars"]) == ["learning_rate", "loss", "steps_per_second"]
        for key in events.Tags()["scalars"]:
            found = [(event.step, event.value) for event in events.Scalars(key)]
            assert found == [(line["step"], np.float32(line[key])) for line in lines]


def test_a_logger_that_is_added_later_gets_earlier_lines(tmp_path, features) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_and_stop(configuration(features), tmp_path, 17)
    train_run(configuration(features, "tensorboard"), tmp_path)
    for stage in STAGES:
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / stage)).Reload()
        assert [event.step for event in events.Scalars("loss")] == [3, 6, 9, 12, 13]


class FakeService:
    """A stand-in for wandb's server: a run resumes by its id and rejects steps that it already has."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[int, dict]] = {}
        self.refused = 0
        self.open = 0

    def init(self, **options):
        rows = self.runs.setdefault(options["id"], {})
        self.open += 1
        assert options["resume"] == "allow"
        assert options["name"] == "r" * 128  # wandb's limit
        assert options["config"]["config"]["method"]["slots"] == 16

        def log(values: dict, *, step: int) -> None:
            self.refused += step in rows
            rows.setdefault(step, values)

        def finish() -> None:
            self.open -= 1

        return types.SimpleNamespace(step=len(rows), log=log, finish=finish, define_metric=lambda *a, **k: None)


@pytest.mark.parametrize("after", [(), (4,), (13, 1), (8, 14, 5)])
def test_wandb_is_sent_each_line_of_the_log_once(tmp_path, features, after: tuple[int, ...], monkeypatch) -> None:
    """Uses a stand-in for the service."""
    service, folder = FakeService(), tmp_path / ("r" * 200)
    monkeypatch.setitem(sys.modules, "wandb", service)
    config = configuration(features, "wandb")
    for steps in after:
        train_and_stop(config, folder, steps)
        assert service.open == 0
    train_run(config, folder)
    assert (service.open, service.refused) == (0, 0)
    (rows,) = service.runs.values()
    assert sorted(rows) == list(range(15))
    expected = [(stage, line) for stage in STAGES for line in logged(folder, stage)]
    for i, (stage, line) in enumerate(expected):
        assert rows[i].keys() == {f"{stage}/{key}" for key in line}
        # steps_per_second is left out: wandb has the first value of steps that were trained twice
        assert all(rows[i][f"{stage}/{key}"] == line[key] for key in ("step", "loss", "learning_rate"))


def test_wandb_itself_writes_a_run(tmp_path, features, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = configuration(features, "wandb")
    train_and_stop(config, tmp_path, 8)
    train_run(config, tmp_path)
    name = (tmp_path / "wandb-id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert len(files) == 2
    assert any(b"task-01/loss" in file.read_bytes() for file in files)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_done(tmp_path, features, name, monkeypatch, capsys) -> None:
    real = builtins.__import__

    def without(module, *arguments, **options):
        if module.split(".")[0] == name or module == "torch.utils.tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'simplexfix\[{name}\]'"):
        train_run(configuration(features, name), tmp_path / "run")
    assert main(["train", "omniglot", f'trainer.loggers=["{name}"]', "--out", str(tmp_path / "run")]) == 2
    assert f"simplexfix train needs {name}: pip install 'simplexfix[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused(features) -> None:
    with pytest.raises(ValueError, match="loggers must be one of 'tensorboard', 'wandb', got 'neptune'"):
        configuration(features, "neptune")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_resumes_at_its_step(tmp_path, features, monkeypatch) -> None:
    pytest.importorskip("rich", reason="pip install 'simplexfix[cli]'")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    config, terminal = configuration(features), Terminal()
    train_and_stop(config, tmp_path, 13 + 8)  # stops at step 8 of the pre-training, whose checkpoint is of step 5
    seen: list[Progress] = []
    with progress_on(terminal) as bar:

        def on_step(progress: Progress) -> None:
            seen.append(progress)
            bar(progress)

        train_run(config, tmp_path, on_step=on_step)
    assert [p.step for p in seen] == [*range(6, 14), *range(1, 14)]
    assert {(p.steps, p.batch) for p in seen} == {(13, 16)}
    assert [p.step for p in seen if p.line is not None] == [6, 9, 12, 13, 3, 6, 9, 12, 13]
    # the cursor is visible again
    assert terminal.getvalue().count("\x1b[?25h") == terminal.getvalue().count("\x1b[?25l") == 2
    # lines of the terminal without control sequences
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]", terminal.getvalue())]
    ends = [line for line in lines if "13/13" in line]
    assert ends[0].startswith("pre-training for task 1: 100 % ")
    assert ends[-1].startswith("task 1: 100 % ")
    loss = logged(tmp_path, "task-01")[-1]["loss"]
    assert f"loss {loss:.4g}, " in ends[-1]
    assert "items/s" in ends[-1]


def test_the_cursor_is_visible_after_an_error(monkeypatch) -> None:
    pytest.importorskip("rich", reason="pip install 'simplexfix[cli]'")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with suppress(KeyboardInterrupt), progress_on(terminal) as show:
        show(Progress("task 0", 1, 100, 16, None))
        raise KeyboardInterrupt
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_progress_in_a_file_is_lines(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("simplexfix.cli._progress.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with progress_on(stream) as show:
        for step in range(2, 101):
            clock[0] += 1.0
            line = {"loss": 2.0 / step, "steps_per_second": 4.0} if step % 10 == 0 else None
            show(Progress("task 0", step, 100, 16, line))
    assert stream.getvalue().splitlines() == [
        "task 0: 100 steps of 16 items from step 2",
        "task 0: 40/100, loss 0.05, 64 items/s, 0:00:15 left",
        "task 0: 70/100, loss 0.02857, 64 items/s, 0:00:08 left",
        "task 0: 100/100, loss 0.02, 64 items/s",
    ]
