"""Copies that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device_async"]


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; to a GPU from pinned memory, or the host would wait until it is there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
