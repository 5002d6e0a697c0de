"""Prints the table "On a GPU" of docs/measurements/performance.md: bytes, operations, and times at published peaks.

python benchmarks/gpu_floor.py            prints the table; nothing in it was measured
python benchmarks/gpu_floor.py --check    compares REGISTERS with the built library (tests/native/machine_code.py)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from gpu import CONTRASTS, LOSSES, SEARCHES


@dataclass(frozen=True)
class Gpu:
    """Published peaks, and the shared memory of an SM."""

    architecture: int
    bandwidth: float  # bytes per second
    matrix: float  # dense bfloat16 operations per second
    shared: int  # bytes


H100 = Gpu(90, 3.35e12, 989e12, 228 << 10)  # SXM
A100 = Gpu(80, 2.04e12, 312e12, 164 << 10)  # SXM, 80 GB

# As compiled by CUDA 13.0: registers per thread on sm_90 and on sm_80, and bytes of static shared memory per block.
# Kernels for rows in chunks have several sweeps; theirs is the maximum.
REGISTERS = {
    "contrast_rows<float>": (40, 40, 160),
    "cross_entropy<CubeLoss<float>, __nv_bfloat16, 128>": (64, 63, 128),
    "cross_entropy<CubeLoss<float>, float, 128>": (64, 63, 128),
    "cross_entropy<CubeLoss<float>, float, 512>": (64, 63, 512),
    "cross_entropy<OrthoplexLoss<float>, __nv_bfloat16, 128>": (64, 64, 80),
    "cross_entropy<OrthoplexLoss<float>, float, 128>": (62, 61, 80),
    "cross_entropy<OrthoplexLoss<float>, float, 512>": (62, 61, 320),
    "cross_entropy<SimplexLoss<float>, __nv_bfloat16, 128>": (64, 64, 96),
    "cross_entropy<SimplexLoss<float>, float, 128>": (64, 63, 96),
    "cross_entropy<SimplexLoss<float>, float, 512>": (64, 61, 384),
    "cross_entropy_chunk<CubeLoss<float>, __nv_bfloat16>": (64, 64, 256),
    "cross_entropy_chunk<CubeLoss<float>, float>": (56, 56, 256),
    "cross_entropy_chunk<OrthoplexLoss<float>, __nv_bfloat16>": (64, 64, 192),
    "cross_entropy_chunk<OrthoplexLoss<float>, float>": (64, 64, 192),
    "cross_entropy_chunk<SimplexLoss<float>, __nv_bfloat16>": (64, 64, 256),
    "cross_entropy_chunk<SimplexLoss<float>, float>": (56, 56, 256),
    "simplex_logits_backward<__nv_bfloat16, 256>": (48, 48, 128),
    "simplex_logits_backward<float, 256>": (48, 48, 128),
    "sweep_tiles<false>": (126, 128, 20480),
}

# additions, multiplications, comparisons and exponentials per number, without margin, weights and smoothing
LOSS_OPERATIONS = {"Simplex": 17, "Orthoplex": 24, "Cube": 33}
LOGITS_OPERATIONS, CONTRAST_OPERATIONS = 8, 10


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    size: str
    moved: float  # bytes
    operations: float
    kernel: str
    threads: int
    dynamic: int = 0  # bytes of dynamic shared memory per block
    products: bool = False  # whether the operations run on tensor cores, whose peak is published
    in_l2: bool = False  # whether the data can stay in L2

    def floor(self, gpu: Gpu) -> float:
        """Returns bytes over memory bandwidth, or the time of the tensor cores if larger, in seconds.

        It is a lower bound of the time unless `in_l2`.
        """
        return max(self.moved / gpu.bandwidth, self.operations / gpu.matrix if self.products else 0.0)

    def occupancy(self, gpu: Gpu) -> float:
        """Returns the fraction of an SM's 64 warps that fit its registers and shared memory.

        For compute capabilities 8.0 and 9.0: an SM has four sub-partitions of 16 Ki registers, which warps get in
        units of 256.  CUDA reserves 1 KiB of shared memory per block; it is allocated in units of 128 bytes.
        """
        on_90, on_80, static = REGISTERS[self.kernel]
        warps = self.threads // 32
        of_warp = ceil((on_80 if gpu.architecture == 80 else on_90) * 32 / 256) * 256
        of_block = ceil((static + self.dynamic + 1024) / 128) * 128
        blocks = min(16384 // of_warp * 4 // warps, gpu.shared // of_block, 64 // warps, 32)
        return blocks * warps / 64

    def line(self) -> str:
        floors = [f"{1e6 * self.floor(gpu):.1f}" for gpu in (H100, A100)]
        if self.in_l2:
            floors = [f"({floor})" for floor in floors]
        fractions = [f"{100 * self.occupancy(gpu):.0f} %" for gpu in (H100, A100)]
        sizes = [f"{self.moved / 1e6:,.1f}", f"{self.operations / 1e6:,.0f}"]
        return f"| {' | '.join([self.what, self.size, *sizes, *floors, *fractions, 'not measured'])} |"


def losses() -> Iterator[Row]:
    for polytope, operations in LOSS_OPERATIONS.items():
        for b, k, dtype in LOSSES:
            d = {"Simplex": k - 1, "Orthoplex": k // 2, "Cube": k}[polytope]
            n, name = dtype.itemsize, "__nv_bfloat16" if dtype.itemsize == 2 else "float"
            staged = (d + 32 // n - 2) // (16 // n) * 16  # bytes, as staged_size() in csrc/cuda/cross_entropy.cuh
            threads = 128 if staged <= 16 << 10 else 512  # no row here is short enough for one warp
            if staged <= 44 << 10:
                kernel = f"cross_entropy<{polytope}Loss<float>, {name}, {threads}>"
            else:
                kernel, staged = f"cross_entropy_chunk<{polytope}Loss<float>, {name}>", 0
            what = f"{polytope.lower()} loss with gradient, its kernel"
            yield Row(what, shape(b, d, n), 2 * b * d * n, operations * b * d, kernel, threads, staged)


def shape(rows: int, columns: int, bytes_of_number: int) -> str:
    return f"{rows:,} x {columns:,} {'bfloat16' if bytes_of_number == 2 else 'float32'}"


def all_rows() -> Iterator[Row]:
    yield from losses()
    for b, k, dtype in LOSSES:  # d numbers read and k written, then k read and d written
        n, name = dtype.itemsize, "__nv_bfloat16" if dtype.itemsize == 2 else "float"
        moved, operations = 2 * b * (2 * k - 1) * n, LOGITS_OPERATIONS * b * k
        kernel = f"simplex_logits_backward<{name}, 256>"
        yield Row("simplex logits + gradient", shape(b, k - 1, n), moved, operations, kernel, 256)
    for b in CONTRASTS:  # three sweeps that read and write
        operations = CONTRAST_OPERATIONS * b * b
        yield Row("contrast_rows", f"{b:,} x {b:,}", 24 * b * b, operations, "contrast_rows<float>", 256, in_l2=True)
    for q, rows, d in SEARCHES:
        splits, chunks = min(128, ceil(rows / 64)), ceil(q / 4096)  # plan_cosine_topk() for k <= 512
        codes, buckets = 2 * ceil(d / 8) * 8 * (q + chunks * rows), 4 * 64 * splits * q
        tiles = 2 * ceil(q / 64) * 64 * ceil(rows / 64) * 64 * ceil(d / 32) * 32
        size = f"{q:,} in {rows:,}, d = {d:,}"
        yield Row("search, first pass", size, 2 * codes + buckets, 2 * tiles, "sweep_tiles<false>", 128, products=True)


def table() -> str:
    head = "| kernel | size | MB | million operations | H100, us | A100, us | H100 filled | A100 filled | measured |"
    return "\n".join([head, "|" + " --- |" * 9, *(row.line() for row in all_rows())])


def registers_built() -> dict[str, tuple[int, int, int]]:
    """Returns REGISTERS for the built library; for a kernel with several sweeps the maximum."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "native"))
    import machine_code

    found: dict[str, tuple[int, int, int]] = {}
    for kernel, by in machine_code.usage(machine_code.built_library()).items():
        name = re.sub(r", \(Sweep\)\d", "", kernel)
        used = (by["90"].registers, by["80"].registers, by["80"].shared)  # sm_90's includes the reserved KiB
        found[name] = tuple(map(max, used, found.get(name, used)))
    return found


def main() -> int:
    if sys.argv[1:] != ["--check"]:
        print(table())
        return 0
    found = registers_built()
    wrong = {kernel: found.get(kernel) for kernel, known in REGISTERS.items() if found.get(kernel) != known}
    for kernel, registers in wrong.items():
        print(f"{kernel}: the library has {registers}, REGISTERS {REGISTERS[kernel]}")
    print(f"{len(wrong)} of {len(REGISTERS)} out of date")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
