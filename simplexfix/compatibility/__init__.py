"""Judging an upgrade: from features and labels only, without any training."""

from .criteria import (
    CompatibilityTable,
    average_accuracy,
    average_compatibility,
    backward_compatibility,
    compatibility_table,
    compatibility_tax,
    forward_compatibility,
    negative_flip_rate,
    positive_flip_rate,
)
from .matrix import compatibility_matrix

__all__ = [
    "CompatibilityTable",
    "average_accuracy",
    "average_compatibility",
    "backward_compatibility",
    "compatibility_matrix",
    "compatibility_table",
    "compatibility_tax",
    "forward_compatibility",
    "negative_flip_rate",
    "positive_flip_rate",
]
