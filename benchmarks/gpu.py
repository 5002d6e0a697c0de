"""Measures all CUDA kernels beside torch eager, torch.compile, dense losses, other searches, and this GPU's limits.

python benchmarks/gpu.py [--out FILE] [--seconds S] [--no-compile]     (on a machine with a GPU; under ten minutes)
python benchmarks/gpu.py --device cpu --quick                           (tests only the script)

Times are between CUDA events, candidates are interleaved, and every speed has its error.  "simplexfix, CUDA graph" is
the same call without Python, dispatch and launches.  liger-kernel, cut-cross-entropy, faiss-gpu and cuvs are measured
if they are installed.  Results are written to benchmarks/results/gpu-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import contrast, logits, loss, search
from measure import copy_in_place, interleave, machine_card
from run import measure, show

from simplexfix.cli.doctor import diagnose

PEERS = {
    "liger-kernel": loss.LigerFusedLinearCrossEntropyLoss is not None,
    "cut-cross-entropy": loss.linear_cross_entropy is not None,
    "faiss-gpu": hasattr(search.faiss, "GpuIndexFlatIP"),
    "cuvs": search.brute_force is not None,
}
HALF = torch.bfloat16


# each kernel's regimes: (B, K, dtype) of losses and logits, rows of the contrast, (Q, N, d) of the search
LOSSES = [(512, 1024, torch.float32), (4096, 1024, HALF), (256, 8192, torch.float32), (256, 65536, HALF)]
LOSSES.append((16, 2**20, torch.float32))
CONTRASTS = [256, 1024, 2048, 4096, 8192]
SEARCHES = [(1000, 100_000, 128), (1000, 100_000, 1023), (1, 100_000, 1023), (1000, 1_000_000, 128)]
SEARCHES.append((10_000, 100_000, 512))


def all_cases(device: str) -> list[Callable[[], Any]]:
    """Returns functions that create the cases, so that only one at a time uses the GPU's memory."""
    return [
        *(lambda p=p, s=s: loss.LossCase(*s, device, p) for p in ("simplex", "orthoplex", "cube") for s in LOSSES),
        *(lambda s=s: logits.LogitsCase(*s, device) for s in LOSSES),
        *(lambda n=n: contrast.ContrastCase(n, 1023, device=device) for n in CONTRASTS),
        *(lambda s=s: search.SearchCase(*s, device=device) for s in SEARCHES),
    ]


def quick_cases(device: str) -> list[Callable[[], Any]]:
    """Returns one small case of each kind."""
    return [
        *(lambda p=p: loss.LossCase(8, 64, device=device, polytope=p) for p in ("simplex", "orthoplex", "cube")),
        lambda: logits.LogitsCase(8, 64, device=device),
        lambda: contrast.ContrastCase(16, 33, device=device),
        lambda: search.SearchCase(3, 500, 33, device=device),
    ]


def rates(device: str, quick: bool) -> dict[str, float]:
    """Measures this machine's bandwidth (a copy larger than the caches) and its rate of matrix products."""
    numbers, side = (2**16, 128) if quick else (2**28, 8192)
    a, b = (torch.randn(side, side, device=device).to(HALF) for _ in range(2))
    calls = {"copy": copy_in_place(numbers, device=device), "product": lambda: a @ b}
    times = interleave(calls, seconds=0.1 if quick else 2.0, device=device)
    return {
        "copy bandwidth, GB/s": 8 * numbers / times["copy"] / 1e9,
        "bfloat16 products, TFLOP/s": 2 * side**3 / times["product"] / 1e12,
    }


def gpu_card() -> dict[str, str]:
    """Returns driver and clocks from nvidia-smi, if it is available."""
    fields = ["name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    # the index would depend on CUDA_VISIBLE_DEVICES
    command.append(f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"GPU": torch.cuda.get_device_name(), "nvidia-smi": f"not readable: {type(error).__name__}"}
    return dict(zip(["GPU", *fields[1:]], (value.strip() for value in done.stdout.split(",")), strict=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only to try the script")
    parser.add_argument("--quick", action="store_true", help="one small case of each kind, and no torch.compile")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case (default: 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/gpu-NAME.json on a GPU, no file on the CPU"
    )
    arguments = parser.parse_args()
    on_gpu, usable = arguments.device == "cuda", diagnose()["CUDA usable"]
    if on_gpu and not usable.startswith("yes"):
        print(f"benchmarks/gpu.py needs a GPU that simplexfix can use: {usable}")
        return 2
    results: dict[str, Any] = {
        "machine": {**machine_card(), **(gpu_card() if on_gpu else {})},
        "peers not installed": [name for name, there in PEERS.items() if not there],
        "rates": rates(arguments.device, arguments.quick),
        "cases": [],
    }
    for table in (results["machine"], results["rates"], {"peers not installed": results["peers not installed"]}):
        for key, value in table.items():
            print(f"{key:>27}  {value}")
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") if on_gpu else "none"
    out = arguments.out or (Path(__file__).parent / "results" / f"gpu-{card}.json" if on_gpu else None)
    failed = 0
    for make in (quick_cases if arguments.quick else all_cases)(arguments.device):
        seconds, compiled = (0.0, False) if arguments.quick else (arguments.seconds, not arguments.no_compile)
        case = make()
        try:
            results["cases"].append(measure(case, seconds, compiled, with_memory=on_gpu))
            show(results["cases"][-1], case.error_name)
        except Exception as error:  # the other cases still run
            failed += 1
            results["cases"].append({"case": case.name, "failed": f"{type(error).__name__}: {error}"})
            print(f"\n{case.name}\n  FAILED {type(error).__name__}: {error}")
        del case
        if on_gpu:
            torch.cuda.empty_cache()
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
    written = f"written to {out}" if out else "not written: pass --out FILE"
    print(f"\n{failed} of {len(results['cases'])} cases failed; {written}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
