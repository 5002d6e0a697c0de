"""Tests relevance judgements: files, matching of ids to rows, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simplexfix.labelled import FeatureFileError, LabelledItems, RelevanceJudgements, VersionFeatures, check_versions

QRELS = {"q1": {"a": 2, "b": 0}, "q3": {"c": 1, "a": 1, "d": -1}}
QUERY_IDS, GALLERY_IDS = ["q3", "q2", "q1"], ["a", "b", "c", "d", "e"]


def judged(qrels=QRELS, query_ids=QUERY_IDS, gallery_ids=GALLERY_IDS, **options) -> LabelledItems:
    return LabelledItems.from_judgements(RelevanceJudgements.from_dict(qrels), query_ids, gallery_ids, **options)


def triples(judgements: RelevanceJudgements) -> list[tuple[str, str, int]]:
    return [
        (str(q), str(i), int(g))
        for q, i, g in zip(judgements.query_ids, judgements.item_ids, judgements.grades, strict=True)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\nq3\tc\t1\nq3\ta\t1\nq3\td\t-1\n",
        "\ufeffquery-id\tcorpus-id\tscore\r\nq1\ta\t2\r\nq1\tb\t0\r\nq3\tc\t1\r\nq3\ta\t1\r\n\r\nq3\td\t-1",
        "q1 0 a 2\nq1 0 b 0\nq3 Q0 c 1\nq3\t0\ta\t1\n  q3 0 d -1\n",
    ],
    ids=["BEIR", "BEIR of Windows", "TREC"],
)
def test_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "qrels.tsv").write_bytes(text.encode())
    found = RelevanceJudgements.load(tmp_path / "qrels.tsv")
    expected = [(query, item, grade) for query, of in QRELS.items() for item, grade in of.items()]
    assert triples(found) == triples(RelevanceJudgements.from_dict(QRELS)) == expected
    assert found == RelevanceJudgements.from_dict(QRELS)
    assert repr(found) == "RelevanceJudgements of 2 queries, 5 pairs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold at least one judgement, it is empty"),
        ("query-id\tcorpus-id\tscore\n", "must hold at least one judgement, got none"),
        ("query-id\tcorpus-id\tscore\n1\t2\t1\n1\t3\n", "line 3 must hold query-id, corpus-id and score between tabs"),
        ("1\t2\t1\n", r"line 1 must hold a header .*\(BEIR\) or query, iteration, item, grade \(TREC\), got '1"),
        ("1 0 2 1\n\n1 0 3 1.5\n", "line 3 must hold an integer grade, got '1.5'"),
        ("1 0 2 1\n1 0 3 1\n1 0 2 0\n", "must judge each pair once, got query '1' with item '2' as judgements 0 and 2"),
        ("1\x00", "cannot be read as relevance judgements: it holds zero bytes"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qrels.tsv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        RelevanceJudgements.load(tmp_path / "qrels.tsv")
    assert str(tmp_path / "qrels.tsv") in str(caught.value)


def test_queries_without_a_judgement_are_left_out() -> None:
    items = judged(query_groups=["x", "y", "z"])
    assert items.query_rows.tolist() == [0, 2]  # q3 and q1
    assert items.given == (3, 5)
    assert items.query_groups.tolist() == ["x", "z"]
    assert items.num_relevant.tolist() == [2, 1]
    assert items.judged.ideal_grades.tolist() == [[1, 1], [2, 0]]
    places = np.array([[0, 3, 2, -1], [1, 0, 4, -1]])
    assert items.grades(places).tolist() == [[1, -1, 1, 0], [0, 2, 0, 0]]
    assert [items.judged.relevant_items(q).tolist() for q in (0, 1)] == [[0, 2], [0]]
    last = judged({"q3": {"e": 1}, "q1": {"e": 2}})
    # -1 does not index the previous query's items
    assert last.grades(np.array([[-1, 4], [-1, 4]])).tolist() == [[0, 1], [0, 2]]
    version = items.version(np.eye(3), np.eye(5, 3))
    assert version.query.whole().tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"query has 2 rows, query_ids has shape \[3\]"):
        items.version(np.eye(2), np.eye(5, 2))


def test_integers_and_text_are_the_same_ids() -> None:
    found = judged({"7": {"10": 1}, "8": {"11": 3}}, np.array([8, 7]), ["10", "11"])
    assert found.grades(np.array([[0, 1], [0, 1]])).tolist() == [[0, 3], [1, 0]]
    composed, apart = "\u00e9", "e\u0301"  # one letter in both Unicode forms
    assert judged({composed: {"a": 1}}, [apart], ["a"]).num_relevant.tolist() == [1]


def test_the_item_of_the_querys_id_is_left_out() -> None:
    items = judged({"a": {"b": 1}}, ["a"], ["b", "a"])
    assert items.excluded.tolist() == [1]
    with pytest.raises(ValueError, match="judges query 'a' with the gallery item of the same id"):
        judged({"a": {"b": 1, "a": 1}}, ["a"], ["b", "a"])


def test_a_part_of_the_items_has_its_judgements() -> None:
    items = judged()
    some = items.take(np.array([1, 0]), np.array([2, 0, 4]))  # q1 and q3; c, a and e
    assert some.grades(np.array([[0, 1, 2], [0, 1, 2]])).tolist() == [[0, 2, 0], [1, 1, 0]]
    assert some.num_relevant.tolist() == [1, 2]
    assert items.take(np.array([1])).num_unjudged == items.num_unjudged == 1
    assert LabelledItems([1], [1]).num_unjudged is None
    none = items.take(gallery=np.array([4]))
    assert none.num_relevant.tolist() == [0, 0]
    assert none.judged.ideal_grades.tolist() == [[0], [0]]
    assert none.grades(np.array([[0], [0]])).tolist() == [[0], [0]]
    assert items.num_relevant.tolist() == [2, 1]


def test_uses_of_labels_are_refused() -> None:
    items = judged()
    for call in (
        lambda: items.query_labels,
        lambda: items.gallery_labels,
        lambda: items.gallery_classes,
    ):
        with pytest.raises(ValueError, match=r"relevance judgements instead.*'ndcg@10'"):
            call()
    with pytest.raises(ValueError, match="ignored_labels needs labels"):
        items.ignoring([1])


def test_versions_must_have_the_same_judgements() -> None:
    rows = np.eye(3), np.eye(5, 3)
    first, again = (judged().version(*rows, name=name) for name in ("a", "b"))
    found = check_versions([first, again])
    assert found[0].items is found[1].items
    other = judged({**QRELS, "q2": {"a": 1}}).version(*rows, name="c")
    with pytest.raises(ValueError, match="a and c must have the same labels or relevance judgements"):
        check_versions([first, other])
    labelled = LabelledItems([0, 1, 2], np.arange(5)).version(*rows, name="d")
    with pytest.raises(ValueError, match=r"a and d .* got judgements and labels"):
        check_versions([first, labelled])
    moved = judged(gallery_ids=GALLERY_IDS[::-1]).version(*rows, name="e")
    with pytest.raises(ValueError, match="gallery_ids at 0 is a and e"):
        check_versions([first, moved])


@pytest.mark.parametrize("name", ["v.npz", "v.parquet"])
def test_feature_files_need_ids_and_no_labels(tmp_path: Path, name: str) -> None:
    query, gallery = np.eye(3, dtype=np.float32), np.eye(5, 3, dtype=np.float32)
    judgements = RelevanceJudgements.from_dict(QRELS)

    def save(**ids) -> Path:
        if name == "v.npz":
            np.savez(tmp_path / name, query=query, gallery=gallery, **ids)
            return tmp_path / name
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = {"split": ["query"] * 3 + ["gallery"] * 5, "vector": [*query.tolist(), *gallery.tolist()]}
        if ids:
            columns["item_id"] = [*ids["query_ids"], *ids["gallery_ids"]]
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
        return tmp_path / name

    version = VersionFeatures.load(save(query_ids=QUERY_IDS, gallery_ids=GALLERY_IDS), judgements=judgements)
    assert version.items.num_relevant.tolist() == [2, 1]
    with pytest.raises(FeatureFileError, match=r"no query_labels|no column label"):
        VersionFeatures.load(tmp_path / name)
    with pytest.raises(FeatureFileError, match=r"no query_ids, gallery_ids|no column item_id"):
        VersionFeatures.load(save(), judgements=judgements)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: judged({"q9": {"a": 1}}),
            ValueError,
            "judges 1 ids that no row of query_ids has: 'q9'; query_ids are",
        ),
        (
            lambda: judged({"q1": {"z": 1, "y": 1, "a": 1}}),
            ValueError,
            "judges 2 ids that no row of gallery_ids has: 'z', 'y'; gallery_ids are 'a', 'b', 'c', ...; remove",
        ),
        (
            lambda: judged(query_ids=["q1", "q3", "q1"]),
            ValueError,
            "query_ids must hold each id once, got 'q1' in rows 0",
        ),
        (
            lambda: judged(gallery_ids=["a", "b", "c", "d", "a"]),
            ValueError,
            "gallery_ids must hold each id once, got 'a'",
        ),
        (lambda: judged(query_ids=[0.5, 1, 2]), TypeError, "query_ids must be integers or names, got float64"),
        (lambda: judged(query_groups=["x"]), ValueError, r"query has 3 rows, query_groups has shape \[1\]"),
        (lambda: LabelledItems.from_judgements(QRELS, [1], [2]), TypeError, "must be RelevanceJudgements, got dict"),
        (lambda: RelevanceJudgements([1, 2], [1], [1, 1]), ValueError, r"must be of one length, got \(2, 1, 2\)"),
        (lambda: RelevanceJudgements([1], [1], [0.5]), TypeError, "grades must be integers, got float64"),
        (lambda: RelevanceJudgements.from_dict({}), ValueError, "judgements must hold at least one judgement"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
