"""Tests `train_side_by_side`: it returns reports by name; an error, a kill or Ctrl-C ends all of its processes."""

from __future__ import annotations

import _thread
import multiprocessing
import os
from contextlib import suppress
from dataclasses import replace
from multiprocessing import resource_tracker

import pytest
from small_run import two_step_configuration, written_features

from simplexfix.cli._side_by_side import train_side_by_side
from simplexfix.training import Progress, RunConfig, read_config, read_mapping

pytestmark = pytest.mark.slow  # spawning processes takes seconds


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("features")
    return read_config(RunConfig, read_mapping(two_step_configuration(folder, written_features(folder))))


def endless(config: RunConfig) -> RunConfig:
    return replace(config, schedule=replace(config.schedule, steps=10**7))


def test_reports_are_by_name_and_on_step_gets_all_steps(config, tmp_path) -> None:
    steps: list[tuple[str, str]] = []
    chains = [{"first": config, "second": replace(config, seed=1)}, {"third": config}]
    reports = train_side_by_side(chains, tmp_path, on_step=lambda name, progress: steps.append((name, progress.stage)))
    assert list(reports) == ["first", "second", "third"]
    assert reports["third"]["search"] == reports["first"]["search"] != reports["second"]["search"]
    assert sorted(steps) == sorted((name, f"task {t}") for name in reports for t in (0, 1) for _ in range(2))


def test_an_error_of_one_ends_the_others(config, tmp_path) -> None:
    without_data = replace(config, data=replace(config.data, path=str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match=r"gone has no train\.npy"):
        train_side_by_side([{"endless": endless(config)}, {"gone": without_data}], tmp_path, on_step=lambda *_: None)
    too_few_slots = replace(config, method=replace(config.method, slots=2))
    with pytest.raises(RuntimeError, match=r"the run few failed:\nTraceback[\s\S]*method\.slots must be at least"):
        train_side_by_side([{"few": too_few_slots}], tmp_path, on_step=lambda *_: None)
    assert not multiprocessing.active_children()


def test_a_killed_process_is_an_error(config, tmp_path) -> None:
    def kill(name: str, progress: Progress) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(ChildProcessError, match="a training process ended with exit code -9"):
        train_side_by_side([{"endless": endless(config)}], tmp_path, on_step=kill)
    assert not multiprocessing.active_children()


def test_ctrl_c_while_a_process_starts(config, tmp_path, monkeypatch, capfd) -> None:
    resource_tracker.ensure_running()  # starts its process now, not through the patched function
    spawn = multiprocessing.util.spawnv_passfds
    children: list[int] = []

    def spawn_and_interrupt(*arguments: object) -> int:
        children.append(spawn(*arguments))
        _thread.interrupt_main()  # as if another thread, in which SIGINT is not blocked, received it
        return children[-1]

    monkeypatch.setattr("multiprocessing.util.spawnv_passfds", spawn_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_side_by_side([{"endless": endless(config)}], tmp_path, on_step=lambda *_: None)
    with suppress(ChildProcessError):  # the process has been waited for already
        os.waitpid(children[-1], 0)
    assert capfd.readouterr().err == ""  # no traceback of a child whose arguments were cut off
