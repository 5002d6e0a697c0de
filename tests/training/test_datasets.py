"""Tests lazily read items: the same batches, bits and memory with any number of worker processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from test_trainer import assert_close, log_lines, run_in_process, same_bits, stop_training, train_in_group, weights
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from simplexfix import SlotRegistry
from simplexfix.data import DatasetRows, ImageFileError
from simplexfix.data.reading import read_ahead
from simplexfix.methods import ER, HOC
from simplexfix.models import EmbeddingModel
from simplexfix.training import (
    BalancedSampler,
    Items,
    Rehearsal,
    Schedule,
    Trainer,
    class_incremental,
    dataset_sequence,
    instance_incremental,
    random_rows,
    read_state,
    train_versions,
    write_state,
)
from simplexfix.training.locks import folder_lock


class StopError(Exception):
    pass


WORKERS = {"trainer": {"workers": 2}}


def test_a_dataset_trains_to_the_bits_of_items_in_memory(tmp_path) -> None:
    jobs.trained(tmp_path / "memory")
    jobs.trained(tmp_path / "dataset", noise=0.0)
    jobs.trained(tmp_path / "workers", noise=0.0, **WORKERS)
    whole = weights(tmp_path / "memory")
    for name in ("dataset", "workers"):
        assert same_bits(weights(tmp_path / name), whole)
        assert log_lines(tmp_path / name) == log_lines(tmp_path / "memory")
    # the data set has the fingerprint of the same items in memory
    started_with = [read_state(tmp_path / name / "version.safetensors")["facts"] for name in ("memory", "workers")]
    assert started_with[0] == started_with[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_random_draws_of_items_do_not_depend_on_the_number_of_workers(tmp_path, accumulate: int) -> None:
    """They do not depend on earlier draws either, and the global generators are unchanged."""
    versions = []
    for workers in (0, 1, 2):
        random.seed(workers)
        np.random.seed(workers)
        states = random.getstate(), np.random.get_state()[1].tolist()
        schedule = {"accumulate": accumulate, "steps": 6}
        versions.append(
            dict(jobs.trained(None, noise=0.1, schedule=schedule, trainer={"workers": workers}).state_dict())
        )
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert all(same_bits(versions[0], other) for other in versions[1:])
    assert not same_bits(versions[0], dict(jobs.trained(None, noise=0.0, schedule=schedule).state_dict()))


def test_every_row_of_every_batch_has_its_own_draws() -> None:
    """A row that appears again, in another batch or the same one, is augmented differently."""
    seen = []

    class Seen(ER):
        def loss(self, model, input, target, old):
            seen.append(input)
            return super().loss(model, input, target, old)

    items = Items(torch.zeros(4, 12), torch.arange(4))
    method = Seen()
    parent = EmbeddingModel(jobs.network(), method.head(10))
    for seed in (0, 1):
        Trainer(method, workers=2).fit(
            parent, jobs.Noisy(items, 1.0), Schedule(3, 0.1, batch=8, accumulate=2), classes=range(4), seed=seed
        )
    rows = torch.cat(seen)
    assert len(rows) == 48
    assert len(torch.unique(rows, dim=0)) == 48


@pytest.mark.slow
def test_a_killed_training_with_workers_ends_with_the_same_bits(tmp_path) -> None:
    options = {"noise": 0.1, "trainer": {"workers": 2}}
    assert run_in_process(jobs.trained_or_resumed, tmp_path / "whole", options) == 0
    for attempt, workers in enumerate((2, 2, 0, 1)):
        code = run_in_process(
            jobs.killed, tmp_path / "run", "step", 7 + attempt, {**options, "trainer": {"workers": workers}}
        )
        if code != -signal.SIGKILL:
            break
    assert attempt
    assert run_in_process(jobs.trained_or_resumed, tmp_path / "run", options) == 0
    name = "version.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")


def test_a_stopped_training_resumes_with_another_number_of_workers(tmp_path) -> None:
    jobs.trained(tmp_path / "whole", noise=0.1)
    stop_training(tmp_path / "run", 12, noise=0.1, **WORKERS)
    jobs.trained(tmp_path / "run", noise=0.1, trainer={"workers": 1})
    assert same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_workers_of_a_killed_training_do_not_keep_the_folder_locked(tmp_path) -> None:
    """Workers outlive a killed parent by seconds, and forked ones inherit its open files."""
    script = (
        "import multiprocessing, pathlib, sys, jobs; multiprocessing.set_start_method('fork'); "
        "jobs.killed(pathlib.Path(sys.argv[1]), 'step', 0, {'noise': 0.1, 'trainer': {'workers': 2}})"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent, check=False)
    assert ended.returncode == -signal.SIGKILL
    with folder_lock(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_when_their_parent_is_killed(method: str, tmp_path) -> None:
    script = (
        f"import multiprocessing, jobs; multiprocessing.set_start_method('{method}'); jobs.readers_without_a_parent()"
    )
    with (tmp_path / "readers").open("w") as out:  # a pipe would stay open until the workers end
        run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, stdout=out, check=False)
    assert run.returncode == -signal.SIGKILL
    readers = [Path("/proc", number) for number in (tmp_path / "readers").read_text().split()]
    assert len(readers) == 2
    end = time.monotonic() + 20
    while any(reader.exists() for reader in readers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(reader.exists() for reader in readers)


def test_workers_end_with_the_training(tmp_path) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())

    before = children()
    during = []
    jobs.trained(None, noise=0.1, on_step=lambda step: during.append(children() - before), **WORKERS)
    stop_training(tmp_path, 5, noise=0.1, **WORKERS)
    assert {len(found) for found in during} == {2}
    assert children() == before


def test_two_processes_have_the_weights_and_losses_of_one(tmp_path) -> None:
    options = {"dropout": 0.0, "noise": 0.1}
    assert train_in_group(tmp_path, "parts", {**options, "trainer": {"workers": 1}}) == [0, 0]
    jobs.trained(tmp_path / "accumulated", **options, schedule={"accumulate": 2})
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "accumulated"))


@pytest.mark.parametrize("workers", [None, 0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_are_those_of_the_sampler(workers: int | None, accumulate: int, tmp_path) -> None:
    """This holds after a stop, too. No other test would detect a shift of all batches."""
    seen = []

    class Seen(ER):
        def loss(self, model, input, target, old):
            seen.append(input[:, 0].long().tolist())
            return super().loss(model, input, target, old)

    def stop(step: int) -> None:
        if step == 3:
            raise StopError

    method = Seen()
    rows = Items(torch.arange(20.0)[:, None].expand(20, 12).contiguous(), torch.arange(20) % 4)
    parent = EmbeddingModel(jobs.network(), method.head(10))
    items, memory = (jobs.Noisy(rows, 0.0) if workers is not None else rows for _ in range(2))
    trainer = Trainer(method, save_every=1, workers=workers or 0)
    options = {"classes": range(4), "seed": 5, "memory": memory if workers is None else Items.from_dataset(memory)}
    schedule = Schedule(7, 0.1, batch=8, accumulate=accumulate)
    with pytest.raises(StopError):
        trainer.fit(parent, items, schedule, folder=tmp_path, on_step=stop, **options)
    trainer.fit(parent, items, schedule, folder=tmp_path, **options)
    sampler = BalancedSampler(20, 20, 8, seed=5)
    expected = []
    for _ in range(7):
        new, remembered = next(sampler)
        expected += [[*new[i::accumulate].tolist(), *remembered[i::accumulate].tolist()] for i in range(accumulate)]
    assert seen == expected


class Counted(Dataset):
    """Constant rows of 12 numbers; counts how often each one is read."""

    def __init__(self, labels: list[int], base: int = 0) -> None:
        self.targets, self.base, self.read = labels, base, [0] * len(labels)
        self.classes = [f"class {c}" for c in range(max(labels) + 1)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        self.read[row] += 1
        return np.full((12,), self.base + row, np.float32), self.targets[row]


LABELS = [i % 6 for i in range(30)]


def test_scenarios_and_memory_read_only_the_first_item() -> None:
    dataset, other = Counted(LABELS), Counted([0, 1, 2, 0], base=100)
    tasks = class_incremental(dataset, [2, 4], seed=0)
    parts = instance_incremental(dataset, 2, seed=0)
    sets = dataset_sequence([dataset, other], seed=0)
    memory = tasks[0].items.take(torch.tensor([3, 1])).joined(sets[1].items.take(torch.tensor([2])))
    assert sum(dataset.read[1:]) == sum(other.read[1:]) == 0  # the first item is read for its shape
    assert memory.inputs.shape == (3, 12)
    rows = [int(row) for row in memory.read()[:, 0]]
    assert rows[2] == 102
    names = tasks[-1].items.class_names
    for task in tasks + parts + sets[:1]:
        for row, label in zip(task.items.read()[:, 0].long().tolist(), task.items.labels.tolist(), strict=True):
            assert task.items.class_names[label] == f"class {LABELS[row]}"
    assert sorted(names) == [f"class {c}" for c in range(6)]
    assert sets[1].items.class_names[:6] == sets[0].items.class_names
    assert sorted(sets[1].items.class_names[6:]) == ["class 0", "class 1", "class 2"]


def versions_of(folder: Path | None, on_step=lambda task, step: None, workers: int = 0) -> list[dict]:
    def start() -> nn.Module:
        return jobs.network()

    trained = train_versions(
        Trainer(HOC(SlotRegistry(12)), save_every=2, log_every=1, workers=workers),
        class_incremental(jobs.Noisy(jobs.features(60, 6, 1), 0.1), [2, 2, 2], seed=0),
        start,
        Schedule(5, 0.01, batch=8),
        seed=0,
        rehearsal=chosen,
        folder=folder,
        on_step=on_step,
    )
    return [dict(version.state_dict()) for version in trained]


def chosen(version, items, generator) -> torch.Tensor:
    assert version.extract(items.inputs).shape == (len(items.labels), 11)
    return random_rows(items.labels, 3, generator)


def test_a_sequence_with_a_memory_of_row_numbers_resumes_to_the_same_bits(tmp_path) -> None:
    whole = versions_of(None)
    for at in ((1, 3), (2, 1)):

        def stop(task: int, step: int, at=at) -> None:
            if (task, step) == at:
                raise StopError

        with pytest.raises(StopError):
            versions_of(tmp_path / "run", stop, workers=1)
    ended = versions_of(tmp_path / "run", workers=2)
    assert all(same_bits(a, b) for a, b in zip(whole, ended, strict=True))
    saved = read_state(tmp_path / "run" / "task-01" / "memory.safetensors")
    assert set(saved) == {"facts", "rows"}


def test_a_memory_in_a_custom_training_loop_holds_row_numbers(tmp_path) -> None:
    dataset = Counted(LABELS)
    items = Items.from_dataset(dataset)
    memories = [Rehearsal(2, generator=np.random.default_rng(0)) for _ in range(2)]
    for c in range(3):
        for memory, inputs in zip(memories, (items.inputs, items.read()), strict=True):
            memory.add_class(c, inputs[items.labels == c])
    assert isinstance(memories[0].items().inputs, DatasetRows)
    assert torch.equal(memories[0].items().read(), memories[1].items().inputs)
    write_state(tmp_path / "memory", memories[0].state_dict())
    read = Rehearsal(2, generator=np.random.default_rng(5))
    read.load_state_dict(read_state(tmp_path / "memory"))
    for memory in (read, *memories):
        batch = items.take(torch.tensor([4, 2])).joined(memory.sample(3))
        assert batch.read()[:2, 0].tolist() == [4, 2]
        assert all(LABELS[int(row)] == label for row, label in zip(batch.read()[:, 0], batch.labels, strict=True))
        assert len(memory.pop_class(1)) == 2


def test_labels_are_found_where_data_sets_keep_them() -> None:
    dataset = Counted(LABELS)
    parts = ConcatDataset([Subset(dataset, [3, 5, 1]), TensorDataset(torch.zeros(2, 12), torch.tensor([7, 8]))])
    assert Items.from_dataset(parts).labels.tolist() == [3, 5, 1, 7, 8]
    assert Items.from_dataset(parts, np.arange(5)).labels.tolist() == [0, 1, 2, 3, 4]
    assert Items.from_dataset(dataset).class_names == tuple(f"class {c}" for c in range(6))
    assert Items.from_dataset(Subset(dataset, [0])).class_names is None


class Plain(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int):
        return self.items[row]


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2)


@pytest.mark.parametrize(
    ("dataset", "labels", "error", "message"),
    [
        (Stream(), [0], TypeError, "dataset must be map-style, with __len__ and __getitem__, got Stream"),
        ([], [], ValueError, "dataset must have an item, this list has none"),
        (Plain([torch.zeros(2)]), None, ValueError, "labels must be given: the Plain has no targets"),
        (Plain([torch.zeros(2)]), [0, 1], ValueError, r"labels must be \[1\], one for each item, got \[2\]"),
        (Plain([torch.zeros(2)]), [0.5], TypeError, "labels must be integers, got float"),
        (Plain([torch.zeros(2)]), ["cat"], TypeError, r"labels must be integers, got str; for names pass np\.unique"),
        (Plain([torch.zeros(2)]), torch.tensor([True]), TypeError, r"labels must be integers, got torch\.bool"),
        (Plain([{"image": 1, "label": 2}]), [0], TypeError, "item 0 of the Plain is dict of image, label"),
        (Plain([("a.png", 2)]), [0], TypeError, "item 0 of the Plain is tuple of str; give it a transform"),
    ],
)
def test_data_sets_that_cannot_be_used_are_refused(dataset, labels, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Items.from_dataset(dataset, labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_items_of_different_shapes_are_named(workers: int) -> None:
    method = ER()
    parent = EmbeddingModel(jobs.network(), method.head(10))
    dataset = Plain([torch.zeros(12)] * 7 + [torch.zeros(13)])
    dataset.targets = [0] * 8
    with pytest.raises(ValueError, match=r"here \[12\] torch\.float32; item 7 of the Plain is \[13\]"):
        Trainer(method, workers=workers).fit(parent, dataset, Schedule(1, 0.1, batch=8), classes=range(1), seed=0)
    with pytest.raises(ValueError, match="inputs must have one shape and dtype"):
        Items.from_dataset(dataset).joined(Items(torch.zeros(1, 13), torch.zeros(1).long()))


def fail(request: int) -> int:
    raise ImageFileError(f"{request}.png cannot be read")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_raises_one_line(workers: int) -> None:
    with pytest.raises(ImageFileError, match=r"^5\.png cannot be read$"):
        list(read_ahead(fail, [5, 6], workers=workers))


class Killed(Counted):
    """Kills the process that reads a certain row, as the out-of-memory killer does."""

    def __getitem__(self, row: int):
        if row == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


def test_a_killed_worker_raises_an_error_with_a_remedy() -> None:
    method = ER()
    parent = EmbeddingModel(jobs.network(), method.head(10))
    says = "a process that reads data was killed: DataLoader worker .* use fewer workers or a smaller"
    with pytest.raises(ChildProcessError, match=says):
        Trainer(method, workers=2).fit(parent, Killed(LABELS), Schedule(9, 0.1, batch=8), classes=range(6), seed=0)
    with pytest.raises(ChildProcessError, match=says):
        parent.extract(Killed(LABELS), workers=1)


class Failing(Counted):
    def __getitem__(self, row: int):
        if row == 13:
            raise RuntimeError("its own")
        return super().__getitem__(row)


def test_an_error_in_a_worker_keeps_its_type_and_traceback() -> None:
    method = ER()
    parent = EmbeddingModel(jobs.network(), method.head(10))
    with pytest.raises(RuntimeError, match=r'raise RuntimeError\("its own"\)'):
        parent.extract(Failing(LABELS), workers=1)


def test_bad_numbers_of_workers() -> None:
    with pytest.raises(ValueError, match="workers must be 0 or more processes, got -1"):
        Trainer(ER(), workers=-1)
    with pytest.raises(TypeError, match="workers must be an integer, got float"):
        Trainer(ER(), workers=1.0)
