"""Small retrieval data sets, and the function that each process of a distributed test runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from simplexfix.training import RunConfig, read_config, train_run

SETS = ("first", "second", "third")
WIDTH = 8


def write_set(folder: Path, seed: int, *, rows: int = 24, negatives: int = 2) -> None:
    """Writes a retrieval data set.  Each query mixes its document, a rotated copy of it, and noise."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "qrels").mkdir()
    documents = draw.normal(size=(rows, WIDTH))
    turn = np.linalg.qr(draw.normal(size=(WIDTH, WIDTH)))[0]
    queries = 0.6 * documents + 0.4 * documents @ turn + 0.3 * draw.normal(size=documents.shape)
    for name, found in (("corpus", documents), ("queries", queries)):
        np.save(folder / f"{name}.npy", found.astype(np.float32))
        key = name[0]
        lines = [json.dumps({"_id": f"{key}{i}", "title": f"title {i}", "text": f"text {i}"}) for i in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    half = rows // 2
    for split, chosen in (("train", range(half)), ("test", range(half, rows))):
        lines = [f"q{i}\tc{i}\t{1 + i % 2}" for i in chosen] + [f"q{i}\tc{(i + 3) % rows}\t0" for i in chosen]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    lines = [f"q{i}\tc{(i + 1 + n) % rows}\t0" for i in range(half) for n in range(negatives)]
    (folder / "hard_negatives.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")


def write_sets(folder: Path) -> Path:
    for seed, name in enumerate(SETS):
        write_set(folder / name, seed)
    return folder


def config(data: Path, changes: dict[str, object] | None = None) -> RunConfig:
    content = {
        "data": {"kind": "retrieval", "path": str(data), "hard_negatives": 1},
        "model": {"kind": "linear"},
        "method": {"name": "qdc", "scale": 10.0},
        "tasks": {"kind": "retrieval_sequence", "sets": SETS},
        "schedule": {"steps": 12, "learning_rate": 0.02, "batch": 8},
        "trainer": {"device": "cpu", "save_every": 3, "log_every": 4},
    }
    return read_config(RunConfig, {**content, **(changes or {})})


def in_group(rank: int, world_size: int, folder: Path, data: Path) -> None:
    """Trains as one process of a distributed run."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    train_run(config(data), folder / "run")
    dist.destroy_process_group()
