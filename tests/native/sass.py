"""Looks for the instructions that were meant in the machine code of the kernels, and for local memory, which was not.

Needs nvcc, cuobjdump and nvdisasm; the last two also by `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import harness

ARCHITECTURES = (80, 90, 120)
LOCAL = ("LDL", "STL")
# Instructions of each kernel, by their first words: products by tensor cores, fragments and copies of 16 bytes
MEANT = {"sweep_tiles": ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128")}


def tools() -> str | None:
    """A PATH with the disassemblers."""
    cuda = harness.cuda_include().parent / "bin"
    packages = Path(sysconfig.get_path("platlib")).glob("nvidia/cu*/bin")
    path = os.pathsep.join(map(str, [os.environ["PATH"], cuda, *packages]))
    return path if all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")) else None


def instructions(source: Path, architecture: int, path: str) -> dict[str, collections.Counter[str]]:
    """How often each kernel has each instruction."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        options = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin"]
        harness.execute([harness.nvcc(), *options, source, "-o", cubin])
        dump = subprocess.run(
            ["cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        )
    found = {}
    for part in dump.stdout.split("Function : ")[1:]:
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", part)
        found[part.split()[0]] = collections.Counter(opcodes)
    return found


def main() -> int:
    path = tools()
    if path is None:
        print("skipped: no cuobjdump and nvdisasm; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return 1  # whoever asks for this wants it done
    broken, seen = [], set()
    for source in sorted((harness.ROOT / "csrc" / "cuda").glob("*.cu")):
        for architecture in ARCHITECTURES:
            for kernel, counts in instructions(source, architecture, path).items():
                where = f"{kernel} on sm_{architecture}"
                broken += [f"{where} uses {word}" for word in counts if word.split(".")[0] in LOCAL]
                for name in (name for name in MEANT if name in kernel):
                    seen.add(name)
                    numbers = {w: sum(n for word, n in counts.items() if word.startswith(w)) for w in MEANT[name]}
                    print(f"{name} on sm_{architecture}: " + ", ".join(f"{n} {w}" for w, n in numbers.items()))
                    broken += [f"{where} lacks {word}" for word, n in numbers.items() if n == 0]
    broken += [f"no kernel {name}" for name in MEANT if name not in seen]
    print("\n".join(f"FAILED {line}" for line in broken) or "as meant, no local memory")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
