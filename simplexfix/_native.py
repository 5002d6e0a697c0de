"""The compiled library: loaded once, here, or known to be missing, with the reason and the remedy."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any

import torch  # before the library: it loads the libtorch that the library is resolved against
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["build_info", "has_kernels", "is_readable", "is_transformed", "library", "missing"]


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("SIMPLEXFIX_NATIVE", "1") == "0":
        return None, "SIMPLEXFIX_NATIVE=0 is set"
    if importlib.util.find_spec("simplexfix._C") is None:
        return None, (
            "simplexfix was installed, or is imported from a source folder, without its compiled library; "
            "`pip install .` in the repository builds it"
        )
    try:
        module = importlib.import_module("simplexfix._C")
    except ImportError as error:
        reason = f"the compiled library does not load beside torch {torch.__version__} ({error}); reinstall simplexfix"
        warnings.warn(f"simplexfix runs without its kernels: {reason}", RuntimeWarning, stacklevel=3)
        return None, reason
    levels, wanted = module.build_info()["cpu_isa_levels"], os.environ.get("SIMPLEXFIX_ISA", "")
    if wanted and wanted not in levels:
        warnings.warn(f"SIMPLEXFIX_ISA={wanted} is none of {', '.join(levels)}: ignored", RuntimeWarning, stacklevel=3)
    return module, None


library, missing = _load()


def build_info() -> dict[str, Any]:
    """What was compiled and what of it runs here; empty without the library."""
    return library.build_info() if library is not None else {}


_DEVICES = frozenset(["cpu", "meta", *(["cuda"] if build_info().get("cuda_archs") else [])]) if library else frozenset()


def has_kernels(tensor: Tensor) -> bool:
    """Whether the library serves this tensor: its device, and no transform that only plain PyTorch knows.

    Under `torch.func` (grad, vmap, jvp, ...) and forward-mode differentiation the twin takes over.
    """
    if tensor.device.type not in _DEVICES:
        return False
    return torch.compiler.is_compiling() or not is_transformed()


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: there are some, and without waiting for a GPU to have made them."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not is_transformed()
