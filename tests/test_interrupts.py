"""Tests that Ctrl-C ends a long search, addition, load or save within a second and changes nothing (interrupts.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_library

SCRIPT = Path(__file__).with_name("interrupts.py")
STOPPED = {"ended": "KeyboardInterrupt", "said": ""}


def interrupted(case: str, folder: Path, native: bool = True, delay: float = 0.5) -> dict[str, Any]:
    """Returns how the case's call ended after a real signal, and the "seconds" since the signal."""
    environment = {**os.environ, "SIMPLEXFIX_NATIVE": "1" if native else "0"}
    command = [sys.executable, SCRIPT, case]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            result = json.loads(process.stdout.readline())
            return {**result, "seconds": time.monotonic() - start}
        finally:
            process.kill()


@needs_library
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("search", {"rows": 50_000, "found": True}),
        ("topk", {"again": [3, 2]}),
        *[
            pytest.param(case, expected, marks=pytest.mark.slow)
            for case, expected in (
                ("search_on_one_thread", {}),
                ("search_without_codes", {}),
                ("add", {"rows": 110, "same": True}),
                ("load", {"early": True}),
                ("save", {"same": True, "files": ["index"]}),
                ("wait_for_another_thread", {"rows": 0}),
                ("topk_with_gradient", {}),
            )
        ],
    ],
)
def test_a_long_call_ends(case: str, expected: dict[str, Any], tmp_path: Path) -> None:
    result = interrupted(case, tmp_path, delay=0.1 if case in ("add", "load") else 0.5)
    seconds = result.pop("seconds")
    assert result == {**STOPPED, **expected}
    assert seconds < 1.5  # one second, and the delay of a busy machine


@pytest.mark.slow
def test_a_long_search_of_the_reference_ends(tmp_path: Path) -> None:
    result = interrupted("search", tmp_path, native=False)
    assert result.pop("seconds") < 3  # one block of queries and rows
    assert result == {**STOPPED, "rows": 50_000, "found": True}


@needs_library
@pytest.mark.slow
def test_a_handler_may_raise_another_exception(tmp_path: Path) -> None:
    result = interrupted("another_exception", tmp_path)
    assert result["ended"] == "TimeoutError"
    assert result["said"] == "too long"
    assert result["seconds"] < 1.5


@needs_library
@pytest.mark.slow
def test_a_handler_that_returns_ends_nothing(tmp_path: Path) -> None:
    result = interrupted("handler_that_returns", tmp_path, delay=0.1)
    assert {**result, "seconds": 0} == {"ended": "finished", "same": True, "came": 1, "meanwhile": True, "seconds": 0}


@needs_library
@pytest.mark.slow
def test_a_handler_may_read_the_index_that_it_interrupts(tmp_path: Path) -> None:
    result = interrupted("handler_that_uses_the_index", tmp_path)
    refused = (
        "a signal handler used this index during the call that it interrupted, and one of the two "
        "calls changes the index: use the index after the handler"
    )
    assert result["handler"] == ["50000", refused, refused]
    assert (result["ended"], result["rows"], result["new"]) == ("KeyboardInterrupt", 50_000, [50_000])


@needs_library
@pytest.mark.slow
def test_the_thread_that_forked_is_interrupted_in_the_child(tmp_path: Path) -> None:
    result = interrupted("child", tmp_path)
    assert result["ended"] == "KeyboardInterrupt"
    assert result["after"] < 2
