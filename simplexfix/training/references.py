"""Embeddings of remembered items by all older versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..models import EmbeddingModel
from . import processes
from .items import Items, embeddings_of
from .trainer import Trainer

__all__ = ["with_references"]


def with_references(items: Items, *, versions: Sequence[EmbeddingModel], trainer: Trainer) -> Items:
    """Returns the items with `references` by all versions; embeddings that are missing are extracted.

    The first process extracts them for all processes.

    Args:
        items: items with references by the first versions, or without references.
        versions: all versions so far, oldest first.
        trainer: its preprocessing and workers are used.
    """
    have = 0 if items.references is None else items.references.shape[1]

    def extracted() -> list[Tensor]:
        return [
            embeddings_of(items, version, preprocessing=trainer.preprocessing, workers=trainer.workers)
            for version in versions[have:]
        ]

    found = torch.stack(processes.run_on_rank0(extracted), 1)
    return replace(items, references=found if items.references is None else torch.cat([items.references, found], 1))
