"""Closed-form rotations of a replacement's junction before training, and of a version's embeddings after training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters._moments import polar
from ..data import Preprocessing
from ..models import EmbeddingModel
from ..polytopes import simplex_prototypes
from .items import Items, embeddings_of

__all__ = ["ALIGN", "JUNCTIONS", "aligned_junction", "aligned_with_older"]

ALIGN = ("none", "older")

JUNCTIONS = ("aligned", "kept")

_VERTEX_WEIGHT = 0.3  # lam of `simplexfix.adapters.SimplexJunction`
_ROWS = 8192  # rows per chunk in float64


def aligned_junction(weight: Tensor, own: Tensor, held: Tensor, slots: Tensor) -> Tensor:
    """Rotates a junction so that its embeddings lie nearest to those of the deployed version.

        T_i = lam t_{y_i} + (1 - lam) u_i                lam = 0.3
        R   = U V^T of the SVD of sum_i n(z_i)^T T_i     maps a row z to z R;  n(v) = v / |v|
        new weight = R^T weight

    z_i is the embedding of item i by this junction, u_i that by the deployed version, and t_{y_i} the vertex of its
    slot y_i.  R is an isometry, so the replacement's search of its own gallery does not change.  This is the map of
    `simplexfix.adapters.SimplexJunction`, but without whitening and centring: the deployed version's embeddings are
    neither whitened nor centred.

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
    """Returns a version with its embeddings rotated towards those of all older versions.

        T_i = n(sum_v n(v(x_i)))                                          v in older, x_i an item;  n(a) = a / |a|
        R   = argmin over isometries of mean |n(z_i) R - T_i|^2           every part has the same weight
            = U V^T of the SVD of sum_parts 1/N_part sum_i n(z_i)^T T_i

    z_i are the version's embeddings without a rotation.  R is an isometry on the space of these embeddings, so the
    version's search of its own gallery does not change, and its queries fit older galleries better.  R becomes the
    `rotation` of the result, in place of the version's own rotation; logits and losses of the head do not use it.  Each
    older version embeds all items once, except those whose embeddings are in `Items.references`.

    Args:
        version: a model with any head, and without `prefixes`.
        older: the older versions as they are deployed, oldest first, of the same width.
        parts: sets of items, such as a task's new ones and the remembered ones; empty sets are ignored.
            `Items.references` of a set hold embeddings by the first older versions, without their rotations.
        preprocessing: preprocessing of all versions; None for each version's own.
        workers: number of processes that read items, as in `EmbeddingModel.extract`.

    Returns:
        A new model with the version's backbone and head; the rotation [d, d] is computed in float64.

    Raises:
        TypeError: the version has prefixes, which a rotation of all dimensions would mix.
        ValueError: there is no older version or no item, or an older version has another width.
    """
    if version.prefixes:
        raise TypeError(
            f"version has prefixes of {', '.join(map(str, version.prefixes))} dimensions for older galleries, which a "
            "rotation of all dimensions would mix"
        )
    widths = [model.embedding_dim for model in older]
    if not widths or set(widths) != {version.embedding_dim}:
        raise ValueError(
            f"older must be one or more versions with embeddings as wide as version's, {version.embedding_dim}, "
            f"got widths {widths}"
        )
    parts = tuple(part for part in parts if len(part.labels))
    if not parts:
        raise ValueError("parts must hold at least one item, got none")
    plain = with_rotation(version, None)
    extract = partial(embeddings_of, preprocessing=preprocessing, workers=workers)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            stored = [] if part.references is None else list(part.references.cpu().unbind(1))
            target = torch.zeros(len(part.labels), version.embedding_dim or 0, dtype=torch.float64)
            for model, rows in zip(older, stored, strict=False):
                target += rows if model.rotation is None else rows @ model.rotation.cpu()
            for model in older[len(stored) :]:
                target += extract(part, model)
            yield extract(part, plain), normalize(target) / len(target)

    basis = _basis(version)
    rotation = basis @ _isometry(basis, pairs())
    return with_rotation(version, rotation.to(next(version.parameters(), basis).device, torch.float32))


def with_rotation(version: EmbeddingModel, rotation: Tensor | None) -> EmbeddingModel:
    """Returns a model that shares backbone and head with the version and has another rotation."""
    made = EmbeddingModel(
        version.backbone,
        version.head,
        preprocessing=version.preprocessing,
        class_names=version.class_names,
        rotation=rotation,
    )
    made.training = version.training
    return made


def _basis(version: EmbeddingModel) -> Tensor:
    """Returns an orthonormal basis [d, r] in float64 of the junction's outputs; the identity without a junction."""
    junction = getattr(version.head, "junction", None)
    if junction is None:
        return torch.eye(version.embedding_dim or 0, dtype=torch.float64)
    reached = [junction.weight] if junction.bias is None else [junction.weight, junction.bias[:, None]]
    basis: Tensor = torch.linalg.qr(torch.cat(reached, 1).detach().double().cpu())[0]
    return basis


def _isometry(basis: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns M [r, d], M M^T = I, that maximizes the sum of tr((own basis M)^T target) over pairs of rows [N, d]."""
    cross = torch.zeros(basis.shape[1], len(basis), dtype=torch.float64)
    for own, target in pairs:
        cross += (own.double() @ basis).T @ target
    return polar(cross)


def _turned(weight: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns R^T weight [d, f]; the isometry R maximizes the sum of tr(R^T own^T target) over pairs of rows [N, d]."""
    basis, inner = torch.linalg.qr(weight.detach().double().cpu())  # embeddings span only these columns
    turned: Tensor = (_isometry(basis, pairs).T @ inner).to(weight)
    return turned
