"""Tests `torchrun -m simplexfix evaluate`: the report of one process, one message for bad input, no hanging rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from processes import Command, free_port, without_figures

from simplexfix.cli import evaluate, main

pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")
pytest.importorskip("rich", reason="pip install 'simplexfix[cli]'")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo processes"
)


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """Returns three versions of two widths, in float64 with sums that float32 rounds; one class has queries only."""
    monkeypatch.chdir(tmp_path)
    rng, labels = np.random.default_rng(0), np.arange(331) % 9
    for t, width in enumerate((16, 16, 24)):
        rows = rng.normal(size=(331, width)) + (1.5 + 0.3 * t) * np.eye(width)[labels]
        (tmp_path / "models" / f"v{t}").mkdir(parents=True)
        made = {
            "query": rows[:200],
            "gallery": rows[200:],
            "query_labels": labels[:200],
            "gallery_labels": labels[200:],
        }
        made["query_labels"] = np.where(labels[:200] == 3, 2**24 + 1, labels[:200])
        for name, array in made.items():
            np.save(tmp_path / "models" / f"v{t}" / f"{name}.npy", array)
    return tmp_path


def ranks(
    folder: Path,
    size: int,
    *flags: str,
    inputs: dict[int, str] | None = None,
    before: Callable[[], None] = without_figures,
) -> list[tuple[int, str, str]]:
    """Returns exit code, output and errors of each process, which has torchrun's environment variables."""
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(size):
        arguments = ["evaluate", (inputs or {}).get(rank, "models"), "--truncate", *flags]
        environment = {**group, "RANK": str(rank)}
        started.append(Command(*arguments, folder=folder, environment=environment, before=before))
    done = [process.wait() for process in started]
    return [(code, out.decode(), errors.decode()) for code, out, errors in done]


@pytest.mark.parametrize(("size", "protocol"), [(2, "nearest_class_mean"), (4, "instance")])
def test_the_report_of_one_process(models, no_figures, size: int, protocol: str) -> None:
    """The figures are left out, because only the first process draws them."""
    flags = ("--protocol", protocol)
    assert main(["evaluate", "models", "--truncate", "--out", "alone", *flags]) == 0
    done = ranks(models, size, "--out", "together", *flags)
    assert [code for code, *_ in done] == [0] * size, done
    assert "by name, oldest first: v0, v1, v2" in done[0][2]
    assert "200 queries, 131 gallery items" in done[0][1]
    assert all(out == "" for _, out, _ in done[1:])
    for path in Path("alone").rglob("*.*"):
        assert path.read_bytes() == (Path("together") / path.relative_to("alone")).read_bytes(), path


def test_bad_input_on_one_rank_ends_all_with_one_message(models) -> None:
    (models / "damaged").mkdir()
    (models / "damaged" / "v.npz").write_bytes(b"PK")
    done = ranks(models, 2, inputs={1: "damaged"})
    assert [code for code, *_ in done] == [2, 2], done
    assert "rank 1: damaged/v.npz cannot be read" in done[0][2]
    assert "Traceback" not in done[0][2] + done[1][2]
    assert not (models / "report").exists()


def test_options_are_checked_before_the_search(models) -> None:
    done = ranks(models, 2, "--confidence", "95")
    assert [code for code, *_ in done] == [2, 2], done
    assert done[0][2].count("\n") == 1, done[0][2]
    assert "confidence must lie between 0 and 1" in done[0][2]
    assert "lost another process" not in done[0][2] + done[1][2]


def test_an_error_of_the_writer_ends_all_ranks(models) -> None:
    (models / "report").mkdir()
    (models / "report" / "notes.txt").write_text("mine")
    done = ranks(models, 2)
    assert [code for code, *_ in done] == [2, 2], done
    assert "report holds something else than a report" in done[0][2]
    assert sorted(path.name for path in (models / "report").iterdir()) == ["notes.txt"]


def kill_the_writer() -> None:
    """Makes the process of rank 0 exit with code 9 instead of writing the report."""
    if os.environ["RANK"] == "0":
        evaluate._write = lambda *_: os._exit(9)


def test_a_rank_that_dies_ends_all_with_a_message(models) -> None:
    """The writer exits after the search, while the other rank waits for it."""
    done = ranks(models, 2, before=kill_the_writer)
    assert [code for code, *_ in done] == [9, 2], done
    assert done[1][2].startswith("simplexfix evaluate: rank 1: ")
    assert "Traceback" not in done[1][2]
