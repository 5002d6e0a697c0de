"""ASNN and NNP: classification by nearest neighbours, alone or in place of another method's cross-entropy."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..heads import SimplexHead
from ..models import EmbeddingModel, NeighbourHead
from ..models.neighbour import check_options

__all__ = ["ASNN"]


class ASNN:
    """Classification by nearest neighbours on new and remembered items; the old model plays no part.

    `loss="asnn"` is not the authors' method, of which only the abstract is known to us, but our approximation of it;
    `loss="nnp"` is its published predecessor, over batch and queue in place of the whole training set
    (`simplexfix.neighbours`).  `FD`, `BCT` and `HOC` take an `ASNN` as `classification`, in place of cross-entropy.

    There is no hook for the training set: class sizes, and mean and standard deviation of "nnp", are those of the batch
    and the queue.  `add_classes`, which a trainer calls before each task, empties the queue: the features of the task
    before are another model's.

    Args:
        loss: "asnn" or "nnp".
        neighbours: of each row.
        queue: rows of the newest features that neighbours come from besides the batch; 0 for the batch alone.
        alpha: of "nnp", weight of neighbours of the same class.
        group: processes whose batches are one.

    Raises:
        TypeError, ValueError: an unknown loss, or a number out of its range.

    Reference:
        Of `simplexfix.neighbours.asnn_loss` and `nnp_loss`.
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
        # not `loss`, which is the function that a trainer calls
        self.kind = loss
        self.neighbours = neighbours
        self.queue = queue
        self.alpha = alpha
        self.group = group

    def head(self, in_features: int, embedding_dim: int | None = None) -> NeighbourHead:
        """A new head; the embedding is the features, or of the given width by a junction."""
        return NeighbourHead(
            in_features,
            embedding_dim,
            loss=self.kind,
            neighbours=self.neighbours,
            queue=self.queue,
            alpha=self.alpha,
        )

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        """Empties the queue; a network that was pre-trained on the simplex keeps its junction, in a head of this kind.

        Raises:
            TypeError: the model has a head of another kind.
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
        """The classification term of these features."""
        return head.loss(features, target, group=self.group)  # type: ignore[no-any-return, operator]
