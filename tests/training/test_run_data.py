"""Tests the data of a run: tasks, pre-training, searches and validation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simplexfix.data import load_omniglot
from simplexfix.models import EmbeddingModel
from simplexfix.training import (
    PRESETS,
    DataConfig,
    MethodConfig,
    ModelConfig,
    ReplacementConfig,
    RunConfig,
    Schedule,
    TasksConfig,
    TrainerConfig,
    train_run,
)
from simplexfix.training.run_data import load_run_data

PER_CLASS = 6


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """Writes CIFAR-10 and CIFAR-100 in their published layout with a few images; each class is a colour with noise."""
    root = tmp_path_factory.mktemp("cifar")
    draw = np.random.default_rng(0)

    def images(labels: np.ndarray, classes: int) -> np.ndarray:
        colours = np.random.default_rng(1).integers(0, 256, (classes, 3, 1))
        return (colours[labels] + draw.integers(-20, 20, (len(labels), 3, 1024))).clip(0, 255).reshape(len(labels), -1)

    fine = np.tile(np.arange(100), PER_CLASS)
    hundred, ten = root / "cifar-100-binary", root / "cifar-10-batches-bin"
    hundred.mkdir()
    ten.mkdir()
    records = np.column_stack([fine // 5, fine, images(fine, 100)]).astype(np.uint8)
    (hundred / "train.bin").write_bytes(records.tobytes())
    (hundred / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)))
    for name in ("data_batch_1.bin", "test_batch.bin"):
        labels = np.arange(30) % 10
        (ten / name).write_bytes(np.column_stack([labels, images(labels, 10)]).astype(np.uint8).tobytes())
    (ten / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    return root


def small(cifar: Path) -> RunConfig:
    """Returns the preset `cpu-small` with fewer images."""
    preset = PRESETS["cpu-small"]
    return replace(preset, data=replace(preset.data, path=str(cifar), per_class=PER_CLASS - 1))


def test_the_small_preset_splits_classes_between_tasks_and_pre_training(cifar) -> None:
    """Tasks have the classes below 50 in the seed's order, pre-training has the others; no item is in both."""
    config = small(cifar)
    data = load_run_data(config)
    assert [task.classes.stop for task in data.tasks] == [8, 15, 22, 29, 36, 43, 50]
    assert [len(torch.unique(task.items.labels)) for task in data.tasks] == [8, 7, 7, 7, 7, 7, 7]
    assert all(torch.bincount(task.items.labels)[task.items.labels].eq(PER_CLASS - 1).all() for task in data.tasks)
    assert torch.unique(data.pretraining.labels).tolist() == list(range(50))
    images = [task.items.inputs for task in data.tasks] + [data.pretraining.inputs]
    rows = {image.numpy().tobytes() for part in images for image in part}
    assert len(rows) == 100 * (PER_CLASS - 1)
    other = load_run_data(replace(config, seed=1))
    assert not torch.equal(other.tasks[0].items.inputs, data.tasks[0].items.inputs)
    assert {image.numpy().tobytes() for image in other.pretraining.inputs} == {
        image.numpy().tobytes() for image in data.pretraining.inputs
    }
    query, gallery = data.searched["search"]
    assert len(query.labels) == len(gallery.labels) == 30
    assert list(data.searched) == ["search"]


