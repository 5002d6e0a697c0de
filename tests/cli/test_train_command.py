"""Tests `simplexfix train` and `simplexfix runs` on a folder of features and on a preset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import configuration, train_until, written_features

from simplexfix.cli import main
from simplexfix.compatibility import compatibility_matrix
from simplexfix.labelled import LabelledItems
from simplexfix.methods import ER
from simplexfix.models import EmbeddingModel, FeatureMLP, read_identity
from simplexfix.training import PRESETS, RunConfig, Schedule, herding_rows, overridden, read_config, read_state
from simplexfix.training.run import _schedule
from simplexfix.training.run_data import load_run_data


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return written_features(tmp_path_factory.mktemp("features"))


def test_a_run_stops_resumes_and_is_listed(tmp_path, features, capsys) -> None:
    config = str(configuration(tmp_path, features))
    assert main(["train", config, "--out", str(tmp_path / "runs" / "whole")]) == 0
    assert "nearest class mean: AC " in capsys.readouterr().out

    train_until(3, config, "--out", str(tmp_path / "runs" / "stopped"))
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert "stopped  task-01, step 5" in capsys.readouterr().out
    assert main(["train", config, "trainer.save_every=9", "--out", str(tmp_path / "runs" / "stopped")]) == 0
    whole, stopped = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    assert (whole / "report.json").read_bytes() == (stopped / "report.json").read_bytes()
    report = json.loads((whole / "report.json").read_text())
    matrix = report["search"]["nearest_class_mean"]["matrix"]
    assert [sum(value is not None for value in row) for row in matrix] == [1, 2, 3]
    assert matrix[0][0] > 0.5  # of 14 classes

    assert main(["train", config, "method.mu=5.0", "--out", str(tmp_path / "runs" / "whole")]) == 2
    assert "config.method.mu: was 10.0, is 5.0" in capsys.readouterr().err
    assert (
        main(["train", config, 'method={"name": "er"}', "model.hidden=[20]", "--out", str(tmp_path / "runs" / "er")])
        == 0
    )
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "whole: method.name = 'hoc' (er: 'er')" in out
    assert out.count("done") == 3
    assert main(["runs", "--json", str(tmp_path / "runs")]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["er", "stopped", "whole"]


VERTICES = {"name": "hoc", "slots": 32, "lambda_": 0.5}
OCA = {"name": "oca", "embedding_dim": 10, "extra": 4}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "er", "scale": 8.0},
        {"name": "asnn", "queue": 64},
        OCA,
        VERTICES,
        {**VERTICES, "classification": "asnn"},
    ],
    ids=["er", "asnn", "oca", "hoc", "hoc with asnn"],
)
def test_the_folders_of_a_runs_versions_give_its_matrix(tmp_path, features, method: dict) -> None:
    """The saved versions give the run's compatibility matrix bit for bit, also after a replacement of the network."""
    config = configuration(tmp_path, features, **method)
    assert main(["train", str(config), "model.hidden=[20]", "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [entry["folder"] for entry in report["versions"]] == [f"task-{t:02d}/model" for t in range(3)]
    rows = {name: torch.from_numpy(np.load(features / f"{name}.npy")) for name in ("query", "gallery")}
    labels = [torch.from_numpy(np.load(features / f"{name}_labels.npy")) for name in rows]
    embeddings: dict[str, list[torch.Tensor]] = {name: [] for name in rows}
    identities, prefixes = [], []
    for t, entry in enumerate(report["versions"]):
        identities.append(read_identity(tmp_path / "run" / entry["folder"]))
        assert identities[-1].fingerprint == entry["fingerprint"]
        assert (identities[-1].version, identities[-1].name) == (t, f"{method['name']}, task {t}")
        model = EmbeddingModel.from_pretrained(tmp_path / "run" / entry["folder"])
        place = tmp_path / "run" / f"task-{t:02d}"
        saved = read_state(place / "version.safetensors")["model"]
        if method["name"] == "hoc" and t > 0:
            saved["rotation"] = read_state(place / "rotation.safetensors")["rotation"]
        weights = {key: value for key, value in model.state_dict().items() if "extra" not in key and "queue" not in key}
        assert all(torch.equal(value, saved[key]) for key, value in weights.items())
        prefixes.append(model.prefixes)
        for name in rows:
            embeddings[name].append(model.extract(model.preprocessing(rows[name])))
    items = LabelledItems(*labels)
    of = [items.version(*x, prefixes=p) for *x, p in zip(*embeddings.values(), prefixes, strict=True)]
    matrix = compatibility_matrix(of, "nearest_class_mean")
    expected = [
        [np.nan if value is None else value for value in row]
        for row in report["search"]["nearest_class_mean"]["matrix"]
    ]
    assert np.array_equal(matrix, np.array(expected), equal_nan=True)
    refusals = [identities[2].why_not_search(identity) for identity in identities]
    assert refusals[2] == []
    assert [bool(reasons) for reasons in refusals[:2]] == [method not in (VERTICES, OCA)] * 2
    assert prefixes == ([(), (10,), (10, 14)] if method is OCA else [()] * 3)


@pytest.mark.parametrize("name", ["bct", "fd"])
def test_methods_with_a_classifier_remember_by_herding(tmp_path, features, name: str) -> None:
    changes = ["model.hidden=[20]", "tasks.rehearsal=herding"]
    config = configuration(tmp_path, features, name=name)
    assert main(["train", str(config), *changes, "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["search"]["nearest_class_mean"]["matrix"][2][2] > 0.5

    read = read_config(RunConfig, overridden(json.loads(config.read_text()), changes))
    first = load_run_data(read).tasks[0].items
    version = EmbeddingModel(FeatureMLP(12, [20]), ER().head(20))
    ER().add_classes(version, range(4))
    version.load_state_dict(read_state(tmp_path / "run" / "task-00" / "version.safetensors")["model"])
    chosen = first.take(herding_rows(version.extract(first.inputs), first.labels, 5))
    remembered = read_state(tmp_path / "run" / "task-00" / "memory.safetensors")
    assert torch.equal(remembered["inputs"], chosen.inputs)
    assert torch.equal(remembered["labels"], chosen.labels)


def test_changed_data_is_named(tmp_path, features, capsys) -> None:
    config = str(configuration(tmp_path, features))
    short = ["schedule.steps=2", "tasks.replacements={}", "--out", str(tmp_path / "run")]
    assert main(["train", config, *short]) == 0
    labels = np.load(features / "query_labels.npy")
    try:
        np.save(features / "query_labels.npy", labels[::-1])
        assert main(["train", config, *short]) == 2
    finally:
        np.save(features / "query_labels.npy", labels)
    assert "data.search query.sha256: was " in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun(tmp_path, features) -> None:
    """Starts two processes with the real launcher; afterwards one process resumes from their files."""
    config = str(configuration(tmp_path, features))
    arguments = ["train", config, "--out", str(tmp_path / "run")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "simplexfix", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nearest class mean") == 1
    report = (tmp_path / "run" / "report.json").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "run" / "report.json").read_bytes() == report


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_read_back(name: str, capsys) -> None:
    assert main(["train", name, "--print-config"]) == 0
    assert read_config(RunConfig, json.loads(capsys.readouterr().out)) == PRESETS[name]


def test_the_preset_that_needs_no_data_runs(tmp_path, capsys) -> None:
    schedules = ("schedule", "tasks.schedules.0", "tasks.replacements.3.schedule")
    short = [f"{schedule}.{change}" for schedule in schedules for change in ("steps=2", "batch=16")]
    assert main(["train", "omniglot", *short, "--out", str(tmp_path / "run")]) == 0
    scores = [line.split(": AC")[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert scores == [f"{name}, {by}" for name in ("seen", "unseen") for by in ("nearest class mean", "instance")]
    assert main(["runs", str(tmp_path / "run")]) == 0
    assert "seen: nearest class mean AC" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.slot=3"], "method.slot is unknown; did you mean slots?"),
        (["tasks.counts=[9, 9]"], "counts must be one or more numbers of at least 1, with a sum of at most 14"),
        (["tasks.replacements.1.classes=7"], "replacements.1.classes must lie in [0, 6]"),
        (["tasks.replacements.1.classes=0"], "pre-training needs both classes and schedule: give both, or neither"),
        (["tasks.replacements.1.source=tasks"], "classes needs source='apart', got 6 with source='tasks'"),
        (['tasks.replacements.1={"model": {}, "source": "tasks"}'], 'source="tasks" needs schedule'),
        (
            ['tasks.replacements.0={"model": {}, "source": "tasks", "schedule": {"steps": 1, "learning_rate": 0.1}}'],
            'replacements.0.source is "tasks", and no task is before task 0; take "apart"',
        ),
        (
            ['tasks.schedules={"3": {"steps": 1, "learning_rate": 0.1}}'],
            "keys of tasks.schedules must be tasks 0 to 2, got [3]",
        ),
        (["tasks.replacements.1.epochs=0"], "epochs must be at least 1, got 0"),
        (['method={"name": "er"}'], "model gives 16, tasks.replacements.1.model gives 20"),
        (["tasks.counts=[]"], 'kind="class_incremental" needs counts, the number of new classes of each task'),
        (["data.kind=omniglot"], 'kind="omniglot" takes no path'),
        (["data.kind=mnist"], "must be one of 'cifar', 'features', 'images', 'omniglot', 'retrieval', got 'mnist'"),
        (["data.kind=cifar"], "has no train.bin, fine_label_names.txt"),
        (["data.validation=1.0"], "validation is a fraction, in [0, 1), got 1.0"),
        (["data.per_class=0"], "per_class must be at least 1, got 0"),
        (["data.pretraining=here"], "pretraining needs kind='cifar' or 'images', got 'here' with kind='features'"),
        (["model.kind=resnet50"], "must be one of 'convnet', 'linear', 'mlp', 'resnet18', 'text', 'timm:NAME', 'torch"),
        (["model.pretrained=true"], "pretrained needs kind='timm' or 'torchvision', got True with kind='mlp'"),
        (['protocols=["mean"]'], "protocols must be one of 'nearest_class_mean', 'instance', got 'mean'"),
        (["tasks.epochs=0"], "epochs must be at least 1, got 0"),
        (["tasks.memory_per_class=-1"], "memory_per_class must be 0 or more, got -1"),
        (["tasks.rehearsal=nearest"], "rehearsal must be one of 'random', 'herding', got 'nearest'"),
        (
            ['method={"name": "bct"}'],
            "BCT has no junction, all its networks must give features of one width: model gives",
        ),
        (
            ["tasks.hoc_reference=self"],
            "hoc_reference must be one of 'all', 'deployed', 'deployed_or_replacement', 'replacement', got 'self'",
        ),
    ],
)
def test_bad_input(changes: list[str], message: str, tmp_path, features, capsys) -> None:
    config = configuration(tmp_path, features)
    assert main(["train", str(config), *changes, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_epochs_count_steps() -> None:
    schedule = Schedule(20, 0.1)
    assert _schedule(schedule, None, 80, 32).steps == 20
    assert _schedule(schedule, 3, 80, 32).steps == 9
    assert _schedule(schedule, 3, 40, 16).steps == 9
