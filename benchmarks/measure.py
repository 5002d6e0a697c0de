"""Timing on shared, noisy machines: candidates take turns in one run, and only ratios are told."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from simplexfix.cli.doctor import diagnose

Call = Callable[[], object]


def interleave(candidates: dict[str, Call], *, seconds: float = 1.0, least: int = 5) -> dict[str, float]:
    """Seconds of each candidate, the first decile of its rounds: on a shared machine noise only adds.

    In every round each has its turn, so all meet the same noise.  A turn repeats a quick call for 10 ms, so that
    caches and allocators are as the candidate itself leaves them; its first call, which finds another's, is not timed.
    """
    repeats = {}
    total = 0.0
    for name, call in candidates.items():
        call()  # warms caches, compiles
        once = min(_time(call, 1) for _ in range(2))
        repeats[name] = max(1, int(10e-3 / max(once, 1e-9)))
        total += once * (repeats[name] + 1)
    rounds = max(least, min(200, int(seconds / total)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            call()
            times[name].append(_time(call, repeats[name]))
    return {name: sorted(spent)[len(spent) // 10] for name, spent in times.items()}


def _time(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def copy_in_place(numbers: int, dtype: torch.dtype = torch.float32) -> Call:
    """Reads and writes `numbers` numbers, as a gradient that is written where its input was read would."""
    source, target = torch.ones(numbers, dtype=dtype), torch.ones(numbers, dtype=dtype)
    return lambda: target.copy_(source)


def machine_card() -> dict[str, object]:
    """Where and with what the numbers were taken."""
    model = "unknown"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "processor": model,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        **diagnose(),
    }
