"""Tests `EvaluationReport.save` and `to_html`: the folder's content, and that foreign files are never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simplexfix.labelled import LabelledItems, VersionFeatures
from simplexfix.report import EvaluationReport, evaluate
from simplexfix.report.folder import FIGURES

pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")
image_module = pytest.importorskip("PIL.Image", reason="pip install 'simplexfix[cli]'")

QUERIES, ITEMS = 40, 60


def versions(count: int = 2, junk: int = 0) -> list[VersionFeatures]:
    """Returns versions of 40 queries and 60 items of 5 classes; the first `junk` items have class -1."""
    draw, labels = np.random.default_rng(0), np.arange(QUERIES + ITEMS) % 5
    gallery_labels = labels[QUERIES:].copy()
    gallery_labels[:junk] = -1
    items = LabelledItems(labels[:QUERIES], gallery_labels)
    made = []
    for t in range(count):
        rows = (1.2 * np.eye(8)[labels] + draw.normal(size=(len(labels), 8))).astype(np.float32)
        made.append(items.version(rows[:QUERIES], rows[QUERIES:], name=f"v{t}"))
    return made


def written_images(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        image_module.new("RGB", (8, 6), (i, 0, 0)).save(path)
    return paths


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return evaluate(versions(), seed=3)


def test_the_folder_holds_the_report(report, tmp_path) -> None:
    report.save(tmp_path / "new")
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content.items() >= report.as_dict().items()
    assert (content["inputs"], content["seed"]) == (["v0", "v1"], 3)
    assert content["zero_rows"] == [{"query": 0, "gallery": 0}] * 2
    assert (tmp_path / "new" / "report.html").read_text() == report.to_html()
    drawn = {f"figures/{name}" for name in FIGURES if name != "regressions.png"}
    files = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert files == {"report.json", "report.html", *drawn}


def test_settings_of_matplotlib_change_no_figure(report, tmp_path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    report.save(tmp_path / "plain")
    settings = {"text.usetex": True, "savefig.bbox": "tight", "axes.grid": True, "path.sketch": (1, 2, 3)}
    with matplotlib.rc_context(settings):
        report.save(tmp_path / "set")
        assert all(matplotlib.rcParams[name] != matplotlib.rcParamsDefault[name] for name in settings)
    for name in FIGURES[:-1]:
        plain, drawn = ((tmp_path / folder / "figures" / name).read_bytes() for folder in ("plain", "set"))
        assert plain == drawn, name


@pytest.mark.usefixtures("no_figures")
def test_a_report_replaces_only_a_report(report, tmp_path) -> None:
    report.save(tmp_path / "report")
    evaluate(versions(1)).save(str(tmp_path / "report"))  # with fewer figures
    assert not (tmp_path / "report" / "figures" / "flips.svg").exists()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for name, message in (
        ("report", "holds notes.txt beside a report"),
        ("other", "holds something else than a report"),
        ("file", "is a file; a report needs a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            report.save(tmp_path / name)
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(FileNotFoundError):
        report.save(tmp_path / "missing" / "report")


def test_cyclic_links_are_an_error(report, tmp_path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: .*loop"):
        report.save(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.usefixtures("no_figures")
def test_images_show_the_worst_regressions(report, tmp_path) -> None:
    assert report.regressions
    images = {
        "query": written_images(tmp_path / "query", QUERIES),
        "gallery": written_images(tmp_path / "gallery", ITEMS),
    }
    report.save(tmp_path / "report", images)
    assert (tmp_path / "report" / "figures" / "regressions.png").exists()
    page = report.to_html(images)
    assert page == (tmp_path / "report" / "report.html").read_text()
    assert page.count('<img src="data:image/png') == 3 * len(report.regressions)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"gallery": [Path("a.png")] * ITEMS}, "give images of 'query', too"),
        ({"query": [Path("a.png")] * 39}, "images of 'query' must be 40 paths, one per item, got 39"),
        ({"query": [Path("a.png")] * 40, "gallery": []}, "images of 'gallery' must be 60 paths, one per item, got 0"),
        ({"query": [Path("a.png")] * 40, "galery": []}, "images must be of 'query' and 'gallery', got 'galery'"),
        ({"query": [Path("a.png")] * 40}, "the image a.png cannot be read"),
    ],
)
def test_images_that_cannot_be_shown_are_refused_and_nothing_is_written(report, tmp_path, images, message) -> None:
    with pytest.raises(ValueError, match=message):
        report.save(tmp_path / "report", images)
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_figures")
def test_image_paths_count_ignored_items(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("simplexfix.report.figures.SHOWN", 3)
    found = evaluate(versions(junk=7), ignored_labels=[-1])
    images = {
        "query": written_images(tmp_path / "query", QUERIES),
        "gallery": written_images(tmp_path / "gallery", ITEMS),
    }
    assert found.to_html(images).count("<figure>") == 3 < len(found.regressions)


@pytest.mark.usefixtures("no_figures")
def test_classes_are_shown_by_their_names(tmp_path) -> None:
    draw, labels = np.random.default_rng(0), np.arange(QUERIES + ITEMS) % 5
    names = np.array(["ant", "b & b", "cat", "dog", "é日本"])[labels]
    items = LabelledItems(names[:QUERIES], names[QUERIES:])
    rows = [(1.2 * np.eye(8)[labels] + draw.normal(size=(len(labels), 8))).astype(np.float32) for _ in range(2)]
    found = evaluate([items.version(x[:QUERIES], x[QUERIES:], name=f"v{t}") for t, x in enumerate(rows)])
    regression = found.regressions[0]
    assert found.class_name(regression.label) == names[regression.query]
    page = found.to_html({"query": written_images(tmp_path / "query", QUERIES)})
    for name in (
        "<td>cat</td>",
        "<td>b &amp; b</td>",
        "<td>é日本</td>",
        f"of class {names[regression.query]}".replace("&", "&amp;"),
    ):
        assert name in page
    assert evaluate(versions()).class_name(3) == "3"


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2\^31\), got {seed}"):
        evaluate(versions(), seed=seed)


@pytest.mark.usefixtures("no_figures")
def test_names_are_escaped() -> None:
    rows = versions()
    named = [
        rows[0].items.version(np.eye(8)[np.arange(40) % 5], np.eye(8)[np.arange(60) % 5], name=name)
        for name in ("<script>alert(1)</script>", 'a & b\'s "c"')
    ]
    page = evaluate(named).to_html()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &amp; b&#39;s &#34;c&#34;" in page
