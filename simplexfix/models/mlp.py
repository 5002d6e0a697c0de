"""Linear maps and multilayer perceptrons on features that a frozen network extracted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["FeatureLinear", "FeatureMLP"]


class FeatureMLP(nn.Module):
    """A multilayer perceptron on features: Linear, batch normalisation and ReLU for each hidden width.

    It maps [B, in_features] to [B, out_features].  Without hidden layers it is the identity; then training fits only
    the head's junction, a linear map of the features.

    Args:
        in_features: width of the input features, at least 1.
        hidden: widths of the layers; `out_features` is the last one, or `in_features` without layers.

    Raises:
        ValueError: a width is not positive.

    Example:
        >>> import torch
        >>> from simplexfix.models import FeatureMLP
        >>> FeatureMLP(32, hidden=(64, 16))(torch.randn(2, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        if min(widths) < 1:
            raise ValueError(f"in_features and hidden must be positive, got {in_features} and {list(hidden)}")
        self.in_features = in_features
        self.hidden = tuple(hidden)
        self.out_features = widths[-1]
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following, bias=False), nn.BatchNorm1d(following), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)  # type: ignore[no-any-return]


class FeatureLinear(nn.Module):
    """A linear map of features, W x + b, initialised with W = I and b = 0.

    Training starts in the space of the features, like fine-tuning of the network that extracted them.

    Args:
        in_features: width of input and output.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = self.out_features = in_features
        self.linear = nn.Linear(in_features, in_features)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)  # type: ignore[no-any-return]
