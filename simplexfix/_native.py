"""Loads the compiled library once; if it cannot be loaded, `missing` holds the reason and the remedy."""

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

import torch  # first: it loads libtorch, which the library links to
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
    """Returns the names of compiled libraries in this folder."""
    return sorted(path.name for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd"))


library, missing = _load()


def build_info() -> dict[str, Any]:
    """Returns the build's options and the features usable on this machine; empty without the library."""
    return library.build_info() if library is not None else {}


def raise_interrupt(error: RuntimeError) -> None:
    """Raises the signal handler's exception (usually KeyboardInterrupt) if a signal ended the operator."""
    if library is not None and "interrupted by a signal" in str(error):
        library.raise_interrupt()


def why_not_cuda(device: int | None = None) -> str | None:
    """Returns the reason why CUDA tensors run in plain PyTorch; None if the kernels support them.

    Args:
        device: index of the GPU; None for the current one.
    """
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
        return (
            f"the library was built with CUDA {_dotted(runtime)}, but the driver supports CUDA up to "
            f"{_dotted(driver)}: update the driver"
        )
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability, info["cuda_archs"], translates=driver >= runtime):
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        return f"the library was built for {info['cuda_archs']}, {name} is {major}{minor}"
    return None


def cuda_versions() -> tuple[int, int]:
    """Returns the CUDA versions of the built-in runtime and of the driver (13000 is 13.0); needs a CUDA build."""
    return library.cuda_versions()  # type: ignore[union-attr, no-any-return]


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def runs_on(capability: tuple[int, int], archs: str, *, translates: bool = True) -> bool:
    """Returns whether a GPU can run a build: machine code of its major version, or the PTX of the last architecture.

    A driver runs machine code of any toolkit with its own major version, but compiles PTX only of toolkits that are not
    newer than the driver.

    Args:
        capability: compute capability of the GPU, (major, minor).
        archs: architectures of the build, ascending, such as "80 90".
        translates: whether the driver can compile the PTX.
    """
    built = [divmod(int(arch), 10) for arch in archs.split()]
    of_its_kind = ((major, minor) for major, minor in built if major == capability[0])
    return (translates and built[-1] <= capability) or any(arch <= capability for arch in of_its_kind)


_serves_gpu: dict[int | None, bool] = {}


def _serves(device: int | None) -> bool:
    """Returns whether the kernels support a GPU; warns once per GPU if they do not."""
    if device not in _serves_gpu:  # cached, since every call needs the answer
        if not torch.cuda.is_available():  # a fake tensor, traced on a machine without a GPU
            return bool(build_info().get("cuda_archs"))
        reason = why_not_cuda(device)
        _serves_gpu[device] = reason is None
        if reason is not None and os.environ.get("SIMPLEXFIX_NATIVE", "1") != "0":
            warnings.warn(f"CUDA tensors run in plain PyTorch: {reason}", RuntimeWarning, stacklevel=4)
    return _serves_gpu[device]


# torch.compiler.assume_constant_result sets this attribute, but imports torch._dynamo first, which takes a second.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_kernels(tensor: Tensor) -> bool:
    """Returns whether the library has kernels for this tensor.

    It has none under `torch.func` (grad, vmap, jvp, ...), forward-mode differentiation and export to ONNX; then the
    reference implementation runs.
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
    """Returns whether an export to ONNX is running; ONNX does not support the library's operators."""
    if torch.compiler.is_dynamo_compiling() or "torch.onnx" not in sys.modules:  # importing it is slow
        return False
    return torch.onnx.is_in_onnx_export()


def is_transformed() -> bool:
    """Returns whether a `torch.func` transform or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_readable(tensor: Tensor) -> bool:
    """Returns whether the tensor has values that can be read without synchronizing with a GPU."""
    return (
        tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not isinstance(tensor, FakeTensor)
    )
