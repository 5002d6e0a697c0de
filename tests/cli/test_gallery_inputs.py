"""Tests `simplexfix gallery` on image folders and on feature files that the model embeds."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.adapters import Procrustes
from simplexfix.cli import _embedder, _gallery_inputs, _progress, main
from simplexfix.data import Drawings, load_omniglot, read_images
from simplexfix.gallery import Gallery
from simplexfix.models import EmbeddingModel, FeatureMLP, ModelIdentity, SmallConvNet

Image = pytest.importorskip("PIL.Image", reason="images are read with Pillow")
PHOTOS = 12


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder of twelve drawings, two compatible models of drawings, and an empty gallery of the first."""
    monkeypatch.chdir(tmp_path)
    slots = SlotRegistry(9)
    slots.add("default", range(4))
    for version in range(2):
        torch.manual_seed(version)
        model = EmbeddingModel(SmallConvNet(4, 8), SimplexHead.from_slots(slots, 8), preprocessing=Drawings(28))
        model.save_pretrained(f"v{version}", version=version, name=f"v{version}")
    images = load_omniglot().images
    for at in range(PHOTOS):
        file = Path("photos", "ab"[at % 2], f"{at:02d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 * (1 - images[at, 0])).save(file)
    assert main(["gallery", "create", "shop", "--model", "v0"]) == 0
    return tmp_path


def run(text: str) -> int:
    return main(["gallery", *text.split()])


def stored() -> dict[str, tuple[int, int, np.ndarray]]:
    with Gallery.open("shop") as gallery:
        rows = gallery.read()
        return {
            payload["path"]: (id_, version, vector)
            for id_, version, vector, payload in zip(
                rows.ids.tolist(), rows.versions.tolist(), rows.vectors, rows.payload, strict=True
            )
        }


def embedded(folder: str, path: str) -> np.ndarray:
    model = EmbeddingModel.from_pretrained(folder)
    images = read_images([Path("photos", path)], model.preprocessing)
    return model.extract(images, prepare=model.preprocessing)[0].numpy()


def test_the_life_of_a_gallery_of_images(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("add shop --inputs photos --model v0 --batch 5") == 0
    assert capsys.readouterr().out == "added 12 rows; the gallery has 12\n"
    names = sorted(str(path.relative_to("photos")) for path in Path("photos").rglob("*.png"))
    assert [(path, row[0]) for path, row in stored().items()] == list(zip(names, range(PHOTOS), strict=True))
    for path in names:
        np.testing.assert_allclose(stored()[path][2], embedded("v0", path), atol=1e-5)
    shutil.copy("photos/a/00.png", "photos/0.png")  # a new image, the first in order
    assert run("add shop --inputs photos --model v0") == 0
    assert capsys.readouterr().out == "added 1 rows, 12 are in the gallery already; the gallery has 13\n"
    assert stored()["0.png"][0] == PHOTOS
    assert run("search shop --inputs photos/b/03.png --model v0 -k 2") == 0
    assert capsys.readouterr().out.startswith("query 03.png: 7 b/03.png 1.0000 v0  ")
    assert run("search shop --inputs photos --model v0 -k 1 --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["queries"] == ["0.png", *names]
    assert [row[0] for row in found["paths"]] == ["a/00.png", *names]  # equal scores: the lower id wins
    assert run("admit shop --model v1 --force test") == 0
    assert run("backfill shop --inputs photos --model v1 --batch 4") == 0
    assert capsys.readouterr().out.endswith("replaced 13 rows; no row is stale\n")
    for path, (_, version, vector) in stored().items():
        assert version == 1
        np.testing.assert_allclose(vector, embedded("v1", path), atol=1e-5)


def test_a_table_gives_ids_and_payload(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Path("table.csv")
    table.write_text("path,id,price,sku\na/00.png,70,1.5,007\nb/01.png,30,2,010\n")
    assert run("add shop --inputs photos --model v0 --payload table.csv") == 0
    with Gallery.open("shop") as gallery:
        assert gallery.ids().tolist() == [30, 70]
        assert gallery.read([70, 30]).payload == [
            {"path": "a/00.png", "price": 1.5, "sku": "007"},
            {"path": "b/01.png", "price": 2, "sku": "010"},
        ]
    Path("more.json").write_text(json.dumps([{"path": "a/02.png", "tags": ["x"]}, {"path": "a/00.png"}]))
    assert run("add shop --inputs photos --model v0 --payload more.json") == 0
    assert stored()["a/02.png"][0] == 71
    capsys.readouterr()
    for text, message in (
        ("path,id\na/04.png,70\n", "id 70 of table.csv is another row of the gallery"),
        ("path,id\na/00.png,5\n", "a/00.png has id 5 in table.csv and 70 in the gallery"),
        ("path,id\na/04.png,x\n", "ids of table.csv must be integers"),
        ("path,id\na/04.png,-1\n", "ids of table.csv must lie between 0"),
        ("path,id\na/04.png,1\na/06.png,1\n", "ids of table.csv must hold each id once, got 1 in rows 0 and 1"),
        ("path\na/04.png\na/04.png\n", "table.csv has the path 'a/04.png' twice"),
        ("path\na/../../secret.png\n", "table.csv row 0 must have a path in photos, without .. in it, got 'a/../.."),
        ("name\na/04.png\n", "table.csv row 0 must have a path in photos, without .. in it, got None"),
        ("path,path\na,b\n", "table.csv is not a table: its first line must have the names of the columns, each once"),
        ("path,id\na/04.png\n", "table.csv is not a table: row 0 has 1 values for 2 columns"),
        ("path,version\na/04.png,3\n", "payload row 0 has the key 'version', which the gallery itself uses"),
    ):
        table.write_text(text)
        assert run("add shop --inputs photos --model v0 --payload table.csv") == 2, text
        assert message in capsys.readouterr().err, text
    assert len(stored()) == 3


def test_images_that_cannot_be_read_are_named_and_left_out(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/a/00.png").write_bytes(b"no image")
    assert run("add shop --inputs photos --model v0 --batch 3") == 1
    said = capsys.readouterr()
    assert said.out.endswith("added 11 rows, 1 cannot be read; the gallery has 11\n")
    assert re.search(r"^simplexfix gallery: photos/a/00\.png cannot be read, it may be truncated", said.err, re.M)
    assert run("search shop --inputs photos --model v0") == 2
    assert "photos/a/00.png cannot be read" in capsys.readouterr().err
    with Gallery.open("shop") as gallery:  # a row without an image, and a path outside the folder
        rows = np.ones((2, 8), np.float32)
        gallery.add([50, 51], rows, model=gallery.model, payload=[{}, {"path": "../v0/config.json"}])
    Path("photos/b/01.png").unlink()
    assert run("admit shop --model v1 --force test") == 0
    capsys.readouterr()
    assert run("backfill shop --inputs photos --model v1 --batch 2") == 1
    said = capsys.readouterr()
    assert said.out == (
        "replaced 10 rows; 3 rows are stale; 2 of this worker's were not in photos; images that cannot be read: 1\n"
    )
    assert "photos/b/01.png cannot be read" in said.err
    with Gallery.open("shop") as gallery:
        assert (gallery.status()["stale"], gallery.status()["leased"]) == (3, 0)
    Path("photos/a/notes.txt").write_text("x")
    assert run("add shop --inputs photos --model v1") == 2
    assert "photos/a/notes.txt is not an image; expected" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["add", "backfill"])
def test_ctrl_c_keeps_finished_rows_and_the_command_continues(shop: Path, monkeypatch, capsys, action: str) -> None:
    command = f"{action} shop --inputs photos --batch 5 --model "
    if action == "backfill":
        assert run("add shop --inputs photos --model v0") == 0
        assert run("admit shop --model v1 --force test") == 0
    embed, calls = _embedder.Embedder.images, []

    def interrupted(self, files):
        calls.append(files)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return embed(self, files)

    with monkeypatch.context() as patched:
        patched.setattr(_embedder.Embedder, "images", interrupted)
        capsys.readouterr()
        assert run(command + ("v1" if action == "backfill" else "v0")) == 130
    said = capsys.readouterr().err
    assert said.endswith(
        "simplexfix gallery: interrupted; added and replaced rows stay; run the same command to continue\n"
    )
    with Gallery.open("shop") as gallery:
        status = gallery.status()
        assert status["leased"] == 0
        assert (status["rows"], status["stale"]) == ((12, 7) if action == "backfill" else (5, 0))
    assert run(command + ("v1" if action == "backfill" else "v0")) == 0
    assert "replaced 7 rows; no" in (out := capsys.readouterr().out) or "added 7 rows, 5 are in" in out


def test_workers_share_rows_and_a_pause_is_reported(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("add shop --inputs photos --model v0") == 0
    assert run("admit shop --model v1 --force test") == 0
    with Gallery.open("shop") as other:
        others = other.stale(batch=4, lease=0.3)
        assert len(next(others)) == 4
        capsys.readouterr()
        assert run("backfill shop --inputs photos --model v1 --batch 5") == 0  # 8 rows, then 4 after their lease ends
        assert capsys.readouterr().out == "replaced 12 rows; no row is stale\n"
        others.close()
    assert run("rollback shop") == 0
    assert run("admit shop --model v1 --force again") == 0
    capsys.readouterr()
    assert run("pause shop") == 0
    assert capsys.readouterr().out.startswith("shop: 12 rows; backfills are paused\nversion 1 (v1) serves since ")
    assert run("backfill shop --inputs photos --model v1") == 1
    assert capsys.readouterr().out == (
        "replaced 0 rows; 12 rows are stale; backfills are paused: `simplexfix gallery resume shop` lets them run\n"
    )


def test_features_are_embedded_by_models_and_adapters(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    old = draw.standard_normal((60, 6)).astype(np.float32)
    new = (old @ draw.standard_normal((6, 6))).astype(np.float32)
    encoder = ModelIdentity.external("vendor/embed", "1", 6)
    Path("old.json").write_text(json.dumps(encoder.to_dict()))
    Procrustes().fit(old, new).save_pretrained("adapter", version=1, old=encoder.fingerprint)
    for name, rows in (("old", old), ("new", new)):
        np.savez(f"{name}.npz", vectors=rows, ids=np.arange(60) * 2)
    assert run("create shop --model old.json") == 0
    assert run("add shop --vectors old.npz --model old.json") == 0
    assert run("admit shop --model adapter --force chosen") == 0
    capsys.readouterr()
    assert run("search shop --inputs new.npz --model adapter -k 1 --json") == 0
    assert np.mean(np.ravel(json.loads(capsys.readouterr().out)["ids"]) == np.arange(60) * 2) > 0.5
    assert run("backfill shop --inputs new.npz --model adapter") == 0
    assert main(["embed", "adapter", "new.npz", "vectors.npz"]) == 0
    with Gallery.open("shop") as gallery:
        np.testing.assert_allclose(gallery.read().vectors, np.load("vectors.npz")["vectors"], atol=1e-6)
    slots = SlotRegistry(9)
    slots.add("default", range(4))
    EmbeddingModel(FeatureMLP(6), SimplexHead.from_slots(slots, 6)).save_pretrained("mlp")
    Path("photos").mkdir()
    Image.new("RGB", (4, 4)).save("photos/a.png")
    assert run("create other --model mlp") == 0
    assert run("add other --inputs new.npz --model mlp") == 0
    capsys.readouterr()
    np.savez("wide.npz", vectors=np.ones((2, 7), "f"), ids=[1, 2])
    for text, message in (
        ("add other --inputs photos --model mlp", "Photographs or Drawings, which define the size; this one has none"),
        ("search shop --inputs photos/a.png --model adapter", "the adapter in adapter takes features, not images"),
        (
            "backfill shop --inputs new.npz --model old.json",
            "--inputs needs the folder of the model, got the file old.j",
        ),
        ("add other --inputs wide.npz --model mlp", "the model in mlp cannot embed wide.npz: vectors [2, 7]: "),
        ("add shop --inputs wide.npz --model adapter", "features must have 6 columns"),
    ):
        assert run(text) == 2, text
        assert message in capsys.readouterr().err, text


def test_embed_takes_images_as_the_gallery_does(shop: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_gallery_inputs, "_IMAGES", 5)
    assert run("add shop --inputs photos --model v0") == 0
    assert main(["embed", "v0", "photos", "all.npz"]) == 0
    with np.load("all.npz") as saved:
        assert sorted(saved) == ["paths", "vectors"]
        vectors = saved["vectors"]
        assert saved["paths"].tolist() == list(stored())
        np.testing.assert_allclose(vectors, [row[2] for row in stored().values()], atol=1e-6)
    assert main(["embed", "v0", "photos/b/03.png", "one.npy"]) == 0
    np.testing.assert_allclose(np.load("one.npy"), vectors[[7]], atol=1e-6)
    capsys.readouterr()
    assert run("search shop --vectors one.npy --model v0 -k 1") == 0
    assert capsys.readouterr().out.startswith("query 0: 7 b/03.png 1.0000 v0")
    slots = SlotRegistry(9)
    slots.add("default", range(4))
    EmbeddingModel(FeatureMLP(6), SimplexHead.from_slots(slots, 6)).save_pretrained("mlp", version=0)
    Procrustes().fit(*np.random.default_rng(0).standard_normal((2, 60, 6), np.float32)).save_pretrained("adapter")
    Path("empty").mkdir()
    for command, message in (
        ("embed mlp photos no.npy", "Photographs or Drawings, which define the size; this one has none"),
        ("gallery search shop --inputs photos --model mlp", "Photographs or Drawings, which define the size; this"),
        ("embed adapter photos no.npy", "the adapter in adapter takes features, not images"),
        ("embed v0 photos no.npy --gallery", "--old and --gallery are for adapters, v0 holds a model"),
        ("embed v0 photos no.txt", "OUT must be an .npy or .npz file, got no.txt"),
        ("embed v0 empty no.npy", "empty has no images; expected .bmp"),
        ("gallery search shop --inputs empty --model v0", "empty has no images; expected .bmp"),
    ):
        assert main(command.split()) == 2, command
        assert message in capsys.readouterr().err, command
    Path("photos/a/00.png").write_bytes(b"no image")
    for command in ("embed v0 photos no.npy", "gallery search shop --inputs photos --model v0"):
        assert main(command.split()) == 2
        assert "photos/a/00.png cannot be read, it may be truncated or damaged" in capsys.readouterr().err
    assert not Path("no.npy").exists()


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    lines, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(_progress, "_SECONDS", 0.0)
    for stream in (lines, terminal):
        with _progress.counted(stream, "backfill", 40) as show:
            show(10)
            time.sleep(0.01)
            show(40)
    assert re.fullmatch(r"backfill: 10/40, 0 rows/s\nbackfill: 40/40, \d+ rows/s, 0:00:00 left\n", lines.getvalue())
    assert "backfill: 100 % " in terminal.getvalue()
    assert "40/40" in terminal.getvalue()
