"""Cases of one training step: ResNet-18 in ImageNet form on 32-pixel images, junction, loss, gradients, SGD."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplexfix import SimplexHead
from simplexfix.models import EmbeddingModel, ResNet18
from simplexfix.polytopes import simplex_prototypes


def blocks(num_classes: int) -> tuple[Tensor, ...]:
    """Returns the slots in blocks: prototypes are computed in float64, and a single block would dominate the memory."""
    return torch.arange(num_classes).split(256)


def matrix(num_classes: int, device: str) -> Tensor:
    w = torch.empty(num_classes, num_classes - 1, device=device)
    for slots in blocks(num_classes):
        w[slots] = simplex_prototypes(num_classes, slots).to(device)
    return w


@dataclass
class TrainingStepCase:
    """A batch and K slots; ours against the same step with the simplex as a matrix (z W^T, then cross-entropy)."""

    rows: int
    num_classes: int
    device: str = "cpu"
    error_name = "loss error"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(self.rows, 3, 32, 32, generator=generator).to(self.device)
        self.target = torch.randint(self.num_classes, (self.rows,), generator=generator).to(self.device)

    @property
    def name(self) -> str:
        return f"training step ResNet-18 B={self.rows} K={self.num_classes}"

    def model(self) -> EmbeddingModel:
        torch.manual_seed(0)
        backbone = ResNet18()
        return EmbeddingModel(backbone, SimplexHead(backbone.out_features, self.num_classes)).to(self.device)

    def losses(self) -> dict[str, Callable[[EmbeddingModel], Tensor]]:
        w: list[Tensor] = []  # created by the first call, so that measurements of ours have no matrix in memory

        def dense(model: EmbeddingModel) -> Tensor:
            if not w:
                w.append(matrix(self.num_classes, self.device))
            return F.cross_entropy(model(self.images) @ w[0].T, self.target)

        return {
            "simplexfix": lambda model: model.head.loss(model.backbone(self.images), self.target),
            "dense matrix": dense,
        }

    def candidates(self, compiled: bool = True) -> dict[str, Callable[[], Any]]:
        return {name: self.step(loss) for name, loss in self.losses().items()}

    def limits(self) -> dict[str, Callable[[], Any]]:
        """Returns the step without a classifier, a lower bound for any loss."""
        return {"the step without a loss": self.step(lambda model: model(self.images).sum())}

    def step(self, loss: Callable[[EmbeddingModel], Tensor]) -> Callable[[], Any]:
        model = self.model()
        # a tiny rate: the sum as a loss, or one repeated batch, would drive the weights to nan
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)

        def call() -> None:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        return call

    @torch.no_grad()
    def errors(self, skipped: Collection[str] = ()) -> dict[str, float]:
        """Returns errors of the first step's loss, relative to the loss of the same network in float64."""
        z = self.model().double()(self.images.double())
        parts = (simplex_prototypes(self.num_classes, slots, dtype=z.dtype) for slots in blocks(self.num_classes))
        truth = F.cross_entropy(torch.cat([z @ w.to(self.device).T for w in parts], 1), self.target)
        return {
            name: abs(float(loss(self.model()) / truth) - 1)
            for name, loss in self.losses().items()
            if name not in skipped
        }


CASES = [TrainingStepCase(128, k) for k in (1024, 8192, 32768)]
