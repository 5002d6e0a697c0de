"""Tests that a child forked during a computation (forks.py) gets results or an error within seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_library

pytestmark = pytest.mark.slow  # computations on two threads beside each fork

SCRIPT = Path(__file__).with_name("forks.py")
LOST = "another thread was changing this index when the process was forked, so the child cannot use it"


def run(folder: Path, cases: tuple[str, ...], native: bool) -> dict[str, list[str]]:
    """Runs all cases in one interpreter, because its imports take two seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "SIMPLEXFIX_NATIVE": "1" if native else "0"}
    command = [sys.executable, SCRIPT, *cases]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = ("readers", "waiting", "after_operators", "beside_operators", "workers", "writers")
REFERENCE_CASES = ("readers", "writers")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[str]]:
    return run(tmp_path_factory.mktemp("forks"), CASES, native=True)


@pytest.fixture(scope="module")
def found_by_the_reference(tmp_path_factory) -> dict[str, list[str]]:
    return run(tmp_path_factory.mktemp("forks"), REFERENCE_CASES, native=False)


@needs_library
@pytest.mark.parametrize("case", CASES[:-1])
def test_a_child_works(case: str, found: dict[str, list[str]]) -> None:
    assert set(found[case]) == {"ok"}


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_a_child_works_with_the_reference(case: str, found_by_the_reference: dict[str, list[str]]) -> None:
    """The reference index replaces all rows in one assignment: no child sees half of a change."""
    assert set(found_by_the_reference[case]) == {"ok"}


@needs_library
def test_a_child_forked_during_a_change_raises(found: dict[str, list[str]]) -> None:
    said = found["writers"]
    assert all(one == "ok" or one.startswith(LOST) for one in said), said
    assert sum(one.startswith(LOST) for one in said) >= 3
