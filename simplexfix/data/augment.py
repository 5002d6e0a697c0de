"""Augmentation of batches on their own device, with an explicit random generator."""

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
    """Random affine maps with smooth elastic deformations, one per image; pixels from outside the image are 0.

        source(x, y) = A (x, y) + t + sum_c e_c b_c(x, y)       # coordinates from -1 to 1

    A consists of a rotation, a shear and a scale.  Their parameters and the shift t are uniform up to the given limits.
    The e_c are normal at 16 control points, and the b_c are bicubic bumps.

    Args:
        rotate: largest rotation in radians.
        log_scale: largest absolute logarithm of the scale of each axis.
        shear: largest shear of the horizontal axis along the vertical one.
        shift: largest shift in half widths of the image.
        elastic: standard deviation at each control point, in half widths of the image.
    """

    rotate: float = 0.2
    log_scale: float = 0.2
    shear: float = 0.2
    shift: float = 0.15
    elastic: float = 0.08

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Warps images.

        Args:
            images: [B, H, W] uint8 or floating.
            generator: generator of all random numbers, on the CPU.

        Returns:
            [B, 1, H, W] float32.
        """
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
    """Per-channel normalisation of pixels, without augmentation.

        (x / 255 - mean) / std

    Args:
        mean, std: one number per channel, for pixels in [0, 1].

    Raises:
        ValueError: the lengths differ, or a std is not positive.

    Example:
        >>> import torch
        >>> from simplexfix.data import Normalize
        >>> images = torch.full((1, 3, 2, 2), 128, dtype=torch.uint8)
        >>> Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(images).shape
        torch.Size([1, 3, 2, 2])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(0 < s < math.inf for s in self.std):
            raise ValueError(
                f"mean and std must be of one length and std positive, got {list(self.mean)} and {list(self.std)}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises images [B, C, H, W] uint8 to float32."""
        _check_pixels(images, len(self.mean))
        return (images - _by_channel(self.mean, images.device)) / _by_channel(self.std, images.device)


@dataclass(frozen=True)
class RandomCropFlip:
    """Random crop with zero padding and random horizontal flip, then normalisation: the usual CIFAR augmentation.

    Crops have the size of the image and a uniform position, drawn per image.

    Args:
        normalize: normalisation of the result.
        padding: width of the padding in pixels, at least 0.
        flip: probability of a horizontal flip, in [0, 1].

    Raises:
        ValueError: the padding is negative, or the probability is outside [0, 1].
    """

    normalize: Normalize
    padding: int = 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.padding < 0 or not 0 <= self.flip <= 1:
            raise ValueError(f"padding must be 0 or more and flip in [0, 1], got {self.padding} and {self.flip}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments images [B, C, H, W] uint8 to float32; the generator is on the CPU, the images on any device."""
        _check_pixels(images, len(self.normalize.mean))
        b, _, height, width = images.shape
        down, right = torch.randint(2 * self.padding + 1, (2, b, 1), generator=generator)
        mirrored = torch.rand(b, 1, generator=generator) < self.flip
        x = torch.arange(width).expand(b, -1)
        rows = to_device_async(torch.arange(height) + down, images.device)  # [B, H] rows of the padded image
        columns = to_device_async(x.where(~mirrored, width - 1 - x) + right, images.device)  # [B, W]
        padded = F.pad(images, (self.padding,) * 4)
        image = torch.arange(b, device=images.device).view(-1, 1, 1)
        # NumPy-style indices on both sides of a slice move the channels to the end; permute moves them back
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
    """Numbers per channel as [1, C, 1, 1], scaled to pixels up to 255."""
    return torch.tensor(numbers, device="cpu").view(1, -1, 1, 1).mul(255).to(device)


@functools.cache
def _basis(height: int, width: int) -> Tensor:
    """Basis functions [3 + 16, H * W] at every pixel: x, y, 1, and the bumps of the control points."""
    down = (2 * torch.arange(height) + 1) / height - 1
    right = (2 * torch.arange(width) + 1) / width - 1
    y, x = torch.meshgrid(down, right, indexing="ij")
    points = torch.eye(_BUMPS * _BUMPS).view(-1, 1, _BUMPS, _BUMPS)
    bumps = F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)
    return torch.cat([torch.stack([x, y, torch.ones_like(x)]).flatten(1), bumps.flatten(1)])
