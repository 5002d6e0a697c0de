"""A head that classifies by nearest neighbours in the batch and in a queue of recent features."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _gather
from .._checks import check_integer, check_name, check_positive
from .._native import is_readable
from .._reference import accumulate_dtype
from ..neighbours import asnn_loss, nnp_loss

__all__ = ["NeighbourHead"]

_LOSSES = ("asnn", "nnp")
_RADIUS = 4.0  # initial radius
_BOUNDS = tuple(math.log(math.expm1(radius)) for radius in (1.0, 16.0))  # bounds of the parameter before softplus


class FeatureQueue(nn.Module):
    """A ring buffer of the most recent feature rows and their class ids, without gradient.

    Args:
        size: capacity in rows, at least 0.
        dim: width of the features.
    """

    features: Tensor
    labels: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), -1))  # -1 marks an empty row
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Replaces the oldest rows; a row that is not finite (float16 overflow) is stored as empty."""
        size = len(self.labels)
        rows, labels = rows.detach()[-size:], labels[-size:]
        if not size or not len(labels):
            return
        places = (self.position + torch.arange(len(labels), device=labels.device)) % size
        self.features.index_copy_(0, places, rows.nan_to_num(0, 0, 0).to(self.features.dtype))
        self.labels.index_copy_(0, places, labels.where(rows.isfinite().all(1), -1))
        self.position.copy_((self.position + len(labels)) % size)

    @torch.no_grad()
    def clear(self) -> None:
        self.features.zero_()
        self.labels.fill_(-1)
        self.position.zero_()


class NeighbourHead(nn.Module):
    """A nearest-neighbour classifier without class weights and without fixed vertices.

    Neighbours are rows of the batch and of a queue with the most recent rows, which have no gradient.  In training mode
    every loss adds its batch to the queue.  Class sizes, and mean and standard deviation of "nnp", are computed over
    batch and queue.  Checkpoints include the queue; model folders do not.  The queue stores no item ids, so an item
    that appears again can have its own older features as a neighbour.

    Args:
        in_features: width of the features.
        embedding_dim: width of the embedding, computed by a junction without bias; None for the features themselves.
        loss: "asnn" or "nnp", the loss of `simplexfix.neighbours`.
        neighbours: number of neighbours, at least 1.
        queue: capacity of the queue in rows; 0 for the batch only.
        alpha: weight of same-class neighbours in "nnp", positive.

    Raises:
        TypeError, ValueError: the loss is unknown, or a number is out of range.
    """

    def __init__(
        self,
        in_features: int,
        embedding_dim: int | None = None,
        *,
        loss: str = "asnn",
        neighbours: int = 10,
        queue: int = 4096,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        check_options(loss, neighbours, queue, alpha)
        self.kind = loss
        self.neighbours = neighbours
        self.alpha = alpha
        self.in_features = in_features
        self.embedding_dim = in_features if embedding_dim is None else embedding_dim
        self.junction = None if embedding_dim is None else nn.Linear(in_features, embedding_dim, bias=False)
        self.raw_radius = nn.Parameter(torch.tensor(math.log(math.expm1(_RADIUS)))) if loss == "asnn" else None
        self.queue = FeatureQueue(queue, self.embedding_dim)

    @property
    def radius(self) -> Tensor:
        """Radius of the sphere, a scalar in [1, 16]: softplus of the trained parameter."""
        assert self.raw_radius is not None
        return F.softplus(self.raw_radius)

    def embed(self, features: Tensor) -> Tensor:
        """Returns the embeddings [B, embedding_dim] of features [B, in_features]."""
        return features if self.junction is None else self.junction(features)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the embeddings; this head has no logits."""
        return self.embed(features)

    def loss(self, features: Tensor, target: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
        """Returns `embedding_loss` of the embeddings of features [B, in_features]."""
        return self.embedding_loss(self.embed(features), target, group=group)

    def embedding_loss(self, z: Tensor, target: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
        """Returns the neighbour loss of a batch; in training mode the batch is added to the queue.

        Args:
            z: [B, embedding_dim] floating.
            target: [B] int64 class ids; rows with negative ids are ignored.
            group: process group whose batches, each of B rows, form one batch.  Each process's queue then holds the
                rows of all processes.

        Returns:
            A scalar.

        Raises:
            TypeError, ValueError: as in the losses of `simplexfix.neighbours`.
            ValueError: batches of the group differ in shape or dtype.
        """
        z = z.to(accumulate_dtype(z.dtype))
        rows, labels, first = z, target, 0
        if group is not None:
            first = _gather.rank_of(z, group) * len(z)
            rows, labels = _gather.all_rows(z, group), _gather.all_rows(target, group)
        if self.training and self.raw_radius is not None:
            # Clamp the parameter: a clamp of the radius has no gradient beyond its bounds and would get stuck there.
            with torch.no_grad():
                self.raw_radius.clamp_(*_BOUNDS)
        pool = torch.cat([rows, self.queue.features.to(z.dtype)])
        loss = self._loss(z, target, pool, torch.cat([labels, self.queue.labels]), first, group)
        if self.training:
            self.queue.add(rows, labels)
        return loss

    def queued_loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Returns the neighbour loss of another model's embeddings, with neighbours from this head's queue only.

        Rows whose class is not in the queue are ignored.  This head gets no gradient.

        Args:
            z: [B, embedding_dim] floating.
            target: [B] int64 class ids.

        Returns:
            A scalar.

        Raises:
            ValueError: the queue is empty (only checked on the CPU).
        """
        labels = self.queue.labels
        if not len(labels) or (is_readable(labels) and labels.max() < 0):
            raise ValueError(
                "the queue is empty; model folders do not store it: use the version that training returned, with a "
                "queue of at least 1 row"
            )
        z = z.to(accumulate_dtype(z.dtype))
        known = (target[:, None] == labels).any(1)
        return self._loss(z, target.where(known, -1), self.queue.features.to(z.dtype), labels, None, None)

    def _loss(
        self,
        z: Tensor,
        target: Tensor,
        pool: Tensor,
        pool_target: Tensor,
        first: int | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        if self.kind == "nnp":
            return nnp_loss(z, target, pool, pool_target, neighbours=self.neighbours, alpha=self.alpha, first=first)
        radius = self.radius if first is not None else self.radius.detach()
        return asnn_loss(
            z, target, pool, pool_target, radius=radius, neighbours=self.neighbours, first=first, group=group
        )

    def extra_repr(self) -> str:
        width = "" if self.junction is None else f", embedding_dim={self.embedding_dim}"
        alpha = f", alpha={self.alpha}" if self.kind == "nnp" else ""
        queue = len(self.queue.labels)
        return f"{self.in_features}{width}, loss={self.kind!r}, neighbours={self.neighbours}, queue={queue}{alpha}"


def check_options(loss: str, neighbours: int, queue: int, alpha: float) -> None:
    check_name("loss", loss, _LOSSES)
    if check_integer("neighbours", neighbours) < 1 or check_integer("queue", queue) < 0:
        raise ValueError(f"neighbours must be at least 1 and queue at least 0, got {neighbours} and {queue}")
    check_positive("alpha", alpha)
