"""Tests versions with prefixes: the leading dimensions of their queries search older, narrower galleries.

`prefixes` lists the widths at which the leading dimensions of a version were trained to match an older version.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simplexfix import CosineIndex
from simplexfix.cli import main
from simplexfix.compatibility import (
    Rule,
    backfill_curve,
    compare_pairs,
    compatibility_hits,
    compatibility_matrix,
    inequality_violations,
    mixed_topk,
    upgrade_gate,
    upgrade_threshold,
)
from simplexfix.labelled import LabelledItems, VersionFeatures
from simplexfix.report import evaluate
from simplexfix.retrieval import PROTOCOLS, Protocol

WIDTHS, PREFIXES = (6, 9, 12), ((), (6,), (6, 9))  # of versions 0, 1 and 2
LABELS = np.arange(150) % 5  # of 90 queries and 60 gallery items


def rows_of(version: int) -> np.ndarray:
    """Returns [150, width] features; their first 6 or 9 dimensions resemble those of the older versions."""
    shared = np.random.default_rng(1).normal(size=(5, 12))[LABELS]
    noise = np.random.default_rng(10 + version).normal(size=(150, 12))
    return (shared + (1.4 - 0.3 * version) * noise)[:, : WIDTHS[version]].astype(np.float32)


def make_versions(prefixes=PREFIXES, **ids) -> list[VersionFeatures]:
    items = LabelledItems(LABELS[:90], LABELS[90:], **ids)
    return [items.version(r[:90], r[90:], prefixes=p) for r, p in zip(map(rows_of, range(3)), prefixes, strict=True)]


def sliced_by_hand(query: int, gallery: int, **ids) -> VersionFeatures:
    """Returns queries of one version, cut to the width of another version, and the gallery of the latter."""
    width = WIDTHS[gallery]
    items = LabelledItems(LABELS[:90], LABELS[90:], **ids)
    return items.version(rows_of(query)[:90, :width], rows_of(gallery)[90:])


IDS = {"query_ids": np.arange(90), "gallery_ids": np.arange(60, 120)}  # 30 queries are gallery items


@pytest.mark.parametrize("ids", [{}, IDS], ids=["apart", "leave one out"])
@pytest.mark.parametrize("protocol", [*PROTOCOLS.values(), Protocol("own", score=PROTOCOLS["instance"].score)])
def test_the_matrix_equals_that_of_queries_sliced_by_hand(protocol: Protocol, ids: dict) -> None:
    expected = [[protocol.score(sliced_by_hand(i, j, **ids)) if j <= i else np.nan for j in range(3)] for i in range(3)]
    found = compatibility_matrix(make_versions(**ids), protocol)
    assert np.array_equal(found, np.array(expected), equal_nan=True)


def test_other_comparisons_equal_those_of_queries_sliced_by_hand() -> None:
    v0, _, v2 = make_versions()
    by_hand = LabelledItems(LABELS[:90], LABELS[90:]).version(rows_of(2)[:90, :6], rows_of(2)[90:, :6])
    old = sliced_by_hand(0, 0)
    for found, expected in (
        (upgrade_gate(v0, v2), upgrade_gate(old, by_hand)),
        (upgrade_threshold(v0, v2, far=0.05), upgrade_threshold(old, by_hand, far=0.05)),
        (inequality_violations(v0, v2), inequality_violations(old, by_hand)),
        (compare_pairs(v0, v2), compare_pairs(old, by_hand)),
    ):
        assert found.as_dict() == {**expected.as_dict(), **_fields_of_the_full_width(found)}
    for protocol in PROTOCOLS:
        curve = backfill_curve(v0, v2, protocol=protocol, steps=4)
        leading = backfill_curve(v0, v2, protocol=protocol, steps=4, widths="leading")
        assert curve.scores.tolist() == leading.scores.tolist()
        assert curve.scores[0] == PROTOCOLS[protocol].score(sliced_by_hand(2, 0))
    replaced = np.arange(60) % 3 == 0
    scores, rows = mixed_topk(v0, v2, replaced, 5)
    leading_scores, leading_rows = mixed_topk(v0, v2, replaced, 5, widths="leading")
    assert torch.equal(scores, leading_scores)
    assert torch.equal(rows, leading_rows)
    rules = [Rule("min_recall", 0.0, gallery="new")]
    assert upgrade_gate(v0, v2, rules).scores["new_on_new"] == PROTOCOLS["nearest_class_mean"].score(v2)


def _fields_of_the_full_width(result: object) -> dict:
    """Returns the fields that do not depend on slicing: equal rows are counted in each version's full-width gallery."""
    fields = result.as_dict()
    return {key: fields[key] for key in ("queries_in_gallery",) if key in fields}


def test_an_index_of_the_old_width_is_searched_by_the_prefix() -> None:
    v0, _, v2 = make_versions()
    index = CosineIndex(6)
    index.add(rows_of(0)[90:])
    _, ids = index.search(v0.searched_by(v2).query.tensor().numpy(), 1)
    hits = compatibility_hits([v0, v2], "instance")[1][0]
    assert (LABELS[90:][ids[:, 0]] == LABELS[:90]).tolist() == hits.tolist()


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (
            ((), (6,), (9,)),
            r"v2.query has 12 columns, v0.gallery has 6: .*; give v2 prefixes=\[6\] if it was trained",
        ),
        (((), (), (6, 9)), r"v1.query has 9 columns, v0.gallery has 6: .*; give v1 prefixes=\[6\].*widths=\"leading\""),
    ],
)
def test_an_older_width_without_its_prefix_is_refused(prefixes, message: str) -> None:
    versions = make_versions(prefixes)
    for function in (compatibility_matrix, compatibility_hits, evaluate):
        with pytest.raises(ValueError, match=message):
            function(versions)


def test_a_narrow_query_does_not_search_a_wider_gallery() -> None:
    v0, v1, _ = make_versions()
    with pytest.raises(ValueError, match=r"has 6 columns, .* has 9: features of different width cannot be compared; w"):
        v1.searched_by(v0)


def test_feature_files_store_prefixes(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = []
    for t, width in enumerate(WIDTHS):
        rows = rows_of(t)
        arrays = {"query": rows[:90], "gallery": rows[90:], "query_labels": LABELS[:90], "gallery_labels": LABELS[90:]}
        np.savez(f"v{t}.npz", **arrays, prefixes=np.array(PREFIXES[t], np.int64))
        files.append(f"v{t}.npz")
        assert VersionFeatures.load(files[-1]).query.width == width
    assert main(["evaluate", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row[: t + 1] for t, row in enumerate(found["matrix"])] == [
        row[: t + 1] for t, row in enumerate(compatibility_matrix(make_versions()).tolist())
    ]
    assert found["violations"] is not None
    assert main(["gate", "--old", files[0], "--new", files[2], "--json"]) in (0, 1)
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["new_on_old"] == found["matrix"][2][0]
    np.savez(files[2], **dict(np.load(files[2]), prefixes=np.array([9])))
    assert main(["evaluate", *files]) == 2
    assert "v2.npz prefixes=[6] if it was trained so; --truncate compares" in capsys.readouterr().err
