"""Tests sdist, wheel and installation: with the library, without it, and where it cannot be built."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("pybind11", reason="building needs pybind11, ninja and setuptools: pip install 'simplexfix[test]'")
pytestmark = pytest.mark.slow  # runs compilers and creates environments

USE_EVERYTHING = """
import torch, simplexfix, simplexfix.functional as SF
from simplexfix import _native
z, target = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 9, 1, -100])
SF.simplex_cross_entropy(z, target, normalize=True, scale=9.0, margin=("angular", 0.2)).backward()
SF.simplex_logits(z).sum().backward()
SF.hoc_loss(z, z.detach(), target.clamp_min(0)).backward()
head = simplexfix.SimplexHead(9, 10)
head.loss(z, target.clamp_min(0)).backward(); head.predict(z, k=2)
print(simplexfix.cosine_topk(z, z, 1)[1].flatten().tolist(), _native.build_info().get("cuda_archs"))
from simplexfix.data import load_omniglot; print(load_omniglot().images.shape)
print(simplexfix.__file__)
"""


def run(*command: object, **environment: str) -> str:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=env, check=False, cwd="/"
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import os; os.chdir({str(ROOT)!r}); from setuptools import build_meta as b; b.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """Returns a new environment with the wheel, in which this environment's torch and numpy are visible."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, wheel)
    (packages / "torch_from_outside.pth").write_text("\n".join(outside_packages()))
    return python


def outside_packages() -> list[str]:
    return [
        p
        for p in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
        if Path(p).is_dir()
    ]


def build(source: Path, folder: Path, **environment: str) -> Path:
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def quick_compiler(folder: Path) -> str:
    """Returns a C++ compiler with -O1: optimisation takes most of the minutes of a build."""
    script = folder / "quick-c++"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O1\n')
    script.chmod(0o755)
    return str(script)


def test_sdist_to_wheel_to_fresh_environment(sdist: Path, tmp_path: Path) -> None:
    wheel = build(sdist, tmp_path / "wheel", SIMPLEXFIX_CUDA="0", CXX=quick_compiler(tmp_path))
    assert "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    files = (path.relative_to(ROOT) for path in (ROOT / "simplexfix").rglob("*") if path.is_file())
    of_source = {path.as_posix() for path in files if path.suffix not in (".so", ".pyc")}
    assert set(names) == {*of_source, f"simplexfix/_C{sysconfig.get_config_var('EXT_SUFFIX')}"}
    python = fresh_environment(tmp_path / "env", wheel)
    said = run(python, "-c", USE_EVERYTHING).splitlines()
    assert said[0] == "[0, 1, 2, 3] "  # CPU kernels are present, CUDA kernels are not
    assert said[1] == "(242, 20, 28, 28)"
    assert said[2].startswith(str(tmp_path / "env"))
    assert "is a CPU build" in run(python, "-m", "simplexfix", "doctor")


def test_pure_python_wheel(sdist: Path, tmp_path: Path) -> None:
    wheel = build(sdist, tmp_path / "wheel", SIMPLEXFIX_NATIVE="0")
    assert wheel.name.endswith("py3-none-any.whl")
    python = fresh_environment(tmp_path / "env", wheel)
    said = run(python, "-c", USE_EVERYTHING).splitlines()
    assert said[0] == "[0, 1, 2, 3] None"
    assert said[2].startswith(str(tmp_path / "env"))
    assert "without its compiled library" in run(python, "-m", "simplexfix", "doctor")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "false"}, "kernels did not compile; the compiler's errors are above. SIMPLEXFIX_NATIVE=0"),
        ({"CXX": "no-such-compiler"}, "the C++ compiler no-such-compiler was not found. SIMPLEXFIX_NATIVE=0"),
        (
            {"SIMPLEXFIX_CUDA": "1", "CUDA_HOME": "/nowhere", "PATH": os.path.dirname(sys.executable)},
            "there is no nvcc",
        ),
        ({"SIMPLEXFIX_CUDA": "yes"}, "SIMPLEXFIX_CUDA must be 0, 1 or auto, got yes"),
        pytest.param(
            {"SIMPLEXFIX_CUDA": "auto", "CXX": "no-such-compiler"},
            "simplexfix builds no CUDA kernels: the installed torch is a CPU build",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build"),
        ),
    ],
)
def test_a_build_that_fails_says_why(sdist: Path, tmp_path: Path, environment: dict[str, str], message: str) -> None:
    env = {"SIMPLEXFIX_CUDA": "0", **environment}
    with pytest.raises(AssertionError) as error:
        build(sdist, tmp_path, **env)
    assert message in str(error.value)
