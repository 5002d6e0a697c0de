"""Exact search and its scores.  Nothing here sees a model."""

from ..functional import cosine_topk
from . import metrics, verification
from ._ranks import RankDiedError, process_group, shard_rows
from .index import CosineIndex
from .protocols import instance_accuracy, instance_hits, nearest_class_mean_accuracy, nearest_class_mean_hits
from .results import RetrievalResults
from .sharded import (
    sharded_cosine_topk,
    sharded_instance_accuracy,
    sharded_instance_hits,
    sharded_nearest_class_mean_accuracy,
    sharded_nearest_class_mean_hits,
)
from .verification import VerificationResults

__all__ = [
    "CosineIndex",
    "RankDiedError",
    "RetrievalResults",
    "VerificationResults",
    "cosine_topk",
    "instance_accuracy",
    "instance_hits",
    "metrics",
    "nearest_class_mean_accuracy",
    "nearest_class_mean_hits",
    "process_group",
    "shard_rows",
    "sharded_cosine_topk",
    "sharded_instance_accuracy",
    "sharded_instance_hits",
    "sharded_nearest_class_mean_accuracy",
    "sharded_nearest_class_mean_hits",
    "verification",
]
