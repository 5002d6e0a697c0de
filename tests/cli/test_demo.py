"""Tests `simplexfix demo --quick` as a user runs it, and its messages if something is missing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simplexfix.cli import demo, main

pytest.importorskip("rich", reason="pip install 'simplexfix[cli]'")
matplotlib = pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")


slow = pytest.mark.slow  # a demo has 12 trainings, and a search of all galleries by all versions


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[dict, Path, str, float]:
    out = tmp_path_factory.mktemp("demo") / "not" / "there yet"
    command = [sys.executable, "-m", "simplexfix", "demo", "--quick", "--seed", "3", "--json", "--out", str(out)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), out, done.stderr, time.monotonic() - start


@slow
def test_report(quick) -> None:
    report, out, progress, _ = quick
    assert json.loads((out / "report.json").read_text()) == report
    assert report["seed"] == 3
    assert len(report["versions"]) == 4
    assert sum(report["seconds"].values()) > 0
    assert list(report["methods"]) == ["hoc", "simplex", "er"]
    for method in report["methods"].values():
        for split in ("seen", "unseen"):
            for protocol in ("nearest_class_mean", "instance"):
                result = method[split][protocol]
                for i, row in enumerate(result["matrix"]):
                    assert [value is None for value in row] == [False] * (i + 1) + [True] * (3 - i)
                    assert all(0 <= value <= 1 for value in row[: i + 1])
                lower = [value for row in result["matrix"] for value in row if value is not None]
                assert result["AA"] == pytest.approx(sum(lower) / 10)
                assert 0 <= result["AC"] <= 1
    assert "100 %" in progress  # the bar, on standard error


@slow
def test_pictures(quick) -> None:
    _, out, _, _ = quick
    for name in ("matrices.png", "neighbours.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


@slow
def test_hoc_keeps_the_old_gallery_usable_and_er_does_not(quick) -> None:
    """In old galleries the replacement keeps under 20 % of their models' accuracy with ER, and over 60 % with HOC."""
    report, _, _, _ = quick
    for split in ("seen", "unseen"):
        kept = {name: method[split]["nearest_class_mean"]["kept"] for name, method in report["methods"].items()}
        assert max(kept["er"]) < 0.2
        assert min(kept["hoc"]) > 0.6


@slow
def test_hoc_and_simplex_have_the_same_first_version(quick) -> None:
    """Without an old model HOC trains as "simplex" does: the two trainings give the same bits."""
    report, _, _, _ = quick
    cells = [report["methods"][m]["unseen"]["instance"]["matrix"][0][0] for m in ("hoc", "simplex")]
    assert cells[0] == cells[1]


@slow
def test_words_and_tables(tmp_path, capsys, monkeypatch) -> None:
    shortened = demo._shortened
    tiny = {"first": 2, "pretraining": 2, "others": 2}
    monkeypatch.setattr(demo, "_shortened", lambda config, **steps: shortened(config, **tiny))
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 7}):  # as in a user's matplotlibrc
        assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("matrices.png", "neighbours.png"))
    text = capsys.readouterr().out
    for words in (
        "d-simplex with HOC",
        "ER: learnable head",
        "(Korean, Tagalog)",
        "    v0  v1  v2  v3",
        "v1 fine-tuned",
        "instance: AC 0.",
        "found",
        "report.json",
    ):
        assert words in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert not math.isnan(report["methods"]["er"]["seen"]["instance"]["AC"])


def test_bad_arguments(capsys) -> None:
    for arguments in (["demo", "--seed", "x"], ["demo", "--seed", "-1"], ["demo", "--seed", str(10**20)], ["dmo"], []):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code not in (0, None)
        capsys.readouterr()


def test_a_folder_that_cannot_be_created(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "x")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo", "--quick"]) == 2
    assert "pip install 'simplexfix[cli]'" in capsys.readouterr().err
