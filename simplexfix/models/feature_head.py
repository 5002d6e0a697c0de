"""The head of an encoder without a classifier."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FeatureHead"]


class FeatureHead(nn.Module):
    """A head without classifier and weights: the embedding is the features.

    Args:
        embedding_dim: width of the features.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim

    def embed(self, features: Tensor) -> Tensor:
        """Returns the features [B, embedding_dim] unchanged."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Returns the features [B, embedding_dim] unchanged."""
        return features

    def extra_repr(self) -> str:
        return f"embedding_dim={self.embedding_dim}"