def test_the_half_width_preset_has_the_papers_tasks(cifar, tmp_path) -> None:
    """Tasks have 10 and 15 classes and 70 epochs; networks are pre-trained on 50, 100 and 200 classes of a folder."""
    for c in range(200):
        (tmp_path / f"class{c:03d}").mkdir()
        Image.fromarray(np.full((32, 32, 3), c, np.uint8)).save(tmp_path / f"class{c:03d}" / "0.png")
    preset = PRESETS["paper-half"]
    places = {"path": str(cifar), "pretraining": str(tmp_path)}
    data = load_run_data(replace(preset, data=replace(preset.data, per_class=PER_CLASS - 1, **places)))
    assert [task.classes.stop for task in data.tasks] == [10, 25, 40, 55, 70, 85, 100]
    assert torch.unique(data.pretraining.labels).tolist() == list(range(200))
    plans = preset.tasks.replacements
    assert {t: (plan.classes, plan.epochs) for t, plan in plans.items()} == {0: (50, 30), 2: (100, 30), 4: (200, 30)}
    paper = PRESETS["iamcl2r-7"]
    assert (preset.schedule, preset.method) == (paper.schedule, paper.method)
    assert replace(preset.tasks, replacements={}) == replace(paper.tasks, replacements={}, hoc_reference=None)
    assert (preset.tasks.epochs, preset.tasks.memory_per_class, preset.data.per_class) == (70, 20, 300)


def test_omniglot_searches_seen_and_unseen_characters_with_untrained_drawings() -> None:
    config = PRESETS["omniglot"]
    data = load_run_data(config)
    assert [task.items.inputs.shape for task in data.tasks] == [(12 * n, 28, 28) for n in (60, 40, 40, 45)]
    sizes = {name: [len(items.labels) for items in pair] for name, pair in data.searched.items()}
    assert sizes == {"seen": [60 * 4, 60 * 4], "unseen": [57 * 10, 57 * 10]}
    parts = [task.items for task in data.tasks] + [items for pair in data.searched.values() for items in pair]
    drawings = [{image.numpy().tobytes() for image in items.inputs} for items in parts]
    # single drawings of two characters can be equal pixel by pixel; whole sets cannot
    for i, a in enumerate(drawings):
        for b in drawings[i + 1 :]:
            assert len(a & b) <= 2
    character = {image.tobytes(): c for c, images in enumerate(load_omniglot().images) for image in images}
    learned, seen = ({character[key] for key in drawings[at]} for at in (0, 4))
    assert seen == learned
    other = load_run_data(replace(config, seed=1))
    assert not torch.equal(other.tasks[0].items.inputs, data.tasks[0].items.inputs)


def test_validation_is_held_out_of_every_class(cifar) -> None:
    config = small(cifar)
    whole = load_run_data(config)
    held = load_run_data(replace(config, data=replace(config.data, validation=0.2)))
    query, gallery = held.searched["validation"]
    assert torch.bincount(query.labels)[:50].tolist() == [1] * 50
    assert len(query.labels) + len(gallery.labels) == sum(len(task.items.labels) for task in whole.tasks)
    trained = {image.numpy().tobytes() for task in held.tasks for image in task.items.inputs}
    assert trained == {image.numpy().tobytes() for image in gallery.inputs}
    assert not trained & {image.numpy().tobytes() for image in query.inputs}
    assert len(held.pretraining.labels) == len(whole.pretraining.labels)


