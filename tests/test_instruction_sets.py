"""Runs the tests at each instruction-set level of this machine, and with the reference implementation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import search_digests
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


def losses_at(level: str) -> subprocess.CompletedProcess[str]:
    """Leaves out tests of several ranks and of memory, which do not depend on the level."""
    tests = ["test_cross_entropy.py", "test_logits.py", "test_contrast.py"]
    return suite({"SIMPLEXFIX_ISA": level}, "not gathered and not memory", *tests)


def searches_at(level: str) -> subprocess.CompletedProcess[str]:
    return run({"SIMPLEXFIX_ISA": level, "OMP_NUM_THREADS": "1"}, "search_digests.py")


def without_the_library() -> subprocess.CompletedProcess[str]:
    """Leaves out most tests of CosineIndex, because test_index.py itself runs them with the reference, too."""
    tests = ["cross_entropy", "logits", "contrast", "topk", "heads", "bad_input"]
    # left out: tests of bits and of tiny losses, which only the kernels promise; tests of several ranks
    chosen = "not threads and not definition and not small_loss and not strid and not gathered and not two_processes"
    paths = [*(f"test_{name}.py" for name in tests), "retrieval/test_index.py::test_reference_implementation"]
    return suite({"SIMPLEXFIX_NATIVE": "0"}, chosen, *paths)


def a_few_at(level: str) -> subprocess.CompletedProcess[str]:
    """Runs tests of losses at one large d, of the contrast in all dtypes, and of searches with many ties."""
    chosen = "(test_sizes and (1023 or 1024)) or test_formats or (test_hard_galleries and duplicates and (129 or 1023))"
    tests = ["test_cross_entropy.py", "test_logits.py", "test_contrast.py", "retrieval/test_exact_search.py"]
    return suite({"SIMPLEXFIX_ISA": level}, chosen, *tests)


def passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:]


@needs_library
@pytest.mark.parametrize("level", [level for level in LEVELS[:-1] if "avx512" not in level])
def test_some_losses_and_searches_at_a_lower_level(level: str) -> None:
    passed(a_few_at(level))


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in LEVELS[:-1] if "vnni" not in level])
def test_losses_at_a_lower_level(level: str) -> None:
    """Runs the tests of losses, logits and the contrast again below the best level.

    On a machine without AVX the levels coincide. The losses have no VNNI kernels.
    """
    passed(losses_at(level))


@needs_library
@pytest.mark.slow
def test_search_gives_the_same_bits_at_every_level() -> None:
    """test_exact_search.py and test_index.py compare the best level with the definition."""
    with ThreadPool(len(os.sched_getaffinity(0))) as pool:
        others = pool.map_async(searches_at, LEVELS[:-1], chunksize=1)
        expected = search_digests.digests()
        searches = others.get()
    for level, done in zip(LEVELS[:-1], searches, strict=True):
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert LEVELS.index(found["level"]) <= LEVELS.index(level)
        if found["level"] != level:
            continue  # this machine lacks the level
        assert found["digests"].keys() == expected.keys()
        different = [name for name, digest in found["digests"].items() if digest != expected[name]]
        assert not different, f"{level}: {different}"
        assert level != "base" or found["level"] == "base"


@needs_library
@pytest.mark.skipif("avxvnni" not in LEVELS or not shutil.which("objdump"), reason="x86-64 with objdump alone")
def test_avxvnni_uses_the_encoding_of_avx() -> None:
    """CPUs with AVX-VNNI often lack AVX-512, whose encoding of vpdpbusd is another one."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _native.library.__file__], capture_output=True, text=True, check=True
    ).stdout
    functions = re.findall(r"^[0-9a-f]+ <\S*7avxvnni\S*>:\n(.*?)^$", listing, re.MULTILINE | re.DOTALL)
    code = "".join(functions)
    assert code.count("{vex} vpdpbusd") >= 12  # six queries, two vectors of rows
    assert not re.search(r"(?<!vex\} )vpdpbusd|zmm|ymm(1[6-9]|[23]\d)|%k[0-7]", code)


@needs_library
def test_an_unknown_level_warns() -> None:
    done = run({"SIMPLEXFIX_ISA": "avx1024"}, "-c", "import simplexfix.functional")
    assert done.returncode == 0
    assert "SIMPLEXFIX_ISA=avx1024 is none of base, avx2" in done.stderr


@pytest.mark.slow
def test_every_public_function_works_without_the_library() -> None:
    passed(without_the_library())
    assert (
        "kernels: none (SIMPLEXFIX_NATIVE=0 is set)" in run({"SIMPLEXFIX_NATIVE": "0"}, "-m", "pytest", "--co").stdout
    )
