"""Tests `simplexfix evaluate` and `gate` with relevance judgements (`--qrels FILE`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simplexfix.cli import main
from simplexfix.compatibility import upgrade_gate
from simplexfix.labelled import RelevanceJudgements, VersionFeatures

QUERIES, ITEMS = 30, 50


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder of two versions with integer ids, and judgements of all queries but two."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    clean, of = draw.standard_normal((ITEMS, 8)), draw.integers(ITEMS, size=QUERIES)
    for name, noise in (("old", 1.0), ("new", 0.3)):
        query = clean[of] + noise * draw.standard_normal((QUERIES, 8))
        np.savez(
            f"{name}.npz", query=query, gallery=clean, query_ids=np.arange(QUERIES), gallery_ids=1000 + np.arange(ITEMS)
        )
    lines = [f"{query}\t{1000 + item}\t1" for query, item in enumerate(of[:-2])]
    Path("qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return tmp_path


def gate(*flags: str) -> int:
    return main(["gate", "--old", "old.npz", "--new", "new.npz", "--qrels", "qrels.tsv", *flags])


def test_gate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--json") == 0
    content = json.loads(capsys.readouterr().out)
    judgements = RelevanceJudgements.load("qrels.tsv")
    old, new = (VersionFeatures.load(f"{name}.npz", judgements=judgements) for name in ("old", "new"))
    expected = upgrade_gate(old, new, protocol="ndcg@10")
    assert content == json.loads(json.dumps(expected.as_dict()))
    assert (content["protocol"], content["queries"], content["queries_without_judgement"]) == ("ndcg@10", 28, 2)
    assert gate("--protocol", "mrr", "--min-recall", "0.999", "--confidence", "0.9") == 1
    text = capsys.readouterr().out
    assert "28 queries, 50 gallery items, mrr; 2 queries have no relevance judgement and are left out" in text
    assert "FAIL  score of the new queries on the old gallery" in text


def test_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")
    pytest.importorskip("rich", reason="pip install 'simplexfix[cli]'")
    assert main(["evaluate", "old.npz", "new.npz", "--qrels", "qrels.tsv", "--protocol", "recall@5"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(Path("report/report.json").read_text())
    assert (content["protocol"], content["judgements"]["pairs"]) == ("recall@5", 28)
    assert "28 queries, 50 gallery items and 28 relevance judgements, recall@5\n" in printed
    assert "2 of 30 queries have no relevance judgement and are left out." in printed
    assert (
        f"{content['upgrades'][0]['losses']} queries get worse, {content['upgrades'][0]['gains']} get better" in printed
    )


def test_labels_may_be_scored_by_a_metric(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(1)
    labels = {"query_labels": draw.integers(4, size=QUERIES), "gallery_labels": draw.integers(5, 9, size=ITEMS)}
    for name in ("old", "new"):
        np.savez(f"{name}.npz", **{**np.load(f"{name}.npz"), **labels})
    assert main(["gate", "--old", "old.npz", "--new", "new.npz", "--protocol", "map", "--max-nfr", "0"]) == 0
    assert "30 queries have no other gallery item of their class and score 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ("99\t1000\t1", (), "qrels.tsv judges 1 ids that no row of query_ids has: '99'"),
        ("1\t7\t1", (), "qrels.tsv judges 1 ids that no row of gallery_ids has: '7'"),
        ("1\t1000\t1\n1\t1000\t2", (), "qrels.tsv must judge each pair once, got query '1' with item '1000'"),
        ("1\t1000\thigh", (), "qrels.tsv line 2 must hold an integer grade, got 'high'"),
        ("1\t1000\t1", ("--protocol", "nearest_class_mean"), "relevance judgements instead"),
        ("1\t1000\t1", ("--protocol", "ndcg"), "protocol must be one of 'nearest_class_mean', 'instance', or a metric"),
        ("1\t1000\t1", ("--ignored-label", "3"), "ignored_labels needs labels"),
    ],
)
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], lines: str, flags, message: str) -> None:
    Path("qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}\n")
    assert gate(*flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_files_that_are_missing_or_have_no_ids(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = dict(np.load("old.npz"))
    np.savez("old.npz", query=arrays["query"], gallery=arrays["gallery"])
    assert gate() == 2
    assert "old.npz: no query_ids, gallery_ids; it holds gallery, query; a version needs" in capsys.readouterr().err
    Path("qrels.tsv").unlink()
    for verb in (gate, lambda: main(["evaluate", "old.npz", "--qrels", "qrels.tsv"])):
        assert verb() == 2
        assert "qrels.tsv is not there; expected a file of relevance judgements: of BEIR" in capsys.readouterr().err


def test_metrics_run_in_one_process(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from simplexfix.cli import evaluate

    pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")

    class Ranks:
        rank = 0

    arguments = evaluate.argparse.Namespace(protocol="ndcg@10")
    with pytest.raises(ValueError, match="--protocol ndcg@10 runs in one process: start it without torchrun"):
        evaluate._evaluate_together(arguments, Ranks())
