"""Every instruction-set level that this machine has, and the plain twin, by forcing each in turn."""

from __future__ import annotations

import os
import subprocess
import sys
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


@needs_library
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_operators_at_a_lower_level(level: str) -> None:
    """The whole numeric suite again below the best level; on a machine without AVX the levels coincide."""
    suites = ["test_topk.py", "retrieval/test_exact_search.py", "retrieval/test_index.py::test_definition"]
    if level != "avx512vnni":  # of the losses there are no VNNI kernels: they are those of avx512
        suites += ["test_cross_entropy.py", "test_logits.py", "test_contrast.py"]
    done = run({"SIMPLEXFIX_ISA": level}, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not gathered", *suites)
    assert done.returncode == 0, done.stdout[-3000:]


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
    done = run({"SIMPLEXFIX_ISA": "avx1024"}, "-c", "import simplexfix")
    assert done.returncode == 0
    assert "SIMPLEXFIX_ISA=avx1024 is none of base, avx2" in done.stderr


def test_every_public_function_works_without_the_library() -> None:
    suites = [
        "test_cross_entropy.py",
        "test_logits.py",
        "test_contrast.py",
        "test_topk.py",
        "test_heads.py",
        "test_bad_input.py",
        "retrieval/test_index.py",
    ]
    # left out: promises about bits, and about tiny losses, that only the kernels make
    chosen = "not threads and not definition and not small_loss and not strid"
    done = run({"SIMPLEXFIX_NATIVE": "0"}, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *suites)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (
        "kernels: none (SIMPLEXFIX_NATIVE=0 is set)" in run({"SIMPLEXFIX_NATIVE": "0"}, "-m", "pytest", "--co").stdout
    )
