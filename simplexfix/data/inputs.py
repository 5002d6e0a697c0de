"""Preprocessings: they turn raw data into network inputs, and their plain parameters are saved with a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Normalize

__all__ = ["Drawings", "Photographs", "Preprocessing", "Tokens", "Vectors"]


@dataclass(frozen=True)
class Vectors:
    """Preprocessing for features of another network: a check and a cast to float32.

    Args:
        width: number of columns.
    """

    width: int

    def __call__(self, rows: Tensor) -> Tensor:
        """Casts floating rows [B, width] to float32."""
        if not rows.is_floating_point() or rows.shape[1:] != (self.width,):
            raise ValueError(f"rows must be floating [B, {self.width}], got {_describe(rows)}")
        return rows.float()


@dataclass(frozen=True)
class Drawings:
    """Preprocessing for drawings: paper is 0, ink is above 0.

    Args:
        side: side of the images in pixels.
    """

    side: int

    def __call__(self, images: Tensor) -> Tensor:
        """Converts images [B, side, side] to float32 [B, 1, side, side]."""
        if images.shape[1:] != (self.side, self.side):
            raise ValueError(f"images must be [B, {self.side}, {self.side}], got {_describe(images)}")
        return images.float().unsqueeze(1)


@dataclass(frozen=True)
class Photographs:
    """Preprocessing for photographs of one size, such as `load_image_folder` returns.

    Args:
        side: side of the images in pixels.
        normalize: normalisation of the pixels.
    """

    side: int
    normalize: Normalize

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises images [B, C, side, side] uint8 to float32."""
        if images.shape[2:] != (self.side, self.side):
            raise ValueError(f"images must be uint8 [B, C, {self.side}, {self.side}], got {_describe(images)}")
        return self.normalize(images)


@dataclass(frozen=True)
class Tokens:
    """Preprocessing for tokenized texts (`simplexfix.models.token_ids`): a check of shape and dtype.

    Args:
        length: tokens per row, padding included.
    """

    length: int

    def __call__(self, ids: Tensor) -> Tensor:
        """Returns ids [B, length] int64 unchanged."""
        if ids.dtype != torch.int64 or ids.shape[1:] != (self.length,):
            raise ValueError(f"ids must be int64 [B, {self.length}], got {_describe(ids)}")
        return ids


Preprocessing = Drawings | Normalize | Photographs | Tokens | Vectors


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
