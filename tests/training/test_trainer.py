"""Tests `Trainer`: killed trainings resume to the same bits, several processes have the result of one, and errors."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from processes import CONTEXT

from simplexfix import SimplexHead
from simplexfix._seeds import seeded
from simplexfix.heads import decode_state
from simplexfix.methods import ER
from simplexfix.models import EmbeddingModel
from simplexfix.training import CheckpointWarning, Items, Schedule, Trainer, read_state, write_state
from simplexfix.training.trainer import _fingerprint as fingerprint_of

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


def run_in_process(job: Callable[..., None], *arguments: object) -> int | None:
    """Runs a function in a new process and returns its exit code."""
    process = CONTEXT.Process(target=job, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def weights(folder: Path) -> dict:
    return read_state(folder / "version.safetensors")["model"]


def same_bits(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(
        torch.equal(a, second[name]) if isinstance(a, torch.Tensor) else a == second[name] for name, a in first.items()
    )


def log_lines(folder: Path) -> list[dict]:
    """Returns the lines of the log without their times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], Path]:
    """Returns a function that maps a key of KINDS to the folder of a training that never stopped."""
    folders: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("uninterrupted") / "run"
            assert run_in_process(jobs.trained_or_resumed, folders[kind], KINDS[kind]) == 0
        return folders[kind]

    return folder_of


def cases() -> list[Any]:
    """Returns pairs of kind and moment of the kill; kills inside a save are slow tests, except for float32."""
    moments = ("step", "write", "fsync", "replace")
    return [
        pytest.param(kind, moment, marks=[] if moment == "step" or kind == "float32" else pytest.mark.slow)
        for moment in moments
        for kind in KINDS
    ]


@pytest.mark.parametrize(("kind", "moment"), cases())
def test_a_training_killed_repeatedly_ends_with_the_same_bits(kind: str, moment: str, uninterrupted, tmp_path) -> None:
    kills, seed = 0, random.Random(f"{kind} {moment}").randrange(1000)
    folder = tmp_path / "run"
    for attempt in range(3):  # each process resumes from the files that the one before left
        code = run_in_process(jobs.killed, folder, moment, seed + attempt, KINDS[kind])
        if code != -signal.SIGKILL:
            break  # the training ended before the kill
        kills += 1
    assert kills
    assert run_in_process(jobs.trained_or_resumed, folder, KINDS[kind]) == 0
    name = "version.safetensors"
    assert (folder / name).read_bytes() == (uninterrupted(kind) / name).read_bytes()
    assert log_lines(folder) == log_lines(uninterrupted(kind))
    # checkpoints and temporary files are deleted
    assert {path.name for path in folder.iterdir()} == {"log.jsonl", "version.safetensors"}


def test_other_options_give_other_weights(uninterrupted) -> None:
    """Shows that the comparisons above can fail."""
    without_dropout = jobs.trained(None, dropout=0.0)
    assert not same_bits(dict(without_dropout.state_dict()), weights(uninterrupted("float32")))
    without_mean = jobs.trained(None, convolutions=True, schedule={"accumulate": 2, "clip": 0.5})
    kind = "channels last, accumulated, clipped, mean"
    assert not same_bits(dict(without_mean.state_dict()), weights(uninterrupted(kind)))


def train_in_group(
    folder: Path, name: str, options: dict, *, world_size: int = 2, die_at: int | None = None
) -> list[int | None]:
    """Trains in the folder `name` with several processes and returns their exit codes."""
    return run_on_ranks(jobs.in_group, folder, name, die_at, options, world_size=world_size)


def run_on_ranks(job: Callable[..., None], *arguments: object, world_size: int = 2) -> list[int | None]:
    """Runs a function in processes with the arguments (rank, world_size, ...) and returns their exit codes."""
    processes = [CONTEXT.Process(target=job, args=(rank, world_size, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def assert_close(first: dict, second: dict) -> None:
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6)


def test_all_processes_have_the_memory_that_the_first_chose(tmp_path) -> None:
    assert run_on_ranks(jobs.choose_memory, tmp_path) == [0, 0]


def test_two_processes_have_the_weights_and_losses_of_one(tmp_path) -> None:
    """Two processes equal one that accumulates two parts; with gathered negatives they equal one without parts."""
    per_process = {"dropout": 0.0, "references": 3, "junction": "aligned", "frozen": 0.25, "denoise": 0.5}
    assert train_in_group(tmp_path, "parts", per_process) == [0, 0]
    jobs.trained(tmp_path / "accumulated", **per_process, schedule={"accumulate": 2})
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "accumulated"))
    assert [line["step"] for line in log_lines(tmp_path / "parts")] == list(range(4, jobs.STEPS + 1, 4))
    losses = zip(log_lines(tmp_path / "parts"), log_lines(tmp_path / "accumulated"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in losses)

    gathered = {"dropout": 0.0, "trainer": {"augment": None}}
    assert train_in_group(tmp_path, "gathered", {**gathered, "group": True}) == [0, 0]
    jobs.trained(tmp_path / "one", **gathered)
    assert_close(weights(tmp_path / "gathered"), weights(tmp_path / "one"))
    difference = weights(tmp_path / "parts")["backbone.0.weight"] - weights(tmp_path / "one")["backbone.0.weight"]
    assert difference.abs().max() > 1e-3


def test_two_processes_train_a_scaled_learnable_head(tmp_path) -> None:
    """The head's bias is unused and frozen: DistributedDataParallel needs a gradient of each trained parameter."""
    options = {"dropout": 0.0, "method": "er"}
    assert train_in_group(tmp_path, "parts", options) == [0, 0]
    jobs.trained(tmp_path / "accumulated", **options, schedule={"accumulate": 2})
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "accumulated"))


