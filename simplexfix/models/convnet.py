"""A small plain convolutional network for small drawings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SmallConvNet"]


class SmallConvNet(nn.Module):
    """[B, 1, 28, 28] images -> [B, out_features] features, batch-normalised.

    Three 3 x 3 convolutions at 14, 14 and 7 pixels a side (the first sees 2 x 2 pixels as channels, which
    quarters its work on a CPU), each followed by batch normalisation and ReLU, then one linear layer.

    Args:
        width: channels of the first convolution; the last has twice as many.
        out_features: width of the features.
    """

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        if width < 1 or out_features < 1:
            raise ValueError(f"width and out_features must be positive, got {width} and {out_features}")
        self.width = width
        self.out_features = out_features
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(2 * width * 9, out_features, bias=False),
            nn.BatchNorm1d(out_features),
        )
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 28, 28):
            raise ValueError(f"images must have shape [B, 1, 28, 28], got {list(images.shape)}")
        return self.layers(images.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]
