"""The junction of a replacement, turned in closed form into the space of the deployed version."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters._moments import polar
from ..polytopes import simplex_prototypes

__all__ = ["JUNCTIONS", "aligned_junction"]

JUNCTIONS = ("aligned", "kept")

_VERTEX_WEIGHT = 0.3  # lam of `simplexfix.adapters.SimplexJunction`
_ROWS = 8192  # at a time, in float64


def aligned_junction(weight: Tensor, own: Tensor, held: Tensor, slots: Tensor) -> Tensor:
    """The junction, turned so that its embeddings lie nearest to the deployed version's.

        T_i = lam t_{y_i} + (1 - lam) u_i                lam = 0.3
        R   = U V^T of the SVD of sum_i n(z_i)^T T_i     rotates z, a row, to z R
        new weight = R^T weight

    with z_i the embeddings as they are and u_i the deployed version's.  R is an isometry: a replacement searches its
    own gallery as before.  It is the map of `simplexfix.adapters.SimplexJunction` without whitening and centring, which
    the deployed version's embeddings do not have.

    Args:
        weight: [d, f] of the junction.
        own: [N, d] unit rows n(z_i) of items.
        held: [N, d] unit rows u_i of the same items.
        slots: [N] int64 of their classes, of d + 1.

    Returns:
        [d, f], of the dtype and on the device of `weight`; computed in float64.
    """
    basis, inner = torch.linalg.qr(weight.detach().double().cpu())  # z lies in f of the d dimensions
    cross = torch.zeros(basis.shape[1], len(weight), dtype=torch.float64)
    for start in range(0, len(own), _ROWS):
        rows = slice(start, start + _ROWS)
        vertices = simplex_prototypes(own.shape[1] + 1, slots[rows], dtype=torch.float64)
        targets = _VERTEX_WEIGHT * vertices + (1 - _VERTEX_WEIGHT) * held[rows].double()
        cross += (own[rows].double() @ basis).T @ targets
    turned: Tensor = (polar(cross).T @ inner).to(weight)
    return turned
