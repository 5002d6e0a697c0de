"""Linear maps and fully connected layers on features that another network, frozen, has extracted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["FeatureLinear", "FeatureMLP"]


class FeatureMLP(nn.Module):
    """[B, in_features] -> [B, out_features]: for each width Linear, batch normalisation and ReLU; nothing for none.

    With no hidden layers a head's junction is all that is trained: a linear map of the features.

    Args:
        in_features: width of what comes in.
        hidden: widths of the layers; `out_features` is the last, or `in_features` if there is none.

    Raises:
        ValueError: a width is not positive.
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
    """[B, in_features] -> [B, in_features]: W x + b, from W = I and b = 0 on.

    Its training begins in the space of the features, as fine-tuning the network that made them would.

    Args:
        in_features: width of the features, and of what is returned.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = self.out_features = in_features
        self.linear = nn.Linear(in_features, in_features)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)  # type: ignore[no-any-return]
