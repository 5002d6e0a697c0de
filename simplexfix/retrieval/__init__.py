"""Exact search by cosine similarity, retrieval metrics and pair verification; works on features, not on models."""

from ..functional import cosine_topk
from . import metrics, verification
from ._ranks import RankDiedError, process_group, shard_rows
from .index import CosineIndex
from .protocols import PROTOCOLS, Protocol, instance, nearest_class_mean
from .results import RetrievalResults
from .sharded import sharded_cosine_topk
from .verification import VerificationResults

__all__ = [
    "PROTOCOLS",
    "CosineIndex",
    "Protocol",
    "RankDiedError",
    "RetrievalResults",
    "VerificationResults",
    "cosine_topk",
    "instance",
    "metrics",
    "nearest_class_mean",
    "process_group",
    "shard_rows",
    "sharded_cosine_topk",
    "verification",
]
