"""Planted bugs: each is one edit of the kernels' sources that some layer of the tests must catch.

    python tests/native/mutants.py [--layers plain asan tsan ptx] [--some N] [NAME ...]

The edits are here and not #ifdefs in the kernels.  `old` must occur exactly once in its file without comments.  So a
mutant whose kernel has changed fails until it is updated, and comments are free to change.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import harness

CONTRAST, CONTRAST_ROW = "cuda/contrast.cuh", "core/contrast.h"
ENTROPY, SUMS, LOGITS, TEAM = "cuda/cross_entropy.cuh", "cuda/loss_sums.cuh", "cuda/simplex_logits.cuh", "cuda/team.cuh"
SIMPLEX, ORTHOPLEX, CUBE = (f"cuda/{polytope}_cross_entropy.cuh" for polytope in ("simplex", "orthoplex", "cube"))
SEARCH, CODES, INDEX = "cpu/search.cpp", "cpu/gallery_codes.cpp", "cpu/cosine_index.cpp"
TILES, SELECT, ROWS = "cuda/topk_tiles.cuh", "cuda/topk_select.cuh", "cuda/topk_rows.cuh"
PARALLEL = "cpu/parallel.cpp"
DEVICE, SCORE = "cuda/device.cuh", "core/cosine_score.h"
LAUNCH, SCALE, CORE = "cuda/simplex_cross_entropy.cu", "cuda/scale_rows.cuh", "core/simplex_cross_entropy.h"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # relative to csrc
    old: str
    new: str
    group: str = "cross_entropy"  # part of the kernels' test program
    layers: tuple[str, ...] = ("plain", "asan", "tsan")  # layers that may find it

    @property
    def in_core(self) -> bool:
        return self.file.startswith("cpu/")


MUTANTS = [
    # Synchronisation
    Mutant(
        "no barrier after staging",
        ENTROPY,
        "return x; });\n    sync_team<kThreads>();",
        "return x; });",
    ),
    Mutant(
        "no barrier before the row is reused",
        ENTROPY,
        "A(x))); });\n    sync_team<kThreads>();",
        "A(x))); });",
    ),
    Mutant("no barrier in a reduction", TEAM, "sync_team<kThreads>();\n    value =", "value ="),
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
        "sync_team<kThreads>();\n    value =",
        "if (threadIdx.x < 64) sync_team<kThreads>();\n    value =",
    ),
    Mutant("teams share rows", TEAM, "int64_t(gridDim.x) * kTeams;", "int64_t(gridDim.x);"),
    # Bounds and alignment
    Mutant(
        "vectors past the end",
        TEAM,
        "const Index body = (d - head) / n * n;",
        "const Index body = (d - head + n - 1) / n * n;",
    ),
    Mutant(
        "alignment taken for granted",
        ENTROPY,
        "misalignment(g_z) == misalignment(g_gradient),\n                        [&]",
        "true,\n                        [&]",
    ),
    Mutant("staged row too small", ENTROPY, "return (d + 2 * n - 2) / n * n;", "return (d + n - 1) / n * n;"),
    Mutant("label out of range let in", ENTROPY, "target >= p.slots ?", "target > p.slots ?"),
    Mutant("stride forgotten", ENTROPY, "p.z + row * p.z_stride;\n    T* s_z", "p.z + row * p.d;\n    T* s_z"),
    # Values
    Mutant("label off by one", SIMPLEX, "if (j == label_) g =", "if (j == label_ + 1) g ="),
    Mutant("label in the sum", SIMPLEX, "const A e = j == label_ ? A(0) : std", "const A e = std"),
    Mutant(
        "last slot counted twice",
        CORE,
        "const A others = label < d ? sum_exp_others + last : sum_exp_others;",
        "const A others = sum_exp_others + last;",
    ),
    Mutant("last slot's term of the gradient", CORE, "simplex.a * g_last -", "-"),
    Mutant("mean not divided", ENTROPY, "return mean ? A(1) / A(sums[0]) : A(1);", "return A(1);"),
    Mutant("ignored rows counted", SUMS, "if (label != ignore_index && label >= 0", "if (label >= 0"),
    Mutant("weight sum not read", ENTROPY, "if (weighted()) with_weights.weight_sum = A(sums[1]);", ""),
    Mutant(
        "projection without weights",
        SIMPLEX,
        "if (row_.weighted()) dot -= outcome_.weight * (sums.weighted - (slot",
        "if (false) dot -= outcome_.weight * (sums.weighted - (slot",
    ),
    Mutant(
        "order of sums by address",
        ENTROPY,
        "(int j = lane; j < d; j += kThreads) loss.accumulate(&sums, j, A(s_z[j]));",
        "(int j = (lane + misalignment(g_z)) % kThreads; j < d; j += kThreads) loss.accumulate(&sums, j, A(s_z[j]));",
    ),
    Mutant(
        "a chunk's sums overwritten",
        ENTROPY,
        "chunks.sums[work] = sums;\n      sync_team<kChunkThreads>();",
        "chunks.sums[work] = sums;",
    ),
    Mutant(
        "only the first chunk's terms",
        ENTROPY,
        "chunks.terms + row * chunks.count, chunks.count)",
        "chunks.terms + row * chunks.count, 1)",
    ),
    Mutant(
        "chunks' workspace by rows",
        ENTROPY,
        "chunks.sums + row * chunks.count, chunks.count)",
        "chunks.sums + row, chunks.count)",
    ),
    Mutant("opposite of the orthoplex's label", ORTHOPLEX, "positive_ ? slot + row_.d : slot - row_.d;", "slot;"),
    Mutant("side of the orthoplex's label", ORTHOPLEX, "positive_ ? z_label_ : -z_label_);", "z_label_);"),
    Mutant(
        "label of another chunk",
        ORTHOPLEX,
        "(positive_ ? row.slot() : row.slot() - row.d) - row.begin)",
        "(positive_ ? row.slot() : row.slot() - row.d))",
    ),
    Mutant("bit of the cube's code", CUBE, ">> (j & 63)) & 1;", ">> (j & 31)) & 1;"),
    Mutant("codes of another chunk", CUBE, " + row.begin / 64),", "),"),
    Mutant("logarithm of the last factors", CUBE, "terms->logs += std::log1p(product_);", "terms->logs += product_;"),
    Mutant("last logit", LOGITS, "T(factor * p.simplex.last * sums.z)", "T(factor * p.simplex.a * sums.z)", "logits"),
    Mutant("projection of the logits' gradient", LOGITS, "* inverse * inverse;", "* inverse;", "logits"),
    Mutant("one factor for all rows", SCALE, "p.factor[k * p.factor_stride]", "p.factor[0]", "scale_rows"),
    Mutant("divisor left out", SCALE, "if (p.divisor) factor", "if (false) factor", "scale_rows"),
    # The contrast
    Mutant(
        "own candidate's derivative",
        CONTRAST,
        "(j == own_at ? own : s[j] * grad_scale)",
        "(s[j] * grad_scale)",
        "contrast",
    ),
    Mutant("one class for all rows", CONTRAST, "p.anchor_class[row]", "p.anchor_class[0]", "contrast"),
    Mutant("candidates of its own class in the sum", CONTRAST, "differs ? score : lowest;", "score;", "contrast"),
    Mutant("length of a zero row", CONTRAST, "squares == A(0) ? A(0) : A(1)", "A(1)", "contrast"),
    Mutant(
        "partial norms overwritten",
        CONTRAST,
        "std::sqrt(squares);\n    sync_team<kThreads>();",
        "std::sqrt(squares);\n",
        "contrast",
    ),
    Mutant("own score above the others", CONTRAST_ROW, "top < own) top = own;", "false) top = own;", "contrast"),
    Mutant(
        "alone without negatives",
        CONTRAST_ROW,
        "Negatives::kRemove && alone",
        "Negatives::kRemove && false",
        "contrast",
    ),
    # The search by tensor cores: synchronisation
    Mutant(
        "tile read too early",
        TILES,
        "sync_team<kTileThreads>();\n        products.add",
        "products.add",
        "topk",
    ),
    Mutant(
        "tile overwritten too early",
        TILES,
        "sync_team<kTileThreads>();\n        now = 1 - now;",
        "now = 1 - now;",
        "topk",
    ),
    Mutant("copies not waited for", TILES, "wait_for_copies<1>();", "wait_for_copies<2>();", "topk"),
    Mutant("counts cleared too early", SELECT, "| digit;\n      sync_team<kThreads>();", "| digit;", "topk"),
    Mutant("counts read too early", SELECT, "sync_team<kThreads>();\n      uint32_t digit", "uint32_t digit", "topk"),
    Mutant(
        "sorted before all have pushed",
        SELECT,
        "sync_team<kThreads>();\n      const int64_t count",
        "const int64_t count",
        "topk",
    ),
    Mutant(
        "no barrier in the sort",
        SELECT,
        "      }\n      sync_team<kThreads>();\n    }\n}",
        "      }\n    }\n}",
        "topk",
    ),
    # ... fragments
    Mutant(
        "halves of a query's columns swapped",
        TILES,
        "lane() % 16][k + lane() / 16 * 8]",
        "lane() % 16][k + (1 - lane() / 16) * 8]",
        "topk",
    ),
    Mutant(
        "rows of a fragment swapped",
        TILES,
        "{rows[f % 2 * 2], rows[f % 2 * 2 + 1]}",
        "{rows[f % 2 * 2 + 1], rows[f % 2 * 2]}",
        "topk",
    ),
    Mutant(
        "operands of mma swapped",
        DEVICE,
        "f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}",
        "f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %7}",
        "topk",
        ("ptx",),
    ),
    Mutant("queries past the end", TILES, "first + row < rows && column + at < pitch", "column + at < pitch", "topk"),
    Mutant("columns past the end", TILES, "first + row < rows && column + at < pitch", "first + row < rows", "topk"),
    Mutant(
        "vectors at odd addresses", "cuda/cosine_topk.cu", "plan.pitch = ceil_div(d, 8) * 8;", "plan.pitch = d;", "topk"
    ),
    # ... bounds
    Mutant("a query's residual forgotten", SCORE, "float(residual * (1 + 0x1p-7) +", "float(0 * residual +", "topk"),
    Mutant("a row's residual forgotten", SCORE, "residual * (1 + 0x1p-16)", "0 * residual", "topk"),
    Mutant(
        "error bound on the wrong side",
        TILES,
        "if (!(product + row_error_bound >= least[j]))",
        "if (!(product - row_error_bound >= least[j]))",
        "topk",
    ),
    Mutant("cutoff of one row too few", SELECT, "int64_t rank = p.k;", "int64_t rank = p.k - 1;", "topk"),
    Mutant("bits of negative scores", SELECT, "? ~bits : bits | 0x80000000u", "? bits : bits | 0x80000000u", "topk"),
    Mutant("rows past the gallery listed", TILES, "if (row >= p.n) continue;", "", "topk"),
    # ... lists, order, results
    Mutant("list past its end", TILES, "if (place < p.capacity) p.list", "p.list", "topk"),
    Mutant(
        "a full list taken for all",
        SELECT,
        "const bool listed = p.found && int64_t(p.found[query]) <= p.capacity;",
        "const bool listed = p.found;",
        "topk",
    ),
    Mutant("ties to the higher id", "core/ranking.h", "a.id < b.id", "a.id > b.id", "topk"),
    Mutant(
        "padding sorted first", SELECT, "list[i] = {-INFINITY, INT64_MAX};", "list[i] = {INFINITY, INT64_MAX};", "topk"
    ),
    Mutant(
        "a full list dropped",
        SELECT,
        "best_count = count < p.k ? count : p.k;",
        "best_count = begin + rows < total ? 0 : count < p.k ? count : p.k;",
        "topk",
    ),
    Mutant("nan not refused", SELECT, "const bool refused = *p.non_finite_rows > 0 ||", "const bool refused =", "topk"),
    Mutant(
        "partial sums in another order",
        ROWS,
        "int mask = kPartials / 2; mask > 0; mask /= 2",
        "int mask = 1; mask < kPartials; mask *= 2",
        "topk",
    ),
    # The CPU core: bounds of the first pass
    Mutant(
        "a row's residual forgotten in the codes",
        CODES,
        "round_up(row.residual + kDot",
        "round_up(0 * row.residual + kDot",
    ),
    Mutant(
        "a query's residual forgotten in the codes", "cpu/query_codes.h", "return residual_[size_t(q)] *", "return 0 *"
    ),
    Mutant("a run's sum that overflows", "cpu/codes.inc", "kRunLimit = 258", "kRunLimit = 330"),
    Mutant("a pair's product that saturates", "cpu/codes.inc", "kPairLimit = 128", "kPairLimit = 160"),
    Mutant("a run's offset in one lane", "cpu/query_codes.cpp", "sum[i / 2 % 2]", "sum[0]"),
    Mutant("panels of codes that overlap", CODES, "memory + i * panel_bytes_", "memory + i * (panel_bytes_ - 64)"),
    Mutant("center forgotten", CODES, "round_up(row.center_dot)", "round_up(0 * row.center_dot)"),
    Mutant(
        "cutoff without the center",
        "cpu/query_codes.cpp",
        "round_down(middle - center_dot_[q] -",
        "round_down(middle -",
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
        "remaining rows of a step taken for scored",
        SEARCH,
        "task.cutoff[size_t(q)] = state.cutoff;",
        "task.cutoff[size_t(q)] = task.seen < state.dense_until ? kInfinity : state.cutoff;",
    ),
    Mutant("sample believed", SEARCH, "if (codes_) search_again(task);", ""),
    Mutant("pending candidates never scored", SEARCH, "score_in_windows(task, &CandidateList::pending);", ""),
    # ... some of the rows
    Mutant("masked rows pass the bounds", SEARCH, " & rows_.mask_word(g / kPanelRows);", ";"),
    Mutant("masked rows are offered", SEARCH, "if (rows_.is_searched(g + r)) best.offer", "best.offer"),
    Mutant("masked rows are scored", SEARCH, "    if (rows_.is_searched(g)) rows.push_back", "    rows.push_back"),
    Mutant("excluded ids are included", INDEX, "word = selection.exclude ? word & ~bit : word | bit;", "word |= bit;"),
    # ... the index
    Mutant(
        "codes of moved rows kept", INDEX, "encode(*codes_, gone.front() / kPanelRows * kPanelRows, to, nullptr);", ""
    ),
    Mutant(
        "a refused row stays",
        INDEX,
        "    rows_.resize(before);\n    if (codes_) codes_->resize(before);\n    throw;",
        "    ids_.append(nullptr, n, interrupt);\n    throw;",
    ),
    Mutant(
        "changes do not wait for searches",
        "cpu/index_lock.cpp",
        "(access == Access::kRead || lock.readers_ == 0)",
        "true",
    ),
    Mutant(
        "length of a file's rows taken on trust",
        "cpu/index_file.cpp",
        "if (square != 0 &&",
        "if (false && square != 0 &&",
    ),
    # ... the pool of threads
    Mutant("a call that has ended stays open", PARALLEL, "if (forks == forks_ && call.seats > 0) close(call);", ""),
    Mutant("a call ends before its threads", PARALLEL, "while (call.running != 0) {", "while (false) {"),
    Mutant("a child counts its parent's threads", PARALLEL, "threads_ = waiting_ = 0;", ""),
    Mutant("an exception of another thread lost", PARALLEL, "if (!failure) failure = std::move(call.failure);", ""),
]


def without_comments(source: str) -> str:
    """Returns C++ without // comments; each statement keeps its line."""
    return re.sub(r'("(?:\\.|[^"\\\n])*")|[ \t]*//[^\n]*', r"\1", source)


