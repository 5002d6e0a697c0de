"""Planted bugs: each is one edit of the kernels' sources that some layer of the tests must catch.

    python tests/native/mutants.py [--layers plain asan tsan ptx] [NAME ...]

The edits are kept here and not as #ifdefs in the kernels.  Each names the text that it replaces, once
in its file: when a kernel changes, its mutant has to follow or fails by itself.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import harness

ENTROPY, LOGITS, TEAM = "cuda/simplex_cross_entropy.cuh", "cuda/simplex_logits.cuh", "cuda/team.cuh"
SEARCH, CODES, INDEX = "cpu/search.cpp", "cpu/gallery_codes.cpp", "cpu/cosine_index.cpp"
LAUNCH, SCALE, CORE = "cuda/simplex_cross_entropy.cu", "cuda/scale_rows.cuh", "core/simplex_cross_entropy.h"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    part: str = "cross_entropy"  # of the kernels' test program

    @property
    def in_core(self) -> bool:
        return self.file.startswith("cpu/")


MUTANTS = [
    # Synchronisation
    Mutant("no barrier after staging", ENTROPY, "sync_team<kThreads>();  // the sweeps below", "// the sweeps below"),
    Mutant("no barrier before the row is reused", ENTROPY, "if constexpr (kKept) sync_team<kThreads>();", ""),
    Mutant("no barrier in a reduction", TEAM, "sync_team<kThreads>();  // every warp", "// every warp"),
    Mutant(
        "reduction buffer reused too early",
        LOGITS,
        "if (lane == 0) out[p.d] = T(factor * p.simplex.last * sums.z);\n    sync_team<kThreads>();",
        "if (lane == 0) out[p.d] = T(factor * p.simplex.last * sums.z);\n",
        "logits",
    ),
    Mutant(
        "barrier under a condition",
        TEAM,
        "    sync_team<kThreads>();  // every",
        "    if (threadIdx.x < 64) sync_team<kThreads>();  //",
    ),
    Mutant("teams share rows", TEAM, "int64_t(gridDim.x) * kTeams;", "int64_t(gridDim.x);"),
    # Bounds and alignment
    Mutant(
        "vectors past the end",
        TEAM,
        "const Index body = (d - head) / n * n;",
        "const Index body = (d - head + n - 1) / n * n;",
    ),
    Mutant("alignment taken for granted", ENTROPY, "phase(g_z) == phase(g_out)", "true"),
    Mutant("kept row too small", ENTROPY, "return (d + 2 * n - 2) / n * n;", "return (d + n - 1) / n * n;"),
    Mutant("label out of range let in", ENTROPY, "target > p.d) {", "target > p.d + 1) {"),
    Mutant("stride forgotten", ENTROPY, "p.z + row * p.z_stride;", "p.z + row * p.d;"),
    # Values
    Mutant("label off by one", ENTROPY, "if (j == label) g = outcome.label;", "if (j == label + 1) g = outcome.label;"),
    Mutant("label in the sum", ENTROPY, "const A e = j == label ? A(0) : std", "const A e = std"),
    Mutant(
        "last slot counted twice",
        CORE,
        "const A others = label < d ? rest + last : rest;",
        "const A others = rest + last;",
    ),
    Mutant("last slot's share of the gradient", CORE, "simplex.a * g_last -", "-"),
    Mutant("mean not divided", ENTROPY, "p.mean ? A(1) / A(p.sums[0]) : A(1)", "A(1)"),
    Mutant("ignored rows counted", ENTROPY, "if (label != ignore_index && label >= 0", "if (label >= 0"),
    Mutant("weight sum not read", ENTROPY, "if (weighted) options.weight_sum = A(p.sums[1]);", ""),
    Mutant("projection without weights", ENTROPY, "if (weighted) projection -=", "if (false) projection -="),
    Mutant(
        "order of sums by address",
        ENTROPY,
        "j = lane; j < d; j += kThreads) {\n      const A x = A(z[j]);\n      sums.sum",
        "j = (lane + phase(g_z)) % kThreads; j < d; j += kThreads) {\n      const A x = A(z[j]);\n      sums.sum",
    ),
    Mutant("last logit", LOGITS, "T(factor * p.simplex.last * sums.z)", "T(factor * p.simplex.a * sums.z)", "logits"),
    Mutant("projection of the logits' gradient", LOGITS, "* inverse * inverse;", "* inverse;", "logits"),
    Mutant("one factor for all rows", SCALE, "p.factor[k * p.factor_stride]", "p.factor[0]", "scale_rows"),
    # The CPU core: bounds of the first pass
    Mutant("a row's residual forgotten", CODES, "round_up(row.residual + kDot", "round_up(0 * row.residual + kDot"),
    Mutant("a query's residual forgotten", "cpu/query_codes.h", "return residual_[size_t(q)] *", "return 0 *"),
    Mutant("center forgotten", CODES, "round_up(row.along)", "round_up(0 * row.along)"),
    Mutant(
        "cutoff without the center", "cpu/query_codes.cpp", "round_down(middle - along_[q] -", "round_down(middle -"
    ),
    Mutant(
        "panel's length from its last row",
        CODES,
        "std::max(at == 0 ? 0.f : norm, round_up(row.code_norm))",
        "round_up(row.code_norm)",
    ),
    # ... what passes, and in which order
    Mutant("rows past the end of the gallery", SEARCH, "~uint64_t(0) >> (kPanelRows - rows)", "~uint64_t(0)"),
    Mutant(
        "rest of a step taken for scored",
        SEARCH,
        "task.cutoff[size_t(q)] = state.cutoff;",
        "task.cutoff[size_t(q)] = task.seen < state.dense_until ? kInfinity : state.cutoff;",
    ),
    Mutant("sample believed", SEARCH, "if (codes_) search_again(task);", ""),
    Mutant("too few of the promising scored", SEARCH, "score_in_windows(task, &QueryState::waiting);", ""),
    # ... the index
    Mutant("codes of moved rows kept", INDEX, "encode(*codes_, gone.front() / kPanelRows * kPanelRows, to);", ""),
    Mutant(
        "a refused row stays",
        INDEX,
        "    rows_.resize(before);\n    if (codes_) codes_->resize(before);\n    throw;",
        "    ids_.append(nullptr, n);\n    throw;",
    ),
    Mutant(
        "changes do not wait for searches",
        INDEX,
        "return std::unique_lock(mutex_);",
        "return std::unique_lock(mutex_, std::defer_lock);",
    ),
    Mutant(
        "length of a file's rows taken on trust",
        "cpu/index_file.cpp",
        "if (square != 0 &&",
        "if (false && square != 0 &&",
    ),
]


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc with the bug in it."""
    csrc = folder / "csrc"
    for part in ("core", "cpu", "cuda"):
        shutil.copytree(harness.ROOT / "csrc" / part, csrc / part)
    file = csrc / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"mutant {mutant.name}: {mutant.file} holds {text.count(mutant.old)} times: {mutant.old}")
    file.write_text(text.replace(mutant.old, mutant.new))
    return csrc


