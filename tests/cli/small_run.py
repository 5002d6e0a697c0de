"""Helpers of CLI tests: feature files of 14 classes, and configurations that train on them within seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simplexfix.cli import main
from simplexfix.training import Trainer


def written_features(folder: Path) -> Path:
    """Writes features and labels of 14 classes, numbered from 100, and returns the folder."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(14, 12))
    for name, rows in (("train", 280), ("query", 56), ("gallery", 84)):
        labels = np.arange(rows) % 14 + 100
        np.save(folder / f"{name}.npy", (centres[labels - 100] + 0.3 * rng.normal(size=(rows, 12))).astype(np.float32))
        np.save(folder / f"{name}_labels.npy", labels)
    return folder


def configuration(folder: Path, features: Path, **method) -> Path:
    """Writes a configuration of three tasks and returns its path.

    A pre-trained wider model replaces the first one at the second task.  `method` holds settings, by default of HOC.
    """
    hoc = {"slots": 32, "normalize": True, "scale": 8.0, "lambda_": 0.5}
    content = {
        "data": {"kind": "features", "path": str(features)},
        "model": {"kind": "mlp", "hidden": [16]},
        "method": method or hoc,
        "tasks": {
            "counts": [4, 2, 2],
            "memory_per_class": 5,
            "replacements": {
                "1": {
                    "model": {"kind": "mlp", "hidden": [24, 20]},
                    "classes": 6,
                    "schedule": {"steps": 30, "learning_rate": 0.01, "batch": 32},
                }
            },
        },
        "schedule": {"steps": 20, "learning_rate": 0.01, "batch": 32},
        "trainer": {"save_every": 4, "log_every": 5},
    }
    path = folder / "small.json"
    path.write_text(json.dumps(content))
    return path


def two_step_configuration(folder: Path, features: Path) -> Path:
    """Writes a configuration of two tasks with two steps each and returns its path."""
    path = configuration(folder, features)
    content = json.loads(path.read_text())
    content["tasks"] = {"counts": [4, 4], "memory_per_class": 5}
    content["schedule"]["steps"] = 2
    content["trainer"]["log_every"] = 1
    path.write_text(json.dumps(content))
    return path


def train_until(nth: int, *arguments: str) -> None:
    """Runs `simplexfix train`; its nth training, counted with pre-trainings, raises an error after the eighth step."""
    fit, fits = Trainer.fit, []

    def failing_fit(self, *arguments, **options):
        fits.append(1)
        if len(fits) == nth:
            steps_left = iter(range(7, -1, -1))
            options["on_step"] = lambda step: 1 / next(steps_left)  # ZeroDivisionError
        return fit(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", failing_fit)
        assert main(["train", *arguments]) == 70