def plant(mutant: Mutant, folder: Path) -> Path:
    """Copies csrc into `folder` and plants the bug in the copy."""
    csrc = folder / "csrc"
    for folder_name in ("core", "cpu", "cuda"):
        shutil.copytree(harness.ROOT / "csrc" / folder_name, csrc / folder_name)
    file = csrc / mutant.file
    text = without_comments(file.read_text())
    if text.count(mutant.old) != 1:
        raise ValueError(f"mutant {mutant.name}: {mutant.file} holds {text.count(mutant.old)} times: {mutant.old}")
    file.write_text(text.replace(mutant.old, mutant.new))
    return csrc


def verdict(mutant: Mutant, layer: str, jobs: int = 1) -> str | None:
    """Returns the line of output that tells why the layer failed, or None if it passed."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = plant(mutant, Path(folder))
        programs = harness.build_core(layer, csrc, jobs) if mutant.in_core else harness.build(layer, csrc, jobs)
    try:
        if mutant.in_core:
            runs = harness.run_core(programs, layer, harness.ISA_LEVELS[-1:])
        else:
            runs = [harness.run(programs, layer, ["--only", mutant.group, "--order", "forward"])]
    except subprocess.TimeoutExpired:
        return "time out"
    for done in runs:
        if done.returncode:
            telling = ("SUMMARY", "runtime error", "CAUGHT", "FAIL ", "the best row", "a row is missing")
            found = [line for line in done.stdout.splitlines() if any(word in line for word in telling)]
            return found[0].strip() if found else f"exit status {done.returncode}"
    return None


def run_all(names: list[str] | None = None, layers: tuple[str, ...] | None = None, jobs: int = 1) -> list[str]:
    """Runs the layers on each mutant until one fails.  Prints a table, returns the survivors."""
    survivors = []
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        for layer in layers or mutant.layers:
            found = verdict(mutant, layer, jobs)
            if found:
                print(f"{mutant.name:38} {layer:6} {found[:150]}", flush=True)
                break
        else:
            print(f"{mutant.name:38} SURVIVED", flush=True)
            survivors.append(mutant.name)
    return survivors


def some(count: int) -> list[Mutant]:
    """Returns `count` mutants, different ones for successive commits.  Mutants that need nvcc are left out."""
    return harness.rotating([mutant for mutant in MUTANTS if mutant.layers != ("ptx",)], count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="all where none is given")
    parser.add_argument("--layers", nargs="+", choices=list(harness.LAYERS))
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    parser.add_argument("--some", type=int, metavar="N", help="N of them, others for every commit")
    options = parser.parse_args()
    if options.some:
        options.names += [mutant.name for mutant in some(options.some)]
    return bool(run_all(options.names, options.layers and tuple(options.layers), options.jobs))


if __name__ == "__main__":
    sys.exit(main())
