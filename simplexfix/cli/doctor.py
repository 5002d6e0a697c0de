"""Prints the installed versions, the kernels that this machine can run, and the reason why others cannot run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from .. import _native

_OPTIONAL = ("matplotlib", "rich", "faiss-cpu", "faiss-gpu", "pytest", "pytest-benchmark")


def run(arguments: argparse.Namespace) -> int:
    found = diagnose()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry or 'not installed'}" for key, entry in value.items())
        print(f"{name:>17}  {value}")
    return 0


def diagnose() -> dict[str, Any]:
    """Returns the diagnosis as JSON values, the most important ones first."""
    info = _native.build_info()
    found: dict[str, Any] = {
        "simplexfix": _version("simplexfix"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "numpy": _version("numpy"),
    }
    if info:
        found["library"] = (
            f"{info['version']}, built by gcc {info['compiler']} with the headers of torch {info['torch_headers']}"
        )
        found["instruction set"] = info["cpu_isa"]
    else:
        found["library"] = f"not in use: {_native.missing}"
        found["instruction set"] = "none: plain PyTorch"
    found["CUDA built for"] = info.get("cuda_archs") or "nothing"
    found["CUDA usable"] = _cuda_usable()
    found["optional packages"] = {name: _version(name) for name in _OPTIONAL}
    return found


def _cuda_usable() -> str:
    reason = _native.why_not_cuda()
    if reason is not None:
        return f"no: {reason}; CUDA tensors run in plain PyTorch"
    major, minor = torch.cuda.get_device_capability()
    return f"yes: {torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
