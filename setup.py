"""Builds simplexfix._C: one library with both the Python module and the torch operators.

The operators use only LibTorch's stable ABI.  Built with the headers of any torch >= 2.11, the
library runs with any other torch >= 2.11, CPU or CUDA build.  Environment variables:

SIMPLEXFIX_NATIVE=0        build no library: the pure PyTorch package
SIMPLEXFIX_CUDA=0 | 1      0: no CUDA kernels.  1: build them, and fail without nvcc.
                           Default: build them if torch is a CUDA build and there is an nvcc.
SIMPLEXFIX_CUDA_ARCHS      GPU architectures, such as "80 90", or "native"
SIMPLEXFIX_LEVELS          for developers: the files csrc/cpu/kernels_NAME.cpp to build, such as "avx2"; the first one
                           must have all kernels and run on this machine.  Default: all
CUDA_HOME, CXX             the CUDA toolkit and the C++ compiler
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
CUDA_ARCHS = "80 86 89 90 100 120"  # machine code for those that nvcc supports, PTX for the newest
NATIVE = os.environ.get("SIMPLEXFIX_NATIVE", "1") != "0"
REMEDY = "SIMPLEXFIX_NATIVE=0 installs simplexfix without compiled kernels."


def find_torch():
    """Returns (folder, version) of an installed torch, read from its headers without importing torch.

    pip's build isolation hides the target environment from sys.path.  It runs that environment's
    own interpreter, however, so `site` still names the folders that contain torch.
    """
    places = [*sys.path, *site.getsitepackages(), site.getusersitepackages()]
    spec = PathFinder.find_spec("torch", places)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    header = folder and folder / "include/torch/headeronly/version.h"
    if not header or not header.is_file():  # no torch, or one older than the stable ABI
        return folder, (0, 0)
    text = header.read_text()
    return folder, tuple(int(re.search(rf"TORCH_VERSION_{p} (\d+)", text)[1]) for p in ("MAJOR", "MINOR"))


def find_nvcc(torch):
    """Returns (path of nvcc, None), or (None, why no CUDA kernels are built)."""
    want = os.environ.get("SIMPLEXFIX_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"SIMPLEXFIX_CUDA must be 0, 1 or auto, got {want}")
    if want == "0":
        return None, "SIMPLEXFIX_CUDA=0"
    # nvcc takes minutes, and a CPU build of torch has no CUDA tensors
    if want == "auto" and not re.search(r"^cuda\b.*= '", (torch / "version.py").read_text(), re.MULTILINE):
        return None, "the installed torch is a CPU build; SIMPLEXFIX_CUDA=1 builds them all the same"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if want == "1" and not nvcc:
        raise SystemExit("SIMPLEXFIX_CUDA=1, but there is no nvcc in CUDA_HOME/bin or on PATH")
    return nvcc, None if nvcc else "no nvcc in CUDA_HOME/bin or on PATH"


def this_machines_archs():
    try:
        found = subprocess.check_output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"SIMPLEXFIX_CUDA_ARCHS=native, but nvidia-smi names no GPU: {error}") from None
    return sorted({line.strip().replace(".", "") for line in found.split("\n") if line.strip()}, key=int)


def cuda_targets(nvcc):
    """Returns the architectures to build for, as text and as nvcc's flags."""
    want = os.environ.get("SIMPLEXFIX_CUDA_ARCHS", CUDA_ARCHS)
    if want == "native":  # only the GPUs of this machine: the fastest build
        want = " ".join(this_machines_archs())
    known = re.findall(r"sm_(\d+)", subprocess.check_output([nvcc, "--list-gpu-code"], text=True))
    archs = [arch for arch in want.split() if arch in known]
    if old := [arch for arch in archs if int(arch) < 80]:
        raise SystemExit(
            f"the CUDA kernels need GPU architectures from 80 on (bfloat16 in tensor cores), got {' '.join(old)}"
        )
    if not archs:
        raise SystemExit(f"{nvcc} supports none of the GPU architectures {want}, only {' '.join(known)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join(archs), [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class NinjaBuildExt(build_ext):
    """Compiles .cpp with the C++ compiler and .cu with nvcc, in parallel and incrementally."""

    def build_extension(self, ext):
        import ninja  # only a build needs it
        import pybind11
        from ninja.ninja_syntax import Writer, escape_path

        torch, version = find_torch()
        if version < MIN_TORCH:
            raise SystemExit(f"simplexfix builds with torch >= 2.11, found {torch} {version}. {REMEDY}")
        (nvcc, no_cuda), cxx = find_nvcc(torch), os.environ.get("CXX", "c++")
        if no_cuda:
            print(f"simplexfix builds no CUDA kernels: {no_cuda}", flush=True)
        if not shutil.which(shlex.split(cxx)[0]):
            raise SystemExit(f"the C++ compiler {cxx} was not found. {REMEDY}")
        archs, arch_flags = cuda_targets(nvcc) if nvcc else ("", [])
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        # This folder is kept: the next build compiles only changed files, and for another Python only the module.
        tmp = ROOT / "build" / f"ninja-{self.plat_name}"
        out.parent.mkdir(parents=True, exist_ok=True)
        tmp.mkdir(parents=True, exist_ok=True)

        host = ["-fPIC", "-fvisibility=hidden"]
        cxx_cmd = [*shlex.split(cxx), "-std=c++20", "-O3", *host, "-Wall", "-Wextra", "-Wno-psabi"]
        cxx_cmd += ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MIN_TORCH)]
        cxx_cmd += ["-DSIMPLEXFIX_WITH_CUDA"] if nvcc else []
        # Only the module depends on the Python.  It uses no header of torch, which brings an older pybind11.
        module_cmd = [
            *cxx_cmd,
            '-DSIMPLEXFIX_BUILD_TORCH="{}.{}"'.format(*version),
            f'-DSIMPLEXFIX_VERSION="{self.distribution.get_version()}"',
            f'-DSIMPLEXFIX_CUDA_ARCHS="{archs}"',
            *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
        ]
        cxx_cmd += ["-isystem", torch / "include"]
        # The .cu files include no torch header.  That halves the compile time and allows an older C++ standard.
        nvcc_cmd = [nvcc, "-std=c++17", "-O3", "-ccbin", cxx, *arch_flags, "-Xcompiler", ",".join(host)]
        nvcc_cmd += ["-Xfatbin", "-compress-all"]
        # nvcc as the linker adds its static CUDA runtime, so the import needs no CUDA library.
        link_cmd = [nvcc, "-shared", "-nodlink", "-ccbin", cxx] if nvcc else [*shlex.split(cxx), "-shared"]
        link_args = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        if nvcc:  # an nvcc from PyPI (nvidia-cuda-nvcc) does not search its own lib folder
            link_args.append(f"-L{Path(nvcc).parent.parent / 'lib'}")

        def shell(words):
            return shlex.join(map(str, words)).replace("$", "$$")

        with open(tmp / "build.ninja", "w") as file:
            writer = Writer(file, width=10**6)
            for rule, command in (("module", module_cmd), ("cxx", cxx_cmd)):
                writer.rule(rule, shell(command) + " -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            if nvcc:
                writer.rule("cu", shell(nvcc_cmd) + " -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            writer.rule("link", shell(link_cmd) + " $in " + shell(link_args) + " -o $out")
            objects = []
            for source in ext.sources:
                if source.startswith("csrc/cuda/") and not nvcc:
                    continue
                name, rule = source.replace("/", "_"), "cu" if source.endswith(".cu") else "cxx"
                if source == "csrc/module.cpp":
                    name, rule = f"{sys.implementation.cache_tag}_{name}", "module"
                objects.append(escape_path(str(tmp / f"{name}.o")))
                writer.build(objects[-1], rule, escape_path(str(ROOT / source)))
            writer.build(escape_path(str(out)), "link", objects)
        try:
            subprocess.check_call([Path(ninja.BIN_DIR) / "ninja", "-C", tmp])
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"simplexfix's kernels did not compile; the compiler's errors are above. {REMEDY}"
            ) from None


def kernel_levels():
    """Returns the names in SIMPLEXFIX_LEVELS, or all; each is one file csrc/cpu/kernels_NAME.cpp."""
    known = {path.stem.removeprefix("kernels_") for path in (ROOT / "csrc/cpu").glob("kernels_*.cpp")}
    levels = set(os.environ.get("SIMPLEXFIX_LEVELS", "").split()) or known
    if unknown := sorted(levels - known):
        raise SystemExit(f"SIMPLEXFIX_LEVELS must name some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return levels


LEVELS = kernel_levels()
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in (".cpp", ".cu")
    and (not path.stem.startswith("kernels_") or path.stem.removeprefix("kernels_") in LEVELS)
)
setup(
    ext_modules=[Extension("simplexfix._C", SOURCES)] if NATIVE else [],
    cmdclass={"build_ext": NinjaBuildExt},
    # pip fetches a torch for the build only if the target environment has no suitable one.
    setup_requires=[] if not NATIVE or find_torch()[1] >= MIN_TORCH else ["torch>=2.11"],
)
