"""Runs the same cases under pytest-benchmark: `pytest benchmarks`.

Compare times within one run only: absolute times of a shared machine are noisy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import cache, partial
from typing import Any

import measure
import pytest
import run
from cases import contrast, logits, loss, search, training

CASES = {case.name: case for case in (*loss.CASES, *logits.CASES, *contrast.CASES, *search.CASES, *training.CASES[:1])}


@cache
def candidates(case: str):
    return CASES[case].candidates(compiled=False)


@cache
def errors(case: str) -> dict[str, float]:
    return CASES[case].errors()


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in candidates(case)])
def test_speed(benchmark, case: str, name: str) -> None:
    benchmark.group = case
    benchmark(candidates(case)[name])
    benchmark.extra_info["error"] = errors(case)[name]
    assert errors(case)[name] < (0.02 if name == "simplexfix" else 1.0)


class SlowPeer:
    """A case with its own clock: a call of the peer takes 100 seconds, one of ours a millisecond."""

    name, device, error_name = "a slow peer", "cpu", "error"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float) -> None:
        self.calls[name] += 1
        self.now += seconds

    def candidates(self, compiled: bool = True) -> dict[str, Any]:
        return {name: partial(self.call, name, seconds) for name, seconds in (("simplexfix", 1e-3), ("peer", 100.0))}

    def limits(self) -> dict[str, Any]:
        return {}

    def errors(self, skipped: Collection[str] = ()) -> dict[str, float]:
        return {name: call() or 0.0 for name, call in self.candidates().items() if name not in skipped}


def test_a_slow_peer_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's first call is timed, and neither its memory nor its error is measured.

    torch's bfloat16 products took minutes per call with AVX2.
    """
    weighed: list[str] = []
    monkeypatch.setattr(run, "peak_memory", lambda case, name: weighed.append(name) or 0)
    case = SlowPeer(monkeypatch)
    result = run.measure(case, 2.0, compiled=False)
    assert case.calls["peer"] == 1
    assert case.calls["simplexfix"] > 1000
    assert result["times ours"]["peer"] == pytest.approx(1e5)
    assert weighed == ["simplexfix"]


def test_the_rounds_of_a_slow_case_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SlowPeer(monkeypatch)
    measure.interleave({"peer": partial(case.call, "peer", 1.0)}, seconds=2.0)
    assert case.now == 1.0 * (2 + 2 * 3)  # two calls, then three rounds of two calls
