"""Augmentation of whole batches on the device where they are, from a generator of one's own."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._devices import to_device_async

__all__ = ["Normalize", "RandomCropFlip", "RandomWarp"]

_BUMPS = 4  # a grid of 4 x 4 control points


@dataclass(frozen=True)
class RandomWarp:
    """Random affine maps with smooth elastic bends, one per image; what comes from outside is 0.

    A sampled point is `A (x, y) + t + sum_c e_c b_c(x, y)`, in coordinates from -1 to 1, with rotation, shear and
    log-scale in A and shift t uniform up to the given limits, and e_c normal at 16 control points with
    bicubic bumps b_c.

    Args:
        rotate: radians.
        log_scale: of each axis.
        shear: of the horizontal axis along the vertical one.
        shift: in half widths of the image.
        elastic: standard deviation at each control point, in half widths.
    """

    rotate: float = 0.2
    log_scale: float = 0.2
    shear: float = 0.2
    shift: float = 0.15
    elastic: float = 0.08

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 or floating [B, H, W] -> float32 [B, 1, H, W], warped."""
        b, height, width = images.shape

        def uniform(limit: float) -> Tensor:
            return (torch.rand(b, generator=generator) * 2 - 1) * limit

        angle, shear = uniform(self.rotate), uniform(self.shear)
        x_scale, y_scale = uniform(self.log_scale).exp(), uniform(self.log_scale).exp()
        cos, sin = angle.cos(), angle.sin()
        x = torch.stack([cos * x_scale, (cos * shear - sin) * y_scale, uniform(self.shift)], 1)
        y = torch.stack([sin * x_scale, (sin * shear + cos) * y_scale, uniform(self.shift)], 1)
        bends = torch.randn(b, 2, _BUMPS * _BUMPS, generator=generator) * self.elastic
        weights = torch.cat([torch.stack([x, y], 1), bends], 2)  # [B, 2, 3 + 16]
        grid = (weights @ _basis(height, width)).view(b, 2, height, width).permute(0, 2, 3, 1)
        return F.grid_sample(images.float().unsqueeze(1), to_device_async(grid, images.device), align_corners=False)


@dataclass(frozen=True)
class Normalize:
    """Pixels as a network takes them, without augmentation: `(x / 255 - mean) / std` by channel.

    Args:
        mean, std: one number for each channel, for pixels in [0, 1].

    Raises:
        ValueError: of different lengths, or a std that is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(0 < s < math.inf for s in self.std):
            raise ValueError(
                f"mean and std must be of one length and std positive, got {list(self.mean)} and {list(self.std)}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, C, H, W]."""
        _check_pixels(images, len(self.mean))
        return (images - _by_channel(self.mean, images.device)) / _by_channel(self.std, images.device)


@dataclass(frozen=True)
class RandomCropFlip:
    """The usual augmentation of 32-pixel photographs: a shifted cut, mirrored or not, one per image, then normalised.

    An image is padded with black (0) on all sides, and a piece of its own size is cut out of that, from anywhere with
    equal chance.  Sizes do not change.

    Args:
        normalize: what follows.
        padding: pixels on each side.
        flip: chance of left and right being exchanged.

    Raises:
        ValueError: a negative padding, or a chance outside [0, 1].
    """

    normalize: Normalize
    padding: int = 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.padding < 0 or not 0 <= self.flip <= 1:
            raise ValueError(f"padding must be 0 or more and flip in [0, 1], got {self.padding} and {self.flip}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, C, H, W]; the generator is on the CPU, the images anywhere."""
        _check_pixels(images, len(self.normalize.mean))
        b, _, height, width = images.shape
        down, right = torch.randint(2 * self.padding + 1, (2, b, 1), generator=generator)
        mirrored = torch.rand(b, 1, generator=generator) < self.flip
        x = torch.arange(width).expand(b, -1)
        rows = to_device_async(torch.arange(height) + down, images.device)  # [B, H] of the padded image
        columns = to_device_async(x.where(~mirrored, width - 1 - x) + right, images.device)  # [B, W]
        padded = F.pad(images, (self.padding,) * 4)
        image = torch.arange(b, device=images.device).view(-1, 1, 1)
        # advanced indices on both sides of a slice: channels come last, and are put back
        cut = padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return self.normalize(cut)


def _check_pixels(images: Tensor, channels: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images must be uint8 [B, {channels}, H, W], got {str(images.dtype).removeprefix('torch.')} "
            f"{list(images.shape)}"
        )


@functools.cache
def _by_channel(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """[1, C, 1, 1], for pixels up to 255."""
    return torch.tensor(numbers, device="cpu").view(1, -1, 1, 1).mul(255).to(device)


@functools.cache
def _basis(height: int, width: int) -> Tensor:
    """[3 + 16, H * W]: x, y and 1 at every pixel, then the bumps of the control points."""
    down = (2 * torch.arange(height) + 1) / height - 1
    right = (2 * torch.arange(width) + 1) / width - 1
    y, x = torch.meshgrid(down, right, indexing="ij")
    points = torch.eye(_BUMPS * _BUMPS).view(-1, 1, _BUMPS, _BUMPS)
    bumps = F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)
    return torch.cat([torch.stack([x, y, torch.ones_like(x)]).flatten(1), bumps.flatten(1)])
