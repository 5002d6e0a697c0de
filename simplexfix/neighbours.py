"""Nearest-neighbour classification losses: NNP as published, and an approximation of ASNN."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_features, check_integer, check_pair, check_positive, check_rows, check_target
from ._reference import accumulate_dtype, no_autocast

__all__ = ["asnn_loss", "nnp_loss"]

_LEAST_VARIANCE = 1e-12  # lower bound of a dimension's variance; avoids division by 0


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
    """Returns the negative log-probability of each row's class among its nearest neighbours on a sphere.

        z = radius * F.normalize(features);  z_j = radius * F.normalize(pool[j])
        N_i = the `neighbours` nearest pool rows of i, without i; plus i's nearest row of its class if N_i has none
        w_c = mean class size / size of class c                                    # counted in the pool
        p_i = sum_{j in N_i, y_j = y_i} w_j exp(-|z_i - z_j|^2) / sum_{j in N_i} w_j exp(-|z_i - z_j|^2)
        loss = -sum_i w_i log p_i / sum_i w_i

    This approximates ASNN from its abstract; the full paper was not available.  The abstract has features on a sphere
    with a learnable radius, pairs from nearest neighbours, and a probability over the neighbourhood.

    Since |z_i - z_j|^2 = 2 radius^2 (1 - cos), radius^2 is an inverse temperature.  The selection of neighbours has no
    gradient.  Rows whose class has no other row in the pool are ignored; if all rows are ignored, the loss is 0.
    Distances and log-sum-exp are computed in float32 or float64, also under autocast.  If the pool is the batch, with
    at most `neighbours` rows and classes of equal size, this is neighbourhood components analysis.

    Args:
        features: [B, d] floating.
        target: [B] int64 class ids; rows with negative ids are ignored.
        pool: [P, d] floating, candidate neighbours, P >= 1; None for the features themselves.
        pool_target: [P] int64 class ids; rows with negative ids are no candidates.
        radius: radius of the sphere, positive; a number, or a scalar tensor that may be trained.
        neighbours: number of neighbours, at least 1.
        first: row of the pool where the features begin, so that no row is its own neighbour; None if the pool does not
            contain them.
        group: process group whose losses are averaged; weights are normalised over all its processes.

    Returns:
        A scalar, float32 or float64, at least 0.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape is wrong, only one of `pool` and `pool_target` is given, `neighbours` is below 1, or `first`
            is outside the pool.

    Reference:
        Zhang et al., IEEE TAI 2024, doi 10.1109/TAI.2024.3477436 (approximated).  Goldberger et al., "Neighbourhood
        Components Analysis", NIPS 2004.

    Example:
        >>> import torch
        >>> from simplexfix.neighbours import asnn_loss
        >>> target = torch.arange(12) % 3
        >>> features = torch.eye(3)[target] + 0.01 * torch.randn(12, 3)
        >>> bool(asnn_loss(features, target, radius=4.0) < asnn_loss(torch.randn(12, 3), target, radius=4.0))
        True
    """
    pool, pool_target, first = _checked(features, target, pool, pool_target, neighbours, first)
    with no_autocast(features):
        rows, pool = F.normalize(_wide(features), dim=1), _wide(pool)
        pool_weights, weights = _class_weights(pool_target, target, rows.dtype)
        with torch.no_grad():
            # norms as in F.normalize, which would copy the pool
            norms = torch.linalg.vector_norm(pool, dim=1).clamp(min=1e-12)
            apart = _masked(-(rows @ pool.T) / norms, pool_target, first)
            same = target[:, None] == pool_target
            nearest = apart.topk(min(neighbours, len(pool)), largest=False)
            of_class = apart.masked_fill(~same, math.inf).min(1, keepdim=True)
            near = torch.cat([nearest.indices, of_class.indices], 1)
            chosen = torch.cat([nearest.values, of_class.values], 1).isfinite()
            same = same.gather(1, near) & chosen
            counted = same.any(1)
            chosen[:, -1] &= ~same[:, :-1].any(1)
            # an ignored row gets log p = 0 from finite terms, so that its gradient is 0 and not nan
            chosen |= ~counted[:, None]
            same |= ~counted[:, None]
            weights = weights * counted
            logs = pool_weights.where(pool_weights > 0, 1).log()[near]
        # only the neighbours get a gradient: a gradient of the whole pool would dominate the time
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
    """Returns the NNP loss: similarity to near rows of other classes minus similarity to near rows of the own class.

        x = (features - pool.mean(0)) / pool.std(0, correction=0);  x_j likewise for pool row j
        h(x) = F.normalize(x) * (1 - exp(-|x| / 2)) / (1 + exp(-|x| / 2))
        s_ij = 2 - |h(x_i) - h(x_j)|
        w_c = mean class size / size of class c                                    # counted in the pool
        N_i = the nearest pool rows without i, until their weights sum to at least `neighbours`
        loss = 1/n sum_i w_i (sum_{j in N_i, y_j != y_i} w_j s_ij - alpha sum_{j in N_i, y_j = y_i} w_j s_ij)

    n is the number of rows that are not ignored; mean and standard deviation are over candidates.  The published
    objective F is n times this loss, with the whole training set as batch and pool.  The loss may be negative.  The
    selection of neighbours has no gradient; mean and standard deviation have one.

    Args:
        features: [B, d] floating.
        target: [B] int64 class ids; rows with negative ids are ignored.
        pool, pool_target, first: as in `asnn_loss`.
        neighbours: sum of the neighbours' weights, at least 1.
        alpha: weight of the neighbours of the same class, positive.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: as in `asnn_loss`.
        ValueError: `alpha` is not positive and finite.

    Reference:
        Wang et al., "Nearest Neighbor Partitioning", IEEE TNNLS 28(10), 2017, doi 10.1109/TNNLS.2016.2580570.

    Example:
        >>> import torch
        >>> from simplexfix.neighbours import nnp_loss
        >>> target = torch.arange(12) % 3
        >>> features = torch.eye(3)[target] + 0.01 * torch.randn(12, 3)
        >>> bool(nnp_loss(features, target) < nnp_loss(torch.randn(12, 3), target))
        True
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
    """Checks the arguments; returns the pool, its targets and the pool row where the features begin."""
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
    """h(x), a map into the unit ball: (1 - exp(-r / 2)) / (1 + exp(-r / 2)) = tanh(r / 4) for r = |x|."""
    return F.normalize(x, dim=1) * torch.tanh(torch.linalg.vector_norm(x, dim=1, keepdim=True) / 4)


def _masked(apart: Tensor, pool_target: Tensor, first: int | None) -> Tensor:
    """Sets distances [B, P] (or other keys with the same order) to inf for non-candidates and for the row itself."""
    apart = apart.masked_fill_(pool_target < 0, math.inf)
    if first is not None:
        apart.diagonal(first).fill_(math.inf)
    return apart


def _class_weights(pool_target: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns weights of pool rows and of batch rows: mean class size / size of the row's class; 0 if ignored.

    Class sizes come from a search in sorted labels; `unique` would synchronize with a GPU.
    """
    ordered = pool_target.sort().values

    def inverse_sizes(labels: Tensor) -> Tensor:
        size = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
        return size.to(dtype).reciprocal().where((labels >= 0) & (size > 0), 0)

    of_pool = inverse_sizes(pool_target)
    mean = (pool_target >= 0).sum() / of_pool.sum().clamp(min=1)  # the sum is the number of classes
    return mean * of_pool, mean * inverse_sizes(target)
