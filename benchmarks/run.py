"""Prints for each case the time of each alternative over ours, the fraction of the machine's limit, and errors.

python benchmarks/run.py [--only loss logits contrast search index training] [--out FILE] [--seconds S] [--threads N]
                         [--no-compile] [--minutes M]

--out also writes the results as JSON.  A run that falls behind its limit of minutes measures further cases without
torch.compile, and leaves out the cases that remain when the limit is reached.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from cases import contrast, logits, loss, search, training
from measure import LONGEST, SLOW, captured, interleave, machine_card, peak_memory

PARTS = {
    "loss": loss.CASES,
    "logits": logits.CASES,
    "contrast": contrast.CASES,
    "search": search.CASES,
    "index": search.INDEX_CASES,
    "training": training.CASES,
}
DELAY = 0.15  # a run is behind if it has used this much more of its minutes than of its cases


def measure(case: Any, seconds: float, compiled: bool, with_memory: bool = True) -> dict[str, Any]:
    candidates = case.candidates(compiled)
    if case.device == "cuda":
        try:
            candidates["simplexfix, CUDA graph"] = captured(candidates["simplexfix"])
        except RuntimeError as error:  # the other candidates still run
            print(f"\n{case.name}: CUDA graph capture failed: {str(error).partition(chr(10))[0]}")
    limits = case.limits()
    times = interleave({**candidates, **limits}, seconds=seconds, device=case.device)
    ours = times["simplexfix"]
    if isinstance(case, search.IndexCase):  # the memory of a search is negligible beside its index
        memory, unit = case.memory(), "x the vectors in fp32"
    else:
        measured = [name for name in case.candidates(compiled=False) if times[name] <= SLOW] if with_memory else []
        if case.device == "cuda":  # faiss and cuVS allocate outside torch, whose statistics miss them
            measured = [name for name in measured if not name.startswith(("faiss", "cuVS"))]
        memory, unit = {name: peak_memory(case, name) / 2**20 for name in measured}, "MiB"
    return {
        "case": case.name,
        **({"microseconds": 1e6 * ours} if case.device == "cuda" else {}),
        "times ours": {name: times[name] / ours for name in candidates if name != "simplexfix"},
        **{f"fraction of {name}": times[name] / ours for name in limits},
        "memory": memory,
        "memory unit": unit,
        case.error_name: case.errors(skipped=[name for name, spent in times.items() if spent > LONGEST]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=list(PARTS), choices=PARTS, help="default: all; index and training take minutes"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="target time of the measurement of a case (default: 2)"
    )
    parser.add_argument("--threads", type=int, default=1, help="1 is steadiest on a shared machine (default: 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of the whole run (default: 10)")
    arguments = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(arguments.threads)
    if search.faiss is not None:
        search.faiss.omp_set_num_threads(arguments.threads)
    results: dict[str, Any] = {"machine": machine_card(), "cases": []}
    for key, value in results["machine"].items():
        print(f"{key:>17}  {value}")
    cases = [case for part in arguments.only for case in PARTS[part]]
    for at, case in enumerate(cases):
        used = (time.monotonic() - start) / (60 * arguments.minutes)
        if used >= 1:
            results["left out"] = [case.name for case in cases[at:]]
            print(f"\n{arguments.minutes:g} minutes are over; left out:", *results["left out"], sep="\n  ")
            save(results, arguments.out)
            break
        compiled = not arguments.no_compile and used <= at / len(cases) + DELAY
        results["cases"].append(measure(case, arguments.seconds, compiled))
        show(results["cases"][-1], case.error_name)
        save(results, arguments.out)  # after each case, so that an interrupted run keeps its results


def save(results: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


def show(result: dict[str, Any], kind: str) -> None:
    print(f"\n{result['case']}")
    if "microseconds" in result:
        print(f"  {result['microseconds']:.1f} us")
    for name, fraction in result.items():
        if name.startswith("fraction of"):
            print(f"  {fraction:.2f} {name.removeprefix('fraction ')}")
    print(f"  {'':28} time / ours")
    for name, ratio in {"simplexfix": 1.0, **result["times ours"]}.items():
        memory, error = result["memory"].get(name), result[kind].get(name)
        extra = [f"{memory:8.2f} {result['memory unit']}"] if memory is not None else []
        extra += [f"{kind} {error:.1e}"] if error is not None else []
        print("  ".join([f"  {name:<28} {ratio:8.2f} x", *extra]))


if __name__ == "__main__":
    main()
