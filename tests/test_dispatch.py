"""Tests which GPUs the library supports, and the single warning for others. No test here needs a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import needs_library
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import simplexfix.functional as SF
from simplexfix import _native, _reference
from simplexfix.cli.doctor import diagnose


@pytest.mark.parametrize(
    ("capability", "archs", "runs", "untranslated"),
    [
        ((8, 0), "80 90", True, True),
        ((8, 6), "80 90", True, True),  # code for an older GPU of the same major version
        ((8, 0), "86", False, False),
        ((9, 0), "80 120", False, False),
        ((10, 0), "80 90", True, False),  # the driver translates PTX
        ((12, 1), "80 86 120", True, True),
        ((7, 5), "80 90", False, False),
    ],
)
def test_architectures(capability: tuple[int, int], archs: str, runs: bool, untranslated: bool) -> None:
    assert _native.runs_on(capability, archs) is runs
    assert _native.runs_on(capability, archs, translates=False) is untranslated


@pytest.fixture
def gpu_of_7_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a GPU that no build of the library supports."""
    if _native.library is None:
        pytest.skip(f"no library: {_native.missing}")
    info = {**_native.build_info(), "cuda_archs": "80 90", "cuda_usable": True}
    monkeypatch.setattr(_native, "build_info", lambda: info)
    monkeypatch.setattr(_native, "_serves_gpu", {})
    monkeypatch.setattr(_native, "cuda_versions", lambda: (13000, 13010))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")


class OnGpu:
    """The attributes of a CUDA tensor that dispatch reads."""

    device, is_cuda = torch.device("cuda", 0), True


@pytest.mark.usefixtures("gpu_of_7_5")
def test_an_unsupported_gpu_warns_once() -> None:
    assert (
        diagnose()["CUDA usable"]
        == "no: the library was built for 80 90, Old GPU is 75; CUDA tensors run in plain PyTorch"
    )
    with pytest.warns(RuntimeWarning, match="CUDA tensors run in plain PyTorch: the library was built for 80 90"):
        assert not _native.has_kernels(OnGpu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.has_kernels(OnGpu())


@pytest.mark.usefixtures("gpu_of_7_5")
def test_a_supported_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert _native.has_kernels(OnGpu())
    assert diagnose()["CUDA usable"] == "yes: Old GPU, compute capability 9.0"


@pytest.mark.usefixtures("gpu_of_7_5")
def test_a_driver_older_than_the_librarys_cuda_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_native, "cuda_versions", lambda: (13000, 12080))
    reason = "the library was built with CUDA 13.0, but the driver supports CUDA up to 12.8: update the driver"
    assert diagnose()["CUDA usable"] == f"no: {reason}; CUDA tensors run in plain PyTorch"
    with pytest.warns(RuntimeWarning, match=reason):
        assert not _native.has_kernels(OnGpu())
    monkeypatch.setattr(_native, "cuda_versions", lambda: (13010, 13000))  # machine code runs, PTX is not translated
    assert _native.why_not_cuda(0) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert _native.why_not_cuda(0) == "the library was built for 80 90, Old GPU is 100"


@pytest.mark.skipif(not _native.build_info().get("cuda_archs"), reason="built without CUDA")
def test_versions_are_those_of_the_toolkit_and_the_driver() -> None:
    runtime, driver = _native.cuda_versions()
    assert runtime >= 11000
    assert driver >= runtime // 1000 * 1000 if torch.cuda.is_available() else driver >= 0


@needs_library
def test_fake_cuda_tensors_are_traced_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing uses the operator if the library was built for CUDA, else the reference, also without a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    built = _native.build_info()
    for archs in ("80 90", ""):
        monkeypatch.setattr(_native, "build_info", lambda archs=archs: {**built, "cuda_archs": archs})
        used = []
        reference = _reference.simplex_logits

        def watched(z: Tensor, used=used, reference=reference, **options: object) -> Tensor:
            used.append("reference")
            return reference(z, **options)

        monkeypatch.setattr(_reference, "simplex_logits", watched)
        with FakeTensorMode():
            logits = SF.simplex_logits(torch.empty(3, 4, device="cuda"))
        monkeypatch.setattr(_reference, "simplex_logits", reference)
        assert (logits.shape, logits.device.type) == ((3, 5), "cuda")
        assert used == ([] if archs else ["reference"])


def test_the_check_for_kernels_of_a_gpu_compiles() -> None:
    torch.compiler.reset()
    function = torch.compile(lambda z: z + 1 if _native._serves(0) else z - 1, fullgraph=True, backend="eager")
    assert function(torch.zeros(2)).tolist() in ([1.0, 1.0], [-1.0, -1.0])
