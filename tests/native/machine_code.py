"""Checks the machine code of the CUDA kernels in a built library: registers within budget, no stack, no local memory,
and the instructions that each kernel is written for.  Prints registers by architecture.

python tests/native/machine_code.py [LIBRARY]      (default: simplexfix/_C*.so as built in place)

Needs cuobjdump and nvdisasm, from a CUDA toolkit or by `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import harness

BUDGET = {"sweep_tiles": 128, "finish_topk": 80}  # registers per thread.  Others: 64, double 128
WIDE = ("LDG.E.128", "STG.E.128")  # 16 bytes at a time
# Prefixes of the opcodes that kernels must have.  sweep_tiles: tensor-core products, ldmatrix, and copies of 16 bytes
# that bypass the registers
MEANT = {
    r"sweep_tiles": ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"),
    r"cross_entropy<": WIDE,
    r"cross_entropy_chunk<.*\)[01]>": WIDE[:1],
    r"cross_entropy_chunk<.*\)2>": WIDE,
    r"simplex_logits": WIDE,
    r"scale_rows": WIDE,
}


class ToolError(Exception):
    """The disassembler failed, or is missing."""


@dataclass(frozen=True)
class Usage:
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # static bytes per block


def built_library() -> Path:
    found = sorted((harness.ROOT / "simplexfix").glob("_C*.so"))
    if not found:
        raise ToolError("no simplexfix/_C*.so: make build")
    return found[0]


def dump(option: str, library: Path) -> subprocess.Popen[str]:
    """Starts cuobjdump, with names demangled by c++filt."""
    packages = Path(sysconfig.get_path("platlib")).glob("nvidia/cu*/bin")
    headers = harness.cuda_include()
    toolkit = [headers.parent / "bin"] if headers else []
    path = os.pathsep.join(map(str, [os.environ["PATH"], *toolkit, *packages]))
    if not all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm", "c++filt")):
        raise ToolError("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command = f'set -o pipefail; cuobjdump {option} "$0" | c++filt'
    return subprocess.Popen(
        ["bash", "-c", command, library], stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}
    )


def short(name: str) -> str:
    """Returns a kernel's name with its template arguments."""
    name = re.sub(r"simplexfix::cuda::|^void ", "", name.strip())
    depth = 0
    for i, letter in enumerate(name):  # up to the parenthesis of the parameters, which is outside angle brackets
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def usage(library: Path) -> dict[str, dict[str, Usage]]:
    """Returns the resource usage by kernel and architecture."""
    found: dict[str, dict[str, Usage]] = collections.defaultdict(dict)
    with dump("-res-usage", library) as process:
        architecture = kernel = ""
        for line in process.stdout:
            if match := re.match(r"arch = sm_(\d+)", line):
                architecture = match[1]
            elif match := re.match(r" Function (.+):$", line):
                kernel = short(match[1])
            elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
                registers, stack, shared, local = map(int, match.groups())
                found[kernel][architecture] = Usage(registers, stack + local, shared)
    if process.returncode or not found:
        raise ToolError(f"{library.name} has no CUDA kernels that cuobjdump finds")
    return found


def instructions(library: Path) -> dict[tuple[str, str], set[str]]:
    """Returns the opcodes of each (kernel, architecture)."""
    found: dict[tuple[str, str], set[str]] = {}
    opcodes: set[str] = set()
    with dump("-sass", library) as process:
        architecture = ""
        for line in process.stdout:
            if match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
                opcodes.add(match[1])
            elif match := re.match(r"arch = sm_(\d+)", line):
                architecture = match[1]
            elif match := re.match(r"\s+Function : (.+)", line):
                opcodes = found[short(match[1]), architecture] = set()
    if process.returncode:
        raise ToolError(f"cuobjdump could not read {library.name}")
    return found


def budget(kernel: str) -> int:
    own = [registers for name, registers in BUDGET.items() if name in kernel]
    return own[0] if own else 128 if "double" in kernel else 64


def broken_rules(used: dict[str, dict[str, Usage]], opcodes: dict[tuple[str, str], set[str]]) -> list[str]:
    broken = []
    for kernel, by_architecture in used.items():
        for architecture, of in by_architecture.items():
            where = f"{kernel} on sm_{architecture}"
            if of.registers > budget(kernel):
                broken.append(f"{where}: {of.registers} registers, budget {budget(kernel)}")
            if of.stack:
                broken.append(f"{where}: a stack of {of.stack} bytes")
    for (kernel, architecture), words in opcodes.items():
        meant = [word for name, words in MEANT.items() if re.match(name, kernel) for word in words]
        lacking = [word for word in meant if not any(found.startswith(word) for found in words)]
        local = sorted(word for word in words if word.split(".")[0] in ("LDL", "STL"))
        broken += [f"{kernel} on sm_{architecture} lacks {word}" for word in lacking]
        broken += [f"{kernel} on sm_{architecture} uses {word}" for word in local]
    broken += [f"no kernel {name}" for name in MEANT if not any(re.match(name, kernel) for kernel in used)]
    if missing := [f"{k} on sm_{a}" for k, by in used.items() for a in by if (k, a) not in opcodes]:
        broken.append(f"no code of {', '.join(missing)}")
    return broken


def main() -> int:
    try:
        library = Path(sys.argv[1]) if len(sys.argv) > 1 else built_library()
        used = usage(library)
        broken = broken_rules(used, instructions(library))
    except ToolError as error:
        print(f"FAILED: {error}")
        return 1
    architectures = sorted({a for by_architecture in used.values() for a in by_architecture}, key=int)
    print(f"{'registers on sm_':60}" + "".join(f"{a:>5}" for a in architectures))
    for kernel, by_architecture in sorted(used.items()):
        print(f"{kernel:60}" + "".join(f"{by_architecture[a].registers:5}" for a in architectures))
    print("\n".join(f"FAILED {line}" for line in broken) or f"{len(used)} kernels as meant")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
