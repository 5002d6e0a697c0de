"""Training of model versions.  It uses public functions only, so a custom loop can do the same."""

from .checkpoint import CheckpointError, Checkpoints, CheckpointWarning, read_state, write_state
from .config import ConfigError, overridden, read_config, read_mapping
from .items import Items, RowBatches
from .junction import aligned_with_older
from .locks import FolderInUseError
from .loggers import Progress
from .presets import PRESETS
from .rehearsal import Rehearsal, herding_rows, random_rows
from .run import train_run
from .run_config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    ReplacementConfig,
    RunConfig,
    TasksConfig,
    TrainerConfig,
)
from .samplers import BalancedSampler
from .scenario import Task, class_incremental, class_order, dataset_sequence, instance_incremental, train_versions
from .schedule import Schedule
from .trainer import Trainer

__all__ = [
    "PRESETS",
    "BalancedSampler",
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "ConfigError",
    "DataConfig",
    "FolderInUseError",
    "Items",
    "MethodConfig",
    "ModelConfig",
    "Progress",
    "Rehearsal",
    "ReplacementConfig",
    "RowBatches",
    "RunConfig",
    "Schedule",
    "Task",
    "TasksConfig",
    "Trainer",
    "TrainerConfig",
    "aligned_with_older",
    "class_incremental",
    "class_order",
    "dataset_sequence",
    "herding_rows",
    "instance_incremental",
    "overridden",
    "random_rows",
    "read_config",
    "read_mapping",
    "read_state",
    "train_run",
    "train_versions",
    "write_state",
]
