"""Modules inside torch's wrappers, under the names that they have without them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["plain_names", "unwrapped"]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, out of `torch.compile`, `DataParallel` and `DistributedDataParallel` in any order."""
    while (inner := _inner(module)) is not None:
        module = module.get_submodule(inner)
    return module


def plain_names(module: nn.Module) -> dict[str, str]:
    """Names of a state_dict -> names of the same tensors where no module within is wrapped."""
    found = []
    for name, part in module.named_modules(remove_duplicate=False):
        outer, inner = f"{name}." if name else "", _inner(part)
        if inner is not None:
            found.append((f"{outer}{inner}.", outer))
    found.sort(key=lambda pair: len(pair[0]), reverse=True)  # from the innermost on
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
    # the class of a compiled module is in torch._dynamo, which takes long to import
    return "_orig_mod" if "_orig_mod" in module._modules else None
