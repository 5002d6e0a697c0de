"""The compiled library: loaded once, here, or known to be missing, with the reason and the remedy."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the library: it loads the libtorch that the library is resolved against
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = [
    "build_info",
    "has_kernels",
    "is_readable",
    "is_transformed",
    "library",
    "missing",
    "raise_interrupt",
    "why_not_cuda",
]


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("SIMPLEXFIX_NATIVE", "1") == "0":
        return None, "SIMPLEXFIX_NATIVE=0 is set"
    if importlib.util.find_spec("simplexfix._C") is None:
        if others := _libraries_of_other_pythons():
            reason = (
                f"its compiled library was built for another Python: {', '.join(others)}, this Python loads "
                f"_C{EXTENSION_SUFFIXES[0]}; reinstall simplexfix with this Python"
            )
            warnings.warn(f"simplexfix runs without its kernels: {reason}", RuntimeWarning, stacklevel=3)
            return None, reason
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


def _libraries_of_other_pythons() -> list[str]:
    """Names of compiled libraries beside this file."""
    return sorted(path.name for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd"))


library, missing = _load()


def build_info() -> dict[str, Any]:
    """What was compiled and what of it runs here; empty without the library."""
    return library.build_info() if library is not None else {}


def raise_interrupt(error: RuntimeError) -> None:
    """Raises KeyboardInterrupt, or what else a signal's handler raised, where that is why an operator ended."""
    if library is not None and "interrupted by a signal" in str(error):
        library.raise_interrupt()


def why_not_cuda(device: int | None = None) -> str | None:
    """Why CUDA tensors, of one GPU or of the current one, run in plain PyTorch; None where the kernels serve them."""
    info = build_info()
    if not info:
        return "there is no compiled library"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not info["cuda_archs"]:
        return "the library was built without CUDA kernels; SIMPLEXFIX_CUDA=1 and `pip install .` build them with nvcc"
    if not info["cuda_usable"]:
        return "torch has not loaded libtorch_cuda.so"
    if not torch.cuda.is_available():
        return "torch finds no GPU or no driver"
    runtime, driver = cuda_versions()
    if driver // 1000 < runtime // 1000:
        return f"the library was built with CUDA {_dotted(runtime)}, the driver serves CUDA up to {_dotted(driver)}"
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability, info["cuda_archs"], translates=driver >= runtime):
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        return f"the library was built for {info['cuda_archs']}, {name} is {major}{minor}"
    return None


def cuda_versions() -> tuple[int, int]:
    """Of the runtime built in, and the newest that the driver serves; 13000 is 13.0.  Of a library with CUDA only."""
    return library.cuda_versions()  # type: ignore[union-attr, no-any-return]


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def runs_on(capability: tuple[int, int], archs: str, *, translates: bool = True) -> bool:
    """Whether a GPU runs the machine code for one of `archs`, "80 90", or the driver translates the PTX of the last.

    A driver runs machine code of any toolkit of its major version, and translates PTX of none newer than itself.
    """
    built = [divmod(int(arch), 10) for arch in archs.split()]
    of_its_kind = ((major, minor) for major, minor in built if major == capability[0])
    return (translates and built[-1] <= capability) or any(arch <= capability for arch in of_its_kind)


_serves_gpu: dict[int | None, bool] = {}


def _serves(device: int | None) -> bool:
    """Whether the kernels serve a GPU; says once for each where not."""
    if device not in _serves_gpu:  # asked in every call: what follows is for the first alone
        if not torch.cuda.is_available():  # a fake tensor: traced for a GPU elsewhere
            return bool(build_info().get("cuda_archs"))
        reason = why_not_cuda(device)
        _serves_gpu[device] = reason is None
        if reason is not None and os.environ.get("SIMPLEXFIX_NATIVE", "1") != "0":
            warnings.warn(f"CUDA tensors run in plain PyTorch: {reason}", RuntimeWarning, stacklevel=4)
    return _serves_gpu[device]


# torch.compiler.assume_constant_result sets this attribute, but imports torch._dynamo first, which takes a second.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_kernels(tensor: Tensor) -> bool:
    """Whether the library serves this tensor: its device, and no transform that only plain PyTorch knows.

    Under `torch.func` (grad, vmap, jvp, ...), forward-mode differentiation and export to ONNX the reference
    implementation takes over.
    """
    if _exports_to_onnx():
        return False
    if tensor.is_cuda:
        if not _serves(tensor.device.index):
            return False
    elif library is None or not (tensor.is_cpu or tensor.is_meta):
        return False
    return torch.compiler.is_compiling() or not is_transformed()


def _exports_to_onnx() -> bool:
    """True during an export to ONNX, which has none of the library's operators."""
    if torch.compiler.is_dynamo_compiling() or "torch.onnx" not in sys.modules:  # an import that takes a while
        return False
    return torch.onnx.is_in_onnx_export()


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: there are some, and without waiting for a GPU to have made them."""
    return (
        tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not isinstance(tensor, FakeTensor)
    )
