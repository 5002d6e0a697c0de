"""Tests exit codes and output: any encoding, closed pipes, full disks, terminal widths, environments and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import Command, Done, command, without_figures
from small_run import configuration, two_step_configuration, written_features

import simplexfix
from simplexfix.cli import _arguments, main
from simplexfix.training import PRESETS

ROOT = Path(simplexfix.__file__).parents[1]
full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder of two versions and a short training with its finished run, all with non-ASCII names."""
    folder = tmp_path_factory.mktemp("files")
    draw, labels = np.random.default_rng(0), np.arange(200) % 10
    for name, noise in (("é日本0", 1.0), ("é日本1", 0.8)):
        rows = (np.eye(16)[labels] * 3 + noise * draw.normal(size=(200, 16))).astype(np.float32)
        parts = {"query": rows[:80], "gallery": rows[80:], "query_labels": labels[:80], "gallery_labels": labels[80:]}
        np.savez(folder / f"{name}.npz", **parts, query_groups=np.array(["café", "日本"])[np.arange(80) % 2])
    (folder / "rules.json").write_text('{"rules": [{"kind": "max_nfr", "limit": 0.9, "group": "*"}]}')
    (folder / "features").mkdir()
    two_step_configuration(folder, written_features(folder / "features")).rename(folder / "訓練.json")
    assert main(["train", str(folder / "訓練.json"), "--out", str(folder / "runs" / "走")]) == 0
    return folder


def verb(name: str, out: Path) -> list[str]:
    """Returns the arguments of a command with this verb that ends with exit code 0."""
    return {
        "doctor": ["doctor"],
        "evaluate": ["evaluate", "é日本0.npz", "é日本1.npz", "--out", str(out)],
        "gate": ["gate", "--old", "é日本0.npz", "--new", "é日本1.npz", "--rules", "rules.json"],
        "runs": ["runs", "runs"],
        "train": ["train", "訓練.json", "--out", str(out / "走")],
        "--help": ["--help"],
    }[name]


VERBS = ["doctor", "evaluate", "gate", "runs", "train", "--help"]


def interpreter(folder: Path, arguments: list[str], tail: str = "", **environment: str) -> Done:
    """Runs the command in a shell and a new interpreter; the shell's exit code is the command's."""
    command = f'set -o pipefail; "$0" -m simplexfix "$@" {tail}; exit ${{PIPESTATUS[0]}}'
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        capture_output=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def forked(folder: Path, arguments: list[str], stdout: str = "file", stderr: str = "file", **environment: str) -> Done:
    return command(
        *arguments, folder=folder, environment=environment, stdout=stdout, stderr=stderr, before=without_figures
    )


ASCII = {"PYTHONIOENCODING": "ascii:strict"}
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    ("run", "name", "environment"),
    [
        (interpreter, "runs", C_LOCALE),  # the file system's encoding is ASCII, too
        *[pytest.param(interpreter, name, C_LOCALE, marks=pytest.mark.slow) for name in ("evaluate", "train")],
        *[(forked, name, ASCII) for name in ("gate", "runs", "train")],
        (forked, "gate", {"PYTHONIOENCODING": "latin-1"}),
        (forked, "evaluate", {"PYTHONIOENCODING": "cp1252"}),
    ],
)
def test_no_encoding_changes_an_exit_code(folder, tmp_path, run, name: str, environment: dict[str, str]) -> None:
    done = run(folder, verb(name, tmp_path / "out"), **environment)
    assert done.returncode == 0, done.stderr.decode("utf8", "replace")
    assert b"Traceback" not in done.stderr
    if name in ("gate", "evaluate"):
        assert b"\\u65e5\\u672c" in done.stdout


@pytest.mark.parametrize(
    ("run", "left", "name", "unbuffered"),
    [
        *[(forked, "left", name, "1") for name in VERBS],
        (forked, "left", "evaluate", ""),
        (interpreter, "| true", "--help", ""),
        pytest.param(interpreter, "| true", "runs", "", marks=pytest.mark.slow),
    ],
)
def test_a_closed_pipe_changes_nothing(folder, tmp_path, run, left: str, name: str, unbuffered: str) -> None:
    done = run(folder, verb(name, tmp_path / "out"), left, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr.count(b"Error")) == (0, 0), done.stderr.decode()
    if name == "evaluate":
        assert (tmp_path / "out" / "report.html").exists()


