"""Training: a user of the library like any other; what it does, a loop of one's own can do."""

from .items import Items, row_batches
from .task import Schedule, train_version

__all__ = ["Items", "Schedule", "row_batches", "train_version"]
