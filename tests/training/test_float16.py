"""Tests that a float16 overflow skips one step and damages neither the version nor the log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import torch

from simplexfix.cli import _progress
from simplexfix.methods import ER
from simplexfix.models import EmbeddingModel, FeatureMLP
from simplexfix.training import Progress, Schedule, Trainer


def trained(folder: Path, overflows: Callable[[int], bool], *, steps: int = 40, normalized: bool = False) -> None:
    """Trains a learnable head; outputs for batch n, counted from 1, overflow float16 if `overflows(n)`."""
    count = iter(range(1, 1000))

    def augment(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return inputs * 1e6 if overflows(next(count)) else inputs

    method = ER()
    backbone = FeatureMLP(12, (16,)) if normalized else jobs.network()
    parent = EmbeddingModel(backbone, method.head(backbone.out_features))
    Trainer(method, augment=augment, precision="float16", save_every=4, log_every=2).fit(
        parent, jobs.features(64, 4, 0), Schedule(steps, 1e-2, batch=16), classes=range(4), seed=0, folder=folder
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_batch_statistics_of_an_overflow_are_not_saved(tmp_path) -> None:
    """The loss scaler skips the step, but batch normalisation has already used the batch."""
    with pytest.raises(FloatingPointError, match=r"running_mean is nan or infinite after step 7.*bfloat16"):
        trained(tmp_path, lambda n: n == 7, normalized=True)
    assert names(tmp_path) == ["log.jsonl", "step-000000004.safetensors"]


def test_a_log_line_without_a_loss_is_json(tmp_path, capsys) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    trained(tmp_path, lambda n: n == 7)
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" not in line] == [8]
    assert _progress._figures(Progress("task 0", 8, 40, 16, lines[3]), 1.0) == "loss -, 16 items/s"


@pytest.mark.parametrize(("first", "steps", "scale", "kept"), [(5, 40, "6.1e-05", 32), (1, 10, "64", 8)])
def test_a_training_that_skips_every_step_stops(tmp_path, first: int, steps: int, scale: str, kept: int) -> None:
    """Training stops after 30 overflows in a row, or if every step overflows, since the version would not change."""
    with pytest.raises(FloatingPointError, match=f"too many steps were skipped .*loss scale fell to {scale}:"):
        trained(tmp_path, lambda n: n >= first, steps=steps)
    assert names(tmp_path)[-1] == f"step-{kept:09d}.safetensors"
