"""Builds and runs the tests of the CUDA kernels and of the CPU core for one layer.  README.md lists the layers.

Objects are cached in build/native under a hash of their sources, flags and compiler, so a second build is free.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "native"
CXX = os.environ.get("CXX", "g++")
T = TypeVar("T")

sys.path.append(str(HERE / "emulator"))
from ptx2cpp import translate  # noqa: E402


@dataclass(frozen=True)
class Layer:
    flags: list[str]
    arguments: list[str] = field(default_factory=list)  # of the test program
    ptx: bool = False
    timeout: int = 600  # seconds


ASAN = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
TSAN = ["-O1", "-fsanitize=thread"]
# TSan finds a race in any order of the threads, so one order and two dtypes are enough.
FEW = ["--small", "--order", "forward", "--dtype", "float", "--dtype", "bfloat16"]
LAYERS = {
    "plain": Layer(["-O1", "-fPIC"]),  # the flags of build_ops(), so the kernels are compiled once for both
    "asan": Layer(["-O1", *ASAN], ["--order", "forward"]),  # addresses do not depend on the order
    "tsan": Layer(TSAN, FEW),
    "ptx": Layer(["-O1"], ["--ptx"], ptx=True),
    "ptx-tsan": Layer(TSAN, ["--ptx", *FEW], ptx=True),
}


class BuildError(Exception):
    """A compiler failed; the message is its command and output."""


def cuda_include() -> Path | None:
    """Returns the folder of CUDA's headers, or None."""
    for home in filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda")):
        if (Path(home) / "include" / "cuda_runtime.h").is_file():
            return Path(home) / "include"
    return None


def nvcc() -> str:
    return shutil.which("nvcc") or str(cuda_include().parent / "bin" / "nvcc")


def missing() -> str | None:
    """Returns why the tests cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator switches contexts on x86-64 only, not on {platform.machine()}"
    if not shutil.which(CXX):
        return f"no {CXX}"
    if cuda_include() is None:
        return "no CUDA headers in $CUDA_HOME/include or /usr/local/cuda/include"
    return None


def execute(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def version(compiler: str) -> str:
    return execute([compiler, "--version"])


def rotating(items: list[T], count: int) -> list[T]:
    """Returns `count` of the items, different ones for successive commits."""
    commits = int(execute(["git", "-C", ROOT, "rev-list", "--count", "HEAD"]))
    return [items[(commits * count + i) % len(items)] for i in range(min(count, len(items)))]


def closure(source: Path, seen: dict[Path, str] | None = None) -> dict[Path, str]:
    """Returns the text of a source and of every file that it includes by a quoted name."""
    seen = {} if seen is None else seen
    source = source.resolve()
    if source not in seen:
        seen[source] = source.read_text()
        for name in re.findall(r'^\s*#include "([^"]+)"', seen[source], re.M):
            closure(source.parent / name, seen)
    return seen


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def make(target: Path, command: list[str | Path]) -> Path:
    """Runs a command that writes `target`, unless `target` exists.  A failed command leaves no partial target."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.stem}.{os.getpid()}{target.suffix}")
        execute([*command, "-o", partial])
        partial.replace(target)
    return target


