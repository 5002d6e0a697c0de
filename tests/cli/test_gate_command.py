"""Tests `simplexfix gate` as a pipeline runs it: exit codes, output, rules and bad input."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from processes import command

from simplexfix.cli import gate, main

CLASSES, WIDTH = 12, 16


def features(clear: float, rotation: np.ndarray | None = None, width: int = WIDTH) -> dict[str, np.ndarray]:
    """Returns the arrays of one version.  `clear`: distance of class means; `rotation`: rotates into another space."""
    labels = np.arange(500) % CLASSES
    made = np.random.default_rng(0).normal(size=(500, width)) + clear * np.eye(width)[labels]
    made = (made if rotation is None else made @ rotation).astype(np.float32)
    return {"query": made[:300], "gallery": made[300:], "query_labels": labels[:300], "gallery_labels": labels[300:]}


ROTATION = np.linalg.qr(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))[0]


@pytest.fixture
def files(tmp_path) -> Path:
    np.savez(tmp_path / "old.npz", **features(2.5))
    np.savez(tmp_path / "better.npz", **features(3.5))
    np.savez(tmp_path / "apart.npz", **features(4.0, ROTATION))
    return tmp_path


def run(files: Path, new: str, *flags: str) -> int:
    return main(["gate", "--old", str(files / "old.npz"), "--new", str(files / new), *flags])


def test_a_compatible_upgrade_passes(files, capsys) -> None:
    assert run(files, "better.npz") == 0
    text = capsys.readouterr().out
    assert "300 queries, 200 gallery items, nearest class mean" in text
    assert "pass  gain of the new queries on the old gallery" in text
    assert text.endswith("the upgrade passes\n")
    assert "unrelated" not in text


def test_unrelated_spaces_are_named_with_the_remedy(files, capsys, monkeypatch) -> None:
    summary = files / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    # each class takes another one's direction
    np.savez(files / "apart.npz", **features(4.0, np.roll(np.eye(WIDTH), 5, axis=1)))
    for flags in ((), ("--agreement", "5")):
        assert run(files, "apart.npz", *flags) == 1
        text = capsys.readouterr().out
        assert "the spaces are unrelated. simplexfix adapt fits a map between them." in text
        assert "new on new" in text
        assert run(files, "apart.npz", *flags, "--json") == 1
        assert json.loads(capsys.readouterr().out)["unrelated_spaces"] is True
    assert summary.read_text().count("simplexfix adapt fits a map") == 4
    assert run(files, "better.npz", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unrelated_spaces"] is False
    assert set(report["scores"]) == {"old_on_old", "new_on_old"}
    # a model that scores at chance in its own gallery too is bad, not unrelated
    np.savez(files / "bad.npz", **{**features(4.0), **{
        part: np.random.default_rng(count).normal(size=(count, WIDTH)).astype(np.float32)
        for part, count in (("query", 300), ("gallery", 200))
    }})  # fmt: skip
    assert run(files, "bad.npz") == 1
    assert "unrelated" not in capsys.readouterr().out


def test_a_better_model_in_another_space_fails_for_the_right_reason(files, capsys) -> None:
    """The new model separates classes better in its own gallery, but finds little in the deployed, old one."""
    assert run(files, "apart.npz", "--json") == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert not report["passed"]
    (rule,) = report["rules"]
    assert rule["rule"] == {"kind": "ecc", "limit": 0.0, "confidence": 0.95, "gallery": "old", "group": None}
    old, new = report["scores"]["old_on_old"], report["scores"]["new_on_old"]
    assert old > 0.6  # the old queries work
    assert new < 0.3  # the new queries fail in the same gallery
    assert rule["value"] == pytest.approx(new - old)
    assert rule["low"] < rule["value"] < rule["high"] < 0
    assert rule["p_value"] < 1e-9
    assert rule["margin"] == rule["low"]
    assert f"{-100 * rule['low']:.2f} % below the limit" in rule["verdict"]
    # the same model passes in its own gallery: only compatibility failed
    (files / "own.json").write_text('{"rules": [{"kind": "min_recall", "limit": 0.9, "gallery": "new"}]}')
    assert run(files, "apart.npz", "--rules", str(files / "own.json")) == 0


def test_flags(files, capsys) -> None:
    flags = [
        "--max-nfr",
        "0.1",
        "--min-recall",
        "0.99",
        "--max-tax",
        "0.5",
        "--unconstrained",
        str(files / "apart.npz"),
    ]
    assert run(files, "better.npz", "--json", *flags) == 1
    report = json.loads(capsys.readouterr().out)
    found = {rule["rule"]["kind"]: rule for rule in report["rules"]}
    assert list(found) == ["max_nfr", "max_tax", "min_recall"]  # no default rule is added
    assert [rule["passed"] for rule in found.values()] == [True, True, False]
    assert found["max_nfr"]["rule"]["confidence"] is None
    shortfall = 0.99 - report["scores"]["new_on_old"]
    assert found["min_recall"]["margin"] == pytest.approx(-shortfall)
    assert run(files, "better.npz", *flags) == 1
    text = capsys.readouterr().out
    assert f"{100 * shortfall:.2f} % below the limit" in text
    assert "the upgrade fails 1 of 3 rules" in text
    assert run(files, "better.npz", "--json", "--ecc", "--confidence", "0.99", "--max-nfr", "0.2") == 0
    rules = json.loads(capsys.readouterr().out)["rules"]
    assert [(rule["rule"]["kind"], rule["rule"]["confidence"]) for rule in rules] == [("ecc", 0.99), ("max_nfr", 0.99)]
    assert run(files, "better.npz", "--json", "--confidence", "0.8") == 0
    assert json.loads(capsys.readouterr().out)["rules"][0]["rule"]["confidence"] == 0.8


def test_rules_of_a_file_per_group_and_summary(files, capsys, monkeypatch) -> None:
    day = np.where(np.arange(300) % 3 == 0, "night|<b>", "day")
    np.savez(files / "new.npz", **features(1.5), query_groups=day)  # worse: some queries break
    (files / "rules.json").write_text(
        json.dumps({"rules": [{"kind": "max_nfr", "limit": 0.0, "group": "*"}, {"kind": "ecc", "confidence": 0.95}]})
    )
    summary = files / "summary.md"
    summary.write_text("from a step before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert run(files, "new.npz", "--rules", str(files / "rules.json"), "--out", str(files / "gate.json")) == 1
    assert "group night|<b>" in capsys.readouterr().out
    report = json.loads((files / "gate.json").read_text())
    assert [rule["group"] for rule in report["rules"]] == ["day", "night|<b>", None]
    assert [rule["queries"] for rule in report["rules"]] == [200, 100, 300]
    lines = summary.read_text().splitlines()
    assert lines[:2] == ["from a step before", "### Upgrade gate: failed"]
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5
    assert {len(line.replace("\\|", "").split("|")) for line in table} == {8}
    assert "night\\|&lt;b>" in table[3]
    assert sorted(path.name for path in files.iterdir() if path.name.startswith(".") or path.suffix == ".tmp") == []


def test_rules_of_toml(files, capsys) -> None:
    pytest.importorskip("tomllib", reason="TOML needs Python 3.11")
    (files / "rules.toml").write_text('[[rules]]\nkind = "min_recall"\nlimit = 0.5\n')
    assert run(files, "better.npz", "--json", "--rules", str(files / "rules.toml")) == 0
    assert json.loads(capsys.readouterr().out)["rules"][0]["rule"]["limit"] == 0.5
    (files / "rules.toml").write_text("[[rules")
    assert run(files, "better.npz", "--rules", str(files / "rules.toml")) == 2


def test_folder_and_safetensors(files, capsys) -> None:
    (files / "new").mkdir()
    for key, value in features(3.5).items():
        np.save(files / "new" / f"{key}.npy", value)
    assert run(files, "new", "--json") == 0
    from_folder = capsys.readouterr().out
    assert run(files, "better.npz", "--json") == 0
    assert capsys.readouterr().out == from_folder
    pytest.importorskip("safetensors.numpy").save_file(features(3.5), files / "new.safetensors")
    assert run(files, "new.safetensors", "--json") == 0
    assert capsys.readouterr().out == from_folder


def test_widths_and_protocol(files, capsys) -> None:
    wide = features(3.5)
    extra = np.random.default_rng(1).normal(size=(500, 5)).astype(np.float32)
    wide["query"] = np.hstack([wide["query"], extra[:300]])
    wide["gallery"] = np.hstack([wide["gallery"], extra[300:]])
    np.savez(files / "wide.npz", **wide)
    assert run(files, "wide.npz") == 2
    assert "wide.npz: query has 21 columns" in capsys.readouterr().err
    assert run(files, "wide.npz", "--truncate", "--protocol", "instance", "--json") == 0
    cut = json.loads(capsys.readouterr().out)
    assert run(files, "better.npz", "--protocol", "instance", "--json") == 0
    assert json.loads(capsys.readouterr().out) == cut
    assert cut["protocol"] == "instance"


def test_bad_input_is_2_and_leaves_nothing_behind(files, capsys) -> None:
    other = features(3.5)
    changes = {
        "nan": {"query": np.where(np.arange(300)[:, None] == 41, np.nan, other["query"])},
        "short": {"query_labels": other["query_labels"][1:]},
        "few": {"query": other["query"][1:], "query_labels": other["query_labels"][1:]},
        "shuffled": {"gallery_labels": np.roll(other["gallery_labels"], 1)},
        "float": {"gallery_labels": other["gallery_labels"].astype(np.float32)},
        "mixed": {"gallery": other["gallery"].astype(np.float64)},
    }
    for name, change in changes.items():
        np.savez(files / f"{name}.npz", **{**other, **change})
    whole = (files / "better.npz").read_bytes()
    (files / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("nan", "query row 41 holds nan or inf"),
        ("short", "query has 300 rows, query_labels has shape [299]"),
        ("few", "must be of the same items: query_labels has 300 and 299 entries"),
        ("shuffled", "must be of the same items in the same order: gallery_labels at 0 is 0 and "),
        ("float", "gallery_labels must be integers or names, got float32"),
        ("mixed", "mixed.npz: query is float32 and gallery is float64: save both alike"),
        ("cut", "it may be truncated or damaged"),
        ("absent", "No such file"),
    ):
        assert run(files, f"{name}.npz", "--out", str(files / "out.json")) == 2, name
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("simplexfix gate: ")
        assert message in captured.err
        assert not (files / "out.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "rules.json cannot be read: Expecting property name"),
        ("[]", 'must hold {"rules": [...]} with at least one rule and nothing else'),
        ('{"rules": []}', "with at least one rule"),
        ('{"rules": [{"kind": "ecc"}], "protocol": "instance"}', "and nothing else"),
        ('{"rules": [{"limit": 1}]}', "rule 0 must have a kind"),
        (
            '{"rules": [{"kind": "ecc"}, {"kind": "ecc", "max": 1}]}',
            "rule 1 has the unknown key max; keys are kind, limit",
        ),
        ('{"rules": [{"kind": "nfr", "limit": 0.1}]}', "rule 0: kind must be one of 'ecc', 'max_nfr'"),
        ('{"rules": [{"kind": "ecc", "group": "99"}]}', "there is no group '99'; groups of queries are 0, 1, 10, 11"),
        (
            '{"rules": [{"kind": "max_tax", "limit": 0.1}]}',
            "trained without compatibility: pass them with --unconstrained",
        ),
        ('{"rules": [{"kind": "max_nfr", "limit": true}]}', "rule 0: limit must be a number, got True"),
        ('{"rules": [{"kind": "max_nfr", "limit": 0.0, "limit": 1.0}]}', "key 'limit' comes twice"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_bad_rules(files, capsys, content: str, message: str) -> None:
    (files / "rules.json").write_text(content)
    assert run(files, "better.npz", "--rules", str(files / "rules.json")) == 2
    assert message in capsys.readouterr().err


def test_bad_flags(files, capsys) -> None:
    for flags, message in (
        (["--confidence", "95"], "confidence must lie between 0 and 1"),
        (["--max-nfr", "5"], "limit must lie in [-1, 1], got 5.0; write 5 % as 0.05"),
    ):
        assert run(files, "better.npz", *flags) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["gate", "--old", "x"])
    assert stop.value.code == 2


def test_a_bug_is_not_a_failed_rule(files, capsys, monkeypatch) -> None:
    def broken(*_, **__):
        raise RuntimeError("of our own")

    monkeypatch.setattr(gate, "upgrade_gate", broken)
    assert run(files, "better.npz") == 70
    assert "RuntimeError: of our own" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_leaves_the_one_before(files, capsys, monkeypatch) -> None:
    out = files / "out.json"
    out.write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(files, "better.npz", "--out", str(out)) == 2
    assert "No space left" in capsys.readouterr().err
    assert out.read_text() == "before"
    assert [path.name for path in files.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"] == []


def test_safetensors_missing_is_named_with_its_remedy(files, capsys, monkeypatch) -> None:
    (files / "new.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert run(files, "new.safetensors") == 2
    assert "simplexfix gate needs safetensors: pip install 'simplexfix[safetensors]'" in capsys.readouterr().err


def test_rules_that_are_no_text(files, capsys) -> None:
    (files / "rules.json").write_bytes(b"\xff")
    assert run(files, "better.npz", "--rules", str(files / "rules.json")) == 2
    assert "rules.json cannot be read" in capsys.readouterr().err


def test_flags_are_named_as_they_are_typed(files, capsys) -> None:
    assert run(files, "better.npz", "--max-nfr", "5") == 2
    assert "--max-nfr: limit must lie in" in capsys.readouterr().err


def test_a_summary_that_cannot_be_written_leaves_the_verdict(files, capsys, monkeypatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(files))
    assert run(files, "better.npz") == 0
    assert "no summary was written" in capsys.readouterr().err


def test_the_rules_in_the_guide_are_accepted(files) -> None:
    page = (ROOT / "docs" / "guides" / "gate.md").read_text()
    (files / "rules.json").write_text(page.split("```json\n")[1].split("```")[0])
    assert run(files, "better.npz", "--rules", str(files / "rules.json"), "--json") in (0, 1)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
@pytest.mark.parametrize(("new", "code"), [("better.npz", 0), ("apart.npz", 1)])
def test_a_closed_pipe_does_not_change_the_exit_code(files, new: str, code: int) -> None:
    """The reader closes the pipe at once, as `| head -0` does."""
    done = command("gate", "--old", "old.npz", "--new", new, folder=files, stdout="left")
    assert (done.returncode, done.stderr) == (code, b"")


def test_names_of_groups_do_not_steer_the_terminal(files, capsys, monkeypatch) -> None:
    names = np.where(np.arange(300) % 2 == 0, "a\x1b[2J\nthe upgrade passes", "b\x9b31m")
    np.savez(files / "named.npz", **features(1.5), query_groups=names)
    (files / "named.json").write_text('{"rules": [{"kind": "max_nfr", "limit": 0.0, "group": "*"}]}')
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(files / "named.md"))
    assert run(files, "named.npz", "--rules", str(files / "named.json")) == 1
    text = capsys.readouterr().out
    assert "group a\\x1b[2J\\nthe upgrade passes:" in text
    for shown in (text, (files / "named.md").read_text()):
        assert not set(shown) & {"\x1b", "\x9b"}


def test_queries_that_are_gallery_items_and_ignored_labels(files, capsys) -> None:
    old, new = features(2.5), features(3.5)
    for made in (old, new):
        made["query"] = made["query"].copy()
        made["query"][:50] = made["gallery"][:50]
        made["query_labels"] = np.concatenate([made["gallery_labels"][:50], made["query_labels"][50:]])
    ids = {"query_ids": np.arange(300) * 2, "gallery_ids": np.arange(len(old["gallery"])) * 2}
    ids["query_ids"][50:] += 10**6
    np.savez(files / "old.npz", **old)
    np.savez(files / "new.npz", **new)
    assert run(files, "new.npz") in (0, 1)
    assert "50 queries equal a gallery row bit for bit and probably find themselves" in capsys.readouterr().out
    assert run(files, "new.npz", "--json") in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["queries_in_gallery"] == {"left_out_by_id": 0, "bit_equal": [50, 50]}
    np.savez(files / "old.npz", **old, **ids)
    np.savez(files / "new.npz", **new, **ids)
    assert run(files, "new.npz", "--json") in (0, 1)
    without = json.loads(capsys.readouterr().out)
    assert without["queries_in_gallery"] == {"left_out_by_id": 50, "bit_equal": [0, 0]}
    assert without["scores"]["old_on_old"] < found["scores"]["old_on_old"]
    assert run(files, "new.npz", "--ignored-label", "0", "--ignored-label", "1", "--json") in (0, 1)
    fewer = json.loads(capsys.readouterr().out)
    assert fewer["queries"] == 300 - int(np.isin(old["query_labels"], (0, 1)).sum())
