"""Tests `simplexfix gallery`: commands, exit codes and messages over several upgrades."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from simplexfix.cli import main
from simplexfix.gallery import Gallery
from simplexfix.models import ModelIdentity

WIDTH, ROWS = 16, 60
OLD = ModelIdentity.external("vendor/embed", "1", WIDTH)
NEW = ModelIdentity.external("vendor/embed", "2", WIDTH, version=1, adapter="5eed", space=OLD)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder of identities, vectors of 60 items by both models, and labelled features for the gate."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    labels = np.arange(ROWS) % 6
    clean = np.eye(WIDTH)[labels] + 0.2 * draw.standard_normal((ROWS, WIDTH))
    for name, model, noise in (("old", OLD, 0.5), ("new", NEW, 0.1)):
        Path(f"{name}.json").write_text(json.dumps(model.to_dict()))
        rows = (clean + noise * draw.standard_normal(clean.shape)).astype(np.float32)
        np.savez(f"{name}.npz", vectors=rows, ids=np.arange(ROWS) * 10)
        queries = (np.eye(WIDTH)[labels] + 1.5 * noise * draw.standard_normal(clean.shape)).astype(np.float32)
        np.savez(f"{name}-features.npz", query=queries, gallery=rows, query_labels=labels, gallery_labels=labels)
    Path("payload.json").write_text(json.dumps([{"shop": row % 3} for row in range(ROWS)]))
    return tmp_path


def run(text: str) -> int:
    return main(["gallery", *text.split()])


def test_the_life_of_a_gallery(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(text: str) -> dict:
        assert run(f"{text} --json") == 0
        return json.loads(capsys.readouterr().out)

    assert told("create shop --model old.json --count-traffic")["rows"] == 0
    assert told("add shop --vectors old.npz --model old.json --payload payload.json")["added"] == ROWS
    hits = told("search shop --vectors old.npz --model old.json -k 2")
    assert [row[0] for row in hits["ids"]] == [10 * row for row in range(ROWS)]
    assert hits["thresholds"][0] == [None, None]
    gate = "gate --old old-features.npz --new new-features.npz --protocol instance --out gate.json"
    assert main([*gate.split(), "--old-model", "old.json", "--new-model", "new.json"]) == 0
    capsys.readouterr()
    assert told("admit shop --model new.json --gate gate.json")["serving"] == 1
    some = np.load("new.npz")
    np.savez("half.npz", vectors=some["vectors"][:20], ids=some["ids"][:20])
    assert run("backfill shop --vectors half.npz --model new.json --order traffic --batch 7") == 1
    out = capsys.readouterr().out
    assert out == "replaced 20 rows; 40 rows are stale; 40 of this worker's were not in half.npz\n"
    status = told("status shop")
    assert [entry["rows"] for entry in status["versions"]] == [40, 20]
    assert run("""search shop --vectors new.npz --model new.json -k 3 --out hits.npz --where {"shop":[1]}""") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("query 1: 10 1.0000 v1  ")
    with np.load("hits.npz") as saved:
        assert (saved["ids"] // 10 % 3 == 1).all()
        assert set(saved) == {"scores", "ids", "versions", "thresholds"}
    assert told("backfill shop --vectors new.npz --model new.json") == {
        "replaced": 40, "missing": 0, "unreadable": [], "stale": 0, "paused": False,
    }  # fmt: skip
    assert told("rollback shop")["rows_restored"] == ROWS
    assert run("admit shop --model new.json --force again") == 0
    capsys.readouterr()
    with Gallery.open("shop") as gallery, closing(gallery.stale(batch=9)) as batches:
        next(batches)
        (worker,) = gallery.status()["workers"]
        assert run("status shop") == 0
        out = capsys.readouterr().out
        assert "60 are stale, and workers have 9 of them\nworker " in out
        assert re.search(rf"\n{worker['worker']}  9     {re.escape(worker['until'])}\nversion  name", out)
    assert told("pause shop")["paused"]
    assert run("backfill shop --vectors new.npz --model new.json") == 1
    assert run("resume shop") == 0
    assert run("backfill shop --vectors new.npz --model new.json") == 0
    assert run("retire shop 0") == 0
    assert capsys.readouterr().out.endswith("version 0 is retired, its 60 old vectors are deleted\n")
    assert run("status shop --history") == 0
    out = capsys.readouterr().out
    assert out.startswith("shop: 60 rows; searches are counted\nversion 1 (vendor/embed 2) serves since 20")
    assert "; there is no rollback\nversion  name            standing  rows  old rows  width  fingerprint\n" in out
    assert f"\n1        vendor/embed 2  serves    60    0         16     {NEW.fingerprint[:12]}\n" in out
    history = "\n".join(out.splitlines()[5:])
    workers = re.findall(r"worker (\S+/[0-9]+/[0-9a-f]{8}) ", history)
    assert len(set(workers)) == 4
    old, new = "version 0 (vendor/embed 1)", "version 1 (vendor/embed 2)"
    assert re.sub(r"20\S+\+00:00  ", "", history).splitlines() == [
        f"created: {old} serves",
        f"admitted: {new} serves in place of version 0; the gate passed",
        "  gate: gain of the new queries on the old gallery 48.3%, demanded > 0.00 % at 95 % confidence: passed",
        f"backfill: worker {workers[0]} began, 60 rows were stale for {new}, order traffic",
        f"backfill: worker {workers[1]} began, 40 rows were stale for {new}, order random",
        f"backfill finished: every row is by {new}",
        f"rolled back: version 0 serves in place of {new}; 60 rows are restored",
        f"admitted: {new} serves in place of version 0; by force: again",
        f"backfill: worker {workers[2]} began, 60 rows were stale for {new}, order random",
        "paused",
        "resumed",
        f"backfill: worker {workers[3]} began, 60 rows were stale for {new}, order random",
        f"backfill finished: every row is by {new}",
        f"retired: {old}; 60 old vectors are deleted",
    ]


def test_thresholds_from_the_command_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("create shop --model old.json --threshold 0.9") == 0
    assert run("add shop --vectors old.npz --model old.json") == 0
    assert run("admit shop --model new.json --force x --threshold 1:0=0.5 --threshold 1:1=0.25") == 2
    assert "thresholds are missing of (query version, vector version) (0, 1): " in capsys.readouterr().err
    command = "admit shop --model new.json --force x --threshold 1:0=0.5 --threshold 1:1=0.25 --threshold 0:1=none"
    assert run(command) == 0
    out = capsys.readouterr().out
    assert out.endswith(
        "\nthresholds    vectors of version 0  vectors of version 1"
        "\nqueries of 0  0.90000               none"
        "\nqueries of 1  0.50000               0.25000\n"
    )
    assert "\nbackfill: 0 of 60 rows are by version 1 (0 %), 60 are stale, and workers have 0 of them\n" in out
    assert run("search shop --vectors old.npz --model old.json -k 60") == 0
    assert " below its threshold" in capsys.readouterr().out


def test_refused_commands_say_why_and_change_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("create shop --model old.json")
    run("add shop --vectors old.npz --model old.json")
    np.savez("bare.npz", vectors=np.ones((2, WIDTH), "f"))
    Path("word.json").write_text('"gate"')
    gate = ["gate", "--old", "old-features.npz", "--new", "new-features.npz", "--protocol", "instance"]
    main([*gate, "--out", "unnamed.json"])
    report = json.loads(Path("unnamed.json").read_text())
    Path("forged.json").write_text(json.dumps({**report, "passed": False}))
    capsys.readouterr()
    for text, message in (
        ("status none", "none holds no gallery: it has no gallery.db"),
        (
            "create shop --model old.json",
            "shop/gallery.db holds tables already: open it with Gallery.open",
        ),
        ("create new --model old.npz", "old.npz is neither the folder of a model nor a JSON file of an identity"),
        ("add shop --vectors bare.npz --model old.json", "bare.npz has no ids"),
        (
            "add shop --vectors old.npz --model new.json",
            "version 1 (vendor/embed 2) cannot add in this gallery: it was not",
        ),
        ("add shop --vectors old.npz --model old.json", "id 0 is in the gallery already"),
        (
            "add shop --vectors old.npz --model old.json --payload old.json",
            "old.json must hold a list of objects, one for each row",
        ),
        (
            "add shop --vectors old-features.npz --model old.json",
            "old-features.npz: no vectors; it holds gallery, gallery_lab",
        ),
        ("search shop --vectors old.npz --model old.json --where shop", "--where is not JSON"),
        ("search shop --vectors old.npz --model old.json -k 0", "k must be at least 1, got 0"),
        ("admit shop --model new.json", "needs the result of upgrade_gate(old, new), or force= with the reason"),
        ("admit shop --model new.json --gate unnamed.json", "the gate result does not say which models it judged"),
        ("admit shop --model new.json --gate forged.json", 'forged.json: "passed" contradicts the rules'),
        ("admit shop --model new.json --gate word.json", "word.json: this is not a result of the upgrade gate"),
        ("backfill shop --vectors new.npz --model new.json --order traffic", 'order "traffic" needs Gallery.create'),
        ("rollback shop", "there is nothing to roll back to"),
        ("retire shop 3", "there is no version 3 in this gallery, which has 0"),
        ("retire shop 0", "version 0 (vendor/embed 1) serves and cannot be retired"),
    ):
        assert run(text) == 2, text
        said = capsys.readouterr()
        assert said.out == "", text
        assert message in said.err, text
        assert said.err.startswith("simplexfix gallery"), text
    assert run("status shop --json") == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["rows"], status["serving"]) == (ROWS, 0)
    with pytest.raises(SystemExit):
        run("admit shop --model new.json --threshold 1=2")
    assert "must be QUERIES:VECTORS=T, as 1:0=0.35 or 0:1=none, got 1=2" in capsys.readouterr().err
