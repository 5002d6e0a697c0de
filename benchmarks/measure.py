"""Measures times on shared, noisy machines: candidates are interleaved in one run, so that their ratios are stable."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simplexfix.cli.doctor import diagnose

Call = Callable[[], Any]
SLOW = 3.0  # seconds: a call that takes longer is measured once
LONGEST = 6.0  # seconds: the limit of one call, and of all rounds of a case, except that one round always runs


def interleave(
    candidates: dict[str, Call], *, seconds: float = 1.0, least: int = 5, device: str = "cpu"
) -> dict[str, float]:
    """Returns the seconds per call of each candidate: the first decile of its rounds, since noise only adds time.

    On a GPU the time is measured between two CUDA events, so slow launches count.

    Every round runs all candidates, so that the same noise affects all.  It repeats a quick call for 20 ms twice, and
    times only the second 20 ms.  By then caches and allocators are in the state that the candidate itself leaves: after
    faiss had read its 50 MB, our search needed a dozen calls until its index was in the last-level cache again.

    A call of more than SLOW seconds is timed once after its first call, and takes no part in the rounds.  A call of
    more than LONGEST seconds runs only once, and this run is timed, unless the candidate's name has "compile".  There
    are at least `least` rounds, or fewer if they would take more than LONGEST seconds.
    """
    _time = {"cpu": _clock, "cuda": _events}[device]
    repeats = {}
    total = 0.0
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for name, call in candidates.items():
        once = _clock(call, 1)  # warms caches, compiles
        if once > LONGEST and "compile" not in name:
            times[name].append(once)
            continue
        once = _time(call, 1)
        if once > SLOW:
            times[name].append(once)
            continue
        if once < 20e-3:
            once = min(once, _time(call, 1))
        repeats[name] = max(1, int(20e-3 / max(once, 1e-9)))
        total += once * 2 * repeats[name]
    rounds = max(min(least, int(LONGEST / total)), min(200, int(seconds / total)), 1) if repeats else 0
    for _ in range(rounds):
        for name, count in repeats.items():
            _time(candidates[name], count)
            times[name].append(_time(candidates[name], count))
    return {name: sorted(spent)[len(spent) // 10] for name, spent in times.items()}


def _clock(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _events(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def captured(call: Call) -> Call:
    """Captures the call as a CUDA graph, which runs the kernels without Python, dispatch and launches."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):  # a capture requires earlier calls on another stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def gradient_step(function: Callable[[Tensor], Tensor], z: Tensor, upstream: Tensor | None = None) -> Call:
    """Returns a call that computes function(z) and its gradient.

    z is a new leaf in every call.  Autograd runs a node on the stream that created it, so a leaf from before a CUDA
    graph's capture cannot be part of the graph.
    """

    def step() -> Tensor:
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, upstream)[0]

    return step


def gradient_errors(steps: dict[str, Call], truth: Call, skipped: Collection[str]) -> dict[str, float]:
    """Returns the largest error of each gradient against float64, relative to the largest entry."""
    expected = truth()
    scale = expected.abs().max()
    return {
        name: float((step().double() - expected).abs().max() / scale)
        for name, step in steps.items()
        if name not in skipped
    }


def peak_memory(case: Any, name: str) -> int:
    """Returns the peak memory in bytes that one call of a candidate adds.

    On a GPU it is that of torch's allocator.  On the CPU (Linux only) the call runs in a new process, whose memory no
    other candidate has used.
    """
    if case.device == "cuda":
        call = case.candidates(compiled=False)[name]
        call()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    context = multiprocessing.get_context("forkserver")  # its server imports torch once for all candidates
    context.set_forkserver_preload(["torch._dynamo", "cases.contrast", "cases.logits", "cases.loss", "cases.search"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_peak_memory, type(case), fields, name).result()


def _peak_memory(cls: type, fields: dict[str, Any], name: str) -> int:
    call = cls(**fields).candidates(compiled=False)[name]
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed during setup would hide a part of the call's memory
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = process_memory("VmRSS")
    call()
    return process_memory("VmHWM") - before


def process_memory(key: str) -> int:
    """Returns an entry of /proc/self/status in bytes: VmRSS, the resident memory, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def copy_in_place(numbers: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    """Returns a copy that reads and writes `numbers` numbers: the traffic of a gradient that overwrites its input."""
    source, target = (torch.ones(numbers, dtype=dtype, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def machine_card() -> dict[str, object]:
    """Returns properties of the machine and of the build, which results of measurements store."""
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
