"""Tests which modules `import simplexfix` loads, and its messages if the compiled library cannot be loaded."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
import torch._dynamo

import simplexfix
from simplexfix import _native

PACKAGE = Path(simplexfix.__file__).parent


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, variables = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(command, cwd=os.sep, env=variables, capture_output=True, text=True, check=True)


def test_the_public_names_load_no_compiler() -> None:
    """torch._dynamo takes as long to import as all of torch."""
    program = "from simplexfix import *\nimport sys\nprint('torch._dynamo' in sys.modules, SimplexHead, CosineIndex)"
    assert run(program).stdout.startswith("False <class 'simplexfix.heads.SimplexHead'>")


def test_the_package_alone_loads_neither_torch_nor_numpy() -> None:
    program = (
        "import sys, simplexfix.integrations\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules, simplexfix.__version__)"
    )
    assert run(program).stdout == f"False False {simplexfix.__version__}\n"


@pytest.mark.parametrize("name", simplexfix.__all__)
def test_every_public_name_is_found_and_listed(name: str) -> None:
    assert getattr(simplexfix, name) is getattr(simplexfix, name)
    assert name in dir(simplexfix)


def test_subpackages_are_attributes() -> None:
    program = "import simplexfix\nprint(simplexfix.retrieval.metrics.__name__, simplexfix.training.Trainer.__name__)"
    assert run(program).stdout == "simplexfix.retrieval.metrics Trainer\n"
    with pytest.raises(AttributeError, match="module 'simplexfix' has no attribute 'SimplexHaed'"):
        simplexfix.SimplexHaed  # noqa: B018


def test_native_sets_the_attribute_of_assume_constant_result() -> None:
    """`_native` sets the attribute itself, since torch's decorator would import torch._dynamo."""

    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked)
    assert vars(_native._serves) == vars(marked)


def test_a_library_of_another_python_is_named(tmp_path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "simplexfix", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (tmp_path / "simplexfix" / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    program = (
        "import sys\n"  # removes an editable install's finder, which would find the library of the working tree
        "sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]\n"
        "from simplexfix import _native\nprint(_native.missing)"
    )
    done = run(program, PYTHONPATH=str(tmp_path))
    expected = (
        "its compiled library was built for another Python: _C.cpython-399-x86_64-linux-gnu.so, this Python loads "
        f"_C{EXTENSION_SUFFIXES[0]}; reinstall simplexfix with this Python"
    )
    assert done.stdout.strip() == expected
    assert f"RuntimeWarning: simplexfix runs without its kernels: {expected}" in done.stderr


ROOMS = {
    "labelled": set(),
    "retrieval": {"labelled"},
    "compatibility": {"labelled", "retrieval"},
    "report": {"labelled", "retrieval", "compatibility"},
    "data": set(),
    "models": {"data", "heads"},
    "adapters": {"labelled", "retrieval", "compatibility", "models"},
    "methods": {"models", "heads"},
    "gallery": {"labelled", "retrieval", "compatibility", "models"},
    "integrations": {"methods", "retrieval"},
    "training": {"adapters", "compatibility", "data", "heads", "labelled", "methods", "models", "report", "retrieval"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == {*ROOMS, "cli"}
    for file in (PACKAGE / room).rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        imported = {name for node in nodes if node.level == 2 for name in named(node)}
        assert imported & {*rooms, "heads"} <= ROOMS[room], file


def named(node: ast.ImportFrom) -> list[str]:
    """Returns the package's modules that `from ..a.b import c` or `from .. import a` names."""
    return [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
