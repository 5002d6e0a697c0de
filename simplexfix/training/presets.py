"""Configurations to start from, by name."""

from __future__ import annotations

from .run import MethodConfig, ModelConfig, ReplacementConfig, RunConfig, TasksConfig
from .schedule import Schedule

__all__ = ["PRESETS"]

PRESETS = {
    # IAM-CL2R at the size of the demo: four tasks, at the last of which a wider, pre-trained network takes over
    "omniglot": RunConfig(
        tasks=TasksConfig(
            counts=(40, 20, 20, 20),
            memory_per_class=6,
            replacements={3: ReplacementConfig(ModelConfig(width=48), classes=85, schedule=Schedule(400, 1e-2))},
        ),
        schedule=Schedule(120, 3e-3),
        method=MethodConfig(slots=256, normalize=True, scale=12.0, lambda_=0.5),
    ),
}
