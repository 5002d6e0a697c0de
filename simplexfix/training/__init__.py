"""Training: a user of the library like any other; what it does, a loop of one's own can do."""

from .checkpoint import CheckpointError, Checkpoints, CheckpointWarning, read_state, write_state
from .config import ConfigError
from .items import Items, RowBatches
from .scenario import Task, class_incremental, class_order, dataset_sequence, instance_incremental, train_versions
from .schedule import Schedule
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "ConfigError",
    "Items",
    "RowBatches",
    "Schedule",
    "Task",
    "Trainer",
    "class_incremental",
    "class_order",
    "dataset_sequence",
    "instance_incremental",
    "read_state",
    "train_versions",
    "write_state",
]
