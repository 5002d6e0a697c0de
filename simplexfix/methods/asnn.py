"""ASNN and NNP: nearest-neighbour classification, alone or instead of another method's cross-entropy."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..heads import SimplexHead
from ..models import EmbeddingModel, NeighbourHead
from ..models.neighbour import check_options

__all__ = ["ASNN"]


class ASNN:
    """Nearest-neighbour classification on new and rehearsed items; the old model is not used.

    `loss="asnn"` approximates the method from its abstract; the full paper was not available.  `loss="nnp"` is its
    published predecessor, computed over batch and queue instead of the whole training set.  Both losses are in
    `simplexfix.neighbours`.  `FD`, `BCT` and `HOC` accept an `ASNN` as `classification` instead of cross-entropy.

    Class sizes, and mean and standard deviation of "nnp", are computed over batch and queue, since methods do not have
    the whole training set.  A trainer calls `add_classes` before each task.  It empties the queue, because the
    queue's features come from another model.

    Args:
        loss: "asnn" or "nnp".
        neighbours: number of neighbours per row, at least 1.
        queue: number of recent feature rows that are candidates beside the batch; 0 for the batch only.
        alpha: weight of same-class neighbours in "nnp", positive.
        group: process group whose batches form one batch; None for this process alone.

    Raises:
        TypeError, ValueError: the loss is unknown, or a number is out of range.

    Reference:
        Zhang et al., IEEE TAI 2024, doi 10.1109/TAI.2024.3477436 (approximated); Wang et al., "Nearest Neighbor
        Partitioning", IEEE TNNLS 28(10), 2017.
    """

    def __init__(
        self,
        *,
        loss: str = "asnn",
        neighbours: int = 10,
        queue: int = 4096,
        alpha: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        check_options(loss, neighbours, queue, alpha)
        # the attribute cannot be called `loss`, the name of the method that a trainer calls
        self.kind = loss
        self.neighbours = neighbours
        self.queue = queue
        self.alpha = alpha
        self.group = group

    def head(self, in_features: int, embedding_dim: int | None = None) -> NeighbourHead:
        """Returns a new head.

        Args:
            in_features: width of the features.
            embedding_dim: width of the embedding, computed by a junction; None for the features themselves.
        """
        return NeighbourHead(
            in_features,
            embedding_dim,
            loss=self.kind,
            neighbours=self.neighbours,
            queue=self.queue,
            alpha=self.alpha,
        )

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        """Empties the queue.  A `SimplexHead` of a pre-trained model is replaced by a new head with the same junction.

        Raises:
            TypeError: the head is neither a `NeighbourHead` nor a `SimplexHead` without bias.
        """
        if isinstance(model.head, SimplexHead) and model.head.junction.bias is None:
            junction: nn.Linear = model.head.junction
            model.head = self.head(junction.in_features, junction.out_features).to(junction.weight)
            model.head.junction = junction
        if not isinstance(model.head, NeighbourHead):
            raise TypeError(
                f"the model must have a NeighbourHead, or a SimplexHead without bias, got {type(model.head).__name__}: "
                "train its backbone with a new head"
            )
        model.head.queue.clear()

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        return self.classify(model.head, model.backbone(input), target)

    def classify(self, head: nn.Module, features: Tensor, target: Tensor) -> Tensor:
        """Returns the classification term of a loss for these features."""
        return head.loss(features, target, group=self.group)  # type: ignore[no-any-return, operator]
