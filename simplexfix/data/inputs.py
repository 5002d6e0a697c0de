"""What a network takes of what there is: plain values, so that a model's folder can keep them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Normalize

__all__ = ["Drawings", "Photographs", "Preprocessing", "Tokens", "Vectors"]


@dataclass(frozen=True)
class Vectors:
    """Features that another network has extracted, as they are.

    Args:
        width: of a row.
    """

    width: int

    def __call__(self, rows: Tensor) -> Tensor:
        """Floating [B, width] -> float32 [B, width]."""
        if not rows.is_floating_point() or rows.shape[1:] != (self.width,):
            raise ValueError(f"rows must be floating [B, {self.width}], got {_describe(rows)}")
        return rows.float()


@dataclass(frozen=True)
class Drawings:
    """Ink as 1 or more, paper as 0.

    Args:
        side: of the images in pixels.
    """

    side: int

    def __call__(self, images: Tensor) -> Tensor:
        """[B, side, side] -> float32 [B, 1, side, side]."""
        if images.shape[1:] != (self.side, self.side):
            raise ValueError(f"images must be [B, {self.side}, {self.side}], got {_describe(images)}")
        return images.float().unsqueeze(1)


@dataclass(frozen=True)
class Photographs:
    """Pixels of images of one size; `load_image_folder` and others bring them to it.

    Args:
        side: of the images in pixels.
        normalize: what follows.
    """

    side: int
    normalize: Normalize

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, side, side] -> float32 [B, C, side, side]."""
        if images.shape[2:] != (self.side, self.side):
            raise ValueError(f"images must be uint8 [B, C, {self.side}, {self.side}], got {_describe(images)}")
        return self.normalize(images)


@dataclass(frozen=True)
class Tokens:
    """Texts as a tokenizer has cut them (`simplexfix.models.token_ids`).

    Args:
        length: tokens of a row, padding among them.
    """

    length: int

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 [B, length], unchanged."""
        if ids.dtype != torch.int64 or ids.shape[1:] != (self.length,):
            raise ValueError(f"ids must be int64 [B, {self.length}], got {_describe(ids)}")
        return ids


Preprocessing = Drawings | Normalize | Photographs | Tokens | Vectors


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
