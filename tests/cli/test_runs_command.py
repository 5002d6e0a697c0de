"""Tests `simplexfix runs`, also for damaged folders and for runs of another release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_run import configuration, train_until, two_step_configuration, written_features

from simplexfix.cli import main


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return written_features(tmp_path_factory.mktemp("features"))


def test_a_run_of_another_release_resumes(tmp_path, features) -> None:
    """Keys that the other release did not write have their defaults."""
    train = ["train", str(two_step_configuration(tmp_path, features)), "--out", str(tmp_path / "run")]
    assert main(train) == 0
    file = tmp_path / "run" / "run.json"
    then = json.loads(file.read_text())
    then["simplexfix"] = "0.0.1"
    del then["config"]["method"]["gather"], then["config"]["tasks"]["hoc_reference"], then["config"]["protocols"]
    file.write_text(json.dumps(then))
    with pytest.warns(UserWarning, match=r"run\.json was begun by simplexfix 0\.0\.1, this is"):
        assert main(train) == 0


def test_a_run_of_another_release_and_configuration_is_refused(tmp_path, features, capsys) -> None:
    train = ["train", str(two_step_configuration(tmp_path, features)), "--out", str(tmp_path / "run")]
    assert main(train) == 0
    file = tmp_path / "run" / "run.json"
    then = json.loads(file.read_text())
    then["config"]["method"]["mu"] = 3.0
    then["config"]["tasks"]["forgotten"] = 1
    file.write_text(json.dumps(then))
    assert main(train) == 2
    error = capsys.readouterr().err
    assert "config.method.mu: was 3.0, is 10.0" in error
    assert "config.tasks.forgotten: was 1, is absent" in error


@pytest.fixture(scope="module")
def finished(tmp_path_factory, features) -> tuple[str, Path]:
    """Returns the path of a configuration and the folder of four runs of it."""
    folder = tmp_path_factory.mktemp("finished")
    config = str(two_step_configuration(folder, features))
    for name in ("a", "b", "c", "d"):
        assert main(["train", config, "--out", str(folder / "runs" / name)]) == 0
    return config, folder / "runs"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"config": {}}', b'{"config": 3, "data": {}, "simplexfix": "0"}', b"[1]", b"\xff\xfe"]
)
def test_a_damaged_file_is_named_and_the_others_are_listed(tmp_path, finished, capsys, content: bytes) -> None:
    config, runs = finished
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / "a" / "run.json").write_bytes(content)
    (tmp_path / "runs" / "c" / "report.json").write_bytes(content)
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    output = capsys.readouterr()
    states = [line.split("  ")[1] for line in output.out.splitlines()]
    assert states == ["damaged: run.json", "done", "damaged: report.json", "done"]
    assert str(tmp_path / "runs" / "a" / "run.json") in output.err
    assert str(tmp_path / "runs" / "c" / "report.json") in output.err
    assert main(["runs", "--json", str(tmp_path / "runs")]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4

    assert main(["train", config, "--out", str(tmp_path / "runs" / "a")]) == 2
    assert f"{tmp_path / 'runs' / 'a' / 'run.json'} is damaged" in capsys.readouterr().err
    (tmp_path / "runs" / "a" / "run.json").unlink()  # as the message advises
    assert main(["train", config, "--out", str(tmp_path / "runs" / "a")]) == 0
    assert main(["train", config, "--out", str(tmp_path / "runs" / "c")]) == 0
    reports = [(tmp_path / "runs" / name / "report.json").read_bytes() for name in ("a", "b", "c")]
    assert len(set(reports)) == 1


def test_validation_is_shown_where_there_is_one(tmp_path, features, capsys) -> None:
    config = str(two_step_configuration(tmp_path, features))
    assert main(["train", config, "--out", str(tmp_path / "runs" / "a")]) == 0
    assert "search, nearest class mean: AC" in capsys.readouterr().out
    assert main(["train", config, "data.validation=0.2", "--out", str(tmp_path / "runs" / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "runs" / "b" / "report.json").read_text())
    assert lines[0].startswith("validation, nearest class mean: AC")
    assert f"AA {100 * report['validation']['nearest_class_mean']['criteria']['AA']:.1f}" in lines[0]
    assert any(line.startswith("search, nearest class mean: AC") for line in lines)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    a, b, *_ = capsys.readouterr().out.splitlines()
    assert "search: nearest class mean AC" in a
    assert "validation: nearest class mean AC" in b
    assert "search" not in b
    assert main(["runs", "--json", str(tmp_path / "runs")]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [list(run["scores"]) for run in runs] == [["search"], ["validation", "search"]]


def test_pre_training_in_a_shared_folder_is_progress(tmp_path, features, capsys) -> None:
    """Progress counts this run's pre-training only, even if other runs wrote to the shared folder later."""
    config = str(configuration(tmp_path, features))
    shared = f"tasks.pretraining_folder={tmp_path / 'shared'}"
    for nth, (name, state) in enumerate((("first", "task-00, step 5"), ("second", "pretraining-01, step 5")), start=1):
        train_until(nth, config, shared, "--out", str(tmp_path / "runs" / name))
        capsys.readouterr()
        assert main(["runs", str(tmp_path / "runs" / name)]) == 0
        assert state in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "runs" / "first")]) == 0
    assert "task-00, step 5" in capsys.readouterr().out
