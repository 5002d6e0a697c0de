"""Tests that a child that was forked during a computation gets results or an error within seconds (forks.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_library

SCRIPT = Path(__file__).with_name("forks.py")
LOST = "another thread was changing this index when the process was forked, so that it is lost in the child"


def run(case: str, folder: Path, native: bool = True) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "SIMPLEXFIX_NATIVE": "1" if native else "0"}
    command = [sys.executable, SCRIPT, case]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_library
@pytest.mark.parametrize("case", ["readers", "waiting", "after_operators", "beside_operators", "workers"])
def test_a_child_works(case: str, tmp_path: Path) -> None:
    assert set(run(case, tmp_path)) == {"ok"}


@pytest.mark.parametrize("case", ["readers", "writers"])
def test_a_child_works_with_the_reference(case: str, tmp_path: Path) -> None:
    """A change replaces old rows by new ones: no child sees only half of a change."""
    assert set(run(case, tmp_path, native=False)) == {"ok"}


@needs_library
def test_a_child_forked_during_a_change_raises(tmp_path: Path) -> None:
    said = run("writers", tmp_path)
    assert all(one == "ok" or one.startswith(LOST) for one in said), said
    assert sum(one.startswith(LOST) for one in said) >= 3
