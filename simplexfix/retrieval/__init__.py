"""Exact search and its scores.  Nothing here sees a model."""

from ..functional import cosine_topk
from . import metrics, verification
from .index import CosineIndex
from .protocols import instance_accuracy, instance_hits, nearest_class_mean_accuracy, nearest_class_mean_hits
from .results import RetrievalResults
from .verification import VerificationResults

__all__ = [
    "CosineIndex",
    "RetrievalResults",
    "VerificationResults",
    "cosine_topk",
    "instance_accuracy",
    "instance_hits",
    "metrics",
    "nearest_class_mean_accuracy",
    "nearest_class_mean_hits",
    "verification",
]