def verdict(mutant: Mutant, layer: str, jobs: int = 1) -> str | None:
    """What the layer found, or None."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = plant(mutant, Path(folder))
        programs = harness.build_core(layer, csrc, jobs) if mutant.in_core else harness.build(layer, csrc, jobs)
    try:
        if mutant.in_core:
            runs = harness.run_core(programs, layer, harness.ISA_LEVELS[-1:])
        else:
            runs = [harness.run(programs, layer, ["--only", mutant.part, "--order", "forward"])]
    except subprocess.TimeoutExpired:
        return "time out"
    for done in runs:
        if done.returncode:
            telling = ("SUMMARY", "runtime error", "CAUGHT", "FAIL ", "the best row", "a row is missing")
            found = [line for line in done.stdout.splitlines() if any(word in line for word in telling)]
            return found[0].strip() if found else f"exit status {done.returncode}"
    return None


def run_all(
    names: list[str] | None = None, layers: tuple[str, ...] = ("plain", "asan", "tsan"), jobs: int = 1
) -> list[str]:
    """Tries the layers on each mutant until one turns red; prints a table, returns the survivors."""
    survivors = []
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        for layer in layers:
            found = verdict(mutant, layer, jobs)
            if found:
                print(f"{mutant.name:38} {layer:6} {found[:150]}", flush=True)
                break
        else:
            print(f"{mutant.name:38} SURVIVED", flush=True)
            survivors.append(mutant.name)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="all where none is given")
    parser.add_argument("--layers", nargs="+", default=["plain", "asan", "tsan"], choices=list(harness.LAYERS))
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    options = parser.parse_args()
    return bool(run_all(options.names, tuple(options.layers), options.jobs))


if __name__ == "__main__":
    sys.exit(main())
