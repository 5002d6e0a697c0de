"""A backbone and a head: what a version of a search service's model is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EmbeddingModel"]


class EmbeddingModel(nn.Module):
    """Any backbone that returns a vector per item, and a head with `embed` and `loss`.

    Args:
        backbone: [B, ...] inputs -> [B, f] features.
        head: `SimplexHead`, or a module with the same `embed(features)` and `loss(features, target)`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, input: Tensor) -> Tensor:
        """[B, ...] -> [B, d] embeddings, as training sees them."""
        return self.head.embed(self.backbone(input))  # type: ignore[no-any-return, operator]

    @torch.no_grad()
    def extract(self, input: Tensor) -> Tensor:
        """[N, ...] -> [N, d] L2-normalised embeddings, as a gallery stores them; in evaluation mode."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            rows = [nn.functional.normalize(self(batch), dim=1) for batch in torch.split(input, 1024)]
        finally:
            for module in training:  # one by one: a part that was frozen stays so
                module.training = True
        return torch.cat(rows)
