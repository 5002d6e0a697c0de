"""Runs the tests at each instruction-set level of this machine, and with the reference implementation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path

import pytest
from conftest import needs_library

from simplexfix import _native

HERE = Path(__file__).parent
LEVELS = _native.build_info().get("cpu_isa_levels", [])


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=HERE,
        check=False,
    )


def suite(environment: dict[str, str], chosen: str, *tests: str) -> subprocess.CompletedProcess[str]:
    return run(
        {**environment, "OMP_NUM_THREADS": "1"}, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests
    )


def at_level(level: str) -> subprocess.CompletedProcess[str]:
    tests = ["test_topk.py", "retrieval/test_exact_search.py", "retrieval/test_index.py::test_definition"]
    if level != "avx512vnni":  # there are no VNNI kernels for losses; avx512's run instead
        tests += ["test_cross_entropy.py", "test_logits.py", "test_contrast.py"]
    return suite({"SIMPLEXFIX_ISA": level}, "not gathered", *tests)


def without_the_library() -> subprocess.CompletedProcess[str]:
    tests = ["cross_entropy", "logits", "contrast", "topk", "heads", "bad_input"]
    # left out: tests of bitwise equality and of tiny losses, which only the kernels guarantee
    chosen = "not threads and not definition and not small_loss and not strid"
    paths = [*(f"test_{name}.py" for name in tests), "retrieval/test_index.py"]
    return suite({"SIMPLEXFIX_NATIVE": "0"}, chosen, *paths)


@pytest.fixture(scope="module")
def runs() -> Iterator[Callable[..., AsyncResult]]:
    """Starts each run on first request, in the background; at most one run per core at a time."""
    with ThreadPool(len(os.sched_getaffinity(0))) as pool:
        yield cache(lambda function, *arguments: pool.apply_async(function, arguments))


def passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:]


@needs_library
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_operators_at_a_lower_level(runs: Callable[..., AsyncResult], level: str) -> None:
    """Runs the numeric tests at every level below the best; on a machine without AVX the levels coincide."""
    others = [runs(at_level, other) for other in LEVELS[:-1]]
    runs(without_the_library)
    passed(others[LEVELS.index(level)].get())


@needs_library
def test_search_gives_the_same_bits_at_every_level() -> None:
    code = (
        "import hashlib, torch, simplexfix.functional as SF; torch.manual_seed(0)\n"
        "found = [SF.cosine_topk(torch.randn(9, d), torch.randn(5000, d), 20) for d in (1, 7, 64, 129, 1023)]\n"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for pair in found for t in pair)).hexdigest())\n"
        "from simplexfix import _native; print(_native.build_info()['cpu_isa'])"
    )
    prints = {level: run({"SIMPLEXFIX_ISA": level}, "-c", code).stdout.split() for level in LEVELS}
    assert len({digest for digest, _ in prints.values()}) == 1, prints
    for level, (_, used) in prints.items():
        assert LEVELS.index(used) <= LEVELS.index(level)
    assert prints["base"][1] == "base"


@needs_library
def test_an_unknown_level_is_told() -> None:
    done = run({"SIMPLEXFIX_ISA": "avx1024"}, "-c", "import simplexfix.functional")
    assert done.returncode == 0
    assert "SIMPLEXFIX_ISA=avx1024 is none of base, avx2" in done.stderr


def test_every_public_function_works_without_the_library(runs: Callable[..., AsyncResult]) -> None:
    passed(runs(without_the_library).get())
    assert (
        "kernels: none (SIMPLEXFIX_NATIVE=0 is set)" in run({"SIMPLEXFIX_NATIVE": "0"}, "-m", "pytest", "--co").stdout
    )
