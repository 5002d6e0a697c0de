"""Asynchronous copies to a device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device_async"]


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device; copies to a GPU use pinned memory, since other copies block the host."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
