"""Tests `simplexfix adapt` and `simplexfix embed` in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from simplexfix import cosine_topk
from simplexfix._files import write_whole
from simplexfix.adapters import Adapter, Procrustes, SimplexJunction, Slerp, WhitenedProcrustes, select
from simplexfix.cli import adapt as cli_adapt
from simplexfix.cli import main
from simplexfix.cli._arguments import parse
from simplexfix.heads import SimplexHead
from simplexfix.labelled import load_vectors
from simplexfix.models import EmbeddingModel, FeatureMLP, ModelIdentity, read_identity


def paired_features(noise: float = 1.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns features by an old encoder of 10 dimensions and a better new one of 12: 600 items of 12 classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 600)
    hidden = rng.standard_normal((12, 8))[labels] + 0.5 * rng.standard_normal((600, 8))
    old = hidden @ rng.standard_normal((8, 10)) + noise * rng.standard_normal((600, 10))
    return old.astype(np.float32), (hidden @ rng.standard_normal((8, 12))).astype(np.float32), labels


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch) -> None:
    def first_candidates(features):
        junctions = [] if features.labels is None else [SimplexJunction()]
        return [Procrustes(), WhitenedProcrustes(0.3), *junctions]

    monkeypatch.setattr(select, "first_candidates", first_candidates)
    monkeypatch.setattr(select, "STEPS", (1,))


@pytest.fixture
def files(tmp_path):
    for name, rows in zip(("old", "new", "labels"), paired_features(), strict=True):
        np.save(tmp_path / f"{name}.npy", rows)
    return tmp_path


def adapt(folder, *more: str) -> list[str]:
    old, new = str(folder / "old.npy"), str(folder / "new.npy")
    return ["adapt", "--old", old, "--new", new, "--out", str(folder / "out"), "--folds", "3", *more]


def test_a_better_encoder_exits_with_0_and_its_folder_embeds(files, capsys) -> None:
    assert main(adapt(files, "--labels", str(files / "labels.npy"), "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["better"]
    assert report["winner"] == report["table"][0]
    adapter = Adapter.from_pretrained(files / "out")
    assert adapter.method == report["winner"]["method"]
    assert adapter.maps_gallery == report["maps_gallery"]
    for side, flags in (("new", []), ("old", ["--gallery"])):
        assert main(["embed", str(files / "out"), str(files / f"{side}.npy"), str(files / "z.npy"), *flags]) == 0
        rows = torch.from_numpy(np.load(files / f"{side}.npy"))
        expected = normalize(adapter.gallery(rows)) if flags else adapter(rows)
        torch.testing.assert_close(torch.from_numpy(np.load(files / "z.npy")), expected)


def test_the_table_shows_the_winner_and_the_scores(files, capsys) -> None:
    (files / "labels.txt").write_text("\n".join(f"class {c}" for c in np.load(files / "labels.npy")) + "\n")
    assert main(adapt(files, "--labels", str(files / "labels.txt"))) == 0
    out = capsys.readouterr().out
    assert "whitened_procrustes (g 0.3)" in out
    assert "on held-out items, the old encoder alone finds" in out
    assert "by nearest class mean" in out
    assert "of a full re-extraction; it breaks" in out
    assert "new queries find more in the old gallery than the old encoder does" in out


def test_no_better_candidate_exits_with_1_and_a_message(files, capsys) -> None:
    old = paired_features(noise=0.0)[0]
    np.save(files / "old.npy", old)
    np.save(files / "new.npy", np.random.default_rng(1).standard_normal((600, 12)).astype(np.float32))
    assert main(adapt(files, "--labels", str(files / "labels.npy"))) == 1
    assert "keep the old encoder: no candidate is shown to be better" in capsys.readouterr().out
    assert Adapter.from_pretrained(files / "out").in_features == 12


def test_stored_vectors_may_be_kept(files, capsys) -> None:
    flags = ["--labels", str(files / "labels.npy"), "--stored-vectors", "keep", "--json"]
    assert main(adapt(files, *flags)) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert {row["method"]["name"] for row in report["table"]} == {"procrustes", "local_correction"}
    assert report["maps_gallery"] is False


@pytest.mark.parametrize("kind", ["of a model", "file", "below a file", "sealed"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_fits(files, capsys, monkeypatch, kind) -> None:
    def fit(*_, **__):
        raise AssertionError("it was fitted")

    monkeypatch.setattr("simplexfix.cli.adapt.select_adapter", fit)
    with pytest.raises(AssertionError, match="it was fitted"):
        cli_adapt.run(parse(adapt(files)))
    assert not (files / "out").exists()
    out = files / "out"
    message = "Not a directory"
    if kind == "of a model":
        out.mkdir()
        (out / "config.json").write_text("{}")
        message = "config.json was not written by save_pretrained and would be overwritten; use another folder"
    elif kind == "sealed":  # a read-only mount; permissions would not restrict root

        def refuse(dir):
            raise OSError(30, "Read-only file system", str(dir / "x"))

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        message = "Read-only file system"
    else:
        out.write_text("mine")
    before = sorted(path.name for path in files.iterdir())
    command = adapt(files)
    command[command.index("--out") + 1] = str(out / "below" if kind == "below a file" else out)
    assert main(command) == 2
    err = capsys.readouterr().err
    assert message in err
    assert str(out) in err
    assert sorted(path.name for path in files.iterdir()) == before


@pytest.mark.parametrize("write", [0, 1])
def test_a_full_disk_leaves_the_adapter_that_was_there(files, capsys, monkeypatch, write) -> None:
    """`save_pretrained` writes the tensors, then config.json; the first or the second write fails."""
    old, new, _ = paired_features()
    Procrustes().fit(old, new).save_pretrained(files / "out", name="before")
    identity = read_identity(files / "out")
    calls = []

    def full(path, content):
        calls.append(path)
        if len(calls) > write:
            raise OSError(28, "No space left on device", str(path))
        write_whole(path, content)

    monkeypatch.setattr("simplexfix.models._config.write_whole", full)
    assert main(adapt(files, "--name", "after")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert read_identity(files / "out") == identity
    assert Adapter.from_pretrained(files / "out").method == {"name": "procrustes"}
    monkeypatch.undo()
    WhitenedProcrustes().fit(old, new).save_pretrained(files / "out")  # deletes files of the failed run
    assert len(list((files / "out").iterdir())) == 2


def test_without_labels_and_with_a_sample(files, capsys) -> None:
    old, new, _ = paired_features()
    np.save(files / "more-old.npy", old[:50])
    np.save(files / "more-new.npy", new[:50])
    sample = ["--sample", str(files / "more-old.npy"), str(files / "more-new.npy")]
    assert main(adapt(files, *sample)) in (0, 1)
    out = capsys.readouterr().out
    assert "agrees to" in out
    assert "breaks" not in out


def test_versions_bring_their_gallery_and_its_labels(files, capsys) -> None:
    old, new, labels = paired_features()
    for name, rows in (("v0", old), ("v1", new)):
        np.savez(files / f"{name}.npz", gallery=rows, gallery_labels=labels, query=rows[:5], query_labels=labels[:5])
    command = ["adapt", "--old", str(files / "v0.npz"), "--new", str(files / "v1.npz"), "--out", str(files / "out")]
    assert main([*command, "--json", "--folds", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == "AA, nearest_class_mean"


def test_rows_of_any_length_are_embedded(files) -> None:
    old, new, _ = paired_features()
    Procrustes().fit(old, new).save_pretrained(files / "a")
    for name, rows, flags in (("new", new, []), ("old", old, ["--gallery"])):
        for scale in (1, 1e-30, 1e30):
            np.save(files / f"{name}.npy", rows * np.float32(scale))
            assert (
                main(["embed", str(files / "a"), str(files / f"{name}.npy"), str(files / f"{scale}.npy"), *flags]) == 0
            )
            np.testing.assert_allclose(np.load(files / f"{scale}.npy"), np.load(files / "1.npy"), atol=1e-5)


def test_slerp_embeds_with_both_encoders(files, capsys) -> None:
    old, new, _ = paired_features()
    adapter = Slerp(Procrustes(), 0.3).fit(old, new)
    adapter.save_pretrained(files / "both")
    command = ["embed", str(files / "both"), str(files / "new.npy"), str(files / "z.npy")]
    assert main(command) == 2
    assert "old must be the old encoder's features" in capsys.readouterr().err
    assert not (files / "z.npy").exists()
    assert main([*command, "--old", str(files / "old.npy")]) == 0
    torch.testing.assert_close(
        torch.from_numpy(np.load(files / "z.npy")), adapter(torch.from_numpy(new), torch.from_numpy(old))
    )


def test_a_model_embeds_in_blocks(files, monkeypatch) -> None:
    from simplexfix.cli import embed

    monkeypatch.setattr(embed, "ROWS", 250)
    torch.manual_seed(0)
    model = EmbeddingModel(FeatureMLP(12), SimplexHead(12, 0, num_slots=20))
    model.save_pretrained(files / "model")
    assert main(["embed", str(files / "model"), str(files / "new.npy"), str(files / "z.npy")]) == 0
    expected = model.extract(torch.from_numpy(paired_features()[1]))
    torch.testing.assert_close(torch.from_numpy(np.load(files / "z.npy")), expected)
    assert not list(files.glob(".z.npy*"))


def test_ids_stay_with_their_vectors(files, monkeypatch) -> None:
    from simplexfix.cli import embed

    monkeypatch.setattr(embed, "ROWS", 250)
    _, new, _ = paired_features()
    Procrustes().fit(*paired_features()[:2]).save_pretrained(files / "a")
    np.savez(files / "in.npz", vectors=new.astype(">f8"), ids=np.arange(600)[::-1])
    assert main(["embed", str(files / "a"), str(files / "in.npz"), str(files / "out.npz")]) == 0
    assert main(["embed", str(files / "a"), str(files / "new.npy"), str(files / "out.npy")]) == 0
    rows, ids = load_vectors(files / "out.npz")
    np.testing.assert_array_equal(ids, np.arange(600)[::-1])
    np.testing.assert_array_equal(rows.rows, np.load(files / "out.npy"))


def test_after_an_error_the_output_is_as_it_was(files, monkeypatch, capsys) -> None:
    from simplexfix.cli import embed

    monkeypatch.setattr(embed, "ROWS", 250)
    Procrustes().fit(*paired_features()[:2]).save_pretrained(files / "a")
    np.save(files / "new.npy", np.where(np.arange(600)[:, None] == 300, np.nan, paired_features()[1]))
    for name in ("z.npy", "z.npz"):
        (files / name).write_bytes(b"before")
        assert main(["embed", str(files / "a"), str(files / "new.npy"), str(files / name)]) == 2
        assert "row 300 holds nan or inf" in capsys.readouterr().err
        assert (files / name).read_bytes() == b"before"
    assert not [file.name for file in files.iterdir() if "tmp" in file.name]


def test_a_gallery_of_the_old_encoder_admits_the_adapter(files, capsys) -> None:
    """Runs the commands of docs/guides/gallery.md for a vendor's gallery, and admits by force.

    test_gate_agreement.py tests the admission by a gate.
    """
    old, new, _ = paired_features()
    model, shop, out = (str(files / name) for name in ("v0.json", "shop", "out"))
    (files / "v0.json").write_text(json.dumps(ModelIdentity.external("vendor/embed", "1", 10).to_dict()))
    for name, rows in (("stored", old), ("again", new)):
        np.savez(files / f"{name}.npz", vectors=rows, ids=np.arange(600))
    assert main(["gallery", "create", shop, "--model", model]) == 0
    assert main(["gallery", "add", shop, "--vectors", str(files / "stored.npz"), "--model", model]) == 0
    keep = ("--stored-vectors", "keep")  # an adapter that maps stored vectors has its own space
    assert main(adapt(files, "--old-model", model, "--name", "vendor/embed 2", *keep)) == 0
    assert not Adapter.from_pretrained(out).maps_gallery
    assert main(["gallery", "admit", shop, "--model", out, "--force", "a test"]) == 0
    assert main(["embed", out, str(files / "new.npy"), str(files / "queries.npy")]) == 0
    _, expected = cosine_topk(Adapter.from_pretrained(out)(torch.from_numpy(new)), torch.from_numpy(old), 3)
    for option, name in (("--inputs", "new.npy"), ("--vectors", "queries.npy")):
        capsys.readouterr()
        assert main(["gallery", "search", shop, option, str(files / name), "--model", out, "-k", "3", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["ids"] == expected.tolist()
    assert main(["gallery", "backfill", shop, "--inputs", str(files / "again.npz"), "--model", out]) == 0
    assert main(["gallery", "rollback", shop]) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["adapt", "--old", "{}/new.npy", "--new", "{}/short.npy", "--out", "{}/o"], "for each of the same items"),
    (["adapt", "--old", "{}/none.npy", "--new", "{}/new.npy", "--out", "{}/o"], "No such file"),
    (["adapt", "--old", "{}/labels.npy", "--new", "{}/new.npy", "--out", "{}/o"], "labels.npy must be float32"),
    (["adapt", "--old", "{}/old.npy", "--new", "{}/new.npy", "--labels", "{}/short.npy", "--out", "{}/o"],
     "labels must be"),
    (["embed", "{}/none", "{}/new.npy", "{}/z.npy"], "is not a folder"),
    (["adapt", "--old", "{}/old.npy", "--new", "{}/same.npy", "--out", "{}/o"], "rows have the same direction"),
    (["adapt", "--old", "{}/old.npy", "--new", "{}/new.npy", "--out", "{}/o", "--old-model", "{}/new.npy"],
     "is neither the folder of a model"),
    (["adapt", "--old", "{}/old.npy", "--new", "{}/new.npy", "--out", "{}/o", "--version", "-1"], "--version must be"),
    (["embed", "{}/a", "{}/new.npz", "{}/z.npy"], "No such file"),
    (["embed", "{}/a", "{}/new.npy", "{}/z.bin"], "OUT must be an .npy or .npz file"),
    (["embed", "{}/a", "{}/nan.npy", "{}/z.npy"], "row 7 holds nan or inf"),
    (["embed", "{}/a", "{}/labels.npy", "{}/z.npy"], "vectors must be float32"),
    (["embed", "{}/a", "{}/old.npy", "{}/z.npy"], "features must have 12 columns"),
    (["embed", "{}/a", "{}/new.npy", "{}/z.npy", "--old", "{}/short.npy"], "--old has 3 rows, IN has 600"),
    (["embed", "{}/a", "{}/old.npy", "{}/z.npy", "--old", "{}/old.npy", "--gallery"], "--old is for queries"),
])  # fmt: skip
def test_bad_input_exits_with_2(arguments, message, files, capsys) -> None:
    np.save(files / "short.npy", np.zeros((3, 12), dtype=np.float32))
    np.save(files / "same.npy", np.ones((600, 12), dtype=np.float32))
    np.save(files / "nan.npy", np.where(np.arange(600)[:, None] == 7, np.nan, paired_features()[1]))
    Procrustes().fit(*paired_features()[:2]).save_pretrained(files / "a")
    assert main([text.format(files) for text in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (files / "o").exists()
    assert not (files / "z.npy").exists()
