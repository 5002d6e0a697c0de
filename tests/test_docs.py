"""The pages tell the truth: snippets run, links lead somewhere, promises name tests that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def test_snippets_of_the_readme_run_in_order() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["ids"].shape == (3, 5)
    assert names["new_head"].num_classes == 120
    names["loss"].backward()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_test_names(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"\btest_[a-z_0-9]+\b(?!\.(?:py|cpp))", text):
        assert f"def {name}(" in tests, f"{page.name} names {name}"
    for path in re.findall(r"`((?:tests|csrc|simplexfix|docs|benchmarks|tools)/[\w./-]+)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_no_page_names_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(^|\s)/(home|root|work|opt)/", page.read_text()), page.name


def test_the_table_of_gpu_floors_is_what_its_script_prints() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_floor.py")]
    table = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert table.count("not measured") >= 30
    assert table in (ROOT / "docs" / "performance.md").read_text()
