"""Tests `simplexfix evaluate`: output, refused input, and that a report is written as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import command, without_figures

from simplexfix.cli import main
from simplexfix.labelled import LabelledItems
from simplexfix.report import evaluate

pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")
pytest.importorskip("rich", reason="pip install 'simplexfix[cli]'")
image_module = pytest.importorskip("PIL.Image", reason="pip install 'simplexfix[cli]'")

CLASSES, WIDTH, QUERIES = 12, 16, 300


def features(seed: int, clear: float, width: int = WIDTH) -> dict[str, np.ndarray]:
    labels = np.arange(500) % CLASSES
    made = np.random.default_rng(seed).normal(size=(500, width)) + clear * np.eye(width)[labels]
    rows = made.astype(np.float32)
    return {
        "query": rows[:QUERIES],
        "gallery": rows[QUERIES:],
        "query_labels": labels[:QUERIES],
        "gallery_labels": labels[QUERIES:],
    }


CLEAR = {"v1": 2.0, "v2": 3.0, "v10": 2.4}


def save(folder: Path, name: str, made: dict[str, np.ndarray]) -> Path:
    if name.endswith(".npz"):
        np.savez(folder / name, **made)
    else:
        (folder / name).mkdir(parents=True)
        for key, array in made.items():
            np.save(folder / name / f"{key}.npy", array)
    return folder / name


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """Returns a folder with v1.npz, the folder v2 and v10.npz; the last version is worse than the one before."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models"
    folder.mkdir()
    for at, (name, clear) in enumerate(CLEAR.items()):
        save(folder, name if name == "v2" else f"{name}.npz", features(at, clear))
    return folder


@pytest.fixture
def drawn() -> None:
    """Tests that need real figures request this fixture; in all others `figures` replaces them."""


@pytest.fixture(autouse=True)
def figures(request) -> None:
    """Replaces figures in other tests."""
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("no_figures")


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def in_memory(**options):
    made = [features(at, clear) for at, clear in enumerate(CLEAR.values())]
    items = LabelledItems(made[0]["query_labels"], made[0]["gallery_labels"])
    versions = [items.version(m["query"], m["gallery"], name=name) for m, name in zip(made, CLEAR, strict=True)]
    return evaluate(versions, **options)


@pytest.mark.usefixtures("drawn")
def test_a_folder_of_versions(models, capsys) -> None:
    (models / "README.md").write_text("not a version")
    (models / ".cache").mkdir()
    assert main(["evaluate", "models", "--seed", "5"]) == 0
    printed = capsys.readouterr()
    assert "by name, oldest first: v1.npz, v2, v10.npz\n" in printed.err
    content = json.loads(Path("report/report.json").read_text())
    assert content["inputs"] == ["models/v1.npz", "models/v2", "models/v10.npz"]
    assert everything_in(Path("report")) == [
        "figures",
        "figures/backfill.svg",
        "figures/flips.svg",
        "figures/matrix.svg",
        "figures/roc.svg",
        "figures/scores.svg",
        "report.html",
        "report.json",
    ]
    expected = in_memory(seed=5)
    assert {key: content[key] for key in expected.as_dict()} == expected.as_dict()
    assert content["made_by"] == "simplexfix evaluate"
    assert content["seed"] == 5
    # the terminal shows every cell on and below the diagonal
    matrix = expected.matrix
    for i in range(3):
        for j in range(i + 1):
            assert f"{100 * matrix[i, j]:.1f}" in printed.out
    assert "300 queries, 200 gallery items of 12 classes, nearest class mean" in printed.out
    assert f"{content['upgrades'][-1]['losses']} queries break" in printed.out
    assert "v10 is not compatible with v2." in printed.out


