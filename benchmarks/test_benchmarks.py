"""The same cases under pytest-benchmark: `pytest benchmarks`.  Absolute times of a shared machine mean little;
compare within one run."""

from __future__ import annotations

import pytest
from cases import loss, search

CANDIDATES = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in (*loss.CASES, *search.CASES)
    for name in (case.candidates(compiled=False) if isinstance(case, loss.LossCase) else case.candidates())
]


@pytest.mark.parametrize(("case", "name"), CANDIDATES)
def test_speed(benchmark, case, name: str) -> None:
    benchmark.group = case.name
    candidates = case.candidates(compiled=False) if isinstance(case, loss.LossCase) else case.candidates()
    benchmark(candidates[name])
    error = case.errors()[name]
    benchmark.extra_info["error"] = error
    assert error < (0.02 if name == "simplexfix" else 1.0)
