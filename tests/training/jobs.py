"""Small trainings on features, and functions that tests run in separate processes and kill."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from simplexfix import SlotRegistry
from simplexfix import _files as files
from simplexfix.data.reading import read_ahead
from simplexfix.methods import ASNN, ER, HOC, OCA
from simplexfix.models import EmbeddingModel, SmallConvNet
from simplexfix.training import Items, RunConfig, Schedule, Task, Trainer, processes, read_config, train_run
from simplexfix.training.checkpoint import fingerprint
from simplexfix.training.references import with_references
from simplexfix.training.scenario import _remembered

STEPS = 24


def features(rows: int, classes: int, seed: int) -> Items:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, 12, generator=generator)
    return Items(centres[labels] + 0.3 * torch.randn(rows, 12, generator=generator), labels)


def add_noise(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator).to(inputs)


class Noisy(Dataset):
    """Uses every global random generator that data sets commonly use."""

    def __init__(self, items: Items, noise: float) -> None:
        self.items, self.noise, self.targets = items, noise, items.labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        input = self.items.inputs[row]
        drawn = torch.randn(input.shape) + random.random() + torch.from_numpy(np.random.standard_normal(input.shape))
        return input + self.noise * drawn.float(), self.targets[row]


def network(dropout: float = 0.2) -> nn.Module:
    layers = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))
    layers.out_features = 10
    return layers


def trained(
    folder: Path | None,
    *,
    convolutions: bool = False,
    dropout: float = 0.2,
    trainer: dict | None = None,
    schedule: dict | None = None,
    on_step=lambda step: None,
    group: bool = False,
    method: str = "hoc",
    noise: float | None = None,
    references: int | None = None,
    **options: object,
) -> EmbeddingModel:
    """Trains a second version with an old model, rehearsal, augmentation and dropout, by HOC, ER, ASNN or OCA.

    Items are in memory; with `noise`, they are read from data sets that add noise of this standard deviation.
    With `references`, remembered items have random stored embeddings by this number of versions. Other options are
    those of `Trainer.fit`.
    """
    processes = dist.group.WORLD if group else None
    chosen = {
        "er": ER(scale=8.0),
        "asnn": ASNN(queue=48, group=processes),
        "oca": OCA(embedding_dim=10, extra=4),
        "hoc": HOC(SlotRegistry(20), lambda_=0.5, group=processes),
    }[method]
    torch.manual_seed(3)
    backbone = SmallConvNet(4, 10) if convolutions else network(dropout)
    parent = EmbeddingModel(backbone, chosen.head(10))
    chosen.add_classes(parent, range(4))
    items, memory = features(50, 8, 1), features(18, 4, 2)
    if convolutions:
        items, memory = (
            Items(torch.rand(len(i.labels), 1, 28, 28, generator=torch.Generator().manual_seed(n)), i.labels)
            for n, i in enumerate((items, memory))
        )
    if noise is not None:
        items, memory = (Items.from_dataset(Noisy(i, noise)) for i in (items, memory))
    if references is not None:
        embeddings = torch.randn(18, references, 19, generator=torch.Generator().manual_seed(7))
        memory = replace(memory, references=nn.functional.normalize(embeddings, dim=2))
    return Trainer(chosen, **{"augment": add_noise, "save_every": 5, "log_every": 4, **(trainer or {})}).fit(
        parent,
        items,
        Schedule(**{"steps": STEPS, "learning_rate": 1e-2, "batch": 16, **(schedule or {})}),
        classes=range(8),
        seed=9,
        memory=memory,
        old=parent.eval(),
        folder=folder,
        on_step=on_step,
        **options,
    )


def write_features(folder: Path) -> Path:
    """Writes features and labels of ten classes for `small_run` and returns the folder."""
    rng = np.random.default_rng(0)
    for name, rows in (("train", 200), ("query", 30), ("gallery", 30)):
        labels = np.arange(rows) % 10
        np.save(folder / f"{name}.npy", (np.eye(10)[labels] + 0.3 * rng.normal(size=(rows, 10))).astype(np.float32))
        np.save(folder / f"{name}_labels.npy", labels)
    return folder


def small_run(data: Path, **changes: object) -> RunConfig:
    """Returns a configuration of two tasks; a network that was pre-trained on other classes replaces the first one."""
    schedule = {"steps": 13, "learning_rate": 0.01, "batch": 16}
    replacement = {"model": {"kind": "mlp", "hidden": [9]}, "classes": 3, "schedule": schedule}
    content = {
        "data": {"kind": "features", "path": str(data)},
        "model": {"kind": "mlp", "hidden": [8]},
        "method": {"slots": 16},
        "tasks": {"counts": [4, 2], "memory_per_class": 3, "replacements": {"1": replacement}},
        "schedule": schedule,
        "trainer": {"device": "cpu", "save_every": 2, "log_every": 3},
        "protocols": ["nearest_class_mean"],
    }
    return read_config(RunConfig, {**content, **changes})


def killed(folder: Path, moment: str, seed: int, options: dict) -> None:
    """Trains and kills itself with SIGKILL at a random moment.

    `moment` is "step", between two steps, or a call during a save: "write", "fsync" or "replace".
    """
    count = [random.Random(seed).randrange(1, STEPS if moment == "step" else 4)]

    def die(step: int = 0) -> None:
        count[0] -= 1
        if count[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_before(function):
        def wrapper(*arguments):
            die()
            return function(*arguments)

        return wrapper

    if moment == "step":
        trained(folder, on_step=die, **options)
    elif moment == "write":  # the temporary file has half of its bytes

        class DyingWriter:
            def __init__(self, file) -> None:
                self.file = file

            def __enter__(self):
                self.file.__enter__()
                return self

            def __exit__(self, *error):
                return self.file.__exit__(*error)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, content: bytes) -> int:
                self.file.write(content[: len(content) // 2])
                self.file.flush()
                die()
                return self.file.write(content[len(content) // 2 :])

        files.open = lambda *arguments: DyingWriter(open(*arguments))  # noqa: SIM115
        trained(folder, **options)
    else:
        setattr(files.os, moment, dying_before(getattr(files.os, moment)))
        trained(folder, **options)
    raise AssertionError("was not killed")


def trained_or_resumed(folder: Path, options: dict) -> None:
    """Trains; resumes if the folder has a checkpoint.  `run_in_process` passes no keyword arguments."""
    trained(folder, **options)


def in_group(rank: int, world_size: int, folder: Path, name: str, die_at: int | None, options: dict) -> None:
    """Trains in a gloo group; each process kills itself after `die_at` steps."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/{name}.{die_at}.rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    steps = 0

    def on_step(step: int) -> None:
        nonlocal steps
        steps += 1
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    version = trained(folder / name, on_step=on_step, **options)
    assert len(set(processes.gathered(fingerprint(version.state_dict())))) == 1  # includes batch statistics
    dist.destroy_process_group()


