"""Training: a user of the library like any other; what it does, a loop of one's own can do."""

from .checkpoint import CheckpointError, Checkpoints, CheckpointWarning, read_state, write_state
from .items import Items, RowBatches
from .schedule import Schedule
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "Items",
    "RowBatches",
    "Schedule",
    "Trainer",
    "read_state",
    "write_state",
]
