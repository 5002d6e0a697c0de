"""Tests the pages: snippets run, links exist, and promises name existing tests."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, snippet

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.cli import main
from simplexfix.models import EmbeddingModel, FeatureMLP
from simplexfix.training import RunConfig, class_order, read_config

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks_of(page: str, language: str) -> list[str]:
    """Returns the code blocks of a page of docs."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_snippets_of_the_readme_run_in_order() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["ids"].shape == (3, 5)
    assert names["new_head"].num_classes == 120
    assert names["new_queries"].shape[1:] == names["stored"].shape[1:]
    names["loss"].backward()


def test_commands_of_the_readme_run_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the commands on versions with growing accuracy in one space."""
    rng = np.random.default_rng(0)
    labels = {"query_labels": rng.integers(8, size=400), "gallery_labels": rng.integers(8, size=200)}
    clean = {name[:-7]: np.eye(16)[ids] for name, ids in labels.items()}
    noise = {name: rng.standard_normal(rows.shape) for name, rows in clean.items()}
    for names, size in ((("old", "v0"), 0.9), (("v1",), 0.6), (("new", "v2"), 0.3)):
        rows = {name: (clean[name] + size * noise[name]).astype(np.float32) for name in clean}
        for name in names:
            np.savez(tmp_path / f"{name}.npz", **rows, **labels)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    commands = re.findall(
        r"^\$ simplexfix (.*)$", "\n".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)), re.MULTILINE
    )
    assert [command.split()[0] for command in commands] == ["gate", "evaluate"]
    assert [main(shlex.split(command, comments=True)) for command in commands] == [0, 0]
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_snippets_of_the_methods_page_run(tmp_path, monkeypatch) -> None:
    """Runs the snippets of docs/guides/methods.md in order: a second version finds items in the first one's gallery."""
    image = pytest.importorskip("PIL.Image", reason="the page reads a folder of images")
    draw = np.random.default_rng(0)
    centres, labels = draw.normal(size=(10, 12)), np.arange(400) % 10
    features = torch.from_numpy(centres[labels] + 0.3 * draw.normal(size=(400, 12))).float()
    cifar = tmp_path / "data" / "cifar-100-binary"
    cifar.mkdir(parents=True)
    (cifar / "train.bin").write_bytes(draw.integers(0, 20, 3074 * 3, np.uint8).tobytes())
    (cifar / "fine_label_names.txt").write_text("\n".join(f"class{i}" for i in range(100)))
    (tmp_path / "data" / "own" / "cat").mkdir(parents=True)
    image.new("RGB", (40, 50), (1, 2, 3)).save(tmp_path / "data" / "own" / "cat" / "a.png")
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of("guides/methods.md", "python")
    assert len(blocks) == 5
    names: dict[str, Any] = {"features": features, "labels": torch.from_numpy(labels)}
    for block in blocks:
        exec(compile(block, "docs/guides/methods.md", "exec"), names)
    first, last = names["versions"]
    ids = class_order(names["labels"], seed=0).argsort()[labels]  # class ids as the tasks count them
    _, slots = last.head.predict(last.backbone(features))
    assert (slots[:, 0] == last.head.slots.lookup("default", ids)).double().mean() > 0.9
    known = ids < 6  # classes of both versions
    old, new = (version.extract(features[known]) for version in (first, last))
    assert old.shape == (240, 32)
    nearest = (new @ old.T).fill_diagonal_(-1).argmax(1)  # an item's own old embedding does not count
    assert (ids[known][nearest] == ids[known]).double().mean() > 0.9
    assert (len(names["rows"]), len(names["again"])) == (16, 16)
    assert names["batch"].shape == (3, 3, 32, 32)
    assert names["own"].images.shape == (1, 3, 32, 32)


