"""No step is lost: trainings that are killed at any moment end as those that never were."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simplexfix.training import read_state

sys.path.insert(0, str(Path(__file__).parent))
import jobs

# a server that has loaded torch forks a process for each job, in milliseconds; it never ran a backward pass itself,
# after which torch forbids that
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch.distributed", "simplexfix.training", "jobs"])

KINDS = {
    "float32": {},
    "channels last, accumulated, clipped, mean": {
        "convolutions": True,
        "trainer": {"ema": 0.9},
        "schedule": {"accumulate": 2, "clip": 0.5},
    },
    "bfloat16 sgd": {"trainer": {"precision": "bfloat16"}, "schedule": {"optimizer": "sgd", "learning_rate": 0.05}},
    "float16 sgd": {
        "trainer": {"precision": "float16"},
        "schedule": {"optimizer": "sgd", "learning_rate": 0.05, "clip": 1.0},
    },
}


def done(job: Callable[..., None], *arguments: object) -> int | None:
    process = PROCESSES.Process(target=job, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def weights(folder: Path) -> dict:
    return read_state(folder / "version.safetensors")["model"]


def same(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(
        torch.equal(a, second[name]) if isinstance(a, torch.Tensor) else a == second[name] for name, a in first.items()
    )


def lines(folder: Path) -> list[dict]:
    """Without their times."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], Path]:
    """The training of a kind that never stopped."""
    folders: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("whole") / "run"
            assert done(jobs.resumed, folders[kind], KINDS[kind]) == 0
        return folders[kind]

    return folder_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["step", "write", "fsync", "replace"])
def test_killed_again_and_again_ends_with_the_same_bits(kind: str, moment: str, whole, tmp_path) -> None:
    kills, seed = 0, random.Random(f"{kind} {moment}").randrange(1000)
    folder = tmp_path / "run"
    for attempt in range(3):  # each dies a few steps, or a save or two, further on
        code = done(jobs.killed, folder, moment, seed + attempt, KINDS[kind])
        if code != -signal.SIGKILL:
            break  # it had nothing left to do
        kills += 1
    assert kills
    assert done(jobs.resumed, folder, KINDS[kind]) == 0
    assert same(weights(folder), weights(whole(kind)))
    assert lines(folder) == lines(whole(kind))
    # checkpoints and what killed saves left are gone
    assert {path.name for path in folder.iterdir()} == {"log.jsonl", "version.safetensors"}


def test_the_seed_decides_and_dropout_is_part_of_it(whole) -> None:
    """Otherwise the tests above could not fail."""
    other = jobs.trained(None, dropout=0.0)
    assert not same(dict(other.state_dict()), weights(whole("float32")))
    mean = jobs.trained(None, convolutions=True, schedule={"accumulate": 2, "clip": 0.5})
    assert not same(dict(mean.state_dict()), weights(whole("channels last, accumulated, clipped, mean")))
