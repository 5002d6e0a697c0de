"""Tests the error messages of `simplexfix train`: cause, place and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import two_step_configuration, written_features

from simplexfix.cli import main


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return written_features(tmp_path_factory.mktemp("features"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer.device=foo", "trainer: device must be one that torch knows, got 'foo'"),
        ("trainer.device=cuda:99", "trainer.device='cuda:99' cannot be used here: "),
        ("trainer.device=meta", "trainer.device='meta' cannot be used here: "),
        ("seed=-1", "seed must be 0 or more, got -1"),
    ],
)
def test_a_bad_device_or_seed_is_named_and_nothing_is_written(tmp_path, features, capsys, change, message) -> None:
    assert main(["train", str(two_step_configuration(tmp_path, features)), change, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_misspelt_preset_is_recognised(capsys) -> None:
    assert main(["train", "cpu-smal"]) == 2
    error = capsys.readouterr().err
    assert "cpu-smal is neither a file nor a preset; did you mean cpu-small?" in error
    assert "presets: omniglot, cl2r, iamcl2r-7, iamcl2r-31, cpu-small, paper-half" in error
    assert main(["train", "nowhere/mine.yaml"]) == 2
    assert "nowhere/mine.yaml is neither a file nor a preset; presets: " in capsys.readouterr().err


def test_changes_may_follow_options(tmp_path, features, capsys) -> None:
    config = str(two_step_configuration(tmp_path, features))
    assert main(["train", config, "seed=3", "--print-config", "schedule.steps=4"]) == 0
    shown = capsys.readouterr().out
    assert '"steps": 4' in shown
    assert '"seed": 3' in shown
    with pytest.raises(SystemExit):
        main(["train", config, "--out", "here", "--shwo"])
    assert "unrecognized arguments: --shwo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "schedule.steps=4"])


@pytest.mark.parametrize("kind", ["features", "images"])
def test_missing_data_is_named_with_the_expected_layout(tmp_path, features, capsys, kind: str) -> None:
    expected = {
        "features": "has no train.npy, train_labels.npy, query.npy, query_labels.npy, gallery.npy, gallery_labels.npy; "
        "expected features [N, d] and labels [N]",
        "images": "has no train, query, gallery; expected folders, each with a folder of images for every class",
    }
    changes = [f'data={{"kind": "{kind}", "path": "{tmp_path / "nothing"}"}}']
    config = str(two_step_configuration(tmp_path, features))
    assert main(["train", config, *changes, "--out", str(tmp_path / "run")]) == 2
    assert f"{tmp_path / 'nothing'} {expected[kind]}" in capsys.readouterr().err


def test_missing_pre_training_images_are_named_with_the_expected_layout(tmp_path, capsys) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "query", "gallery"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            image.new("RGB", (8, 8)).save(tmp_path / part / name / "a.png")
    (tmp_path / "a.json").write_text(
        '{"schedule": {"steps": 1, "learning_rate": 0.1}, "tasks": {"counts": [2]}, "model": {"kind": "resnet18"}}'
    )
    data = f'data={{"kind": "images", "path": "{tmp_path}", "pretraining": "{tmp_path / "nothing"}"}}'
    assert main(["train", str(tmp_path / "a.json"), data]) == 2
    assert (
        f"{tmp_path / 'nothing'} is not a folder; expected one with a folder of images for each"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("file", ["version.safetensors", "memory.safetensors", "model/config.json"])
def test_a_damaged_file_of_a_task_is_written_again_once_it_is_deleted(tmp_path, features, capsys, file: str) -> None:
    """After the damaged file is deleted, as the message advises, the next run writes the same bytes again."""
    train = ["train", str(two_step_configuration(tmp_path, features)), "--out", str(tmp_path / "run")]
    assert main(train) == 0
    damaged, report = tmp_path / "run" / "task-00" / file, tmp_path / "run" / "report.json"
    whole = (damaged.read_bytes(), report.read_bytes())
    damaged.write_bytes(whole[0][:-40])
    capsys.readouterr()
    assert main(train) == 2
    error = capsys.readouterr().err
    assert str(damaged) in error
    assert "damaged" in error
    assert "delete " in error
    damaged.unlink()
    assert main(train) == 0
    assert (damaged.read_bytes(), report.read_bytes()) == whole
