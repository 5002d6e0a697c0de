"""Tests that only one training runs in a folder."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import jobs
import pytest
from test_trainer import log_lines, run_in_process, same_bits, weights

from simplexfix.training import CheckpointWarning, processes, train_run
from simplexfix.training.locks import FolderInUseError, folder_lock


def test_a_second_training_in_a_folder_is_refused(tmp_path) -> None:
    def second(step: int) -> None:
        if step == 12:
            with pytest.raises(FolderInUseError, match=r"another process trains in .*run"):
                jobs.trained(tmp_path / "run", dropout=0.0)

    jobs.trained(tmp_path / "run", dropout=0.0, on_step=second)
    jobs.trained(tmp_path / "whole", dropout=0.0)
    assert same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")


def test_a_killed_training_releases_its_lock(tmp_path) -> None:
    assert run_in_process(jobs.killed, tmp_path, "step", 0, {}) == -signal.SIGKILL
    with folder_lock(tmp_path):
        pass


def test_a_version_that_another_process_finished_is_read(tmp_path, monkeypatch) -> None:
    """The other process finishes after this one's first check and before its lock."""
    jobs.trained(tmp_path / "whole")
    looked = processes.broadcast

    def late(value):
        if value is False:
            monkeypatch.setattr(processes, "broadcast", looked)
            jobs.trained(tmp_path / "run")
        return looked(value)

    def no_step(step: int) -> None:
        raise AssertionError

    monkeypatch.setattr(processes, "broadcast", late)
    assert same_bits(dict(jobs.trained(tmp_path / "run", on_step=no_step).state_dict()), weights(tmp_path / "whole"))


def test_runs_wait_for_a_shared_pretraining(tmp_path, monkeypatch) -> None:
    """A run waits for a locked pre-training folder that runs share; a lock on its own folder is an error."""
    config = jobs.small_run(jobs.write_features(tmp_path))
    shared = replace(config, tasks=replace(config.tasks, pretraining_folder=str(tmp_path / "shared")))
    slept: list[float] = []
    with held(tmp_path / "run" / "pretraining-01"), pytest.raises(FolderInUseError):
        train_run(config, tmp_path / "run")
    with held(tmp_path / "shared" / "simplex" / "pretraining-01") as file:

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 2:
                fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr(time, "sleep", sleep)
        with pytest.warns(UserWarning, match=r"another process trains in .*pretraining-01.* waits for it"):
            report = train_run(shared, tmp_path / "other")
    assert len(slept) == 2
    monkeypatch.undo()
    assert train_run(config, tmp_path / "run")["search"] == report["search"]


@contextmanager
def held(folder: Path) -> Iterator[BinaryIO]:
    folder.mkdir(parents=True)
    with open(folder / "log.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(CheckpointWarning, match="cannot be locked.*no locks available"):
        jobs.trained(tmp_path / "run", schedule={"steps": 1})