def test_methods_share_their_pre_training_and_saved_models_embed_alike(cifar, tmp_path) -> None:
    """Runs IAM-CL2R on images: `hoc` and `simplex` read the same pre-trained networks, `er` has its own."""
    config = RunConfig(
        data=DataConfig(kind="cifar", path=str(cifar), query_batches=(1,), validation=0.2),
        model=ModelConfig(kind="resnet18", width=4),
        method=MethodConfig(slots=128),
        tasks=TasksConfig(
            counts=(10, 10),
            pretraining_from=50,
            epochs=1,
            memory_per_class=2,
            replacements={1: ReplacementConfig(ModelConfig(kind="resnet18", width=8), 20, Schedule(1, 0.1), epochs=1)},
            pretraining_folder=str(tmp_path / "pretrained"),
            hoc_reference="replacement",
        ),
        schedule=Schedule(1, 0.01, batch=16),
        trainer=TrainerConfig(device="cpu"),
        protocols=("nearest_class_mean",),
    )
    stages: list[str] = []
    report = train_run(config, tmp_path / "hoc", on_step=lambda progress: stages.append(progress.stage))
    assert "pre-training for task 1" in stages
    assert set(report) == {"versions", "search", "validation", "class_names"}
    assert len(report["validation"]["nearest_class_mean"]["matrix"]) == 2
    again: list[str] = []
    simplex = replace(config, method=replace(config.method, name="simplex"))
    train_run(simplex, tmp_path / "simplex", on_step=lambda progress: again.append(progress.stage))
    assert "pre-training for task 1" not in again
    narrow = replace(config.tasks, replacements={1: replace(config.tasks.replacements[1], model=config.model)})
    er = replace(config, tasks=narrow, method=MethodConfig("er"))
    lines: dict[str, list[object]] = {}
    train_run(er, tmp_path / "er", on_step=lambda p: lines.setdefault(p.stage, []).append(p.line))
    assert sorted(path.name for path in (tmp_path / "pretrained").iterdir()) == ["linear", "simplex"]
    assert lines["pre-training for task 1"][-1]["step"] == len(lines["pre-training for task 1"])
    other = replace(config, method=replace(config.method, normalize=True))
    with pytest.raises(ValueError, match=r"with other settings[\s\S]*method\.normalize: was False, is True"):
        train_run(other, tmp_path / "other")

    version = EmbeddingModel.from_pretrained(tmp_path / "hoc" / "task-01" / "model")
    data = load_run_data(config)
    images = data.searched["search"][0].inputs
    assert version.backbone.width == 8
    rows = version.extract(version.preprocessing(images))
    assert torch.equal(rows, version.extract(data.prepare(images)))
    identity = json.loads((tmp_path / "hoc" / "task-01" / "model" / "config.json").read_text())["fingerprint"]
    assert report["versions"][1]["fingerprint"] == identity


