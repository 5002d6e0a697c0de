"""Tests gate, backfill, regressions and report of an upgrade with relevance judgements (scores in [0, 1])."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F

from simplexfix.compatibility import (
    Rule,
    backfill_curve,
    bootstrap_gain,
    bootstrap_interval,
    compatibility_hits,
    compatibility_matrix,
    exact_interval,
    farthest_from_class_mean,
    inequality_violations,
    randomization_test,
    upgrade_gate,
    worst_regressions,
)
from simplexfix.labelled import LabelledItems, RelevanceJudgements, VersionFeatures
from simplexfix.report import evaluate
from simplexfix.retrieval import RetrievalResults, metrics

QUERIES, ITEMS, D = 60, 90, 8
UNJUDGED = 5


def versions(
    noise: tuple[float, ...] = (0.8, 0.5),
    *,
    widths: tuple[int, ...] = (D, D),
    groups: bool = False,
    own_space: bool = False,
) -> list[VersionFeatures]:
    """Returns versions with queries near their relevant items; the last five queries have no judgement.

    All versions share a space; with `own_space` each later one is rotated into its own.
    """
    draw = np.random.default_rng(0)
    clean = draw.standard_normal((ITEMS, max(widths)))
    of = draw.integers(ITEMS, size=QUERIES)
    qrels: dict[str, dict[str, int]] = {}
    for query in range(QUERIES - UNJUDGED):
        others = draw.choice(ITEMS, 3, replace=False)
        qrels[f"q{query}"] = {f"d{item}": int(draw.integers(0, 2)) for item in others} | {f"d{of[query]}": 3}
    query_groups = np.where(np.arange(QUERIES) % 3 == 0, "short", "long") if groups else None
    items = LabelledItems.from_judgements(
        RelevanceJudgements.from_dict(qrels),
        [f"q{query}" for query in range(QUERIES)],
        [f"d{item}" for item in range(ITEMS)],
        query_groups=query_groups,
    )
    found = []
    for at, (size, width) in enumerate(zip(noise, widths, strict=True)):
        gallery = clean + 0.3 * draw.standard_normal(clean.shape)
        query = clean[of] + size * draw.standard_normal((QUERIES, max(widths)))
        if own_space and at:
            turn = np.linalg.qr(draw.standard_normal((max(widths),) * 2))[0]
            gallery, query = gallery @ turn, query @ turn
        found.append(items.version(query[:, :width], gallery[:, :width], name=f"v{at}"))
    return found


def ndcg(version: VersionFeatures) -> np.ndarray:
    return metrics.ndcg(RetrievalResults.search(version), 10, per_query=True)


def test_the_gate_judges_means_of_scores() -> None:
    old, new = versions()
    before, after = ndcg(old), ndcg(old.searched_by(new))
    own = ndcg(new)
    rules = [
        Rule("ecc", confidence=0.95),
        Rule("max_nfr", 0.4, confidence=0.9),
        Rule("min_recall", 0.5, confidence=0.9),
        Rule("min_recall", 0.5, gallery="new"),
        Rule("max_tax", 0.1),
    ]
    result = upgrade_gate(old, new, rules, protocol="ndcg@10", unconstrained=new)
    assert result.scores == {"old_on_old": before.mean(), "new_on_old": after.mean(), "new_on_new": own.mean(),
                             "unconstrained": own.mean()}  # fmt: skip
    ecc, nfr, recall, on_new, tax = result.outcomes
    assert ecc.value == after.mean() - before.mean()
    seed = int(np.random.default_rng(0).integers(2**63))
    numbers = np.random.default_rng(seed)
    assert (ecc.low, ecc.high) == bootstrap_gain(before, after, confidence=0.95, generator=numbers)
    assert ecc.p_value == randomization_test(before, after, generator=numbers)
    falls = int((after < before).sum())
    assert 0 < falls < QUERIES - UNJUDGED
    assert (nfr.value, nfr.low, nfr.high) == (falls / 55, *exact_interval(falls, 55, confidence=0.9))
    numbers = np.random.default_rng(seed)
    assert recall.value == after.mean()
    assert (recall.low, recall.high) == bootstrap_interval(after, confidence=0.9, generator=numbers)
    assert recall.margin == recall.low - 0.5
    assert on_new.value == own.mean()
    assert tax.value == 0
    assert (result.queries, result.gallery, result.unjudged, result.absent) == (55, ITEMS, 5, 0)
    assert result.as_dict()["queries_without_judgement"] == 5
    assert upgrade_gate(new, new, [Rule("ecc")], protocol="map").outcomes[0].p_value == 1


def test_few_changed_queries_do_not_pass_by_a_bootstrap_without_width() -> None:
    """All four queries gain: the bootstrap interval excludes 0, the exact test does not reject."""
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(4)}
    ids = [f"q{i}" for i in range(4)], [f"d{i}" for i in range(4)]
    items = LabelledItems.from_judgements(RelevanceJudgements.from_dict(qrels), *ids)
    gallery = np.eye(4)
    old = items.version(np.roll(gallery, 1, axis=0) + 0.5 * gallery, gallery)
    new = items.version(gallery, gallery)
    (outcome,) = upgrade_gate(old, new, protocol="mrr").outcomes
    assert (outcome.value, outcome.low, outcome.high, outcome.p_value) == (0.5, 0.5, 0.5, 0.125)
    assert not outcome.passed
    assert outcome.verdict == "failed: p = 0.125: too few queries changed"


def test_groups_need_query_groups() -> None:
    old, new = versions(groups=True)
    result = upgrade_gate(old, new, [Rule("max_nfr", 0.5, group="*")], protocol="ndcg@10")
    assert [(outcome.group, outcome.queries) for outcome in result.outcomes] == [("long", 36), ("short", 19)]
    with pytest.raises(ValueError, match="a rule for groups needs query_groups"):
        upgrade_gate(*versions(), [Rule("max_nfr", 0.5, group="*")], protocol="ndcg@10")


@pytest.mark.parametrize("widths", [(D, D), (D - 2, D)])
def test_backfill_goes_from_the_old_gallery_to_the_new_one(widths: tuple[int, int]) -> None:
    old, new = versions(widths=widths, own_space=widths[0] == D)
    curve = backfill_curve(old, new, protocol="ndcg@10", widths="leading", steps=4)
    assert curve.hits.shape == (5, 55)
    assert np.array_equal(curve.hits[0], ndcg(old.searched_by(new, widths="leading")))
    assert np.array_equal(curve.hits[-1], ndcg(new))
    assert np.array_equal(curve.scores, curve.hits.mean(1))
    assert (curve.queries, curve.absent) == (55, 0)
    if widths[0] == widths[1]:
        gallery = old.gallery.rows.copy()
        rows = curve.order[: ITEMS // 2]
        gallery[rows] = new.gallery.rows[rows]
        assert np.array_equal(curve.hits[2], ndcg(old.items.version(new.query.rows, gallery)))


def test_regressions_are_the_queries_that_lose_most() -> None:
    old, new = versions((0.5, 1.2))
    before, after = ndcg(old), ndcg(old.searched_by(new))
    worst = worst_regressions(old, new, before, after, protocol="ndcg@10")
    lost = np.flatnonzero(after < before)
    assert len(worst) == len(lost) > 10
    losses = [entry.before - entry.after for entry in worst]
    assert losses == sorted(losses, reverse=True)
    place = {row: at for at, row in enumerate(old.items.query_rows.tolist())}
    query, gallery = (F.normalize(rows.whole().double(), dim=1).numpy() for rows in (new.query, old.gallery))
    for entry in worst:
        at = place[entry.query]
        assert (entry.before, entry.after) == (before[at], after[at])
        assert (entry.label, entry.found_label) == (None, None)
        cosines = gallery @ query[at]
        relevant = old.items.judged.relevant_items(at)
        assert entry.found_item == cosines.argmax()
        assert entry.own_item == relevant[cosines[relevant].argmax()]
        assert entry.score == pytest.approx(cosines.max(), abs=1e-6)
        assert entry.own_score == pytest.approx(cosines[relevant].max(), abs=1e-6)
        assert entry.margin >= -1e-12
    assert worst_regressions(old, new, before, after, protocol="ndcg@10", limit=3) == worst[:3]


def test_the_report_has_the_numbers_of_the_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, protocol = versions((0.8, 0.5, 1.0), widths=(D, D, D)), "ndcg@10"
    report = evaluate(of, protocol=protocol)
    np.testing.assert_array_equal(report.matrix, compatibility_matrix(of, protocol))
    hits = compatibility_hits(of, protocol)
    last = report.last_upgrade
    assert last.gain == hits[2][1].mean() - hits[1][1].mean() < 0
    assert last.losses == (hits[2][1] < hits[1][1]).sum()
    assert not last.compatible
    assert report.upgrades[0].compatible == bool(report.table.compatible[1, 0])
    assert report.regressions == worst_regressions(of[1], of[2], hits[1][1], hits[2][1], protocol=protocol)
    assert [curve.order_name for curve in report.backfill] == ["random"]
    assert (report.pairs, report.violations) == (None, None)
    assert report.remarks == ("5 of 60 queries have no relevance judgement and are left out.",)
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert content["counts"]["classes"] is None
    judged = of[0].items.judged
    assert content["judgements"] == {"pairs": len(judged.grades), "relevant": int((judged.grades > 0).sum()),
                                     "queries_left_out": 5}  # fmt: skip
    image_module = pytest.importorskip("PIL.Image", reason="pip install 'simplexfix[cli]'")
    pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")
    titles: list[str] = []

    def set_title(axes, text: str, **options: object) -> None:
        titles.append(text)

    monkeypatch.setattr("simplexfix.report.figures.SHOWN", 2)
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", set_title)
    image_module.new("RGB", (8, 8)).save(tmp_path / "x.png")
    report.save(tmp_path / "report", {"query": [tmp_path / "x.png"] * QUERIES, "gallery": [tmp_path / "x.png"] * ITEMS})
    assert set(titles) == {*(f"query {entry.query}" for entry in report.regressions[:2]), "found", "right"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"mean {protocol} of the queries" in page
    assert f"{last.losses} get worse, {last.gains} get better" in page
    assert "paired randomization test" in page
    assert "McNemar" not in page
    assert "classes" not in page.split("<main>")[1].split("</header>")[0]
    assert "relevance judgements do not say of each pair" in page
    assert f"{last.losses} queries score less with v2 than with v1" in page
    for entry in report.regressions:
        assert f'<data value="{entry.before!r}">' in page


def test_one_version_alone_and_labels_by_a_metric() -> None:
    report = evaluate(versions()[:1], protocol="ndcg@10")
    assert report.verdict.words == f"v0 scores {100 * report.matrix[0, 0]:.1f} % by ndcg@10."
    draw = np.random.default_rng(0)
    items = LabelledItems(draw.integers(4, size=40), draw.integers(4, size=30))
    of = [items.version(draw.standard_normal((40, 6)), draw.standard_normal((30, 6))) for _ in range(2)]
    report = evaluate(of, protocol="map")
    assert report.judgements is None
    assert report.counts.classes == 4
    assert len(report.backfill) == 3
    worst = report.regressions[0]
    assert worst.before - worst.after > 0
    assert worst.label == items.query_labels[worst.query]
    assert worst.found_label == items.gallery_labels[worst.found_item]
    assert worst.label == items.gallery_labels[worst.own_item]


def test_functions_of_classes_refuse_judgements() -> None:
    old, new = versions()
    for call in (
        lambda: upgrade_gate(old, new),
        lambda: evaluate([old, new]),
        lambda: inequality_violations(old, new),
        lambda: farthest_from_class_mean(old),
        lambda: backfill_curve(old, new, protocol="map", order="lowest_margin"),
    ):
        with pytest.raises(ValueError, match="relevance judgements instead"):
            call()