def test_two_processes_have_the_neighbour_queue_of_one(tmp_path) -> None:
    options = {"dropout": 0.0, "method": "asnn", "trainer": {"augment": None}}
    assert train_in_group(tmp_path, "gathered", {**options, "group": True}) == [0, 0]
    jobs.trained(tmp_path / "one", **options)
    first, second = weights(tmp_path / "gathered"), weights(tmp_path / "one")
    assert_close({key: value for key, value in first.items() if "queue" not in key}, second)
    labels = [w["head.queue.labels"].sort().values for w in (first, second)]  # batches have another order of rows
    assert torch.equal(*labels)


def test_two_processes_have_the_prototypes_of_one(tmp_path) -> None:
    """The first process computes the old version's embeddings for both."""
    options = {"dropout": 0.0, "method": "oca"}
    assert train_in_group(tmp_path, "parts", options) == [0, 0]
    jobs.trained(tmp_path / "accumulated", **options, schedule={"accumulate": 2})
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "accumulated"))
    name = "head.objective.prototypes"
    assert weights(tmp_path / "parts")[name].any(1).all()


def test_a_killed_group_resumes_to_the_same_bits(tmp_path) -> None:
    options = {"convolutions": True, "schedule": {"accumulate": 2}}  # batch statistics differ by process
    assert train_in_group(tmp_path, "whole", options) == [0, 0]
    # one process may fail with an error before its own kill, because the other one is dead
    assert -signal.SIGKILL in train_in_group(tmp_path, "killed", options, die_at=13)
    assert (tmp_path / "killed" / "step-000000010.safetensors").exists()
    assert train_in_group(tmp_path, "killed", options) == [0, 0]
    assert same_bits(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")


class StopError(Exception):
    pass


def stop_training(folder: Path, after: int, **options) -> None:
    """Trains for `after` steps and stops by an exception."""
    steps = []

    def on_step(step: int) -> None:
        steps.append(1)
        if len(steps) == after:
            raise StopError

    with pytest.raises(StopError):
        jobs.trained(folder, on_step=on_step, **options)


def test_a_damaged_checkpoint_is_skipped(tmp_path) -> None:
    jobs.trained(tmp_path / "whole")  # in this process, whose number of threads other tests may have changed
    stop_training(tmp_path / "run", 12)
    newest = tmp_path / "run" / "step-000000010.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(CheckpointWarning, match=r"step-000000010\.safetensors cannot be read"):
        jobs.trained(tmp_path / "run")
    assert same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    version = tmp_path / "run" / "version.safetensors"
    version.write_bytes(version.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"version\.safetensors cannot be read"):
        jobs.trained(tmp_path / "run")


def test_a_finished_version_is_read_and_not_trained_again(tmp_path) -> None:
    first = jobs.trained(tmp_path / "run")

    def no_step(step: int) -> None:
        raise AssertionError

    second = jobs.trained(tmp_path / "run", on_step=no_step)
    assert same_bits(dict(first.state_dict()), dict(second.state_dict()))
    assert not second.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": {"learning_rate": 0.02}}, r"schedule\.learning_rate: was 0\.01, is 0\.02"),
        ({"trainer": {"precision": "bfloat16"}}, "precision: was 'float32', is 'bfloat16'"),
        ({"trainer": {"augment": None}}, "augment: was 'jobs.add_noise', is None"),
        ({"convolutions": True}, r"items\.shape: was \[50, 12\], is \[50, 1, 28, 28\]"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_changed_settings_are_named(tmp_path, options: dict, message: str, finished: bool) -> None:
    if finished:
        jobs.trained(tmp_path / "run", schedule={"steps": 1} | options.get("schedule", {}) | {"learning_rate": 0.01})
        options = {**options, "schedule": {"steps": 1, **options.get("schedule", {})}}
    else:
        stop_training(tmp_path / "run", 6)
    with pytest.raises(ValueError, match=message):
        jobs.trained(tmp_path / "run", **options)


def test_checkpoints_with_the_older_form_of_classes_resume(tmp_path) -> None:
    """Older checkpoints stored the head's classes as a dict instead of a tensor.

    The fingerprints of parent and old model were computed with the dict, too.
    """

    def rewrite_in_the_older_form(path: Path, *keys: str) -> None:
        state = read_state(path)
        model = state
        for key in keys:
            model = model[key]
        model["head._extra_state"] = decode_state(model["head._extra_state"])
        write_state(path, state)

    whole = jobs.trained(tmp_path / "whole")
    stop_training(tmp_path / "stopped", 13)
    rewrite_in_the_older_form(tmp_path / "stopped" / "step-000000010.safetensors", "run", "model")
    assert same_bits(jobs.trained(tmp_path / "stopped").state_dict(), whole.state_dict())
    rewrite_in_the_older_form(tmp_path / "whole" / "version.safetensors", "model")
    assert same_bits(jobs.trained(tmp_path / "whole").state_dict(), whole.state_dict())


def test_the_fingerprint_of_a_model_never_changes() -> None:
    """Checkpoints of the first release have this fingerprint; another one would reject them."""
    model = EmbeddingModel(torch.nn.Identity(), SimplexHead(2, 3, num_slots=4))
    model.head.junction.weight.data = torch.arange(6.0).view(3, 2)
    assert fingerprint_of(model) == "1ea221381687c3742371092b3a5acc24a9d110ed0ad95a2c08465c56b33ba9fa"


def test_another_number_of_processes_warns(tmp_path) -> None:
    stop_training(tmp_path / "run", 6, dropout=0.0)
    path = tmp_path / "run" / "step-000000005.safetensors"
    state = read_state(path)
    write_state(path, {**state, "run": {**state["run"], "processes": state["run"]["processes"] * 2}})
    with pytest.warns(CheckpointWarning, match="1 processes resume a training of 2"):
        jobs.trained(tmp_path / "run", dropout=0.0)


def test_a_loss_of_nan_ends_the_training_and_leaves_older_checkpoints(tmp_path) -> None:
    def nan_after_11_steps(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        steps[0] += 1
        return inputs * float("nan") if steps[0] > 11 else inputs

    steps = [0]
    with pytest.raises(FloatingPointError, match=r"the loss of steps 8 to 11 is nan: .*in a new run folder"):
        jobs.trained(tmp_path / "run", trainer={"augment": nan_after_11_steps, "save_every": 3})
    assert sorted(p.name for p in (tmp_path / "run").glob("step*"))[-1] == "step-000000009.safetensors"


def test_weights_of_nan_are_an_error_and_not_saved(tmp_path) -> None:
    """The loss is finite and its gradient is not: the square root of 0."""

    class ERWithNanGradient(ER):
        def loss(self, model, input, target, old):
            zero = (model.backbone(input) * 0).square().sum(1).sqrt().mean()
            return super().loss(model, input, target, old) + zero

    method = ERWithNanGradient()
    parent = EmbeddingModel(jobs.network(), method.head(10))
    for folder in (None, tmp_path / "run"):
        with pytest.raises(
            FloatingPointError, match="a weight is nan or infinite after step 0, because its gradient was"
        ):
            Trainer(method).fit(
                parent, jobs.features(20, 4, 1), Schedule(1, 0.1, batch=4), classes=range(4), seed=0, folder=folder
            )
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["log.jsonl"]


def test_parts_of_one_row_with_batch_norm_are_refused_before_the_folder_exists(tmp_path) -> None:
    """Images with many pixels and networks with other normalisations are accepted."""
    method = ER()
    normalised = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.BatchNorm1d(10))
    for backbone in (normalised, jobs.network(0.0)):
        parent = EmbeddingModel(backbone, method.head(10))
        state, run = torch.get_rng_state(), Schedule(2, 0.1, batch=2, accumulate=2)
        fit = partial(
            Trainer(method, augment=jobs.add_noise).fit, parent, jobs.features(20, 4, 1), classes=range(4), seed=0
        )
        if backbone is normalised:
            with pytest.raises(ValueError, match="batch must be at least 4: the Sequential has batch normalisation"):
                fit(run, folder=tmp_path / "run")
            assert not (tmp_path / "run").exists()
            assert normalised[1].num_batches_tracked == 0
            fit(replace(run, batch=4))
        else:
            fit(run)
        assert torch.equal(torch.get_rng_state(), state)
    images = Items(torch.rand(8, 1, 28, 28), torch.arange(8) % 4)
    layers = [torch.nn.Conv2d(1, 10, 3), torch.nn.BatchNorm2d(10), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    parent = EmbeddingModel(torch.nn.Sequential(*layers), method.head(10))
    Trainer(method).fit(parent, images, Schedule(1, 0.1, batch=1), classes=range(4), seed=0)


def test_an_uneven_split_of_the_batch_is_refused_before_the_folder_exists(tmp_path) -> None:
    with pytest.raises(ValueError, match="are not divisible by"):
        jobs.trained(tmp_path / "run", schedule={"accumulate": 3})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["items", "memory"])
def test_labels_outside_the_classes_are_refused(part: str) -> None:
    """On a GPU the kernels do not check labels: the loss would be nan."""
    method = ER()
    parent = EmbeddingModel(jobs.network(), method.head(10))
    items = {"items": jobs.features(20, 4, 1), "memory": jobs.features(20, 4, 1)}
    items[part] = jobs.features(20, 5, 1)
    with pytest.raises(ValueError, match=rf"labels of {part} must lie in \[0, 4\), the classes so far, got 0 to 4"):
        Trainer(method).fit(parent, schedule=Schedule(1, 0.1, batch=4), classes=range(4), seed=0, **items)


def test_seeded_does_not_change_the_generators_of_gpus(monkeypatch) -> None:
    """Dropout of each process draws from these generators."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(1)
    assert seeds == [1]
    before = torch.get_rng_state()
    with seeded(5):
        assert torch.initial_seed() == 5
    assert seeds == [1]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_version_has_the_moving_average_of_the_weights() -> None:
    # after one step, the average is ema * first weights + (1 - ema) * last weights
    last = jobs.trained(None, schedule={"steps": 1})
    mean = jobs.trained(None, schedule={"steps": 1}, trainer={"ema": 0.75})
    torch.manual_seed(3)
    first = jobs.network()
    expected = 0.75 * first[0].weight + 0.25 * last.backbone[0].weight
    torch.testing.assert_close(mean.backbone[0].weight, expected)


def test_overflowing_first_steps_of_sgd_do_not_change_the_weights() -> None:
    """After a skipped first step torch's fused SGD would use uninitialised memory as momentum."""
    weight = torch.nn.Linear(64, 64)
    before = weight.weight.detach().clone()
    optimizer = Schedule(1, 0.1, optimizer="sgd").optimizer_of(weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value in (float("inf"), 1.0):
        scaler.scale((weight.weight * value).sum() + 0 * weight.bias.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if value != 1.0:
            assert torch.equal(weight.weight, before)
            fill = [torch.full((64, 64), 1e30) for _ in range(50)]  # so that uninitialised memory is not 0 by chance
            del fill
    torch.testing.assert_close(weight.weight, before - 0.1 * (1 + 0.05 * before), rtol=1e-5, atol=1e-6)


def test_clip_and_compile() -> None:
    unclipped = jobs.trained(
        None, dropout=0.0, schedule={"optimizer": "sgd", "steps": 1, "warmup": 0.0, "momentum": 0.0}
    )
    clipped = jobs.trained(
        None, dropout=0.0, schedule={"optimizer": "sgd", "steps": 1, "warmup": 0.0, "momentum": 0.0, "clip": 1e-3}
    )
    torch.manual_seed(3)
    first = jobs.network(0.0)
    changes = [(version.backbone[0].bias - first[0].bias).norm() for version in (unclipped, clipped)]
    assert changes[1] <= 1.001e-2 * 1e-3 < changes[0]
    compiled = jobs.trained(None, dropout=0.0, trainer={"compile": True}, schedule={"steps": 3})
    plain = jobs.trained(None, dropout=0.0, schedule={"steps": 3})
    torch.testing.assert_close(compiled.backbone[0].weight, plain.backbone[0].weight, rtol=1e-3, atol=1e-4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"precision": "half"}}, "precision must be one of 'float32', 'bfloat16', 'float16', got 'half'"),
        ({"trainer": {"ema": 1.0}}, r"ema must be None or lie in \(0, 1\), got 1\.0"),
        ({"trainer": {"save_every": 0}}, "save_every, keep and log_every must be at least 1, got 0, 3 and 4"),
        ({"schedule": {"accumulate": 3}}, "8 new and 8 remembered rows of a batch are not divisible by 1"),
        ({"schedule": {"optimizer": "lion"}}, "optimizer must be one of 'adamw', 'sgd', got 'lion'"),
        ({"schedule": {"momentum": 1.0}}, r"momentum must lie in \[0, 1\), got 1\.0"),
        ({"schedule": {"final_learning_rate": 1.0}}, r"final_learning_rate must lie in \[0, 0\.01\]"),
        ({"schedule": {"weight_decay": -1.0}}, r"weight_decay must be 0 or more and finite, got -1\.0"),
        ({"schedule": {"clip": 0.0}}, r"clip must be positive and finite, got 0\.0"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs.trained(None, **options)