def run_in_group(rank: int, world_size: int, folder: Path, data: Path) -> None:
    """Runs one process of `train_run` and writes its report and its number of `extract` calls."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    extract, count = EmbeddingModel.extract, [0]

    def counted(model: EmbeddingModel, *arguments: object, **options: object) -> torch.Tensor:
        count[0] += 1
        return extract(model, *arguments, **options)

    EmbeddingModel.extract = counted
    report = train_run(small_run(data), folder / "run")
    (folder / f"{rank}.json").write_text(json.dumps({"extracted": count[0], "report": report}))
    dist.destroy_process_group()


def slow_rank0(rank: int, world_size: int, folder: Path) -> None:
    """`run_on_rank0` may take longer than the group's timeout; `broadcast` may not."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/slow_rank0", rank=rank, world_size=world_size)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    assert processes.run_on_rank0(lambda: time.sleep(2) or rank) == 0
    if rank == 0:
        time.sleep(2)
    else:
        try:
            processes.broadcast(None)
        except RuntimeError:  # the timeout is in force, so the first assertion could have failed
            os._exit(0)
    os._exit(rank)


def choose_memory(rank: int, world_size: int, folder: Path) -> None:
    """Asserts that all processes get the rows that rank 0 chooses, although each rank would choose other ones."""
    rendezvous = f"file://{folder}/choose_memory.rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    items = features(12, 3, 0)
    version = EmbeddingModel(nn.Identity(), nn.Identity() if rank == 0 else nn.Linear(12, 12))
    version.head.embed = version.head.forward
    embed = partial(with_references, versions=[version], trainer=Trainer(ER()))
    for place in (None, folder):
        memory = _remembered(
            version, Task(items, range(3)), None, lambda v, pool, g: torch.tensor([rank, 5 + rank]), 0, place, embed
        )
        torch.testing.assert_close(memory.references[:, 0], nn.functional.normalize(memory.inputs))
        assert torch.equal(memory.inputs, items.inputs[[0, 5]])
        assert torch.equal(memory.labels, items.labels[[0, 5]])
    dist.destroy_process_group()


def readers_without_a_parent() -> None:
    """Starts two processes that read ahead, prints their ids and kills this process, their parent."""
    reading = read_ahead(own_id, range(100), workers=2)
    print(*{next(reading) for _ in range(4)}, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def own_id(request: int) -> int:
    return os.getpid()