def test_image_folders_are_matched_by_class_name(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    for part, names in (
        ("train", ("blue", "green")),
        ("query", ("red",)),
        ("gallery", ("green", "red")),
        ("more", ("blue", "red")),
    ):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                image.new("RGB", (20, 10), colours[name]).save(tmp_path / part / name / f"{i}.png")
    config = RunConfig(
        data=DataConfig(kind="images", path=str(tmp_path), size=8, pretraining=str(tmp_path / "more")),
        tasks=TasksConfig(counts=(1, 1)),
        schedule=Schedule(1, 0.1),
    )
    data = load_run_data(config)
    query, gallery = data.searched["search"]
    assert query.inputs.shape == (3, 3, 8, 8)
    assert query.labels.tolist() == [1] * 3
    assert gallery.labels.tolist() == [0] * 3 + [1] * 3
    assert len(data.pretraining.labels) == 6
    both = replace(config, tasks=replace(config.tasks, pretraining_from=1))
    with pytest.raises(ValueError, match="exclude each other: set one of them"):
        load_run_data(both)


def sequence(path: Path, **data: object) -> RunConfig:
    return RunConfig(
        data=DataConfig(kind="features", path=str(path), **data),
        model=ModelConfig(kind="mlp"),
        tasks=TasksConfig(kind="dataset_sequence", sets=("cars", "birds")),
        schedule=Schedule(2, 0.1, batch=4),
        trainer=TrainerConfig(device="cpu"),
        protocols=("instance",),
    )


@pytest.fixture
def two_sets(tmp_path) -> Path:
    """Writes features of cars (classes 3 and 7), of birds (3, 5 and 7), and of query and gallery (0 and 1)."""
    draw = np.random.default_rng(0)
    for name, classes in (("cars", (7, 3)), ("birds", (5, 3, 7)), ("query", (0, 1)), ("gallery", (0, 1))):
        labels = np.repeat(classes, 6)
        np.save(tmp_path / f"{name}.npy", draw.normal(size=(len(labels), 8)).astype(np.float32))
        np.save(tmp_path / f"{name}_labels.npy", labels)
    return tmp_path


def test_a_data_set_for_each_task(two_sets) -> None:
    """Each task has the rows of its set, with new ids for all of its classes."""
    tasks = load_run_data(sequence(two_sets)).tasks
    assert [task.classes for task in tasks] == [range(2), range(5)]
    for task, name in zip(tasks, ("cars", "birds"), strict=True):
        assert np.array_equal(task.items.inputs.numpy(), np.load(two_sets / f"{name}.npy"))
        known = np.load(two_sets / f"{name}_labels.npy")
        pairs = set(zip(task.items.labels.tolist(), known.tolist(), strict=True))
        assert len(pairs) == len(set(known)) == len(set(task.items.labels.tolist()))
    assert sorted(set(tasks[1].items.labels.tolist())) == [2, 3, 4]


def test_validation_items_are_held_out_of_every_set(two_sets) -> None:
    config = sequence(two_sets, per_class=5, validation=0.2)
    data = load_run_data(config)
    assert [len(task.items.labels) for task in data.tasks] == [8, 12]
    query, gallery = data.searched["validation"]
    assert torch.bincount(query.labels).tolist() == [1] * 5
    assert torch.bincount(gallery.labels).tolist() == [4] * 5
    report = train_run(config, two_sets / "run")
    assert [len(report[name]["instance"]["matrix"]) for name in ("search", "validation")] == [2, 2]


@pytest.mark.parametrize(
    ("tasks", "data", "says"),
    [
        (
            {"sets": ("cars",), "counts": (1,), "kind": "class_incremental"},
            {},
            'kind="class_incremental" takes no sets',
        ),
        ({"kind": "dataset_sequence"}, {}, 'kind="dataset_sequence" needs sets, the data set of each task'),
        ({"kind": "dataset_sequence", "sets": ("cars",), "pretraining_from": 2}, {}, "pretraining_from excludes sets"),
        ({"kind": "dataset_sequence", "sets": ("a",)}, {"kind": "cifar", "path": "a"}, "got 'cifar'"),
    ],
)
def test_bad_sequences_are_refused(tasks, data, says) -> None:
    with pytest.raises(ValueError, match=says):
        RunConfig(tasks=TasksConfig(**tasks), schedule=Schedule(1, 0.1), data=DataConfig(**data))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": MethodConfig(slots=4)}, "method.slots must be at least 5, for 5 classes of the tasks and 0 of"),
        ({"schedule": Schedule(2, 0.1, batch=6, accumulate=2)}, "3 new and 3 remembered rows .* with 2 parts each"),
        ({"trainer": TrainerConfig(device="cpu", precision="bf16")}, "precision must be one of .*got 'bf16'"),
        ({"model": ModelConfig(kind="resnet18", stem="cifr")}, "stem must be one of .*got 'cifr'"),
        ({"model": ModelConfig(kind="convnet")}, r"^model\.kind=convnet does not take .* \[2, 8\]: images must have"),
        ({"model": ModelConfig(kind="resnet18")}, r"^model\.kind=resnet18 does not take .* \[2, 8\]: "),
    ],
)
def test_bad_configurations_are_refused_before_the_folder_exists(two_sets, change, says) -> None:
    """The folder stays free for the intended configuration."""
    with pytest.raises(ValueError, match=says):
        train_run(replace(sequence(two_sets), **change), two_sets / "run")
    assert not (two_sets / "run").exists()


@pytest.mark.parametrize(
    ("batch", "accumulate", "replaced", "says"),
    [
        (
            1,
            1,
            {},
            r"batch must be at least 2: model\.kind=resnet18 has batch normalisation, .* 1 rows over 1 processes",
        ),
        (2, 2, {}, r"batch must be at least 4: model\.kind=resnet18 .* with 2 parts each leave one; raise batch"),
        (8, 1, {"batch": 1}, r"batch must be at least 2: tasks\.replacements\.1\.model\.kind=resnet18 has"),
        (
            8,
            1,
            {"batch": 4, "accumulate": 4},
            r"batch must be at least 8: tasks\.replacements\.1\.model\.kind=resnet18 has",
        ),
    ],
)
def test_batches_of_one_with_batch_normalisation_are_refused_before_the_folder_exists(
    cifar, tmp_path, batch, accumulate, replaced, says
) -> None:
    """The network reduces 32 pixels to one, so batch normalisation needs two rows."""
    plan = ReplacementConfig(ModelConfig(kind="resnet18", width=8), 20, Schedule(1, 0.1, **{"batch": 4, **replaced}))
    config = RunConfig(
        data=DataConfig(kind="cifar", path=str(cifar), query_batches=(1,)),
        model=ModelConfig(kind="resnet18", width=4),
        method=MethodConfig(slots=128),
        tasks=TasksConfig(counts=(10, 10), pretraining_from=50, memory_per_class=0, replacements={1: plan}),
        schedule=Schedule(1, 0.01, batch=batch, accumulate=accumulate),
        trainer=TrainerConfig(device="cpu"),
    )
    with pytest.raises(ValueError, match=says):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["convnet", "resnet18"])