def test_the_snippets_of_the_evaluation_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the snippets on a version that is better than the one before; half of the queries are gallery items."""
    from simplexfix.retrieval import Protocol

    monkeypatch.chdir(tmp_path)
    draw, query_labels, gallery_labels = np.random.default_rng(0), np.arange(300) % 6, np.arange(200) % 6
    names: dict[str, Any] = {
        "query_labels": query_labels, "gallery_labels": gallery_labels, "Protocol": Protocol,
        "query_ids": np.arange(300) + 100, "gallery_ids": np.arange(200),
    }  # fmt: skip
    for name, noise in (("old", 0.8), ("new", 0.4)):
        for part, labels in (("query", query_labels), ("gallery", gallery_labels)):
            rows = np.eye(8)[labels] + noise * draw.standard_normal((len(labels), 8))
            names[f"{name}_{part}"] = rows.astype(np.float32)
    judged = [f"{query + 100}\t{item}\t1" for query in range(300) for item in (query % 6, query % 6 + 6)]
    Path("qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    text = (ROOT / "docs" / "guides" / "evaluation.md").read_text()
    first, second = blocks_of("guides/evaluation.md", "python")
    exec(compile(first, "docs/guides/evaluation.md", "exec"), names)
    assert names["result"].passed
    assert names["report"].matrix[1][0] > names["report"].matrix[0][0]
    assert (tmp_path / "report" / "report.html").is_file()
    assert names["recall"] > 0.05
    own = re.search(r"`(Protocol\(.*\))`", text)
    cmc = eval(own[1], names)
    assert names["upgrade_gate"](names["v0"], names["v1"], protocol=cmc).scores["new_on_old"] > 0.9
    assert names["backfill_curve"](names["v0"], names["v1"], protocol=cmc).protocol == "CMC"
    with pytest.raises(ValueError, match="the custom Protocol 'CMC'; compatibility_matrix, upgrade_gate and"):
        names["evaluate"]([names["v0"], names["v1"]], protocol=cmc)
    exec(compile(second, "docs/guides/evaluation.md", "exec"), names)
    assert names["report"].protocol == "ndcg@10"
    assert names["ndcg"].shape == (300,)
    assert 0 < names["ndcg"].mean() < 1


def test_the_snippets_of_the_gallery_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the page on two versions with one simplex; the first one uses half of the feature columns."""
    monkeypatch.chdir(tmp_path)
    draw, slots = torch.Generator().manual_seed(0), SlotRegistry(32)
    slots.add("default", range(10))
    centres = torch.randn(10, 12, generator=draw)

    def features(labels: torch.Tensor) -> torch.Tensor:
        return centres[labels] + 0.9 * torch.randn(len(labels), 12, generator=draw)

    torch.manual_seed(0)
    model = EmbeddingModel(FeatureMLP(12), SimplexHead.from_slots(slots, 12))
    optimizer, train = torch.optim.Adam(model.parameters(), lr=0.01), torch.arange(1000) % 10
    rows = features(train)
    for _ in range(100):
        optimizer.zero_grad()
        model.head(model.backbone(rows), train).backward()
        optimizer.step()
    model.save_pretrained("models/v1")
    with torch.no_grad():
        model.head.junction.weight[:, 6:] = 0
    model.save_pretrained("models/v0")
    ids, labels = torch.arange(400) * 3, torch.arange(400) % 10
    photos = features(labels)
    names: dict[str, Any] = {
        "ids": ids, "photos": photos, "shops": (labels % 4).tolist(), "queries": features(labels),
        "query_labels": train, "item_labels": train, "labelled_queries": features(train),
        "labelled_items": features(train), "load": lambda batch: photos[batch // 3],
    }  # fmt: skip
    blocks = blocks_of("guides/gallery.md", "python")
    # snippets that need a server run in tests/gallery
    blocks = [block for block in blocks if "postgresql://" not in block and "http://" not in block]
    assert len(blocks) == 5
    for block in blocks[:3]:
        exec(compile(block, "docs/guides/gallery.md", "exec"), names)
    gallery, hits = names["gallery"], names["hits"]
    assert (labels[hits.ids[:, 0] // 3] == labels).double().mean() > 0.5
    assert hits.accepted.any()
    assert not hits.accepted.all()
    assert [entry["rows"] for entry in gallery.status()["versions"]] == [0, 400]
    for block in blocks[3:]:
        exec(compile(block, "docs/guides/gallery.md", "exec"), names)
    assert [event["event"] for event in gallery.history()] == [
        "created", "admitted", "backfill", "backfill finished", "rolled back", "admitted", "backfill",
        "backfill finished", "retired",
    ]  # fmt: skip
    assert len(names["index"]) == 400
    assert names["second"].why_not_search(names["first"]) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_test_names(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"\btest_[a-z_0-9]+\b(?!\.(?:py|cpp))", text):
        assert f"def {name}(" in tests, f"{page.name} names {name}"
    for path in re.findall(r"`((?:tests|csrc|simplexfix|docs|benchmarks|tools)/[\w./-]+)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


MODULES = sorted(
    page.stem if page.stem == "simplexfix" else f"simplexfix.{page.stem}"
    for page in (ROOT / "docs" / "reference").glob("*.md")
    if page.stem not in ("cli", "formats", "glossary")
)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_print_what_they_say(module: str) -> None:
    package = importlib.import_module(module)
    runner = doctest.DocTestRunner()
    for name in package.__all__:
        for example in doctest.DocTestFinder().find(getattr(package, name), name, globs={}):
            runner.run(example)
    assert runner.tries > 0 or module == "simplexfix.integrations"
    assert runner.failures == 0, "see the output above"


@pytest.mark.parametrize(
    "module", ["simplexfix", "simplexfix.functional", "simplexfix.neighbours", "simplexfix.polytopes"]
)
def test_each_operator_has_an_example(module: str) -> None:
    package = importlib.import_module(module)
    functions = [getattr(package, name) for name in package.__all__]
    missing = [f.__name__ for f in functions if inspect.isfunction(f) and ">>>" not in f.__doc__]
    assert not missing


def test_names_of_the_package_exist() -> None:
    """Checks each name `simplexfix.x.y` in pages and docstrings, so that renamed objects are renamed there too.

    Names of integrations are looked up in their source, as their libraries may be missing.
    """
    sources = [*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "simplexfix").rglob("*.py")]
    missing = set()
    for name in {found for path in sources for found in re.findall(r"`(simplexfix(?:\.\w+)+)", path.read_text())}:
        if integration := re.fullmatch(r"simplexfix\.integrations\.(\w+)\.?(\w*)", name):
            file = ROOT / "simplexfix" / "integrations" / f"{integration[1]}.py"
            if not file.exists() or (integration[2] and f'"{integration[2]}"' not in file.read_text()):
                missing.add(name)
            continue
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.add(name)
    assert not missing


def test_no_page_names_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(^|\s)/(home|root|work|opt)/", page.read_text()), page.name


def test_the_table_of_gpu_floors_is_what_its_script_prints(capsys, monkeypatch) -> None:
    script = str(ROOT / "benchmarks" / "gpu_floor.py")
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(script, run_name="__main__")
    table = capsys.readouterr().out
    assert table.count("not measured") >= 30
    assert table in (ROOT / "docs" / "measurements" / "performance.md").read_text()


def test_the_configurations_of_the_training_page_are_valid() -> None:
    blocks = blocks_of("guides/training.md", "yaml")
    whole, images, tasks = blocks
    config = read_config(RunConfig, yaml.safe_load(whole))
    assert config.data.kind == "features"
    assert config.method.normalize
    assert read_config(RunConfig, {**yaml.safe_load(whole), **yaml.safe_load(images)}).model.pretrained
    content = yaml.safe_load(whole)
    content["tasks"] |= yaml.safe_load(tasks)["tasks"]
    assert read_config(RunConfig, content).tasks.replacements[2].source == "tasks"


def test_the_program_of_the_training_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the program with one step instead of five thousand."""
    monkeypatch.chdir(tmp_path)
    block, *_ = blocks_of("guides/training.md", "python")
    assert "Schedule(5000," in block
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (120, 3, 32, 32), generator=draw, dtype=torch.uint8)
    names: dict[str, Any] = {"images": images, "labels": torch.arange(120) % 40}
    exec(compile(block.replace("Schedule(5000,", "Schedule(1,"), "docs/guides/training.md", "exec"), names)
    assert names["embeddings"].shape == (100, 1023)
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} == {"task-00", "task-01", "task-02"}


def test_the_snippets_of_the_replacing_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simplexfix.adapters import Procrustes, SimplexJunction, WhitenedProcrustes, select

    monkeypatch.setattr(select, "first_candidates", lambda _: [Procrustes(), WhitenedProcrustes(), SimplexJunction()])
    monkeypatch.setattr(select, "STEPS", (1,))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "guides" / "replacing.md").read_text()
    rng = np.random.default_rng(0)
    labels = rng.integers(12, size=240)
    hidden = rng.standard_normal((12, 8))[labels] + 0.4 * rng.standard_normal((240, 8))
    rows = [(hidden @ rng.standard_normal((8, width))).astype(np.float32) for width in (10, 12, 12)]
    names: dict[str, Any] = {"labels": labels, "old": rows[0], "new": rows[1], "v0": rows[0], "v1": rows[1]}
    names |= {"v2": rows[2], "old_sample": rows[0][:9], "new_sample": rows[1][:9]}
    names |= {"new_queries": torch.from_numpy(rows[1]), "stored": torch.from_numpy(rows[0])}
    old_encoder = torch.nn.Linear(8, 384).requires_grad_(False)
    moved = torch.randn(384)
    names |= {"old_encoder": old_encoder, "new_encoder": lambda queries: old_encoder(queries) + moved}
    names |= {"batches": torch.randn(3, 20, 8).unbind(), "asked": torch.randn(5, 8)}
    blocks = blocks_of("guides/replacing.md", "python")
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "replacing.md", "exec"), names)
    assert names["query"].shape == (5, 384)
    assert names["drift"].explained_fraction(2) > 0.5
    assert names["items"].shape == (240, 10)
    assert set(names["chain"].adapters) == {(1, 0), (2, 0), (2, 1)}
    for name, array in (("old", rows[0]), ("new", rows[1]), ("labels", labels), ("stored", rows[0])):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "new-queries.npy", rows[1])
    commands = re.findall(r"^simplexfix (.*)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["adapt", "embed", "embed"]
    assert [main(shlex.split(command, comments=True)) for command in commands] in ([0, 0, 0], [1, 0, 0])


def test_the_tutorial_for_search_engineers_runs_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command succeeds and prints the lines that the page shows, except times and fingerprints."""
    monkeypatch.chdir(tmp_path)
    (files,) = blocks_of("tutorials/search_engineer.md", "python")
    exec(compile(files, "search_engineer.md", "exec"), {})
    commands = []
    for block in blocks_of("tutorials/search_engineer.md", "console"):
        for part in block.split("$ simplexfix ")[1:]:
            command, *expected = part.rstrip().split("\n")
            commands.append(command.split()[0])
            assert main(shlex.split(command)) == 0, command
            printed = capsys.readouterr().out.splitlines()
            if commands[-1] == "gallery":  # these lines hold no number that depends on the machine's rounding
                words = {" ".join(line.split()[:2]) for line in printed}
                assert {" ".join(line.split()[:2]) for line in expected if line != "..."} <= words, command
    assert commands == ["gallery", "gallery", "adapt", "gate", *["gallery"] * 5]


def test_the_tutorial_for_trainers_runs_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks_of("tutorials/trainer.md", "python"):
        exec(compile(block, "trainer.md", "exec"), names)
    matrix = names["matrix"]
    assert matrix[1, 1] > matrix[1, 0] > matrix[0, 0]  # the page's table
    assert set(names["hits"].versions.ravel().tolist()) == {0}  # new queries, old vectors
    assert (tmp_path / "drawings").is_dir()


def test_the_snippet_of_faiss_runs() -> None:
    faiss = pytest.importorskip("faiss", reason="the extra faiss is not installed")
    from simplexfix import CosineIndex

    draw = np.random.default_rng(0)
    index, queries = CosineIndex(8), draw.standard_normal((5, 8), np.float32)
    index.add(draw.standard_normal((50, 8), np.float32), range(100, 150))
    names: dict[str, Any] = {"index": index, "queries": queries, "faiss": faiss, "CosineIndex": CosineIndex}
    exec(snippet("integrations.md", "faiss"), names)
    for found in (names["ids"], names["again"].search(queries, 10)[1]):
        np.testing.assert_array_equal(found, index.search(queries, 10)[1])


def test_the_reference_has_every_integration() -> None:
    """The test does not import the integrations, as their libraries may be missing."""
    page = (ROOT / "docs" / "reference" / "integrations.md").read_text()
    for file in (ROOT / "simplexfix" / "integrations").glob("[!_]*.py"):
        (public,) = re.findall(r"^__all__ = (\[.*?\])", file.read_text(), re.MULTILINE | re.DOTALL)
        for name in ast.literal_eval(public):
            assert f"::: simplexfix.integrations.{file.stem}.{name}\n" in page


# public names that only other packages of simplexfix use
_OF_THE_HOUSE = {
    "simplexfix.labelled": {
        "FeatureRows", "GalleryClasses", "Ids", "Rows", "check_versions", "check_widths", "ignoring", "is_version",
        "load_rows", "map_array", "read_column", "read_features", "read_hits", "read_ids", "read_integers",
        "read_query_scores", "row_slices", "row_squares", "to_float32", "unit_rows",
    },
    "simplexfix": {"__version__", "functional", "polytopes"},
    "simplexfix.retrieval": {"metrics", "verification"},
}  # fmt: skip


def test_the_reference_has_every_command() -> None:
    generated = subprocess.run([sys.executable, ROOT / "tools" / "cli_reference.py"], capture_output=True, text=True)
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert page == generated.stdout, "python tools/cli_reference.py > docs/reference/cli.md"


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module: str) -> None:
    listed = {  # a name that two packages export is on the page of one of them
        name.rsplit(".", 1)[1]
        for other in (ROOT / "docs" / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", other.read_text(), re.MULTILINE)
    }
    public = set(importlib.import_module(module).__all__) - _OF_THE_HOUSE.get(module, set())
    assert public <= listed, f"docs/reference lacks {sorted(public - listed)}"