def compile_source(source: Path, flags: list[str]) -> Path:
    texts = [*closure(source).values(), *closure(HERE / "emulator" / "ptx_runtime.h").values()]
    emulator = ["-include", HERE / "emulator" / "emulator.h", f"-I{HERE / 'emulator'}", "-isystem", cuda_include()]
    # Fewer blocks than rows, so that the kernels' loops over rows iterate.
    common = ["-std=c++20", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    common += ["-DSIMPLEXFIX_MAX_BLOCKS=3", "-DSIMPLEXFIX_GROUP_BYTES=100000"]
    name = f"{source.stem}-{digest(version(CXX), common, flags, *texts)}.o"
    return make(CACHE / name, [CXX, *common, *flags, *emulator, "-x", "c++", "-c", source])


def compile_ptx(source: Path, flags: list[str]) -> Path:
    """Compiles a source to optimised PTX by nvcc, translates it to C++ and compiles that."""
    name = f"{source.stem}-{digest(version(nvcc()), *closure(source).values())}.ptx"
    options = ["-std=c++17", "-O3", "-arch=compute_80", "-lineinfo", "-ptx"]
    ptx = make(CACHE / name, [nvcc(), *options, source])
    text = translate(ptx.read_text())
    cxx = CACHE / f"{source.stem}-ptx-{digest(text)}.cpp"
    if not cxx.exists():
        cxx.write_text(text)
    return compile_source(cxx, [*flags, "-w", "-fno-var-tracking"])


@dataclass(frozen=True)
class CoreLayer:
    """The CPU core: no torch, no CUDA, no emulator."""

    flags: list[str]
    levels: list[str]  # instruction sets to run with; the machine may lack some
    arguments: list[str] = field(default_factory=list)
    fuzz_seconds: int = 0
    timeout: int = 600


ISA_LEVELS = ["base", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16"]
CORE_LAYERS = {
    "plain": CoreLayer(["-O2"], ISA_LEVELS),
    "asan": CoreLayer(["-O1", *ASAN], ISA_LEVELS, fuzz_seconds=4),
    "tsan": CoreLayer(["-O1", "-fsanitize=thread"], ISA_LEVELS[-1:], ["--small"]),
}


@dataclass(frozen=True)
class Target:
    """The machine that the CPU core is built for and runs on."""

    cxx: str
    machines: dict[str, list[str]] = field(default_factory=dict)  # emulators, by their newest instruction set
    link_flags: list[str] = field(default_factory=list)

    def missing(self) -> str | None:
        """Returns why the core cannot be built or run, or None."""
        tools = [self.cxx, *(machine[0] for machine in self.machines.values())]
        return next((f"no {tool}" for tool in tools if not shutil.which(tool)), None)


EMULATED_TIMEOUT = 3600  # seconds; a run takes about 75 s of one core
# Cortex-A72 has no dotprod and Neoverse N1 no i8mm, so the choice at run time is tested too.
QEMU = {"base": "cortex-a72", "dotprod": "neoverse-n1", "i8mm": "max"}
TARGETS = {
    "native": Target(CXX),
    "aarch64": Target(
        "aarch64-linux-gnu-g++",
        {level: ["qemu-aarch64-static", "-cpu", cpu] for level, cpu in QEMU.items()},
        ["-static"],
    ),
}


def has_avxvnni() -> bool:
    """Returns whether this machine runs vpdpbusd in the encoding of AVX-VNNI."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx_vnni" in info.read_text().split()


def build_core(
    layer: str, csrc: Path = ROOT / "csrc", jobs: int = 1, target: Target = TARGETS["native"]
) -> tuple[Path, Path]:
    """Returns the test program and the fuzz program of a layer, built with the core of `csrc`."""
    cxx, flags = target.cxx, ["-pthread", *CORE_LAYERS[layer].flags]
    common = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Wno-psabi"]
    if not has_avxvnni():  # compile level avxvnni with the instructions of AVX-512
        common.append("-DSIMPLEXFIX_AVXVNNI_AS_EVEX")

    def compiled(source: Path) -> Path:
        name = f"{source.stem}-{digest(cxx, version(cxx), common, flags, *closure(source).values())}.o"
        return make(CACHE / name, [cxx, *common, *flags, "-c", source])

    core, tests = sorted((csrc / "cpu").glob("*.cpp")), sorted((HERE / "core").glob("*.cpp"))
    with ThreadPool(jobs) as pool:
        objects = dict(zip(core + tests, pool.map(compiled, core + tests, chunksize=1), strict=True))
    library = [objects[source] for source in core]

    def linked(what: str, own: list[Path]) -> Path:
        name = f"core-{what}-{layer}-{digest(*own, *library)}"
        return make(CACHE / name, [cxx, *flags, *target.link_flags, *own, *library])

    return (
        linked("tests", [objects[source] for source in tests if not source.stem.startswith("fuzz")]),
        linked("fuzz", [objects[source] for source in tests if source.stem.startswith("fuzz")]),
    )


def run_core(
    programs: tuple[Path, Path], layer: str, levels: list[str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Runs the test program at every level of the layer, or at `levels`, then the fuzz program."""
    chosen = CORE_LAYERS[layer]
    environment = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "max_allocation_size_mb=64"}

    def start(command: list[str | Path], level: str) -> subprocess.CompletedProcess[str]:
        return start_program(command, chosen.timeout, {**environment, "SIMPLEXFIX_ISA": level})

    done = [start([programs[0], *chosen.arguments], level) for level in levels or chosen.levels]
    if chosen.fuzz_seconds:  # loading a file of a few kilobytes must never allocate more than 64 MiB
        done.append(start([programs[1], str(chosen.fuzz_seconds)], ISA_LEVELS[-1]))
    return done


def run_core_on(target: Target, levels: list[str], program: Path) -> list[subprocess.CompletedProcess[str]]:
    """Runs the test program on the target's machine for each level.  The program must choose that level by itself."""
    done = []
    for level in levels:
        ran = start_program([*target.machines[level], program], EMULATED_TIMEOUT, {})
        if f" {level}:" not in ran.stdout:
            ran.returncode, ran.stdout = 1, f"{ran.stdout} (expected level {level})"
        done.append(ran)
    return done


def build(layer: str, csrc: Path = ROOT / "csrc", jobs: int = 1) -> Path:
    """Returns the test program of a layer, built with the kernels of `csrc`."""
    chosen = LAYERS[layer]
    kernels = [*sorted((csrc / "cuda").glob("*.cu")), HERE / "primitives.cu"]
    tests = sorted(HERE.glob("*.cpp"))
    work = [(compile_source, source) for source in (*kernels, *tests)]
    if chosen.ptx:  # their strong symbols replace the weak ones of the kernels above
        work += [(compile_ptx, source) for source in kernels]
    with ThreadPool(jobs) as pool:
        objects = pool.map(lambda item: item[0](item[1], chosen.flags), work, chunksize=1)
    name = f"tests-{layer}-{digest(*objects)}"
    return make(CACHE / name, [CXX, *chosen.flags, *objects])


def build_ops(jobs: int = 1) -> Path:
    """Builds a library of the CUDA operators for CPU tensors.  They register in torch.ops.simplexfix_emulated."""
    import torch  # only this function needs it

    folder = Path(torch.__file__).parent
    headers = HERE / "emulator" / "emulated_ops.h"
    fronts = [f for f in sorted((ROOT / "csrc" / "ops").glob("*.cpp")) if f.stem != "cuda_stream"]
    fronts.append(ROOT / "csrc" / "cpu" / "fork.cpp")  # the buffer pool uses it
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", folder / "include", "-include", headers]

    def compile_front(source: Path, _: object) -> Path:
        texts = [*closure(source).values(), *closure(headers).values()]
        name = f"{source.stem}-ops-{digest(version(CXX), torch.__version__, flags, *texts)}.o"
        return make(CACHE / name, [CXX, *flags, "-c", source])

    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    work = [(compile_source, source) for source in kernels]
    work += [(compile_front, source) for source in [*fronts, HERE / "emulator" / "emulated_stream.cpp"]]
    with ThreadPool(jobs) as pool:
        objects = pool.map(lambda item: item[0](item[1], LAYERS["plain"].flags), work, chunksize=1)
    name = f"libops-{digest(*objects)}.so"
    return make(CACHE / name, [CXX, "-shared", *objects, f"-L{folder / 'lib'}", "-ltorch_cpu"])


def run(program: Path, layer: str, arguments: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a test program; its output is in stdout."""
    command = [program, *LAYERS[layer].arguments, *(arguments or [])]
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    return start_program(command, LAYERS[layer].timeout, options)


def start_program(
    command: list[str | Path], timeout: int, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        env={**os.environ, **environment},
    )
