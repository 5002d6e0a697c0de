"""Losses and nearest neighbours with the interfaces of pytorch-metric-learning."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import accuracy_calculator, common_functions
from pytorch_metric_learning.utils.inference import return_results
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
from torch import Tensor

from ..functional import cosine_topk
from ..methods import HOC, Simplex
from ..retrieval import CosineIndex
from ..slots import SlotRegistry

__all__ = ["AccuracyCalculator", "CosineKNN", "HOCLoss", "SimplexLoss"]


class SimplexLoss(BaseMetricLossFunction):  # type: ignore[misc]
    """Cross-entropy of embeddings with the fixed classifier of `simplexfix.SimplexHead`.

        losses = simplexfix.functional.simplex_cross_entropy(embeddings, slots.lookup(namespace, labels))
        loss(embeddings, labels) = reducer(weights * losses)    # weights: of a miner's indices_tuple, or 1

    It replaces losses with learnable class weights, such as `NormalizedSoftmaxLoss` and `ArcFaceLoss`, and has no
    parameters.  The embedder ends in a linear map without bias to K - 1 dimensions.

    Args:
        slots: registry that all versions share; K is `slots.num_slots`.
        namespace: namespace of the classes in the registry.
        normalize, scale, margin: as in `simplexfix.functional.simplex_cross_entropy`.
        reducer, embedding_regularizer, embedding_reg_weight: as in all losses of pytorch-metric-learning.

    Raises:
        ValueError: an option is out of range.

    Reference:
        arXiv 2405.02581.
    """

    def __init__(
        self,
        slots: SlotRegistry,
        *,
        namespace: str = "default",
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
    ) -> None:
        super().__init__(
            reducer=reducer, embedding_regularizer=embedding_regularizer, embedding_reg_weight=embedding_reg_weight
        )
        self.method = Simplex(slots, namespace, normalize=normalize, scale=scale, margin=margin)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        """Returns the loss of each row; `forward` reduces them."""
        common_functions.labels_required(labels)
        common_functions.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        losses = self.method.embedding_loss(embeddings, labels, reduction="none")
        return _per_row(losses, labels, indices_tuple)


class HOCLoss(BaseMetricLossFunction):  # type: ignore[misc]
    """HOC, for a model that replaces another one: `SimplexLoss` plus a contrast to the old model's embeddings.

        losses = simplexfix.functional.hoc_loss(embeddings, ref_emb, slots.lookup(namespace, labels))
        loss(embeddings, labels, ref_emb=ref_emb) = reducer(weights * losses)

    `ref_emb` [B, K - 1] are embeddings of the same rows by the old model; they get no gradient.

    Args:
        slots: registry that all versions share; K is `slots.num_slots`.
        namespace: namespace of the classes in the registry.
        lambda_, mu, negatives, anchor, normalize, scale, margin, group: as in `simplexfix.functional.hoc_loss`.
        reducer, embedding_regularizer, embedding_reg_weight: as in all losses of pytorch-metric-learning.

    Raises:
        ValueError: an option is out of range.

    Reference:
        arXiv 2405.02581.
    """

    def __init__(
        self,
        slots: SlotRegistry,
        *,
        namespace: str = "default",
        lambda_: float = 0.1,
        mu: float = 10.0,
        negatives: str = "zero_mask",
        anchor: str = "old",
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        group: dist.ProcessGroup | None = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
    ) -> None:
        super().__init__(
            reducer=reducer, embedding_regularizer=embedding_regularizer, embedding_reg_weight=embedding_reg_weight
        )
        self.method = HOC(
            slots,
            namespace,
            normalize=normalize,
            scale=scale,
            margin=margin,
            lambda_=lambda_,
            mu=mu,
            negatives=negatives,
            anchor=anchor,
            group=group,
        )

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> dict[str, Any]:
        """Returns the loss of each row; `forward` reduces them."""
        common_functions.labels_required(labels)
        if ref_emb is embeddings:
            raise ValueError("ref_emb must be the old model's embeddings of the same rows, got none")
        if ref_labels is not None and not torch.equal(ref_labels, labels):
            raise ValueError("ref_labels must equal labels, because ref_emb holds the same rows; or leave them out")
        losses = self.method.embedding_loss(embeddings, labels, ref_emb, reduction="none")
        return _per_row(losses, labels, indices_tuple)


class CosineKNN:
    """Exact nearest neighbours by cosine similarity, as `knn_func`, without faiss.

        scores, rows = simplexfix.cosine_topk(query, reference, k)

    `AccuracyCalculator(knn_func=CosineKNN())` calls it with a reference.  `InferenceModel(trunk, knn_func=CosineKNN())`
    stores rows first: `train` replaces them, `add` appends, `save` and `load` use files of `simplexfix.CosineIndex`.
    """

    def __init__(self) -> None:
        self.index: CosineIndex | None = None

    def __call__(
        self, query: Tensor, k: int, reference: Tensor | None = None, ref_includes_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the k best rows for each query.

        Args:
            query: [Q, d] floating.
            k: from 1 to the number of rows, or one less if `ref_includes_query`.
            reference: [N, d] floating; None for the stored rows.
            ref_includes_query: whether the first Q rows of the reference are the queries; each is then left out of its
                own search.

        Returns:
            scores [Q, k] float32 cosines in descending order, and rows [Q, k] int64.

        Raises:
            ValueError: k is out of range, or there are no rows.
        """
        rows = len(self.index or ()) if reference is None else len(reference)
        wanted = k + bool(ref_includes_query)
        if not 1 <= wanted <= rows:
            raise ValueError(f"k must lie between 1 and {rows - bool(ref_includes_query)}, the number of rows, got {k}")
        if reference is not None:
            scores, ids = cosine_topk(query, reference.to(query), wanted)
        else:
            assert self.index is not None
            best = self.index.search(query.cpu(), wanted)
            scores, ids = (torch.from_numpy(part).to(query.device) for part in best)
        scores, ids = return_results(scores, ids, ref_includes_query)
        return scores, ids

    def train(self, embeddings: Tensor) -> None:
        """Stores rows [N, d] in place of earlier ones."""
        self.index = None
        self.add(embeddings)

    def add(self, embeddings: Tensor) -> None:
        """Stores more rows [N, d]."""
        if self.index is None:
            self.index = CosineIndex(embeddings.shape[1])
        self.index.add(torch.as_tensor(embeddings).detach().cpu())

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Writes the stored rows by `CosineIndex.save`."""
        if self.index is None:
            raise ValueError("there are no rows to save: call train or add first")
        self.index.save(filename)

    def load(self, filename: str | os.PathLike[str]) -> None:
        """Reads the rows that `save` wrote, in place of the present ones."""
        self.index = CosineIndex.load(filename)


class AccuracyCalculator(accuracy_calculator.AccuracyCalculator):  # type: ignore[misc]
    """The `AccuracyCalculator` of pytorch-metric-learning, exact for class ids beyond 2^24.

    The original rounds labels to float32, so classes 2^24 and 2^24 + 1 become one.  This class first replaces labels by
    their ranks, which changes no metric.  A `label_comparison_fn` gets labels as the original passes them.
    """

    def get_accuracy(
        self,
        query: Any,
        query_labels: Any,
        reference: Any = None,
        reference_labels: Any = None,
        ref_includes_query: bool = False,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Returns the metrics by name, as the original class does."""
        if self.label_comparison_fn is accuracy_calculator.EQUALITY:
            query_labels = torch.as_tensor(query_labels)
            if reference is None:
                query_labels = torch.unique(query_labels, return_inverse=True)[1]
            else:
                both = torch.cat([query_labels, torch.as_tensor(reference_labels).to(query_labels)])
                ranks = torch.unique(both, return_inverse=True)[1]
                query_labels, reference_labels = ranks.split([len(query_labels), len(ranks) - len(query_labels)])
        metrics: dict[str, Any] = super().get_accuracy(
            query, query_labels, reference, reference_labels, ref_includes_query, include, exclude
        )
        return metrics


def _per_row(losses: Tensor, labels: Tensor, indices_tuple: Any) -> dict[str, Any]:
    weights = convert_to_weights(indices_tuple, labels, dtype=losses.dtype)
    rows = torch.arange(len(losses), device=losses.device)
    return {"loss": {"losses": losses * weights, "indices": rows, "reduction_type": "element"}}
