"""Tests runs on image folders, in memory or decoded lazily, and the names of their classes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simplexfix.data import ImageFileError
from simplexfix.models import EmbeddingModel, read_identity
from simplexfix.training import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    Progress,
    ReplacementConfig,
    RunConfig,
    Schedule,
    TasksConfig,
    TrainerConfig,
    train_run,
)
from simplexfix.training.run_data import load_run_data

image_module = pytest.importorskip("PIL.Image", reason="folders of images are read with Pillow")

CLASSES = ("ant", "bee", "cat", "dog", "e\u0301mu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 6), ("query", 2), ("gallery", 3)):
        for c, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = (50 * c + draw.integers(0, 50, (9, 11, 3))).astype(np.uint8)
                image_module.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def run_of(folder: Path, workers: int | None, **data: object) -> RunConfig:
    return RunConfig(
        data=DataConfig(kind="images", path=str(folder), size=8, validation=0.2, workers=workers, **data),
        model=ModelConfig(kind="resnet18", width=4),
        method=MethodConfig(slots=16),
        tasks=TasksConfig(
            counts=(2, 2),
            memory_per_class=2,
            rehearsal="herding",
            replacements={1: ReplacementConfig(ModelConfig(kind="resnet18", width=4), 1, Schedule(2, 0.01, batch=4))},
        ),
        schedule=Schedule(5, 0.01, batch=8),
        trainer=TrainerConfig(device="cpu", save_every=2, log_every=1),
        protocols=("nearest_class_mean",),
    )


class StopError(Exception):
    pass


def stop_at(stage: str, step: int):
    def on_step(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise StopError

    return on_step


def weights(run: Path) -> list[str]:
    return [read_identity(run / f"task-{t:02d}" / "model").fingerprint for t in range(2)]


def test_lazily_decoded_images_train_to_the_same_bits(folder, tmp_path) -> None:
    """Images are held in memory, decoded in this process or in workers; stopped runs change the number of workers."""
    reports = {
        name: train_run(run_of(folder, workers), tmp_path / name)
        for name, workers in (("memory", None), ("here", 0), ("others", 2))
    }
    for place, workers in ((("task 0", 3), 2), (("task 1", 4), 0)):
        with pytest.raises(StopError):
            train_run(run_of(folder, workers), tmp_path / "stopped", on_step=stop_at(*place))
    reports["stopped"] = train_run(run_of(folder, 1), tmp_path / "stopped")
    assert len({tuple(weights(tmp_path / name)) for name in reports}) == 1
    assert reports["here"] == reports["others"] == reports["stopped"] == reports["memory"]


def test_a_run_cannot_change_between_memory_and_lazy_decoding(folder, tmp_path) -> None:
    train_run(run_of(folder, 0), tmp_path)
    with pytest.raises(ValueError, match=r"config\.data\.workers: was 0, is None"):
        train_run(run_of(folder, None), tmp_path)


def test_names_of_classes_are_stored(folder, tmp_path) -> None:
    """Names are stored in one Unicode form, under the ids of tasks, of pre-training and of each search."""
    report = train_run(run_of(folder, 0), tmp_path)
    names = [*CLASSES[:4], "\u00e9mu"]
    names_by_use = json.loads((tmp_path / "run.json").read_text())["class_names"]
    assert set(names_by_use) == {"tasks", "pretraining", "search", "validation"}
    assert names_by_use["search"] == names_by_use["validation"] == report["class_names"]["search"] == names
    assert sorted(names_by_use["tasks"] + names_by_use["pretraining"]) == sorted(names)
    assert len(names_by_use["pretraining"]) == 1
    for t, count in enumerate((2, 4)):
        model = EmbeddingModel.from_pretrained(tmp_path / f"task-{t:02d}" / "model")
        assert model.class_names == tuple(names_by_use["tasks"][:count])
    # the colours of the images match the names of their labels
    data = load_run_data(run_of(folder, None))
    for task in data.tasks:
        for image, label in zip(task.items.inputs, task.items.labels.tolist(), strict=True):
            assert names[int(image.float().mean()) // 50] == names_by_use["tasks"][label]


def test_a_run_that_began_without_class_names_resumes(folder, tmp_path) -> None:
    with pytest.raises(StopError):
        train_run(run_of(folder, None), tmp_path, on_step=stop_at("task 0", 3))
    file = tmp_path / "run.json"
    record = json.loads(file.read_text())
    del record["class_names"], record["config"]["data"]["workers"]
    file.write_text(json.dumps(record))
    train_run(run_of(folder, None), tmp_path)


def test_a_models_fingerprint_excludes_class_names(folder, tmp_path) -> None:
    train_run(run_of(folder, 0), tmp_path)
    place = tmp_path / "task-00" / "model"
    model = EmbeddingModel.from_pretrained(place)
    identity = model.identity()
    model.class_names = None
    assert model.identity().fingerprint == identity.fingerprint
    model.save_pretrained(tmp_path / "without")
    assert EmbeddingModel.from_pretrained(tmp_path / "without").class_names is None
    config = json.loads((place / "config.json").read_text())
    config["class_names"][0] = "another"
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="changed after it was written: class_names without its checksum"):
        EmbeddingModel.from_pretrained(place)


def test_sets_of_images_name_their_classes_by_set(folder, tmp_path) -> None:
    for name, classes in (("cars", "ab"), ("birds", "bc")):
        for c in classes:
            os.makedirs(tmp_path / name / c)
            for i in range(2):
                image_module.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / c / f"{i}.png")
    for part in ("query", "gallery"):
        (tmp_path / part).symlink_to(folder / part)
    base = run_of(tmp_path, 0)
    tasks = TasksConfig(kind="dataset_sequence", sets=("cars", "birds"), memory_per_class=1)
    data = load_run_data(replace(base, tasks=tasks, data=replace(base.data, validation=0.0)))
    names = data.class_names()["tasks"]
    assert sorted(names[:2]) == ["cars/a", "cars/b"]
    assert sorted(names[2:]) == ["birds/b", "birds/c"]


def test_the_error_for_a_damaged_image_names_it(folder, tmp_path) -> None:
    for part in ("train", "query", "gallery"):
        subprocess.run(["cp", "-r", folder / part, tmp_path / part], check=True)
    file = tmp_path / "train" / "bee" / "3.png"
    file.write_bytes(file.read_bytes()[:60])
    for workers in (None, 0, 2):
        with pytest.raises(ImageFileError, match=rf"^{file} cannot be read, it may be truncated or damaged"):
            train_run(run_of(tmp_path, workers), tmp_path / "run")


def test_changed_images_are_refused(folder, tmp_path) -> None:
    for part in ("train", "query", "gallery"):
        subprocess.run(["cp", "-r", folder / part, tmp_path / part], check=True)
    config = run_of(folder, 0)
    train_run(config, tmp_path / "run")
    train_run(run_of(tmp_path, 0), tmp_path / "run")  # a copy with other modification times
    for c in CLASSES[:4]:
        image_module.new("RGB", (9, 11)).save(tmp_path / "train" / c / "2.png")
    with pytest.raises(ValueError, match=r"data\.task 0\.sha256: was "):
        train_run(run_of(tmp_path, 0), tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "images", "path": "a", "workers": -1}, "workers must be 0 or more processes, or null to hold all"),
        ({"kind": "cifar", "path": "a", "workers": 1}, 'workers: .*"images"|workers'),
    ],
)
def test_bad_numbers_of_workers(data, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**data)


def test_images_that_do_not_fit_into_memory_are_refused_with_the_remedy(folder, tmp_path) -> None:
    config = run_of(folder, None)
    with pytest.raises(
        ValueError, match=r"train has 30 images, which need .* GiB .* data\.size=1000000, .* data\.workers=4"
    ):
        train_run(replace(config, data=replace(config.data, size=1_000_000)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


MANY = 5_000


def begin(root: str, run: str) -> None:
    """Trains one step with two workers; prints this process's CPU seconds and its growth of peak memory in KiB."""
    base = run_of(Path(root), 2)
    config = replace(
        base,
        data=replace(base.data, size=256, validation=0.0),
        model=ModelConfig(kind="resnet18", width=1),
        method=MethodConfig(slots=128),
        tasks=TasksConfig(counts=(60, 40)),
        schedule=Schedule(2, 0.01, batch=8),
    )
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(StopError):
        train_run(config, run, on_step=stop_at("task 0", 1))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": time.process_time() - began, "kib": after - before}))


def test_a_run_on_many_images_starts_in_seconds_with_little_memory(tmp_path) -> None:
    """5,000 hard links to files of about 1 KB in 100 classes; decoded to 256 pixels, they would take 980 MB."""
    draw = np.random.default_rng(0)
    for c in range(100):
        image = tmp_path / f"{c}.png"
        image_module.fromarray(draw.integers(0, 256, (18, 18, 3), np.uint8)).save(image)
        assert 900 < image.stat().st_size < 1200
        for part, count in (("train", MANY // 100), ("query", 1), ("gallery", 1)):
            (tmp_path / "root" / part / f"{c:02d}").mkdir(parents=True)
            for i in range(count):
                os.link(image, tmp_path / "root" / part / f"{c:02d}" / f"{i:04d}.png")
    script = "import sys; from test_image_runs import begin; begin(*sys.argv[1:])"
    arguments = [sys.executable, "-c", script, str(tmp_path / "root"), str(tmp_path / "run")]
    done = subprocess.run(arguments, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["seconds"] < 10  # CPU time, which does not depend on other processes
    assert found["kib"] < 200 * 1024
