"""The same cases under pytest-benchmark: `pytest benchmarks`.  Absolute times of a shared machine mean little;
compare within one run."""

from __future__ import annotations

from functools import cache

import pytest
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