def test_versions_named_one_by_one_json_and_protocol(models, capsys) -> None:
    names = [str(models / name) for name in ("v1.npz", "v2", "v10.npz")]
    assert main(["evaluate", *names, "--json", "--protocol", "instance", "--out", "r", "--confidence", "0.8"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    content = json.loads(printed.out)
    assert printed.out == Path("r/report.json").read_text()
    expected = in_memory(protocol="instance", confidence=0.8).as_dict()
    assert {key: content[key] for key in expected} == expected


@pytest.mark.usefixtures("drawn")
def test_the_same_input_gives_the_same_report(models) -> None:
    for out in ("a", "b"):
        assert main(["evaluate", "models", "--out", out]) == 0
    for name in everything_in(Path("a")):
        if (Path("a") / name).is_file():
            assert (Path("a") / name).read_bytes() == (Path("b") / name).read_bytes(), name


@pytest.mark.usefixtures("drawn")
def test_one_version_and_a_version_given_as_the_only_folder(models, capsys) -> None:
    assert main(["evaluate", "models/v2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["criteria"]["AC"] is None
    assert [version["name"] for version in content["versions"]] == ["v2"]
    assert "no upgrade to judge" in Path("report/report.html").read_text()
    assert not Path("report/figures/flips.svg").exists()


def test_names_are_the_shortest_that_differ(models, capsys) -> None:
    save(models, "v1", features(8, 3.0))
    save(models, "v3.5", features(8, 3.0))
    for given, names in (
        (["models/v1.npz", "models/v3.5"], ["v1", "v3.5"]),
        (["models/v1.npz", "models/v1"], ["v1.npz", "v1"]),
        (["models/v2", "./models/v2/../v2"], ["models/v2", "models/v2/../v2"]),
    ):
        assert main(["evaluate", *given, "--json"]) == 0
        assert [version["name"] for version in json.loads(capsys.readouterr().out)["versions"]] == names


def test_widths(models, capsys) -> None:
    wide = save(models, "wide.npz", features(9, 3.0, width=24))
    names = [str(models / "v1.npz"), str(wide)]
    assert main(["evaluate", *names]) == 2
    message = capsys.readouterr().err
    assert "wide.npz: query has 24 columns" in message
    assert "--truncate" in message
    assert not Path("report").exists()
    assert main(["evaluate", *names, "--truncate", "--json"]) == 0
    assert [version["dimensions"] for version in json.loads(capsys.readouterr().out)["versions"]] == [16, 24]


@pytest.mark.usefixtures("drawn")
def test_one_class_has_no_pairs_of_different_classes(models, capsys) -> None:
    made = features(0, 2.0)
    made["query_labels"][:], made["gallery_labels"][:] = 7, 7
    save(models, "alike.npz", made)
    assert main(["evaluate", "models/alike.npz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] is None
    assert "all pairs of a query and a gallery item are of one kind" in Path("report/report.html").read_text()
    assert not Path("report/figures/roc.svg").exists()


def test_thirty_one_versions(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for t in range(31):
        save(tmp_path, f"v{t}.npz", features(t, 2 + t / 30))
    assert main(["evaluate", *(f"v{t}.npz" for t in range(31))]) == 0
    assert len(json.loads(Path("report/report.json").read_text())["matrix"]) == 31
    assert Path("report/report.html").read_text().count('id="C-') == 496
    assert max(map(len, capsys.readouterr().out.split("p = ")[0].splitlines()[3:36])) <= 80


def test_classes_that_the_gallery_lacks_are_counted_and_reported(models, capsys) -> None:
    far = [2**24 + 1, 2**24 + 2, -5, 2**60] + list(range(100, 100 + CLASSES - 4))
    for at, (name, clear) in enumerate(CLEAR.items()):
        made = features(at, clear)
        made["query_labels"] = np.array(far)[made["query_labels"]]
        made["gallery_labels"] = np.array(far)[made["gallery_labels"]]
        # the gallery's items of class 2**24 + 2 get label 2**24 + 1, which float32 cannot represent
        made["gallery_labels"][made["gallery_labels"] == 2**24 + 2] = 2**24 + 1
        save(models.parent, f"far-{name}.npz", made)
    assert main(["evaluate", *(f"far-{name}.npz" for name in CLEAR)]) == 0
    content = json.loads(Path("report/report.json").read_text())
    assert content["counts"]["queries_of_classes_not_in_gallery"] == QUERIES // CLASSES
    assert content["counts"]["classes_not_in_gallery"] == 1
    expected = (
        "25 queries have no other gallery item of their class and count as wrong; classes that the gallery lacks: 1"
    )
    assert expected in capsys.readouterr().out
    assert "25 of 300 queries" in Path("report/report.html").read_text()


@pytest.mark.usefixtures("drawn")
def test_items_alone_in_their_class_are_reported(models, capsys) -> None:
    made, alone = features(0, 3.0), np.arange(QUERIES)
    rows = {"query": made["query"], "gallery": made["query"], "query_labels": alone, "gallery_labels": alone}
    save(models.parent, "alone.npz", {**rows, "query_ids": alone, "gallery_ids": alone})
    assert main(["evaluate", "alone.npz"]) == 0
    printed, page = capsys.readouterr().out, Path("report/report.html").read_text()
    assert f"{QUERIES} queries have no other gallery item of their class and count as wrong\n" in printed
    assert f"{QUERIES} of {QUERIES} queries</strong> have no other gallery item of their class. No version" in page


def change(array: str, value) -> dict:
    def apply(made: dict[str, np.ndarray]) -> None:
        made[array] = value(made[array]) if callable(value) else value

    return {"change": apply}


def nan_at(row: int):
    def put(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[row, 3] = np.nan
        return rows

    return put


BAD = {
    "labels of another length": (change("query_labels", lambda x: x[:-1]), "query has 300 rows, query_labels"),
    "nan": (change("gallery", nan_at(17)), "gallery row 17 holds nan or inf"),
    "dtypes within": (change("query", lambda x: x.astype(np.float64)), "query is float64 and gallery is float32"),
    "float labels": (change("query_labels", lambda x: x.astype(np.float32)), "query_labels must be integers"),
    "other labels": (change("gallery_labels", lambda x: x[::-1].copy()), "gallery_labels at 0 is"),
    "fewer items": (change("drop", None), "query_labels has 300 and 299 entries"),
    "one dimension": (change("query", lambda x: x[0]), "query must have 2 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_2_and_writes_nothing(models, capsys, case: str) -> None:
    how, message = BAD[case]
    made = features(4, 2.0)
    if case == "fewer items":
        made["query"], made["query_labels"] = made["query"][1:], made["query_labels"][1:]
    else:
        how["change"](made)
    save(models, "bad.npz", made)
    before = everything_in(models.parent)
    assert main(["evaluate", str(models / "v1.npz"), str(models / "bad.npz")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("simplexfix evaluate: ")
    assert message in error
    assert "bad.npz" in error
    assert everything_in(models.parent) == before


def test_dtypes_between_versions(models, capsys) -> None:
    half = {key: x.astype(np.float16) if x.ndim == 2 else x for key, x in features(4, 2.0).items()}
    save(models, "half.npz", half)
    assert main(["evaluate", str(models / "half.npz"), "--json"]) == 0
    half = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(models / "v1.npz"), str(models / "half.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matrix"][1][1] == half["matrix"][0][0]  # all are compared in float32


def test_numbers_past_the_range_of_float32(models, capsys) -> None:
    large = {key: x.astype(np.float64) if x.ndim == 2 else x for key, x in features(4, 2.0).items()}
    large["query"][7, 2] = 1e300
    save(models, "large.npz", large)
    assert main(["evaluate", str(models / "large.npz")]) == 2
    assert "large.npz: query row 7 holds a number past float32's range" in capsys.readouterr().err


def test_numbers_too_small_for_float32_and_zero_rows(models, capsys) -> None:
    small = {key: x.astype(np.float64) if x.ndim == 2 else x for key, x in features(4, 2.0).items()}
    small["gallery"][3] *= 1e-60
    save(models, "small.npz", small)
    assert main(["evaluate", str(models / "small.npz")]) == 2
    assert "small.npz: gallery row 3 has only numbers below float32's range" in capsys.readouterr().err
    small["gallery"][3] = 0
    small["query"][5:9] = 0
    save(models, "small.npz", small)
    assert main(["evaluate", str(models / "small.npz")]) == 0
    said = capsys.readouterr().err
    assert "small.npz: 4 rows of query are all zeros" in said
    assert "small.npz: 1 rows of gallery are all zeros" in said
    assert json.loads(Path("report/report.json").read_text())["zero_rows"] == [{"query": 4, "gallery": 1}]


def test_classes_whose_rows_add_up_to_too_much(models, capsys) -> None:
    large = {key: np.full_like(x, 3e38) if x.ndim == 2 else x for key, x in features(4, 2.0).items()}
    save(models, "large.npz", large)
    assert main(["evaluate", str(models / "large.npz")]) == 2
    assert "large.npz: gallery has a class whose rows add up to more than float32 holds" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lzma", "bz2", "encrypted"])
def test_damage_that_a_zip_file_hides(models, capsys, kind: str) -> None:
    """Each kind of damage raises another error in the reader; the message of each names the file."""
    import zipfile

    method = {"lzma": zipfile.ZIP_LZMA, "bz2": zipfile.ZIP_BZIP2, "encrypted": zipfile.ZIP_STORED}[kind]
    with zipfile.ZipFile(models / "v1.npz") as whole, zipfile.ZipFile(models / "bad.npz", "w", method) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    content = bytearray((models / "bad.npz").read_bytes())
    if kind == "encrypted":
        for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = -1
            while (at := content.find(signature, at + 1)) >= 0:
                content[at + flags] |= 1
    else:
        content[60:4000:7] = bytes(x ^ 0x5A for x in content[60:4000:7])
    (models / "bad.npz").write_bytes(content)
    assert main(["evaluate", str(models / "bad.npz")]) == 2
    assert "bad.npz cannot be read, it may be truncated or damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("drawn")
def test_file_names_that_are_not_text(models, capsys) -> None:
    shutil.copy(models / "v1.npz", models.parent / os.fsdecode(b"\xff\x1b[31m.npz"))
    assert main(["evaluate", os.fsdecode(b"\xff\x1b[31m.npz")]) == 0
    assert "\x1b[31m" not in capsys.readouterr().out
    content = json.loads(Path("report/report.json").read_text())
    assert content["inputs"] == ["\\xff\\x1b[31m.npz"]
    assert content["versions"][0]["name"] == "\\xff\\x1b[31m"


def test_a_version_and_its_copy(models, capsys) -> None:
    shutil.copy(models / "v1.npz", models.parent / "copy.npz")
    assert main(["evaluate", str(models / "v1.npz"), "copy.npz"]) == 0
    assert "copy answers every query as v1 does." in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_truncated_files(models, capsys, size: int) -> None:
    content = (models / "v1.npz").read_bytes()
    (models / "cut.npz").write_bytes(content[:size])
    assert main(["evaluate", str(models / "cut.npz")]) == 2
    assert "cut.npz cannot be read, it may be truncated or damaged" in capsys.readouterr().err
    assert not Path("report").exists()


def test_missing_inputs_and_bad_options(models, capsys) -> None:
    (models.parent / "empty").mkdir()
    for arguments, message in [
        (["nothing.npz"], "nothing.npz"),
        (["empty"], "empty holds no versions"),
        (["models/v1.npz", "models/v1.npz"], "models/v1.npz is given twice"),
        (["models", "--out", "no/where"], "no"),
        (["models", "--confidence", "0"], "confidence must lie between 0 and 1"),
        (["models", "--gallery-images", "x"], "--gallery-images needs --images"),
    ]:
        assert main(["evaluate", *arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert everything_in(models.parent)[0] == "empty"
    assert not Path("report").exists()


def test_no_natural_order(models, capsys) -> None:
    save(models, "v01.npz", features(0, 2.0))
    assert main(["evaluate", "models"]) == 2
    assert "their names define no order" in capsys.readouterr().err


def test_an_error_while_writing_leaves_the_old_report(models, monkeypatch) -> None:
    assert main(["evaluate", "models"]) == 0
    before = {name: Path("report", name).read_bytes() for name in ("report.json", "report.html")}
    entries = everything_in(models.parent)

    for at, error in ((2, OSError(28, "No space left on device")), (4, KeyboardInterrupt())):
        calls = iter(range(100))

        def fsync(_: int, calls=calls, at=at, error=error) -> None:
            if next(calls) == at:
                raise error

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            code = 2 if isinstance(error, OSError) else 130
            assert main(["evaluate", "models", "--seed", "9"]) == code
        assert everything_in(models.parent) == entries
        assert {name: Path("report", name).read_bytes() for name in before} == before


def test_a_failed_rename_restores_the_old_report(models, monkeypatch) -> None:
    assert main(["evaluate", "models"]) == 0
    before, entries = Path("report/report.json").read_bytes(), everything_in(models.parent)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    assert main(["evaluate", "models", "--seed", "9"]) == 2
    assert everything_in(models.parent) == entries
    assert Path("report/report.json").read_bytes() == before


def test_a_report_is_replaced_whole(models) -> None:
    assert main(["evaluate", "models"]) == 0
    Path("report").chmod(0o750)
    assert main(["evaluate", "models/v2"]) == 0
    assert everything_in(Path("report")) == [
        "figures",
        "figures/matrix.svg",
        "figures/roc.svg",
        "figures/scores.svg",
        "report.html",
        "report.json",
    ]
    assert Path("report").stat().st_mode & 0o777 == 0o750
    assert everything_in(models.parent)[-1] == "report/report.json"


def test_a_folder_of_something_else_is_never_deleted(models, capsys) -> None:
    Path("report").mkdir()  # an empty folder may be used
    assert main(["evaluate", "models"]) == 0
    Path("report/notes.txt").write_text("mine")
    for name in ("report.json.bak", "report.html.orig", "figures/my-own.png", "figures/empty/"):
        kept = Path("kept")
        assert main(["evaluate", "models", "--out", "kept"]) == 0
        (kept / name).mkdir() if name.endswith("/") else (kept / name).write_text("mine")
        assert main(["evaluate", "models", "--out", "kept"]) == 2
        assert f"kept holds {name.rstrip('/')} beside a report" in capsys.readouterr().err
        shutil.rmtree(kept)
    Path("photos").mkdir()
    Path("photos/report.json").write_text("{}")
    Path("file").write_text("mine")
    for out, message in (
        ("report", "notes.txt"),
        ("photos", "something else"),
        ("file", "a report needs a folder"),
        (".", "is the current folder or around it"),
    ):
        entries = everything_in(models.parent)
        capsys.readouterr()
        assert main(["evaluate", "models", "--out", out]) == 2
        assert message in capsys.readouterr().err
        assert everything_in(models.parent) == entries
    # a folder of .npy files is not a report either
    assert main(["evaluate", "models/v1.npz", "--out", "models/v2"]) == 2


def images(folder: Path, name: str, count: int) -> Path:
    (folder / name).mkdir()
    for i in range(count):
        image_module.new("RGB", (200 if i % 2 else 28, 28), (i % 256, 80, 120)).save(folder / name / f"{i}.png")
    (folder / f"{name}.txt").write_text("".join(f"{name}/{i}.png\n" for i in range(count)))
    return folder / f"{name}.txt"


def test_images_of_the_worst_regressions(models, capsys, monkeypatch) -> None:
    monkeypatch.setattr("simplexfix.report.figures.SHOWN", 5)
    query, gallery = images(models.parent, "q", QUERIES), images(models.parent, "g", 200)
    assert main(["evaluate", "models", "--images", str(query), "--gallery-images", str(gallery)]) == 0
    content = json.loads(Path("report/report.json").read_text())
    worst = content["regressions"]["worst"][0]
    with image_module.open("report/figures/regressions.png") as sheet:
        assert min(sheet.size) > 100
    page = Path("report/report.html").read_text()
    assert len(content["regressions"]["worst"]) > 5
    assert page.count("<figure>") == 5
    assert page.count('alt="query ') == page.count('alt="found: ') == page.count('alt="right: ') == 5
    assert f'alt="found: gallery item {worst["found_item"]} of class {worst["found_label"]}"' in page
    # only images that are shown are read; none of these may be missing
    (models.parent / "q" / f"{worst['query']}.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    before = Path("report/report.html").read_bytes()
    capsys.readouterr()
    assert main(["evaluate", "models", "--images", str(query)]) == 2
    assert f"the image {models.parent}/q/{worst['query']}.png cannot be read" in capsys.readouterr().err
    assert Path("report/report.html").read_bytes() == before


def test_bad_lists_of_images(models, capsys) -> None:
    (models.parent / "short.txt").write_text("a.png\n")
    (models.parent / "binary.txt").write_bytes(b"\xff\x00" * 300)
    for name, message in (
        ("short.txt", "short.txt has 1 lines, query has 300 rows"),
        ("binary.txt", "binary.txt must be text in UTF-8"),
        ("missing.txt", "missing.txt"),
    ):
        assert main(["evaluate", "models", "--images", name]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("drawn")
def test_names_of_files_are_text_and_neither_html_nor_mathematics(models) -> None:
    os.rename(models / "v10.npz", models / "v10 $\\frac$ [red]<b>&\"'.npz")
    assert main(["evaluate", "models"]) == 0
    for figure in Path("report/figures").glob("*.svg"):
        assert "\\math" not in figure.read_text(), figure  # the SVG has each text as a comment beside its shapes
    assert "<!-- query by -->" in Path("report/figures/matrix.svg").read_text()
    page = Path("report/report.html").read_text()
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;&#34;" in page


def test_output_is_ascii_if_the_terminal_is(models) -> None:
    done = command(
        "evaluate", "models", folder=models.parent, environment={"PYTHONIOENCODING": "ascii"}, before=without_figures
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    assert done.stdout.decode("ascii").count("+ finds more") == 1


@pytest.mark.usefixtures("drawn")
def test_matplotlib_missing_is_named_with_its_remedy(models, capsys, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "simplexfix.cli._"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", "models"]) == 2
    assert "evaluate needs matplotlib: pip install 'simplexfix[cli]'" in capsys.readouterr().err


def test_a_query_set_that_is_the_gallery(models, capsys) -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((200, 32)).astype(np.float32), np.repeat(np.arange(50), 4)
    noise = {"query": rows, "gallery": rows, "query_labels": labels, "gallery_labels": labels}
    save(models, "noise.npz", noise)
    save(models, "ids.npz", {**noise, "query_ids": np.arange(200), "gallery_ids": np.arange(200)})
    for protocol in ("nearest_class_mean", "instance"):
        assert main(["evaluate", str(models / "noise.npz"), "--protocol", protocol]) == 0
        assert "noise: 200 of 200 queries have a gallery row of the same bits" in " ".join(
            capsys.readouterr().out.split()
        )
        page = Path("report/report.html").read_text()
        assert "noise: 200 of 200 queries have a gallery row of the same bits" in page
        content = json.loads(Path("report/report.json").read_text())
        assert content["queries_in_gallery"] == {"left_out_by_id": 0, "bit_equal": [200]}
        assert content["matrix"][0][0] > 0.7
        assert main(["evaluate", str(models / "ids.npz"), "--json", "--protocol", protocol]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["queries_in_gallery"] == {"left_out_by_id": 200, "bit_equal": [0]}
        assert content["matrix"][0][0] < 0.06
        assert "200 queries are gallery items themselves, by their ids" in Path("report/report.html").read_text()


def test_names_as_labels_and_ignored_labels(models, capsys) -> None:
    names = np.array(["junk", *(f"class {i:02}" for i in range(1, CLASSES))])
    for name, clear in (("a.npz", 2.0), ("b.npz", 3.0)):
        made = features(1, clear)
        save(models, name, {**made, **{key: names[made[key]] for key in ("query_labels", "gallery_labels")}})
        save(models, f"n{name}", made)
    scores = []
    for given, junk in ((("a.npz", "b.npz"), "junk"), (("na.npz", "nb.npz"), "0")):
        paths = [str(models / name) for name in given]
        assert main(["evaluate", *paths, "--json", "--ignored-label", junk]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["label_names"] == (sorted(names) if junk == "junk" else None)
        assert content["ignored"]["queries"] == int((features(1, 2.0)["query_labels"] == 0).sum()) > 0
        assert content["counts"]["classes"] == CLASSES - 1
        scores.append(content["matrix"])
    assert scores[0] == scores[1]
    assert main(["evaluate", str(models / "na.npz"), "--ignored-label", "77"]) == 2
    assert "ignored_labels holds '77', which is the label of no query and no gallery item" in capsys.readouterr().err
    assert main(["evaluate", str(models / "na.npz"), "--ignored-label", "junk"]) == 2
    assert "ignored_labels holds 'junk', and labels are integers" in capsys.readouterr().err
