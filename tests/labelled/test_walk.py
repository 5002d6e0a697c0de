"""Tests the call path from `evaluate` to the kernels: on the way down no module is entered twice."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from versions import versions

import simplexfix
from simplexfix.report import evaluate

ROOT = f"{Path(simplexfix.__file__).parent}/"


def modules_above(frame: FrameType | None) -> list[str]:
    """Returns the package's modules from the top of the stack down to the frame, without consecutive repeats."""
    found: list[str] = []
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and (not found or found[-1] != name):
            found.append(name)
        frame = frame.f_back
    return [name.removeprefix(ROOT) for name in reversed(found)]


@pytest.mark.parametrize("protocol", ["nearest_class_mean", "instance"])
@pytest.mark.parametrize("itself", [False, True])
def test_evaluate_enters_each_module_once(protocol: str, itself: bool) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((80, 16)).astype(np.float32) for _ in range(2)]
    labels = rng.integers(5, size=80)
    ids = {"query_ids": np.arange(60), "gallery_ids": np.arange(80)} if itself else {}
    of = versions([x[:60] for x in rows], rows, labels[:60], labels, **ids)
    paths: set[tuple[str, ...]] = set()

    def called(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            paths.add(tuple(modules_above(frame)))

    sys.setprofile(called)
    try:
        evaluate(of, protocol=protocol)
    finally:
        sys.setprofile(None)
    assert any(path[-1] == "_ops.py" for path in paths) or any(path[-1] == "_reference.py" for path in paths)
    assert [path for path in paths if len(set(path)) < len(path)] == []
    assert max(map(len, paths)) <= 8
