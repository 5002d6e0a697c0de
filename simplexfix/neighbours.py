"""Classification losses over nearest neighbours: NNP as published, and ASNN, an approximation of ours."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_features, check_integer, check_pair, check_positive, check_rows, check_target
from ._reference import accumulate_dtype, no_autocast

__all__ = ["asnn_loss", "nnp_loss"]

_LEAST_VARIANCE = 1e-12  # of a dimension, so that one without any spread is not divided by 0


def asnn_loss(
    features: Tensor,
    target: Tensor,
    pool: Tensor | None = None,
    pool_target: Tensor | None = None,
    *,
    radius: Tensor | float,
    neighbours: int = 10,
    first: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Negative log-probability of the row's class among its nearest neighbours on a sphere.

        z = radius * F.normalize(features);  z_j likewise of pool row j
        N_i = the `neighbours` rows of the pool nearest to i, without i; and i's nearest of its class if none is there
        w_c = mean class size / size of class c                                    # counted in the pool
        p_i = sum_{j in N_i, y_j = y_i} w_j exp(-|z_i - z_j|^2) / sum_{j in N_i} w_j exp(-|z_i - z_j|^2)
        loss = -sum_i w_i log p_i / sum_i w_i

    This is not the authors' ASNN, of which the abstract alone is known to us: features on a sphere of learnable radius,
    pairs from nearest neighbours, a probability over the neighbourhood.  It is our approximation of that.

    |z_i - z_j|^2 = 2 radius^2 (1 - cos): radius^2 is an inverse temperature.  The choice of neighbours is not
    differentiated.  Rows whose class has no other row in the pool are left out; where none is left the loss is 0.
    Distances and log-sum-exp are in float32 at least, under autocast too.  With a pool that is the batch, no more rows
    than `neighbours` and classes of equal size this is neighbourhood component analysis.

    Args:
        features: [B, d] floating.
        target: [B] int64 class ids; rows with a negative one do not count.
        pool: [P, d] rows that neighbours are taken from, P >= 1; None for the features themselves.
        pool_target: [P] int64 class ids; rows with a negative one are nobody's neighbours.
        radius: of the sphere, positive; a scalar tensor, which may be trained, or a number.
        neighbours: at least 1.
        first: where in the pool the features begin, so that no row is its own neighbour; None if they are not in it.
        group: processes whose losses are averaged: the weights are then normalised over all of them.

    Returns:
        Scalar, float32 or float64, 0 or more.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: wrong shapes, a pool without its targets, `neighbours` below 1, or `first` outside the pool.

    Reference:
        Zhang et al., IEEE TAI 2024, doi 10.1109/TAI.2024.3477436 (approximated).  Goldberger et al., "Neighbourhood
        Components Analysis", NIPS 2004.
    """
    pool, pool_target, first = _checked(features, target, pool, pool_target, neighbours, first)
    with no_autocast(features):
        rows, pool = F.normalize(_wide(features), dim=1), _wide(pool)
        pool_weights, weights = _class_weights(pool_target, target, rows.dtype)
        with torch.no_grad():
            norms = torch.linalg.vector_norm(pool, dim=1).clamp(min=1e-12)  # as F.normalize, which would copy the pool
            apart = _masked(-(rows @ pool.T) / norms, pool_target, first)
            same = target[:, None] == pool_target
            nearest = apart.topk(min(neighbours, len(pool)), largest=False)
            of_class = apart.masked_fill(~same, math.inf).min(1, keepdim=True)
            near = torch.cat([nearest.indices, of_class.indices], 1)
            chosen = torch.cat([nearest.values, of_class.values], 1).isfinite()
            same = same.gather(1, near) & chosen
            counted = same.any(1)
            chosen[:, -1] &= ~same[:, :-1].any(1)
            # a row that is left out gets log p = 0 from finite terms: its gradient is 0, and not nan
            chosen |= ~counted[:, None]
            same |= ~counted[:, None]
            weights = weights * counted
            logs = pool_weights.where(pool_weights > 0, 1).log()[near]
        # only neighbours are normalised with a gradient: that of the whole pool would be most of the time
        cosines = torch.einsum("bd,bnd->bn", rows, F.normalize(pool[near], dim=2))
        logits = (logs - 2 * radius**2 * (1 - cosines)).masked_fill(~chosen, -math.inf)
        losses = logits.logsumexp(1) - logits.masked_fill(~same, -math.inf).logsumexp(1)
        total = weights.sum()
        if group is not None:
            dist.all_reduce(total, group=group)
            total /= dist.get_world_size(group)
        return (weights * losses).sum() / total.where(total > 0, 1)


