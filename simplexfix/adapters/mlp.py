"""The orthogonal map, followed by a small residual network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_integer, check_positive
from ._moments import Moments
from ._training import descend, draw, row_reader
from .base import Adapter, AdapterMethod
from .maps import ResidualMap
from .procrustes import procrustes_map

__all__ = ["MLP"]


@dataclass(frozen=True)
class MLP(AdapterMethod):
    """Maps new queries into the old space by the map of `Procrustes` and a trained correction; stored vectors stay.

        p = (n(x) - mean_new) Q + mean_old
        adapter(x) = n(p + gelu(p H + c) U)                                    n(v) = v / |v|
        trained by Adam:  loss = mean(1 - adapter(new(item)) . n(old(item))),  U starts at 0

    Args:
        hidden: number of columns of H.
        steps, learning_rate, batch: steps, learning rate and batch size of Adam; the rate falls to 0 as a cosine.
        seed: seed of H's first values and of the batches.

    Reference:
        Drift-Adapter, arXiv 2509.23471: a residual network of 256 units.
    """

    name: ClassVar[str] = "mlp"
    hidden: int = 256
    steps: int = 300
    learning_rate: float = 1e-3
    batch: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("hidden", "steps", "batch"):
            if check_integer(field, getattr(self, field)) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        check_positive("learning_rate", self.learning_rate)

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        features = moments.features
        base = procrustes_map(moments, old, new)
        generator = torch.Generator().manual_seed(self.seed)
        d = base.out_features
        hidden = (torch.randn(d, self.hidden, generator=generator) / d**0.5).to(features.device).requires_grad_()
        bias = torch.zeros(self.hidden, device=features.device, requires_grad=True)
        up = torch.zeros(self.hidden, d, device=features.device, requires_grad=True)
        weight, offset = base.weight.float(), base.bias.float()
        network = ResidualMap(weight, offset, hidden, bias, up)
        turned = row_reader(moments, new, lambda rows: rows @ weight + offset)
        wanted = row_reader(moments, old)

        def loss() -> Tensor:
            at = draw(0, len(features), self.batch, generator)
            return 1 - (network.corrected(turned(at)) * wanted(at)).sum(1).mean()

        descend([hidden, bias, up], loss, steps=self.steps, learning_rate=self.learning_rate)
        trained = [tensor.detach() for tensor in (network.weight, network.bias, hidden, bias, up)]
        return Adapter(ResidualMap(*trained), method=self.described())
