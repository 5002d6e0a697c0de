"""A trained affine map with a penalty on its distance from the orthogonal maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .._checks import check_integer, check_positive
from ._moments import Moments
from ._training import descend, draw, row_reader
from .base import Adapter, AdapterMethod
from .maps import AffineMap
from .procrustes import procrustes_map

__all__ = ["LambdaOrthogonal"]


@dataclass(frozen=True)
class LambdaOrthogonal(AdapterMethod):
    """Maps new queries into the old space, with a penalty on maps far from orthogonal; stored vectors stay.

        D = |W^T W - I|_F      of W [f_new, f_old]; |W W^T - I|_F if the old encoder is wider
        loss = mean(1 - n(n(x) W + b) . n(y)) + sigmoid(alpha (D - lambda)) D
        trained by Adam from the map of `Procrustes`
        adapter(x) = n(n(x) W + b)                         n(v) = v / |v|

    Args:
        lambda_: distance D at which the penalty sets in.
        alpha: steepness of the sigmoid at that distance.
        steps, learning_rate, batch: steps, learning rate and batch size of Adam; the rate falls to 0 as a cosine.
        seed: seed of the batches.

    Reference:
        arXiv 2509.16664.
    """

    name: ClassVar[str] = "lambda_orthogonal"
    lambda_: float = 12.0
    alpha: float = 1.0
    steps: int = 100
    learning_rate: float = 3e-3
    batch: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("steps", "batch"):
            if check_integer(field, getattr(self, field)) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("lambda_", "alpha", "learning_rate"):
            check_positive(field, getattr(self, field))

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        features = moments.features
        base = procrustes_map(moments, old, new)
        generator = torch.Generator().manual_seed(self.seed)
        w, b = (tensor.float().clone().requires_grad_() for tensor in (base.weight, base.bias))

        given, wanted = row_reader(moments, new), row_reader(moments, old)

        def loss() -> Tensor:
            at = draw(0, len(features), self.batch, generator)
            mapped = normalize(given(at) @ w + b, dim=1)
            return 1 - (mapped * wanted(at)).sum(1).mean() + self.penalty(w)

        descend([w, b], loss, steps=self.steps, learning_rate=self.learning_rate)
        return Adapter(AffineMap(w.detach(), b.detach()), method=self.described())

    def penalty(self, w: Tensor) -> Tensor:
        """Returns the second term of the loss."""
        fixed = w.detach()
        square = fixed.T @ w if w.shape[0] >= w.shape[1] else w @ fixed.T
        # the distance is symmetric in both factors of the product: differentiate one and double it, one product less
        square = 2 * square - square.detach()
        # 1e-12 under the root, since the norm has no gradient at an orthogonal map
        distance = ((square - torch.eye(len(square), dtype=w.dtype, device=w.device)).square().sum() + 1e-12).sqrt()
        return torch.sigmoid(self.alpha * (distance - self.lambda_)) * distance
