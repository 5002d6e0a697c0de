"""Tests `simplexfix gate --agreement` and `--adapter` in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest

from simplexfix.adapters import Procrustes, Slerp, WhitenedProcrustes, select
from simplexfix.cli import gate, main
from simplexfix.models import ModelIdentity


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Returns a folder of features by an old encoder of 6 dimensions and a better one of 8, and of three adapters."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((800, 6))
    old = (hidden + 0.7 * rng.standard_normal((800, 6))).astype(np.float32)
    new = (hidden @ np.linalg.qr(rng.standard_normal((8, 6)))[0].T).astype(np.float32)
    for name, rows in (("old", old), ("new", new)):
        np.save(tmp_path / f"{name}-fit.npy", rows[:500])
        np.save(tmp_path / f"{name}.npy", rows[500:])
        np.savez(tmp_path / f"{name}.npz", query=rows[500:600], gallery=rows[600:])
        labels = {"query_labels": np.arange(100) % 9, "gallery_labels": np.arange(200) % 9}
        np.savez(tmp_path / f"{name}-labelled.npz", query=rows[500:600], gallery=rows[600:], **labels)
    (tmp_path / "old.json").write_text(json.dumps(ModelIdentity.external("vendor", "1", 6).to_dict()))
    for name, method in (
        ("adapter", Procrustes()),
        ("mapped", WhitenedProcrustes()),
        ("both", Slerp(Procrustes(), 0.5)),
    ):
        method.fit(old[:500], new[:500]).save_pretrained(tmp_path / name, version=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*flags: str, old: str = "old.npz", new: str = "new.npz") -> int:
    return main(["gate", "--old", old, "--new", new, *flags])


def test_a_gallery_admits_an_adapter_by_its_agreement(files, capsys, monkeypatch) -> None:
    assert main(["gallery", "create", "shop", "--model", "old.json"]) == 0
    # the adapter leaves stored vectors unchanged
    monkeypatch.setattr(select, "first_candidates", lambda _: [Procrustes()])
    adapted = ["adapt", "--old", "old-fit.npy", "--new", "new-fit.npy", "--out", "fitted", "--old-model", "old.json"]
    assert main(adapted) in (0, 1)
    flags = ["--agreement", "--adapter", "fitted", "--old-model", "old.json", "--out", "gate.json"]
    assert run(*flags, old="old.npy", new="new.npy") == 0
    assert main(["gallery", "admit", "shop", "--model", "fitted", "--gate", "gate.json"]) == 0


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_an_adapter_is_judged_without_labels(files, capsys, suffix: str) -> None:
    flags = ["--agreement", "--adapter", "adapter", "--old-model", "old.json", "--json"]
    assert run(*flags, old=f"old.{suffix}", new=f"new.{suffix}") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["protocol"] == "agreement@10"
    assert report["scores"]["new_on_old"] > report["scores"]["old_on_old"] > 0.2
    assert (report["queries"], report["gallery"]) == ((100, 200) if suffix == "npz" else (300, 300))
    assert report["queries_in_gallery"]["left_out_by_id"] == (0 if suffix == "npz" else 300)
    old = ModelIdentity.from_dict(json.loads((files / "old.json").read_text()))
    assert report["fingerprints"][0] == old.fingerprint
    assert None not in report["fingerprints"]


def test_of_many_items_a_sample_are_queries(files, capsys, monkeypatch) -> None:
    monkeypatch.setattr(gate, "DRAWN", 40)
    flags = ["--agreement", "3", "--adapter", "adapter", "--min-recall", "0.1", "--json"]
    assert run(*flags, old="old.npy", new="new.npy") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["queries"], report["gallery"], report["protocol"]) == (40, 300, "agreement@3")


def test_other_adapters(files, capsys) -> None:
    for name in ("mapped", "both"):
        assert run("--agreement", "--adapter", name, "--json") in (0, 1)
        assert json.loads(capsys.readouterr().out)["scores"]["new_on_old"] > 0.3
    assert run("--adapter", "adapter", "--json", old="old-labelled.npz", new="new-labelled.npz") in (0, 1)
    assert json.loads(capsys.readouterr().out)["protocol"] == "nearest_class_mean"


def test_text_says_what_was_compared(files, capsys) -> None:
    assert run("--agreement", "--adapter", "adapter", "--min-recall", "0.99") == 1
    text = capsys.readouterr().out
    assert "100 queries, 200 gallery items, agreement@10" in text
    assert "FAIL  score of the new queries on the old gallery" in text


def test_bad_input(files, capsys) -> None:
    np.save(files / "short.npy", np.ones((7, 8), dtype=np.float32))
    for flags, files_of, message in (
        (["--agreement"], {}, "new.npz: query has 8 columns"),
        ([], {}, "old.npz: no query_labels, gallery_labels"),
        (["--agreement"], {"old": "old.npy", "new": "short.npy"}, "must be of the same items, got 300 and 7"),
        (["--agreement", "300"], {"old": "old.npy", "new": "new.npy"}, "more than k gallery items beside the query"),
        (["--agreement", "--max-tax", "0.1", "--unconstrained", "new.npz"], {}, "rules apply to the old gallery only"),
        (["--agreement", "--adapter", "none"], {}, "none is no"),
        (["--agreement", "--adapter", "adapter", "--new-model", "old.json"], {}, "leave out --new-model"),
        (["--agreement", "--adapter", "adapter"], {"new": "old.npz"}, "must have 8 columns"),
        (["--agreement", "--ignored-label", "1"], {}, "ignored_labels needs labels"),
    ):
        assert run(*flags, **files_of) == 2, flags
        assert message in capsys.readouterr().err, flags
    for flags in (["--agreement", "--protocol", "instance"], ["--agreement", "--qrels", "x"], ["--agreement", "0"]):
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        assert stop.value.code == 2
