"""Rotation of junctions in closed form: of a replacement before its training, of a version after it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters._moments import polar
from ..data import Preprocessing
from ..models import EmbeddingModel, NeighbourHead
from ..polytopes import simplex_prototypes
from .items import Items, embeddings_of

__all__ = ["ALIGN", "JUNCTIONS", "aligned_junction", "aligned_with_older"]

ALIGN = ("none", "older")

JUNCTIONS = ("aligned", "kept")

_VERTEX_WEIGHT = 0.3  # lam of `simplexfix.adapters.SimplexJunction`
_ROWS = 8192  # at a time, in float64


def aligned_junction(weight: Tensor, own: Tensor, held: Tensor, slots: Tensor) -> Tensor:
    """Turns a junction so that its embeddings lie nearest to those of the deployed version.

        T_i = lam t_{y_i} + (1 - lam) u_i                lam = 0.3
        R   = U V^T of the SVD of sum_i n(z_i)^T T_i     rotates z, a row, to z R
        new weight = R^T weight

    z_i are the embeddings by this junction, u_i those by the deployed version, and t the vertices.  R is an isometry:
    the replacement searches its own gallery as before.  This is the map of `simplexfix.adapters.SimplexJunction`
    without whitening and centring: embeddings of the deployed version have neither.

    Args:
        weight: [d, f] weight of the junction.
        own: [N, d] unit rows n(z_i) of items.
        held: [N, d] unit rows u_i of the same items.
        slots: [N] int64, slots of their classes, in [0, d].

    Returns:
        The new weight [d, f], in the dtype and on the device of `weight`; computed in float64.
    """

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(own), _ROWS):
            rows = slice(start, start + _ROWS)
            vertices = simplex_prototypes(own.shape[1] + 1, slots[rows], dtype=torch.float64)
            yield own[rows], _VERTEX_WEIGHT * vertices + (1 - _VERTEX_WEIGHT) * held[rows].double()

    return _turned(weight, pairs())


def aligned_with_older(
    version: EmbeddingModel,
    older: Sequence[EmbeddingModel],
    *parts: Items,
    preprocessing: Preprocessing | None = None,
    workers: int = 0,
) -> EmbeddingModel:
    """Returns a copy of a version whose junction is turned towards the embeddings of all older versions.

        T_i = n(sum_v n(v(x_i)))                                          v in older
        R   = argmin over isometries of mean |n(z_i) R - T_i|^2           every part has the same weight
            = U V^T of the SVD of sum_parts 1/N_part sum_i n(z_i)^T T_i
        new weight = R^T weight

    R is an isometry, so the version's search of its own gallery stays as it is, and its queries fit older galleries
    better.  The head must classify by neighbours, which an isometry does not change.  The vertices of a simplex and a
    learned classifier would not turn with the embeddings.  Each older version embeds all items once, except those whose
    embeddings are in `Items.references`.

    Args:
        version: a model with a `NeighbourHead` that has a junction.
        older: the older versions as they are deployed, oldest first, of the same width.
        parts: sets of items, such as a task's new ones and the remembered ones; empty sets are ignored.
        preprocessing: of all versions; None for each version's own.
        workers: number of processes that read items, as in `EmbeddingModel.extract`.

    Returns:
        The copy, in evaluation mode and with an empty queue; the weight is computed in float64.

    Raises:
        TypeError: the head is not a `NeighbourHead` with a junction.
        ValueError: there is no older version or no item, or an older version has another width.
    """
    if not isinstance(version.head, NeighbourHead) or version.head.junction is None:
        raise TypeError(
            "version must have a NeighbourHead with a junction, as HOC with a classification by neighbours trains, got "
            f"{type(version.head).__name__}: the classifier of other heads would not turn with the embeddings"
        )
    widths = [model.embedding_dim for model in older]
    if not widths or set(widths) != {version.embedding_dim}:
        raise ValueError(
            f"older must be one or more versions with embeddings as wide as version's, {version.embedding_dim}, "
            f"got widths {widths}"
        )
    parts = tuple(part for part in parts if len(part.labels))
    if not parts:
        raise ValueError("parts must hold items that all versions embed, got none")

    extract = partial(embeddings_of, preprocessing=preprocessing, workers=workers)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            stored = [] if part.references is None else list(part.references.cpu().unbind(1))
            target = torch.zeros(len(part.labels), version.embedding_dim or 0, dtype=torch.float64)
            for rows in stored[: len(older)]:
                target += rows
            for model in older[len(stored) :]:
                target += extract(part, model)
            yield extract(part, version), normalize(target) / len(target)

    turned = copy.deepcopy(version).eval()
    assert isinstance(turned.head, NeighbourHead)
    assert turned.head.junction is not None
    with torch.no_grad():
        turned.head.junction.weight.copy_(_turned(version.head.junction.weight, pairs()))
    turned.head.queue.clear()  # its rows were embedded before the turn
    return turned


def _turned(weight: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """R^T weight [d, f], where the isometry R maximizes the sum of tr(R^T own^T target) over pairs of rows [N, d]."""
    basis, inner = torch.linalg.qr(weight.detach().double().cpu())  # z lies in f of the d dimensions
    cross = torch.zeros(basis.shape[1], len(weight), dtype=torch.float64)
    for own, target in pairs:
        cross += (own.double() @ basis).T @ target
    turned: Tensor = (polar(cross).T @ inner).to(weight)
    return turned
