"""Tests sequences of retrieval data sets: pairs, constant indexes, drift compensation, and stopped runs."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import retrieval_jobs as jobs
import torch
import yaml
from conftest import ROOT
from processes import CONTEXT
from test_trainer import log_lines, same_bits, weights

from simplexfix.adapters import QueryDrift
from simplexfix.cli import main
from simplexfix.data import Vectors
from simplexfix.labelled import RelevanceJudgements
from simplexfix.models import EmbeddingModel, FeatureHead, FeatureLinear, read_identity
from simplexfix.training import RunConfig, read_config, train_run
from simplexfix.training.retrieval_sequence import RetrievalData, RetrievalJudge, SearchedSet, pair_items
from simplexfix.training.retrieval_sets import RetrievalSet, load_retrieval_set


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return jobs.write_sets(tmp_path_factory.mktemp("sets") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Returns a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_run(jobs.config(data), folder)
    return folder


def embedded(model: EmbeddingModel, rows: torch.Tensor) -> torch.Tensor:
    return model.extract(rows)


def translated(by: torch.Tensor) -> EmbeddingModel:
    """Returns the model x -> x + `by`."""
    network = FeatureLinear(3)
    with torch.no_grad():
        network.linear.bias.copy_(by)
    return EmbeddingModel(network, FeatureHead(3)).eval()


def test_a_translation_of_queries_is_compensated() -> None:
    """Queries lie on a circle. Versions move them along its axis, away from their documents and towards other ones.

    Training queries have mean 0, so that the compensated queries are multiples of the first version's.
    """
    angles = torch.arange(12) * (2 * math.pi / 12)
    circle = torch.stack([angles.cos(), angles.sin(), torch.zeros(12)], 1)
    others = torch.stack([0.6 * angles.cos(), 0.6 * angles.sin(), torch.full((12,), 0.8)], 1)
    documents = torch.cat([circle, others])
    ids = tuple(f"d{row}" for row in range(24))
    judged = RelevanceJudgements.from_dict({f"q{row}": {f"d{row}": 1} for row in range(12)})
    queries = tuple(f"q{row}" for row in range(12))
    found = RetrievalSet(ids, documents, queries, circle, judged, judged, {})
    searched = SearchedSet.of("circle", found, documents, circle)
    judge = RetrievalJudge(RetrievalData([], [searched] * 4, Vectors(3)), embedded, Path())
    judge.drift = drift = QueryDrift(3)
    drift.save = lambda path: None  # type: ignore[method-assign]
    for t, height in enumerate((0.0, 1.0, 3.0, 3.0)):
        judge.add(t, translated(torch.tensor([0.0, 0.0, height])))
    report = judge.report()
    plain, moved = (
        np.array(report["search"][name]["matrix"], dtype=float) for name in ("ndcg@10", "ndcg@10_compensated")
    )
    assert plain[0, 0] == 1
    assert plain[1, 0] < 0.7
    assert plain[2, 0] < 0.3
    assert moved[1, 0] == moved[2, 0] == moved[3, 0] == 1
    assert np.isnan(plain[0, 1:]).all()
    assert np.array_equal(np.diag(plain), np.diag(moved))
    assert report["explained_fraction"][1] > 0.5
    assert report["explained_fraction"][3] is None  # no query moved, and JSON has no nan


def test_a_run_reports_both_matrices_and_keeps_indexes_drifts_and_models(data, whole) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert report["sets"] == list(jobs.SETS)
    versions = [EmbeddingModel.from_pretrained(whole / entry["folder"]) for entry in report["versions"]]
    assert read_identity(whole / "task-02/model").fingerprint == report["versions"][2]["fingerprint"]
    old, new = (version.identity(version=t) for t, version in enumerate(versions[:2]))
    assert "QueryDrift moves queries" in new.why_not_search(old)[0]
    assert old.why_not_search(old) == []
    sets = [load_retrieval_set(data / name, features=True) for name in jobs.SETS]
    searched = [SearchedSet.of("", found, found.documents, found.queries) for found in sets]
    drift = QueryDrift.load(whole / "task-02" / "drift.safetensors")
    assert drift.versions.tolist() == [1, 2]
    assert drift.counts.tolist() == [12, 12]
    for j, found in enumerate(searched):
        index = versions[j].extract(found.documents)
        for t in range(j, 3):
            queries = versions[t].extract(found.queries)
            moved = drift.compensate(queries, from_version=t, to_version=j)
            for name, rows in (("ndcg@10", queries), ("ndcg@10_compensated", moved)):
                assert report["search"][name]["matrix"][t][j] == found.score(rows, index)
        anew = found.score(versions[2].extract(found.queries), versions[2].extract(found.documents))
        assert report["reindexed_ndcg@10"][j] == anew
    first, second = (version.extract(searched[1].train_queries).double() for version in versions[:2])
    assert torch.allclose(drift.drift(1), (second - first).mean(0), atol=1e-7)
    assert report["explained_fraction"] == [None, drift.explained_fraction(1), drift.explained_fraction(2)]


def test_distillation_reduces_the_drift_of_later_versions_only(data, whole, tmp_path) -> None:
    method = {"name": "qdc", "scale": 10.0, "weight": 0.0}
    train_run(jobs.config(data, {"method": method}), tmp_path)
    assert same_bits(weights(whole / "task-00"), weights(tmp_path / "task-00"))
    kept, free = (QueryDrift.load(folder / "task-01" / "drift.safetensors") for folder in (whole, tmp_path))
    assert kept.squares.item() < free.squares.item()


class StopError(Exception):
    pass


@pytest.mark.parametrize("stage", ["task 0", "task 2"])
def test_a_stopped_run_resumes_to_the_same_bits(data, whole, tmp_path, stage) -> None:
    def on_step(progress) -> None:
        if (progress.stage, progress.step) == (stage, 8):
            raise StopError

    with pytest.raises(StopError):
        train_run(jobs.config(data), tmp_path, on_step=on_step)
    train_run(jobs.config(data), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    for task in ("task-00", "task-01", "task-02"):
        assert same_bits(weights(tmp_path / task), weights(whole / task))
        assert log_lines(tmp_path / task) == log_lines(whole / task)
    drifts = [(folder / "task-02" / "drift.safetensors").read_bytes() for folder in (tmp_path, whole)]
    assert drifts[0] == drifts[1]


def test_two_processes_train_as_one_with_the_documents_of_both(data, whole, tmp_path) -> None:
    started = [CONTEXT.Process(target=jobs.in_group, args=(rank, 2, tmp_path, data)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    for task in ("task-00", "task-01", "task-02"):
        expected = weights(whole / task)
        for name, value in weights(tmp_path / "run" / task).items():
            assert torch.allclose(value, expected[name], atol=1e-5), name
    schedule = {"steps": 12, "learning_rate": 0.02, "batch": 8, "accumulate": 2}
    train_run(jobs.config(data, {"schedule": schedule}), tmp_path / "parts")  # each half has its own documents
    apart = weights(tmp_path / "parts" / "task-00")["backbone.linear.weight"]
    assert (apart - weights(whole / "task-00")["backbone.linear.weight"]).abs().max() > 1e-3


def test_pairs_are_query_document_and_its_first_hard_negatives(data) -> None:
    found = load_retrieval_set(data / "first", features=True)
    items = pair_items(found, found.documents, found.queries, negatives=2)
    assert items.inputs.shape == (12, 4, jobs.WIDTH)  # a score of 0 gives no pair
    assert items.labels.tolist() == list(range(12))
    expected = torch.stack([found.queries[3], found.documents[3], found.documents[4], found.documents[5]])
    assert torch.equal(items.inputs[3], expected)
    with pytest.raises(
        ValueError, match=r"every query must have 3 hard negatives \(data\.hard_negatives\), query 'q0'"
    ):
        pair_items(found, found.documents, found.queries, negatives=3)


def test_texts_are_title_and_text_of_plain_or_compressed_files(data, tmp_path) -> None:
    jobs.write_set(tmp_path / "set", 0)
    folder = tmp_path / "set"
    corpus = (folder / "corpus.jsonl").read_bytes().replace(b'"title 3"', b'""')
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus))
    (folder / "corpus.jsonl").unlink()
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").rename(folder / f"qrels_{split}.tsv")
    (folder / "hard_negatives.tsv").unlink()
    found = load_retrieval_set(folder)
    assert found.documents[2:4] == ("title 2 text 2", "text 3")
    assert found.queries[0] == "title 0 text 0"
    assert found.hard_negatives == {}
    assert len(found.test) == 24


def spoilt(folder: Path, name: str, before: str, after: str) -> None:
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after, 1))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "corpus.jsonl").unlink(), FileNotFoundError, r"has no corpus\.jsonl and no corpus\.jsonl\.gz"),
        (
            lambda f: (f / "qrels/test.tsv").unlink(),
            FileNotFoundError,
            r"has no qrels/test\.tsv and no qrels_test\.tsv",
        ),
        (lambda f: (f / "queries.npy").unlink(), FileNotFoundError, r'queries\.npy is missing: .*model\.kind="text"'),
        (
            lambda f: spoilt(f, "corpus.jsonl", '{"_id": "c1",', "{"),
            ValueError,
            r"corpus\.jsonl, line 2: it must be an",
        ),
        (lambda f: spoilt(f, "corpus.jsonl", '"title"', "title"), ValueError, r"corpus\.jsonl, line 1: "),
        (
            lambda f: spoilt(f, "queries.jsonl", "q1", "q0"),
            ValueError,
            r"queries\.jsonl, line 2: _id 'q0' is there twice",
        ),
        (
            lambda f: spoilt(f, "qrels/test.tsv", "c13", "c99"),
            ValueError,
            r"test\.tsv has the id 'c99', which is missing in corpus",
        ),
        (
            lambda f: spoilt(f, "qrels/train.tsv", "q5", "qx"),
            ValueError,
            r"train\.tsv has the id 'qx', which is missing in queries",
        ),
        (lambda f: np.save(f / "queries.npy", np.ones((24, 5))), ValueError, r"one width, got corpus \[24, 8\] and"),
        (lambda f: np.save(f / "corpus.npy", np.ones((3, 8))), ValueError, r"row for each of the 24 lines .* got 3"),
        (
            lambda f: (f / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tc1\t0\n"),
            ValueError,
            r"train\.tsv has no score above 0",
        ),
    ],
)
def test_damaged_sets_are_named(tmp_path, spoil, error, message: str) -> None:
    jobs.write_set(tmp_path / "set", 0)
    spoil(tmp_path / "set")
    with pytest.raises(error, match=message):
        load_retrieval_set(tmp_path / "set", features=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "hoc"}}, r'belong together; method\.name="qdc" must be chosen too'),
        ({"data": {"kind": "features", "path": "x"}}, r'data\.kind="retrieval" must be chosen too'),
        ({"model": {"kind": "convnet"}}, 'data.kind="retrieval" needs model.kind="text", "linear" or "mlp", got'),
        ({"model": {"kind": "text"}}, 'kind="text" needs path, the folder of the encoder'),
        ({"model": {"kind": "linear", "path": "x"}}, "path needs kind='text'"),
        ({"protocols": ["instance"]}, "protocols must be left out for a retrieval sequence"),
        ({"data": {"kind": "retrieval", "path": "x", "per_class": 3}}, "per_class needs kind="),
        ({"data": {"kind": "retrieval", "path": "x", "tokens": 0}}, "tokens must be at least 1"),
        (
            {"tasks": {"kind": "retrieval_sequence", "sets": ["a"], "memory_per_class": 5}},
            "memory_per_class needs kind=",
        ),
        (
            {
                "tasks": {
                    "kind": "retrieval_sequence",
                    "sets": ["a", "b"],
                    "replacements": {"1": {"model": {"kind": "mlp"}}},
                }
            },
            r"tasks\.replacements must be empty",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_refused(data, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs.config(data, changes)


def test_the_configuration_in_methods_md_is_read() -> None:
    (content,) = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs" / "guides" / "methods.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert read_config(RunConfig, yaml.safe_load(content)).method.name == "qdc"


def test_the_command_trains_and_lists_a_sequence(data, tmp_path, capsys) -> None:
    content = {
        "data": {"kind": "retrieval", "path": str(data)},
        "model": {"kind": "linear"},
        "method": {"name": "qdc"},
        "tasks": {"kind": "retrieval_sequence", "sets": list(jobs.SETS[:2]), "epochs": 1},
        "schedule": {"steps": 1, "learning_rate": 0.01, "batch": 6},
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    assert main(["train", str(tmp_path / "mine.json"), "--out", str(tmp_path / "run")]) == 0
    assert "search, ndcg@10 compensated: AC " in capsys.readouterr().out
    assert main(["runs", str(tmp_path)]) == 0
    assert "search: ndcg@10 AC " in capsys.readouterr().out
