"""ResNet-18 for small photographs, with the stem for ImageNet or for CIFAR."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_name

__all__ = ["ResNet18"]

_STEMS = ("cifar", "imagenet")


class ResNet18(nn.Module):
    """ResNet-18 without its classifier: it maps images [B, in_channels, H, W] to features [B, 8 width].

    The features are the mean over the last feature map.  Four stages have 1, 2, 4 and 8 times `width` channels, and two
    residual blocks of two 3 x 3 convolutions each.  Each stage after the first halves height and width.

        stem       first layers                              side of the stages for 32-pixel images
        imagenet   7 x 7 of stride 2, 3 x 3 max-pool of 2     8, 4, 2, 1
        cifar      3 x 3 of stride 1                          32, 16, 8, 4

    Stem "imagenet" is 15 times as fast.  Parameter names are those of torchvision's `resnet18`; with stem
    "imagenet" and width 64 its weights can be loaded, except `fc`.  Initialisation is the same as there: He's normal
    distribution, scaled by fan-out.

    Args:
        stem: "imagenet" or "cifar".
        width: channels of the first stage; 64 in the paper.
        in_channels: channels of the images.

    Raises:
        ValueError: the stem is unknown, or a number is not positive.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385.

    Example:
        >>> import torch
        >>> from simplexfix.models import ResNet18
        >>> ResNet18(width=16).eval()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """

    def __init__(self, stem: str = "imagenet", *, width: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        check_name("stem", stem, _STEMS)
        if width < 1 or in_channels < 1:
            raise ValueError(f"width and in_channels must be positive, got {width} and {in_channels}")
        self.stem = stem
        self.width = width
        self.in_channels = in_channels
        self.out_features = 8 * width
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(_Block(width, width, 1), _Block(width, width, 1))
        self.layer2 = nn.Sequential(_Block(width, 2 * width, 2), _Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(_Block(2 * width, 4 * width, 2), _Block(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(_Block(4 * width, 8 * width, 2), _Block(8 * width, 8 * width, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # In channels_last oneDNN writes out of bounds in the gradient of a 1 x 1 convolution of stride 2 with fewer
        # input channels than its block size of 8 or 16: github.com/uxlfoundation/oneDNN/issues/6035
        self._layout = torch.channels_last if width >= 16 else torch.contiguous_format
        self.to(memory_format=self._layout)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must have shape [B, {self.in_channels}, H, W], got {list(images.shape)}")
        x = images.contiguous(memory_format=self._layout)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        maps: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return maps.mean((2, 3))


class _Block(nn.Module):
    """relu(x' + bn(conv(relu(bn(conv(x)))))); x' is x, or a 1 x 1 convolution of x if the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))
            if stride > 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(_convolved(self.conv1, x)), inplace=True)
        return F.relu(shortcut + self.bn2(_convolved(self.conv2, x)), inplace=True)


def _convolved(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Returns a 3 x 3 convolution with padding 1, by a matrix product if the result has one pixel.

    The product skips the taps that multiply only padding; a convolution would take several times as long.
    """
    height, width = x.shape[2:]
    if max(height, width) > convolution.stride[0]:
        return convolution(x)  # type: ignore[no-any-return]
    taps = convolution.weight[:, :, 1 : 1 + height, 1 : 1 + width]
    return F.linear(x.flatten(1), taps.flatten(1))[:, :, None, None]
