"""Augmentation of whole batches on the device where they are, from a generator of one's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RandomWarp"]

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
        return F.grid_sample(images.float().unsqueeze(1), grid.to(images.device), align_corners=False)


@functools.cache
def _basis(height: int, width: int) -> Tensor:
    """[3 + 16, H * W]: x, y and 1 at every pixel, then the bumps of the control points."""
    down = (2 * torch.arange(height) + 1) / height - 1
    right = (2 * torch.arange(width) + 1) / width - 1
    y, x = torch.meshgrid(down, right, indexing="ij")
    points = torch.eye(_BUMPS * _BUMPS).view(-1, 1, _BUMPS, _BUMPS)
    bumps = F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)
    return torch.cat([torch.stack([x, y, torch.ones_like(x)]).flatten(1), bumps.flatten(1)])
