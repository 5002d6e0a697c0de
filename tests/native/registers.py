"""Compiles the kernels for every GPU architecture and holds them to their budget: no stack, no spills,
64 registers a thread (128 where sums are double) or what BUDGET says.  Prints registers by architecture; needs nvcc."""

import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
BUDGET = {"sweep_tiles": 128, "finish_topk": 80}  # their headers say why


def report(source: Path) -> str:
    """What ptxas says of a source."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    options = ["-std=c++17", "-O3", *codes, "-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings", "-c"]
    with tempfile.TemporaryDirectory() as folder:
        command = [harness.nvcc(), *options, source, "-o", Path(folder) / "object.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise harness.BuildError(done.stdout + done.stderr)
    return done.stderr


def main() -> int:
    registers: dict[str, dict[str, int]] = collections.defaultdict(dict)
    broken = []
    for source in sorted((harness.ROOT / "csrc" / "cuda").glob("*.cu")):
        for part in report(source).split("Compiling entry function '")[1:]:
            name, architecture = re.match(r"(\S+)' for 'sm_(\d+)'", part).groups()
            stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.* (\d+) bytes.* (\d+) bytes", part).groups())
            used = registers[name][architecture] = int(re.search(r"Used (\d+) registers", part)[1])
            own = (registers for kernel, registers in BUDGET.items() if kernel in name)
            if stack or stores or loads or used > next(own, 128 if re.search(r"Id(Li\d+|E)", name) else 64):
                broken.append(f"{name} on sm_{architecture}: {used} registers, stack {stack}, spills {stores}/{loads}")
    plain = subprocess.run(["c++filt"], input="\n".join(registers), capture_output=True, text=True, check=True).stdout
    print(f"{'registers on sm_':52}" + "".join(f"{a:5}" for a in ARCHITECTURES))
    for name, by_architecture in zip(plain.splitlines(), registers.values(), strict=True):
        short = re.sub(r"\(.*|simplexfix::cuda::|^void ", "", name)
        print(f"{short:52}" + "".join(f"{by_architecture[str(a)]:5}" for a in ARCHITECTURES))
    print("\n".join(f"OVER BUDGET {line}" for line in broken) or "within budget")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
