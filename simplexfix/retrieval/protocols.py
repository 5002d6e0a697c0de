"""How a search is scored: queries with labels against a gallery with labels, by cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_features
from ..functional import cosine_topk

__all__ = ["instance_accuracy", "instance_hits", "nearest_class_mean_accuracy", "nearest_class_mean_hits"]


def nearest_class_mean_accuracy(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """The share of queries whose nearest class template is that of their own class.

        template[c] = F.normalize(gallery[gallery_labels == c].mean(0))
        accuracy = mean( argmax_c (query . template[c]) == query_labels )

    Args:
        query: [Q, d] floating features, Q >= 1.
        query_labels: [Q] int64 class ids, any values.
        gallery: [N, d] features, N >= 1.
        gallery_labels: [N] int64.

    Returns:
        In [0, 1].  A query whose class the gallery lacks counts as wrong.

    Raises:
        TypeError: labels are not int64, or features not floating tensors.
        ValueError: lengths do not match, features are not [rows, d], or there are no rows.

    Reference:
        The protocol of arXiv 2405.02581; docs/math.md.
    """
    return share(nearest_class_mean_hits(query, query_labels, gallery, gallery_labels))


def nearest_class_mean_hits(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> Tensor:
    """Which queries are nearest to the template of their own class; their share is `nearest_class_mean_accuracy`.

    Arguments and errors as there.

    Returns:
        [Q] bool.
    """
    _check_labels(query, query_labels, gallery, gallery_labels)
    classes, _, sums = class_sums(gallery, gallery_labels)
    _, nearest = cosine_topk(query.float(), sums, 1)
    hits: Tensor = classes[nearest[:, 0]] == query_labels
    return hits


def instance_accuracy(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """The share of queries whose nearest gallery item, by cosine, has their label (CMC@1).

    Arguments, result and errors as of `nearest_class_mean_accuracy`.
    """
    return share(instance_hits(query, query_labels, gallery, gallery_labels))


def instance_hits(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> Tensor:
    """Which queries' nearest gallery item has their label; their share is `instance_accuracy`.

    Arguments and errors as there.

    Returns:
        [Q] bool.
    """
    _check_labels(query, query_labels, gallery, gallery_labels)
    _, nearest = cosine_topk(query, gallery, 1)
    return gallery_labels[nearest[:, 0]] == query_labels


def class_sums(gallery: Tensor, gallery_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[C] class ids, ascending; [N] each row's place among them; [C, d] float32 sums, that point where the means do."""
    classes, index = torch.unique(gallery_labels, return_inverse=True)
    sums = torch.zeros(len(classes), gallery.shape[1], dtype=torch.float64, device=gallery.device)
    sums.index_add_(0, index, gallery.double())
    if not sums.isfinite().all():
        bad = (~gallery.isfinite()).any(1).nonzero()
        if len(bad):
            raise ValueError(f"gallery row {int(bad[0])} holds nan or inf")
    return classes, index, check_sums("gallery", sums.float())


def check_sums(name: str, sums: Tensor) -> Tensor:
    """[classes, d] sums of finite rows.

    Raises:
        ValueError: one is more than float32 holds.
    """
    if not sums.isfinite().all():
        raise ValueError(f"{name} has a class whose rows add up to more than float32 holds: scale its features down")
    return sums


def share(hits: Tensor) -> float:
    """Of those that are true."""
    return int(hits.sum()) / len(hits)


def _check_labels(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> None:
    for name, rows, labels in (("query", query, query_labels), ("gallery", gallery, gallery_labels)):
        check_features(name, rows)
        if rows.ndim != 2:
            raise ValueError(f"{name} must have 2 dimensions, got {list(rows.shape)}")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            found = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"{name}_labels must be int64 and a torch.Tensor, got {found}")
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"{name} has {len(rows)} rows, {name}_labels has shape {list(labels.shape)}")
        if not len(rows):
            raise ValueError(f"{name} has no rows")
