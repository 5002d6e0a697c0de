"""Tests metrics of relevance judgements against hand-computed values, and against trec_eval on ties and real data."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from simplexfix.compatibility import compatibility_hits, compatibility_matrix
from simplexfix.labelled import LabelledItems, RelevanceJudgements, VersionFeatures
from simplexfix.retrieval import RetrievalResults, metrics
from simplexfix.retrieval.protocols import read_protocol

# trec_eval's name -> ours
METRICS = {
    "ndcg_cut_1": "ndcg@1",
    "ndcg_cut_10": "ndcg@10",
    "ndcg_cut_1000": "ndcg@1000",
    "map": "map",
    "map_cut_5": "map@5",
    "recip_rank": "mrr",
    "recall_5": "recall@5",
    "recall_1000": "recall@1000",
    "P_5": "precision@5",
}


def by_trec_eval(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    trec_eval = pytest.importorskip("pytrec_eval", reason="pip install pytrec-eval-terrier")
    measures = {"ndcg_cut.1,10,1000", "map", "map_cut.5", "recip_rank", "recall.5,1000", "P.5"}
    return trec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)


def check_equal(qrels: dict[str, dict[str, int]], version: VersionFeatures, query_ids: list[str], run) -> None:
    expected = by_trec_eval(qrels, run)
    rows = version.items.query_rows.tolist()
    assert {query_ids[row] for row in rows} == set(expected)
    for theirs, ours in METRICS.items():
        values = read_protocol(ours).hits(version)
        of_queries = [expected[query_ids[row]][theirs] for row in rows]
        np.testing.assert_allclose(values, of_queries, rtol=0, atol=1e-12, err_msg=ours)


def random_case(seed: int) -> tuple[dict[str, dict[str, int]], VersionFeatures, list[str], list[str]]:
    """Returns judgements with grades from -1 to 3, a version with many tied scores, query ids and gallery ids.

    Some queries have no judgement or no relevant item.
    """
    draw = np.random.default_rng(seed)
    queries, items = 25, 60
    query_ids = [f"q{i}" for i in draw.permutation(queries)]
    # trec_eval orders ties by descending document id, the search by ascending row; ids that descend make both orders
    # equal
    gallery_ids = [f"d{999 - row:03d}" for row in range(items)]
    qrels = {
        query: {gallery_ids[i]: int(draw.integers(-1, 4)) for i in draw.choice(items, draw.integers(1, 12), False)}
        for query in query_ids[: queries - 3]
    }
    qrels[query_ids[0]] = {gallery_ids[5]: 0, gallery_ids[6]: -1}
    # few directions: most scores are tied
    query, gallery = (draw.integers(-1, 2, size=(n, 3)).astype(np.float32) for n in (queries, items))
    labelled = LabelledItems.from_judgements(RelevanceJudgements.from_dict(qrels), query_ids, gallery_ids)
    return qrels, labelled.version(query, gallery), query_ids, gallery_ids


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_trec_eval_with_ties(seed: int) -> None:
    """trec_eval ranks by our scores and, with these ids, orders ties by ascending row as the search does."""
    qrels, version, query_ids, gallery_ids = random_case(seed)
    found = RetrievalResults.search(version)
    tied = (np.diff(found.scores, axis=1) == 0).mean()
    assert tied > 0.5
    run = {
        query_ids[row]: {gallery_ids[item]: float(score) for item, score in zip(items, scores, strict=True)}
        for row, items, scores in zip(version.items.query_rows.tolist(), found.positions, found.scores, strict=True)
    }
    check_equal(qrels, version, query_ids, run)
    without = [
        at for at, row in enumerate(version.items.query_rows.tolist()) if max(qrels[query_ids[row]].values()) < 1
    ]
    assert found.queries_without_match.tolist() == without != []


def test_by_hand() -> None:
    qrels = {"x": {"a": 1, "c": 3, "e": 2}, "y": {"b": 0}, "z": {"d": 1}}
    items = LabelledItems.from_judgements(RelevanceJudgements.from_dict(qrels), list("xyz"), list("abcde"))
    gallery = np.array([[1.0, 0.1], [1, 0.2], [1, 0.3], [1, 0.4], [1, 0.5]])
    version = items.version(np.tile([[1.0, 0.0]], (3, 1)), gallery)  # every query ranks a, b, c, d, e
    found = RetrievalResults.search(version)
    assert found.grades.tolist() == [[1, 0, 3, 0, 2], [0] * 5, [0, 0, 0, 1, 0]]
    discount = 1 / np.log2(np.arange(2, 7))
    best = 3 * discount[0] + 2 * discount[1] + discount[2]
    at = [(discount[0] + 3 * discount[2]) / best, 0, 0]
    assert metrics.ndcg(found, 3, per_query=True) == pytest.approx(at, abs=1e-15)
    assert metrics.ndcg(found, 1, per_query=True) == pytest.approx([1 / 3, 0, 0], abs=1e-15)
    assert read_protocol("map").hits(version) == pytest.approx([(1 + 2 / 3 + 3 / 5) / 3, 0, 1 / 4], abs=1e-15)
    assert read_protocol("mrr").hits(version).tolist() == [1, 0, 1 / 4]
    assert read_protocol("mrr@3").hits(version).tolist() == [1, 0, 0]
    assert read_protocol("recall@3").hits(version) == pytest.approx([2 / 3, 0, 0])
    assert read_protocol("precision@4").hits(version).tolist() == [0.5, 0, 0.25]
    assert read_protocol("map").score(version) == pytest.approx(np.mean([(1 + 2 / 3 + 3 / 5) / 3, 0, 1 / 4]))


def test_the_ndcg_of_a_perfect_ranking_is_at_most_1() -> None:
    """nDCG is at most 1: with six relevant items of ten, sums of six and of ten terms may differ in the last bit."""
    draw = np.random.default_rng(0)
    grades = -np.sort(-draw.integers(1, 4, size=(200, 6)), axis=1)
    query_ids, gallery_ids = [f"q{i}" for i in range(200)], [f"d{i}" for i in range(10)]
    qrels = {
        query: dict(zip(gallery_ids, of.tolist(), strict=False)) for query, of in zip(query_ids, grades, strict=True)
    }
    items = LabelledItems.from_judgements(RelevanceJudgements.from_dict(qrels), query_ids, gallery_ids)
    angles = np.arange(10) / 10
    gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    values = metrics.ndcg(
        RetrievalResults.search(items.version(np.eye(1, 2).repeat(200, 0), gallery)), 10, per_query=True
    )
    assert values.max() <= 1
    assert values.min() > 1 - 1e-15


def test_metrics_of_labels_equal_those_of_grades_0_and_1() -> None:
    draw = np.random.default_rng(0)
    query, gallery = draw.standard_normal((20, 6)), draw.standard_normal((50, 6))
    labels = draw.integers(5, size=20), draw.integers(5, size=50)
    by_labels = LabelledItems(*labels).version(query, gallery)
    pairs = [(q, i) for q in range(20) for i in range(50) if labels[0][q] == labels[1][i]]
    ids = [f"q{i}" for i in range(20)], [f"i{i}" for i in range(50)]
    judgements = RelevanceJudgements(
        [ids[0][q] for q, _ in pairs], [ids[1][i] for _, i in pairs], np.ones(len(pairs), np.int64)
    )
    by_grades = LabelledItems.from_judgements(judgements, *ids).version(query, gallery)
    assert len(by_grades.query) == 20
    for name in METRICS.values():
        protocol = read_protocol(name)
        np.testing.assert_allclose(protocol.hits(by_labels), protocol.hits(by_grades), rtol=0, atol=1e-15)


def test_the_query_itself_is_left_out_of_its_ranking() -> None:
    qrels = {"a": {"b": 1}, "c": {"a": 1}}
    items = LabelledItems.from_judgements(RelevanceJudgements.from_dict(qrels), ["a", "c"], ["a", "b", "c"])
    rows = np.array([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1]])
    version = items.version(rows[[0, 2]], rows)
    assert RetrievalResults.search(version).positions.tolist() == [[1, 2], [0, 1]]
    assert read_protocol("mrr").hits(version).tolist() == [1, 1]


def test_cells_are_those_of_each_pair() -> None:
    _, version, *_ = random_case(0)
    draw = np.random.default_rng(1)
    later = version.items.version(draw.standard_normal((25, 3)), draw.standard_normal((60, 3)))
    for name in ("ndcg@10", "map"):
        protocol = read_protocol(name)
        hits = compatibility_hits([version, later], name)
        matrix = compatibility_matrix([version, later], protocol)
        assert np.array_equal(hits[1][0], protocol.hits(version.searched_by(later)))
        for i, j in ((0, 0), (1, 0), (1, 1)):
            assert matrix[i, j] == hits[i][j].mean()


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, version, *_ = random_case(0)
    draw = np.random.default_rng(1)
    later = version.items.version(draw.standard_normal((25, 3)), draw.standard_normal((60, 3)))
    replaced = draw.random(60) < 0.4
    whole = {name: read_protocol(name).hits(later) for name in ("map", "ndcg@10")}
    mixed = {name: read_protocol(name).mixed_hits(version, later)(replaced) for name in whole}
    sizes: list[int] = []
    original = RetrievalResults.of_ranking.__func__

    def of_ranking(cls, items, *found):
        sizes.append(len(items.query_rows))
        return original(cls, items, *found)

    monkeypatch.setattr(RetrievalResults, "of_ranking", classmethod(of_ranking))
    monkeypatch.setattr("simplexfix.retrieval.relevance._BLOCK_PLACES", 250)
    for name in whole:
        assert np.array_equal(read_protocol(name).hits(later), whole[name])
        assert np.array_equal(read_protocol(name).mixed_hits(version, later)(replaced), mixed[name])
    assert sorted(set(sizes)) == [2, 4, 22]  # 4 rankings of 60 ranks fill a block; at 10 ranks all 22 queries fit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndcg", "protocol must be one of 'nearest_class_mean', 'instance', or a metric (ndcg@K, map, "),
        ("recall", "got 'recall'"),
        ("ndcg@0", "got 'ndcg@0'"),
        ("ndcg@-1", "got 'ndcg@-1'"),
        ("ndcg@10 ", "got 'ndcg@10 '"),
        ("bleu@3", "got 'bleu@3'"),
    ],
)
def test_names_that_are_no_metric(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_protocol(name)


@pytest.mark.parametrize("name", ["nearest_class_mean", "instance"])
def test_protocols_of_labels_refuse_judgements(name: str) -> None:
    _, version, *_ = random_case(0)
    with pytest.raises(ValueError, match="relevance judgements instead"):
        read_protocol(name).hits(version)
    with pytest.raises(ValueError, match="relevance judgements instead"):
        compatibility_matrix([version], name)


def hashed_words(texts: list[str], buckets: int = 512) -> np.ndarray:
    """Returns hashed bags of words, weighted by inverse document frequency: features without a model."""
    rows = np.zeros((len(texts), buckets), dtype=np.float32)
    for row, text in enumerate(texts):
        for word, count in Counter(re.findall(r"[a-z0-9]+", text.lower())).items():
            rows[row, zlib.crc32(word.encode()) % buckets] += count
    return np.log1p(rows) * np.log(len(texts) / (1 + (rows > 0).sum(0)))


def test_scifact(data_folder: Path) -> None:
    folder = data_folder / "scifact"
    if not folder.is_dir():
        pytest.skip(f"no SciFact in {data_folder}")
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        corpus = [json.loads(line) for line in file]
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    judgements = RelevanceJudgements.load(folder / "qrels_test.tsv")
    query_ids, gallery_ids = ([entry["_id"] for entry in part] for part in (queries, corpus))
    items = LabelledItems.from_judgements(judgements, query_ids, gallery_ids)
    assert repr(judgements) == "RelevanceJudgements of 300 queries, 339 pairs"
    assert repr(items) == "LabelledItems of 300 queries and 5183 gallery items"
    texts = [entry["text"] for entry in queries] + [f"{entry['title']} {entry['text']}" for entry in corpus]
    rows = torch.from_numpy(hashed_words(texts))
    version = items.version(rows[: len(queries)], rows[len(queries) :])
    found = RetrievalResults.search(version, k=1000)
    assert 0.2 < metrics.ndcg(found, 10) < 0.6  # bags of words; a good encoder reaches about 0.65
    qrels: dict[str, dict[str, int]] = {}
    for query, item, grade in zip(judgements.query_ids, judgements.item_ids, judgements.grades, strict=True):
        qrels.setdefault(str(query), {})[str(item)] = int(grade)
    # trec_eval gets ranks instead of scores, since ids do not descend with the row here
    run = {
        query_ids[row]: {gallery_ids[item]: float(-place) for place, item in enumerate(items)}
        for row, items in zip(
            version.items.query_rows.tolist(), RetrievalResults.search(version).positions, strict=True
        )
    }
    check_equal(qrels, version, query_ids, run)
