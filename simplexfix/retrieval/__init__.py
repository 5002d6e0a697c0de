"""Exact search and its scores.  Nothing here sees a model."""

from ..functional import cosine_topk
from .protocols import instance_accuracy, nearest_class_mean_accuracy

__all__ = ["cosine_topk", "instance_accuracy", "nearest_class_mean_accuracy"]
