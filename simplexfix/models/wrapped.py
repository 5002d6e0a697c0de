"""Strips torch's wrappers from a module and from the names of its tensors."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["plain_names", "unwrapped"]


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, in any order."""
    while (inner := _inner(module)) is not None:
        module = module.get_submodule(inner)
    return module


def plain_names(module: nn.Module) -> dict[str, str]:
    """Maps each name of the state_dict to the name of its tensor in the unwrapped module."""
    found = []
    for name, part in module.named_modules(remove_duplicate=False):
        outer, inner = f"{name}." if name else "", _inner(part)
        if inner is not None:
            found.append((f"{outer}{inner}.", outer))
    found.sort(key=lambda pair: len(pair[0]), reverse=True)  # innermost first
    names = {}
    for key in module.state_dict():
        plain = key
        for prefix, outer in found:
            if plain.startswith(prefix):
                plain = outer + plain.removeprefix(prefix)
        names[key] = plain
    return names


def _inner(module: nn.Module) -> str | None:
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return "module"
    # isinstance would import torch._dynamo, which takes seconds
    return "_orig_mod" if "_orig_mod" in module._modules else None
