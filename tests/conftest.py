"""Which simplexfix is tested stands in the header of every run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import simplexfix
from simplexfix import _native

ROOT = Path(__file__).resolve().parents[1]


def pytest_report_header() -> str:
    info = _native.build_info()
    kernels = f"{info['cpu_isa']}, CUDA {info['cuda_archs'] or 'not built'}" if info else f"none ({_native.missing})"
    return f"simplexfix {simplexfix.__version__} from {Path(simplexfix.__file__).parent}; kernels: {kernels}"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data for development; no user has or needs it."""
    folder = Path(os.environ.get("SIMPLEXFIX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; SIMPLEXFIX_DATA names another")
    return folder


needs_library = pytest.mark.skipif(_native.library is None, reason="the compiled library is not in use")