def test_a_closed_pipe_of_messages_changes_nothing(folder, tmp_path) -> None:
    done = forked(folder, verb("train", tmp_path / "out"), stderr="left", PYTHONUNBUFFERED="1")
    assert done.returncode == 0
    assert done.stdout.endswith(b"holds versions, logs and report.json\n")


@full_disk
@pytest.mark.parametrize(
    ("run", "full", "name", "unbuffered"),
    [
        *[(forked, "full", name, "") for name in VERBS],
        (forked, "full", "evaluate", "1"),
        (interpreter, "> /dev/full", "--help", ""),
        pytest.param(interpreter, "> /dev/full", "runs", "", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_under_standard_output_exits_with_2(
    folder, tmp_path, run, full: str, name: str, unbuffered: str
) -> None:
    done = run(folder, verb(name, tmp_path / "out"), full, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.decode().splitlines() if "standard output" in line]
    program = "simplexfix" if name == "--help" else f"simplexfix {name}"
    assert line == f"{program}: standard output cannot be written: No space left on device"
    assert b"Traceback" not in done.stderr


@full_disk
@pytest.mark.parametrize(
    ("run", "name", "streams"),
    [
        (forked, "train", {"stderr": "full"}),
        (forked, "evaluate", {"stderr": "closed"}),
        (forked, "gate", {"stdout": "closed"}),
        pytest.param(interpreter, "train", {"tail": "2>&- >&-"}, marks=pytest.mark.slow),
    ],
)
def test_streams_that_are_full_or_closed_change_nothing(
    folder, tmp_path, run, name: str, streams: dict[str, str]
) -> None:
    assert run(folder, verb(name, tmp_path / "out"), **streams).returncode == 0


@pytest.mark.slow
def test_settings_of_matplotlib_and_the_backend_of_a_notebook_are_ignored(folder, tmp_path) -> None:
    """test_demo.py tests this for the figures of the demo."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 7\n")
    settings = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://backend_that_is_not_installed"}
    done = interpreter(folder, verb("evaluate", tmp_path / "out"), **settings)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_of_torchrun_that_is_no_number_is_named(folder, tmp_path, monkeypatch, capsys, name: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv(name, "x")
    assert main(verb("evaluate", tmp_path / "out")) == 2
    assert f"{name}, which torchrun sets, must be an integer, got 'x'; unset it" in capsys.readouterr().err


def test_any_width_prints_everything(folder, tmp_path) -> None:
    printed = {
        columns: forked(folder, verb("evaluate", tmp_path / "out"), COLUMNS=columns).stdout
        for columns in ("80", "0", "1")
    }
    assert printed["0"] == printed["80"]  # 0: an unknown width
    assert b"AC" in printed["80"]
    assert b"AC" in printed["1"]


@pytest.mark.parametrize(
    ("name", "step", "remedy"),
    [
        ("evaluate", "_read", "no report was written; run the same command to start again"),
        ("gate", "_judge", "there is no verdict; run the same command to start again"),
    ],
)
def test_ctrl_c_while_features_are_judged(folder, tmp_path, monkeypatch, capsys, name: str, step: str, remedy: str):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(f"simplexfix.cli.{name}.{step}", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(verb(name, tmp_path / "out")) == 130
    assert capsys.readouterr().err == f"simplexfix {name}: interrupted; {remedy}\n"
    assert not (tmp_path / "out").exists()


def swallowed(*_: object) -> SimpleNamespace:
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    return SimpleNamespace(run=lambda arguments: 0)


def turned_into_another_error(*_: object) -> SimpleNamespace:
    def run(arguments: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("too many values to unpack") from None

    return SimpleNamespace(run=run)


def failing(*_: object) -> SimpleNamespace:
    signal.raise_signal(signal.SIGINT)
    raise ImportError("half of torch is missing")


@pytest.mark.parametrize("imported", [swallowed, turned_into_another_error, failing])
def test_ctrl_c_that_an_import_swallows_still_exits_with_130(monkeypatch, capsys, imported) -> None:
    monkeypatch.setattr("simplexfix.cli.importlib.import_module", imported)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "simplexfix doctor: interrupted; run the same command to start again\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("demo", "nothing is kept; run the same command to start again"),
        ("train", "the same command resumes from the last checkpoint"),
    ],
)
def test_ctrl_c_prints_one_line_with_the_remedy(folder, tmp_path, name: str, remedy: str) -> None:
    command = ["demo", "--out", str(tmp_path / "out")]
    if name == "train":
        command = ["train", str(configuration(tmp_path, folder / "features")), "--out", str(tmp_path / "out")]
        command.append("schedule.steps=100000")
    process = Command(*command, folder=folder)
    log = tmp_path / "out" / "task-00" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2 if name == "train" else (tmp_path / "out").exists()):
        assert not process.has_ended(), process.wait()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    done = process.wait(timeout=60)
    said = done.stderr.decode()
    assert done.returncode == 130, said
    assert said.splitlines()[-1] == f"simplexfix {name}: interrupted; {remedy}"
    assert "Traceback" not in said
    if name == "train":
        lines = log.read_text()
        again = Command(*command, folder=folder)
        try:  # the same command resumes
            waited = time.monotonic() + 60
            while log.read_text().count("\n") <= lines.count("\n") and time.monotonic() < waited:
                assert not again.has_ended(), again.wait()
                time.sleep(0.05)
        finally:
            again.kill()
            again.wait()
        before, after = (
            [json.loads(line)["step"] for line in text.splitlines()[1:]] for text in (lines, log.read_text())
        )
        assert after[: len(before)] == before  # lines after the checkpoint are written again, with other speeds
        assert len(after) > len(before)


def test_an_internal_error_exits_with_70(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("simplexfix.cli.runs.run", lambda arguments: 1 / 0)
    assert main(["runs", str(folder / "runs")]) == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, "demo "),
        (["train", "--help"], 0, ", ".join(PRESETS)),
        (["evaluate", "--help"], 0, ".npz, .safetensors or .parquet file, or folder of .npy or .parquet files"),
        (["gate", "--help"], 0, ".npz, .safetensors or .parquet file, or folder of .npy or .parquet files"),
        (["--version"], 0, simplexfix.__version__),
        (["gate", "--old", "a"], 2, "--new"),
        (["evaluate", "a", "--seed", "-1"], 2, "must be an integer in [0, 2^31), got -1"),
        (["gate", "--old", "a", "--new", "b", "--seed", "9999999999"], 2, "[0, 2^31), got 9999999999"),
        (["demo", "--seed", "one"], 2, "must be an integer in [0, 2^31), got one"),
        (["retrain"], 2, "invalid choice: 'retrain'"),
    ],
)
def test_help_and_bad_arguments_need_no_torch(arguments: list[str], code: int, expected: str) -> None:
    program = (
        "import sys\nfrom simplexfix.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n"
        "    print('torch' in sys.modules, 'numpy' in sys.modules, stop.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"False False {code}"
    assert expected in done.stdout + done.stderr


def test_the_grammar_has_every_preset_and_verb() -> None:
    assert tuple(PRESETS) == _arguments.PRESET_NAMES
    files = {path.stem for path in (ROOT / "simplexfix" / "cli").glob("*.py") if not path.name.startswith("_")}
    assert set(_arguments.VERBS) == files


def test_json_is_the_same_in_any_encoding(folder, tmp_path) -> None:
    texts = [
        forked(folder, [*verb("gate", tmp_path), "--json"], PYTHONIOENCODING=encoding).stdout
        for encoding in ("utf-8", "ascii")
    ]
    assert texts[0] == texts[1]
    assert {rule["group"] for rule in json.loads(texts[0])["rules"]} == {"café", "日本"}
