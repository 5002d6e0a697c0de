"""Tests that `simplexfix doctor` reports the library in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import simplexfix
from simplexfix import _native
from simplexfix.cli import main


def test_json(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["simplexfix"] == simplexfix.__version__
    assert found["torch"].startswith(torch.__version__)
    info = _native.build_info()
    if info:
        assert found["instruction set"] == info["cpu_isa"]
        assert found["CUDA built for"] == (info["cuda_archs"] or "nothing")
    if torch.version.cuda is None:
        assert found["CUDA usable"].startswith("no: ")
    assert "pytest" in found["optional packages"]


@pytest.mark.slow
def test_text_without_the_library() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simplexfix", "doctor"],
        env={**os.environ, "SIMPLEXFIX_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "not in use: SIMPLEXFIX_NATIVE=0 is set" in done.stdout
    assert "none: plain PyTorch" in done.stdout
    assert "no: there is no compiled library" in done.stdout


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"simplexfix {simplexfix.__version__}\n"
