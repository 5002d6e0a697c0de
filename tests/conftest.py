"""Options, order and fixtures of all tests; the header of every run has the version and path of simplexfix."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from processes import without_figures

import simplexfix
from simplexfix import _native
from simplexfix.retrieval import index as index_module
from simplexfix.retrieval._plain_index import PlainIndex

ROOT = Path(__file__).resolve().parents[1]


# The files that take longest, some with slow tests and some without. With `-n auto` they start first, so that none
# runs alone at the end.
LONGEST = (
    "test_gallery_contract.py", "test_instruction_sets.py", "test_install.py", "test_cuda_kernels.py", "test_demo.py",
    "test_interrupts.py", "test_evaluate.py", "test_docs.py", "test_trainer.py", "test_operators.py",
    "test_gallery_milvus.py", "test_terminals.py",
)  # fmt: skip


LEFT_OUT = pytest.StashKey[int]()  # the number of slow tests that are not selected


def example(page: str, heading: str) -> str:
    """Returns the first Python block below a heading of a guide."""
    text = (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    return text.split("```python\n", 1)[1].split("\n```\n")[0] + "\n"


def snippet(page: str, heading: str) -> CodeType:
    """Returns `example(page, heading)`, compiled."""
    return compile(example(page, heading), page, "exec")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulated-cuda", action="store_true", help="CUDA operators on CPU tensors: tests/native")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a process already
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's `pytest &`; child processes inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--emulated-cuda"):
        sys.path.append(str(ROOT / "tests" / "native"))
        import harness

        torch.ops.load_library(harness.build_ops(jobs=2))
        torch.ops.simplexfix = torch.ops.simplexfix_emulated


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Assigns whole files to processes in the order of collection, so that module fixtures run once.

    All tests of the Milvus server count as one more file: the server takes 15 seconds to start, and its tests mostly
    wait for it.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "milvus-server" if "[milvus-server" in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # it would start the files with the fewest tests last
    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if config.getoption("--emulated-cuda"):
        for item in items:
            if item.get_closest_marker("cpu_only"):
                item.add_marker(pytest.mark.skip(reason="of the CPU's operators alone"))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Counts slow tests that are left out without -m and -k."""
    config = items[0].config
    if config.option.markexpr == "not slow" and not config.option.keyword:
        number = sum(item.get_closest_marker("slow") is not None for item in items)
        config.stash[LEFT_OUT] = config.stash.get(LEFT_OUT, 0) + number


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a pytest that a test starts inherits PYTEST_XDIST_WORKER, too
        session.config.workeroutput["slow_left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Stores a worker's number of slow tests: each worker of pytest-xdist collects all tests."""
    found = getattr(node, "workeroutput", {}).get("slow_left_out", 0)  # a process that was killed has none
    node.config.stash[LEFT_OUT] = max(found, node.config.stash.get(LEFT_OUT, 0))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{number} slow tests not selected: pytest -m slow")


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--emulated-cuda"):
        return "kernels: those of CUDA, emulated"
    info = _native.build_info()
    kernels = f"{info['cpu_isa']}, CUDA {info['cuda_archs'] or 'not built'}" if info else f"none ({_native.missing})"
    return f"simplexfix {simplexfix.__version__} from {Path(simplexfix.__file__).parent}; kernels: {kernels}"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Returns the folder of real data for development; skips a test where there is none."""
    folder = Path(os.environ.get("SIMPLEXFIX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; SIMPLEXFIX_DATA names another")
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figures of reports empty; skips a test where matplotlib is missing."""
    figures = pytest.importorskip("simplexfix.report.figures", reason="pip install 'simplexfix[cli]'")
    monkeypatch.setattr(figures, "_encode", figures._encode)  # restored after the test
    without_figures()


needs_library = pytest.mark.skipif(_native.library is None, reason="the compiled library is not in use")


@pytest.fixture(params=[pytest.param("library", marks=needs_library), "plain"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test for the compiled index and for its reference implementation."""
    if request.param == "plain":
        monkeypatch.setattr(index_module, "_kind", lambda: PlainIndex)
    return str(request.param)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares bits; for the reference implementation allows rounding, since torch's row sums depend on the shape."""
    exact = {"rtol": 0, "atol": 0} if _native.library is not None else {}
    torch.testing.assert_close(actual, expected, equal_nan=True, **exact)