def nnp_loss(
    features: Tensor,
    target: Tensor,
    pool: Tensor | None = None,
    pool_target: Tensor | None = None,
    *,
    neighbours: int = 10,
    alpha: float = 1.0,
    first: int | None = None,
) -> Tensor:
    """Nearest neighbour partitioning: similarity to near rows of other classes, less that to near ones of the same.

        x = (features - mean) / std, both of the pool;  x_j likewise of pool row j
        h(x) = F.normalize(x) * (1 - exp(-|x| / 2)) / (1 + exp(-|x| / 2))
        s_ij = 2 - |h(x_i) - h(x_j)|
        w_c = mean class size / size of class c                                    # counted in the pool
        N_i = the nearest rows of the pool without i, until their weights add up to `neighbours`
        loss = 1/B sum_i w_i (sum_{j in N_i, y_j != y_i} w_j s_ij - alpha sum_{j in N_i, y_j = y_i} w_j s_ij)

    The published F is B times this, with the whole training set for batch and pool.  The loss may be negative.  The
    choice of neighbours is not differentiated, mean and std are.

    Args:
        features: [B, d] floating.
        target: [B] int64 class ids; rows with a negative one do not count.
        pool, pool_target, first: of `asnn_loss`.
        neighbours: at least 1.
        alpha: weight of the neighbours of the same class, positive.

    Returns:
        Scalar, float32 or float64.

    Raises:
        TypeError, ValueError: as `asnn_loss`, and `alpha` not positive and finite.

    Reference:
        Wang et al., "Nearest Neighbor Partitioning", IEEE TNNLS 28(10), 2017, doi 10.1109/TNNLS.2016.2580570.
    """
    check_positive("alpha", alpha)
    pool, pool_target, first = _checked(features, target, pool, pool_target, neighbours, first)
    with no_autocast(features):
        rows, pool = _wide(features), _wide(pool)
        counts = (pool_target >= 0).to(pool.dtype)[:, None]
        number = counts.sum().clamp(min=1)
        mean = (counts * pool).sum(0) / number
        std = ((counts * (pool - mean).square()).sum(0) / number).clamp(min=_LEAST_VARIANCE).sqrt()
        rows, pool = (_squashed((part - mean) / std) for part in (rows, pool))
        pool_weights, weights = _class_weights(pool_target, target, rows.dtype)
        with torch.no_grad():
            apart = _masked(torch.cdist(rows, pool), pool_target, first)
            order = apart.sort(1).indices
            ordered = pool_weights[order]
            taken = (ordered.cumsum(1) - ordered < neighbours) & apart.gather(1, order).isfinite()
            signed = torch.where(target[:, None] == pool_target[order], -alpha * ordered, ordered)
            factors = weights[:, None] * signed * taken
        similarities = 2 - torch.cdist(rows, pool).gather(1, order)
        return (factors * similarities).sum() / (target >= 0).sum().clamp(min=1)


def _checked(
    features: Tensor,
    target: Tensor,
    pool: Tensor | None,
    pool_target: Tensor | None,
    neighbours: int,
    first: int | None,
) -> tuple[Tensor, Tensor, int | None]:
    """The pool, its targets, and where in it the features begin."""
    check_rows("features", features)
    check_target(target, features)
    if check_integer("neighbours", neighbours) < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    if (pool is None) != (pool_target is None):
        raise ValueError("pool and pool_target belong together: pass both, or neither for the batch itself")
    if pool is None or pool_target is None:
        if first is not None:
            raise ValueError("first is a row of the pool; leave it out where the batch is the pool")
        pool, pool_target, first = features, target, 0
    check_features("pool", pool)
    check_pair("features", features, "pool", pool)
    if pool.ndim != 2 or not len(pool) or pool.shape[1] != features.shape[1]:
        raise ValueError(
            f"pool must have shape [P, {features.shape[1]}] like the features, P >= 1, got {list(pool.shape)}"
        )
    if pool_target.dtype != torch.int64 or pool_target.shape != pool.shape[:1]:
        raise ValueError(
            f"pool_target must be int64 of shape [{len(pool)}], one class id for each row of the pool, "
            f"got {pool_target.dtype} of shape {list(pool_target.shape)}"
        )
    if first is not None and not 0 <= first <= len(pool) - len(features):
        raise ValueError(
            f"first must lie in [0, {len(pool) - len(features)}], for a pool of {len(pool)} rows that holds all "
            f"{len(features)} of the batch, got {first}"
        )
    return pool, pool_target, first


def _wide(rows: Tensor) -> Tensor:
    return rows.to(accumulate_dtype(rows.dtype))


def _squashed(x: Tensor) -> Tensor:
    """h(x) into the unit ball: (1 - exp(-r / 2)) / (1 + exp(-r / 2)) = tanh(r / 4)."""
    return F.normalize(x, dim=1) * torch.tanh(torch.linalg.vector_norm(x, dim=1, keepdim=True) / 4)


def _masked(apart: Tensor, pool_target: Tensor, first: int | None) -> Tensor:
    """[B, P] distances, or what orders alike; infinite to rows that are nobody's neighbour and to the row itself."""
    apart = apart.masked_fill_(pool_target < 0, math.inf)
    if first is not None:
        apart.diagonal(first).fill_(math.inf)
    return apart


def _class_weights(pool_target: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean class size / size of its class, of pool rows and of batch rows; 0 for rows that do not count.

    Sorted labels are searched, for a count of distinct values would wait for a GPU.
    """
    ordered = pool_target.sort().values

    def inverse_sizes(labels: Tensor) -> Tensor:
        size = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
        return size.to(dtype).reciprocal().where((labels >= 0) & (size > 0), 0)

    of_pool = inverse_sizes(pool_target)
    mean = (pool_target >= 0).sum() / of_pool.sum().clamp(min=1)  # the sum is the number of classes
    return mean * of_pool, mean * inverse_sizes(target)