def test_a_replacement_that_cannot_take_the_data_is_refused_at_once(two_sets, kind: str) -> None:
    config = sequence(two_sets)
    config = replace(config, tasks=replace(config.tasks, replacements={1: ReplacementConfig(ModelConfig(kind=kind))}))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"^tasks\.replacements\.1\.model\.kind={kind} does not take"):
        train_run(config, two_sets / "run")
    assert not (two_sets / "run").exists()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_whose_outputs_are_not_vectors_is_refused_at_once(tmp_path) -> None:
    config = RunConfig(tasks=TasksConfig(counts=(2,)), schedule=Schedule(1, 0.1), model=ModelConfig(kind="mlp"))
    says = r"^model\.kind=mlp must return shape \[2, 28\] for inputs of shape \[2, 1, 28, 28\], got \[2, 1, 28, 28\]"
    with pytest.raises(ValueError, match=says):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batches_of_a_single_task_have_no_remembered_half(two_sets) -> None:
    config = sequence(two_sets)
    config = replace(
        config, tasks=replace(config.tasks, sets=("cars",)), schedule=Schedule(1, 0.1, batch=5, accumulate=5)
    )
    assert len(train_run(config, two_sets / "run")["versions"]) == 1


def test_searched_items_must_have_the_shape_of_training_items(two_sets) -> None:
    np.save(two_sets / "gallery.npy", np.ones((12, 9), np.float32))
    np.save(two_sets / "query.npy", np.ones((12, 9), np.float32))
    with pytest.raises(ValueError, match=r"query has inputs of shape \[9\], training items have \[8\]"):
        load_run_data(sequence(two_sets))


def test_nan_among_the_training_data_is_named(two_sets) -> None:
    rows = np.load(two_sets / "birds.npy")
    rows[3] = np.nan
    np.save(two_sets / "birds.npy", rows)
    with pytest.raises(ValueError, match="birds row 3 holds nan"):
        load_run_data(sequence(two_sets))


def test_a_replacement_that_is_its_own_reference_must_be_trained() -> None:
    tasks = TasksConfig(counts=(1, 1), replacements={1: ReplacementConfig(ModelConfig())}, hoc_reference="replacement")
    with pytest.raises(ValueError, match=r"those of tasks \[1\] are not; give them classes and schedule"):
        RunConfig(tasks=tasks, schedule=Schedule(1, 0.1))
    mixed = replace(tasks, hoc_reference="deployed_or_replacement")
    RunConfig(tasks=mixed, schedule=Schedule(1, 0.1))  # task 1 has a deployed version
    first = replace(mixed, replacements={0: ReplacementConfig(ModelConfig())})
    with pytest.raises(
        ValueError, match=r'hoc_reference="deployed_or_replacement" needs .* those of tasks \[0\] are not'
    ):
        RunConfig(tasks=first, schedule=Schedule(1, 0.1))


def test_sets_of_different_widths_are_refused(two_sets) -> None:
    np.save(two_sets / "birds.npy", np.zeros((18, 9), np.float32))
    with pytest.raises(ValueError, match=r"the same shape and dtype, got \[8\] torch.float32, \[9\] torch.float32"):
        load_run_data(sequence(two_sets))
