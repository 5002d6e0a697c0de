"""Tests whole runs: killed, continued elsewhere, and evaluated again."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from processes import CONTEXT
from test_trainer import log_lines, run_in_process, run_on_ranks

from simplexfix.models import EmbeddingModel, NeighbourHead, OCAHead
from simplexfix.training import (
    CheckpointWarning,
    ModelConfig,
    Progress,
    ReplacementConfig,
    Schedule,
    read_state,
    train_run,
    write_state,
)
from simplexfix.training.run_data import load_run_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return jobs.write_features(tmp_path_factory.mktemp("features"))


class StopError(Exception):
    pass


def stop_training(data: Path, folder: Path, stage: str, step: int) -> None:
    def on_step(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise StopError

    with pytest.raises(StopError):
        train_run(jobs.small_run(data), folder, on_step=on_step)


def begun_on(device: str, *files: Path) -> None:
    """Rewrites the files as if a training on another device had written them."""
    for file in files:
        state = read_state(file)
        state["facts"]["device"] = device
        if "run" in state:
            state["run"]["processes"][0]["random"][device] = state["run"]["processes"][0]["random"]["cpu"]
        write_state(file, state)


def test_a_run_may_be_finished_on_another_device(data, tmp_path) -> None:
    stop_training(data, tmp_path, "task 1", 5)
    begun_on("cuda", tmp_path / "task-00" / "version.safetensors", *(tmp_path / "task-01").glob("step-*"))
    with pytest.warns(
        CheckpointWarning, match="begun on cuda resumes on cpu: its results will differ in the last bits"
    ):
        train_run(jobs.small_run(data), tmp_path)


def test_a_finished_run_may_be_judged_by_another_protocol(data, tmp_path) -> None:
    config = jobs.small_run(data)
    first = train_run(config, tmp_path)
    assert set(first["search"]) == {"nearest_class_mean"}
    assert first["search"]["nearest_class_mean"]["violations"]["other_pairs"] == 30 * 30 - 90

    def no_step(progress: Progress) -> None:
        raise AssertionError

    second = train_run(replace(config, protocols=("nearest_class_mean", "instance")), tmp_path, on_step=no_step)
    assert second["search"]["nearest_class_mean"] == first["search"]["nearest_class_mean"]
    assert json.loads((tmp_path / "report.json").read_text()) == second
    assert set(second["search"]) == {"nearest_class_mean", "instance"}


@pytest.mark.parametrize("method", [{"slots": 16, "normalize": True, "scale": 8.0}, {"name": "er"}], ids=["hoc", "er"])
def test_a_replacement_pretrained_on_earlier_tasks_keeps_their_class_ids(data, tmp_path, method):
    """The last task changes almost nothing, so the version is the pre-trained network."""
    config = jobs.small_run(data, method=method)
    schedule = Schedule(80, 0.03, batch=16)
    tasks = replace(
        config.tasks,
        replacements={1: ReplacementConfig(ModelConfig("mlp", hidden=(8,)), schedule=schedule, source="tasks")},
        schedules={1: Schedule(1, 1e-9, batch=16)},
    )
    steps = []
    train_run(replace(config, tasks=tasks), tmp_path, on_step=lambda p: steps.append((p.stage, p.step)))
    assert steps == [
        *(("task 0", step) for step in range(1, 14)),
        *(("pre-training for task 1", step) for step in range(1, 81)),
        ("task 1", 1),
    ]
    model = EmbeddingModel.from_pretrained(tmp_path / "task-01" / "model")
    items = load_run_data(config).tasks[0].items
    with torch.no_grad():
        logits = model.head(model.backbone(items.inputs))
    known = torch.arange(4) if "name" in method else model.head.slots.lookup("default", torch.arange(4))
    assert (logits[:, known].argmax(1) == items.labels).double().mean() > 0.95


@pytest.mark.parametrize(
    "method",
    [
        {"name": "oca", "embedding_dim": 10, "extra": 4},
        {"name": "asnn", "queue": 48},
        {"name": "fd", "classification": "asnn", "queue": 48},
    ],
    ids=["oca", "asnn", "fd with asnn"],
)
def test_a_replacement_pretrained_on_earlier_tasks_gets_the_head_of_its_method(data, tmp_path, method) -> None:
    """ER pre-trains a classifier that these methods do not use."""
    config = jobs.small_run(data, method=method)
    schedule = Schedule(2, 0.03, batch=16)
    replacement = ReplacementConfig(ModelConfig("mlp", hidden=(8,)), schedule=schedule, source="tasks")
    tasks = replace(config.tasks, replacements={1: replacement})
    train_run(replace(config, tasks=tasks, schedule=schedule), tmp_path)
    head = EmbeddingModel.from_pretrained(tmp_path / "task-01" / "model").head
    assert isinstance(head, OCAHead if method["name"] == "oca" else NeighbourHead)


def test_the_same_data_may_have_another_path(data, tmp_path) -> None:
    """Data at another path is accepted if its fingerprint is the same; the error for other data names the path."""
    config = jobs.small_run(data)
    stop_training(data, tmp_path / "run", "task 1", 5)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    elsewhere = replace(config, data=replace(config.data, path=str(moved)))
    train_run(elsewhere, tmp_path / "run")
    train_run(config, tmp_path / "whole")
    assert (tmp_path / "run" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()
    train_run(config, tmp_path / "run")
    rows = np.load(moved / "train.npy")
    np.save(moved / "train.npy", rows + 1)
    with pytest.raises(ValueError, match=r"config\.data\.path: was .*[\s\S]*data\.task 0\.sha256: was "):
        train_run(elsewhere, tmp_path / "run")


def test_a_moved_folder_of_pre_trained_networks_is_found(data, tmp_path) -> None:
    config = jobs.small_run(data)
    shared = replace(config, tasks=replace(config.tasks, pretraining_folder=str(tmp_path / "shared")))
    train_run(shared, tmp_path / "run")
    (tmp_path / "shared").rename(tmp_path / "moved")

    def no_step(progress: Progress) -> None:
        raise AssertionError

    moved = replace(config, tasks=replace(config.tasks, pretraining_folder=str(tmp_path / "moved")))
    train_run(moved, tmp_path / "run", on_step=no_step)


def test_a_run_killed_at_any_moment_ends_with_the_same_report(data, tmp_path) -> None:
    """The run is killed while it reads, pre-trains, trains, saves, extracts and evaluates."""
    config, draw = jobs.small_run(data), random.Random(0)
    assert run_in_process(int) == 0  # starts the fork server
    began = time.monotonic()
    assert run_in_process(train_run, config, tmp_path / "whole") == 0
    whole, kills = time.monotonic() - began, 0
    for run in (tmp_path / name for name in "abcd"):
        for _ in range(3):
            process = CONTEXT.Process(target=train_run, args=(config, run))
            process.start()
            process.join(draw.uniform(0, whole))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        assert run_in_process(train_run, config, run) == 0
        assert (run / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()
        for stage in ("task-00", "pretraining-01", "task-01"):
            assert log_lines(run / stage) == log_lines(tmp_path / "whole" / stage)
    assert kills


def test_the_first_process_alone_extracts_and_judges(data, tmp_path) -> None:
    """All processes get the first one's results."""
    assert run_on_ranks(jobs.run_in_group, tmp_path, data) == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # 4 calls to judge; 4 to align the junction and 4 to rotate, each for new and remembered items by two versions
    assert [entry["extracted"] for entry in found] == [12, 0]
    assert found[0]["report"] == found[1]["report"] == json.loads((tmp_path / "run" / "report.json").read_text())


def test_ranks_wait_for_rank_0_longer_than_the_timeout(tmp_path) -> None:
    assert run_on_ranks(jobs.slow_rank0, tmp_path) == [0, 0]
