"""QDC (query drift compensation): contrastive fine-tuning of a text encoder with distillation from the old encoder."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_new_and_old, check_number, check_pair, check_positive, check_rows
from .._gather import all_rows, rank_of
from .._reference import accumulate_dtype, no_autocast
from ..models import EmbeddingModel, FeatureHead
from .fd import cosine_distances

__all__ = ["QDC", "info_nce"]


def info_nce(query: Tensor, document: Tensor, *, scale: float = 50.0, group: dist.ProcessGroup | None = None) -> Tensor:
    """Returns the InfoNCE loss: cross-entropy of each query's positive document among all documents.

        loss = 1/B sum_i [ log sum_j exp(scale q_i . d_j) - scale q_i . d_{i n} ]     # q, d: L2-normalised rows

    There are n documents per query.  The inner sum runs over the documents of all processes of the group.  Gradients
    flow to documents of other processes, so the mean over processes is the loss of the global batch.

    Args:
        query: [B, d] floating.
        document: [B n, d] in the same dtype.  Rows i n to i n + n - 1 belong to query i: its positive document, then
            its hard negatives.
        scale: inverse temperature, positive.
        group: process group whose documents are gathered; None for this process alone.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or batches of the group differ in shape.

    Example:
        >>> import torch
        >>> from simplexfix.methods import info_nce
        >>> query, document = torch.randn(8, 16), torch.randn(8, 16)
        >>> bool(info_nce(query, query) < info_nce(query, document))
        True
    """
    check_rows("query", query)
    check_rows("document", document)
    check_pair("query", query, "document", document)
    check_positive("scale", scale)
    if not len(query) or not len(document) or len(document) % len(query) or document.shape[1] != query.shape[1]:
        raise ValueError(
            f"document must be [B n, d] for query [B, d], B and n at least 1, got {list(document.shape)} for "
            f"{list(query.shape)}"
        )
    wide = accumulate_dtype(query.dtype)
    query, document = F.normalize(query.to(wide)), F.normalize(document.to(wide))
    positive = torch.arange(len(query), device=query.device) * (len(document) // len(query))
    if group is not None:
        positive = positive + rank_of(document, group) * len(document)
        document = all_rows(document, group)
    with no_autocast(query):  # in bfloat16, logits up to 50 would be rounded to multiples of 0.25
        return F.cross_entropy(scale * query @ document.T, positive)


class QDC:
    """InfoNCE between queries and documents, plus distillation from the old encoder.

        loss = info_nce(q, d) + weight * L_kd
        L_kd = mean(1 - q . q_old) + mean(1 - d . d_old)        # 0 without an old encoder

    q and d are the unit embeddings of the batch's queries and of all its documents, hard negatives included.  q_old and
    d_old are those of the old encoder, without gradient.  The query drift is measured after training
    (`simplexfix.adapters.QueryDrift`).

    Inputs are [B, 2 + n, ...]: per row a query, its positive document and n hard negatives.  The target is not used.  A
    document that is relevant to another query of the batch still counts as that query's negative, as in the authors'
    code.

    Args:
        weight: weight of the distillation, at least 0.  With 0 the old encoder does not run.  The authors' code
            multiplies InfoNCE by the number of processes P, so its weight 1 corresponds to 1 / P here.
        scale, group: as in `info_nce`.

    Raises:
        TypeError, ValueError: `weight` is negative or infinite, or `scale` is not positive.  `loss` raises for inputs
            without documents and for an old encoder of another width.

    Reference:
        Goswami et al., "Query Drift Compensation: Enabling Compatibility in Continual Learning of Retrieval Embedding
        Models", arXiv 2506.00037.
    """

    def __init__(self, *, weight: float = 1.0, scale: float = 50.0, group: dist.ProcessGroup | None = None) -> None:
        check_number("weight", weight)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be 0 or more and finite, got {weight}")
        check_positive("scale", scale)
        self.weight = weight
        self.scale = scale
        self.group = group

    def head(self, in_features: int) -> FeatureHead:
        return FeatureHead(in_features)

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        """Does nothing: there is no classifier."""

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        if input.ndim < 3 or input.shape[1] < 2:
            raise ValueError(
                "input must be [B, 2 + n, ...], a query, its positive document and n hard negatives in each row, got "
                f"{list(input.shape)}"
            )
        queries, documents = input[:, 0], input[:, 1:].flatten(0, 1)
        query, document = model(queries), model(documents)
        loss = info_nce(query, document, scale=self.scale, group=self.group)
        if old is None or self.weight == 0:
            return loss
        with torch.no_grad():
            references = old(queries), old(documents)
        kept = sum(_mean_distance(new, reference) for new, reference in zip((query, document), references, strict=True))
        return loss + self.weight * kept


def _mean_distance(new: Tensor, old: Tensor) -> Tensor:
    check_new_and_old("new", new, old)
    return cosine_distances(new, old).mean()
