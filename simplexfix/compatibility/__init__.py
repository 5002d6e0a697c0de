"""Judging an upgrade: from features and labels only, without any training."""

from .criteria import average_accuracy, average_compatibility, backward_compatibility, forward_compatibility
from .matrix import compatibility_matrix

__all__ = [
    "average_accuracy",
    "average_compatibility",
    "backward_compatibility",
    "compatibility_matrix",
    "forward_compatibility",
]
