"""Trains four versions on handwriting, replaces the model, and searches the old galleries, in two minutes.

A small convolutional network learns the characters of six alphabets in steps: v0 from scratch, v1 and v2
fine-tuned, and then a wider network, pre-trained apart, takes its place: v3.  The galleries of v0, v1 and v2
stay as they were.  Three methods do this with the same data, budget and networks: the fixed simplex with
HOC, the fixed simplex alone, and experience replay (ER) with an ordinary learnable classifier.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..compatibility import average_accuracy, average_compatibility, compatibility_matrix
from ..labelled import LabelledItems
from ..models import EmbeddingModel
from ..retrieval import PROTOCOLS
from ..training.items import Items
from ..training.omniglot import METHODS, UNSEEN_ALPHABETS, OmniglotData, Recipe, split_omniglot, train_methods
from ._terminal import console

TITLES = {"hoc": "d-simplex with HOC", "simplex": "d-simplex, CE only", "er": "ER: learnable head"}
THREADS = 1  # in each of the two trainings that run side by side: a seed gives the same numbers whatever the cores


def run(arguments: argparse.Namespace) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from . import _pictures

    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    recipe = Recipe().quick() if arguments.quick else Recipe()
    data = split_omniglot(recipe, arguments.seed)
    # progress goes to standard error, so that --json leaves standard output to the report
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(sys.stderr)) as progress:
        bar = progress.add_task("", total=recipe.steps(METHODS))
        with _threads(THREADS):
            versions = train_methods(
                data,
                recipe,
                arguments.seed,
                on_step=lambda stage: progress.update(bar, description=stage, advance=1),
            )
    trained = time.perf_counter()
    with _threads(THREADS):
        embeddings = {method: _extract(models, data) for method, models in versions.items()}
    report: dict[str, Any] = {
        "seed": arguments.seed,
        "quick": arguments.quick,
        "recipe": asdict(recipe),
        "versions": _describe(recipe),
        "methods": {method: _judge(rows, data) for method, rows in embeddings.items()},
    }
    judged = time.perf_counter()
    _pictures.save_matrices(arguments.out / "matrices.png", report["methods"], TITLES)
    _pictures.save_neighbours(arguments.out / "neighbours.png", data, embeddings, TITLES, arguments.seed)
    done = time.perf_counter()
    report["seconds"] = {"training": trained - began, "search": judged - trained, "pictures": done - judged}
    text = json.dumps(report, indent=1)
    (arguments.out / "report.json").write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        _print(report, arguments.out, done - began)
    return 0


# "gallery" | "query" -> "seen" | "unseen" -> a tensor per version
Embeddings = dict[str, dict[str, list[torch.Tensor]]]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's number of threads, as it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _extract(models: list[EmbeddingModel], data: OmniglotData) -> Embeddings:
    """What each version stores of the gallery, once, and what it sends as queries."""

    def rows(items: Items) -> list[torch.Tensor]:
        return [model.extract(items.inputs.float().unsqueeze(1)) for model in models]

    return {
        "gallery": {split: rows(items) for split, items in data.gallery.items()},
        "query": {split: rows(items) for split, items in data.query.items()},
    }


def _judge(embeddings: Embeddings, data: OmniglotData) -> dict[str, Any]:
    judged: dict[str, Any] = {}
    for split in data.query:
        judged[split] = {}
        items = LabelledItems(data.query[split].labels, data.gallery[split].labels)
        parts = zip(embeddings["query"][split], embeddings["gallery"][split], strict=True)
        versions = [items.version(query, gallery) for query, gallery in parts]
        for name, protocol in PROTOCOLS.items():
            matrix = compatibility_matrix(versions, protocol)
            rows = [[None if value != value else float(value) for value in row] for row in matrix]
            judged[split][name] = {
                "matrix": rows,
                "AC": average_compatibility(matrix),
                "AA": average_accuracy(matrix),
                "kept": [float(matrix[-1, j] / max(matrix[j, j], 1e-9)) for j in range(len(matrix) - 1)],
            }
    return judged


def _describe(recipe: Recipe) -> list[str]:
    counts = [sum(recipe.new_classes[: t + 1]) for t in range(4)]
    return [
        f"v0: {recipe.width} channels, {counts[0]} characters",
        f"v1: v0 fine-tuned, {counts[1]} characters",
        f"v2: v1 fine-tuned, {counts[2]} characters",
        f"v3: replaced by {recipe.replacement_width} channels pre-trained on {recipe.pretrain_classes} characters, "
        f"fine-tuned, {counts[3]} characters",
    ]


def _print(report: dict[str, Any], out: Path, seconds: float) -> None:
    from rich.table import Table

    terminal = console(sys.stdout)
    for line in report["versions"]:
        terminal.print(f"  {line}", highlight=False)
    searches = {
        "seen": "held-out drawings of the characters that v0 learned",
        "unseen": f"alphabets that no version saw ({', '.join(UNSEEN_ALPHABETS)})",
    }
    for split, meaning in searches.items():
        terminal.print(f"\n[bold]{split}[/bold]: {meaning}; accuracy in percent, rows search columns", highlight=False)
        for method, title in TITLES.items():
            table = Table(title=title, title_justify="left", box=None, pad_edge=False)
            table.add_column("")
            for heading in ("class mean", "instance"):
                for j in range(4):
                    table.add_column(f"{heading}\nv{j} gallery" if j == 0 else f"\nv{j}", justify="right")
            scores = report["methods"][method][split]
            for i in range(4):
                cells = [_cell(scores[name]["matrix"], i, j) for name in PROTOCOLS for j in range(4)]
                table.add_row(f"v{i} queries", *cells)
            terminal.print(table)
            terminal.print(
                "  "
                + "; ".join(
                    f"{name.replace('_', ' ')}: AC {scores[name]['AC']:.2f}, AA {100 * scores[name]['AA']:.1f}"
                    for name in PROTOCOLS
                ),
                highlight=False,
            )
    terminal.print()
    for method, title in TITLES.items():
        terminal.print(f"[bold]{title}.[/bold] {_in_words(report['methods'][method])}", highlight=False)
    terminal.print(f"\n{seconds:.0f} s; report.json, matrices.png and neighbours.png are in {out}", highlight=False)


def _cell(matrix: list[list[float | None]], i: int, j: int) -> str:
    value = matrix[i][j]
    if value is None:
        return ""
    own = matrix[j][j]
    colour = "" if i == j or own is None else "green" if value > own else "yellow" if value > 0.75 * own else "red"
    text = f"{100 * value:.1f}"
    return f"[{colour}]{text}[/{colour}]" if colour else text


def _in_words(scores: dict[str, Any]) -> str:
    """What became of the v0 gallery when v3, the replacement, searched it."""
    sentences = []
    for split in ("seen", "unseen"):
        result = scores[split]["nearest_class_mean"]
        own, cross, kept = result["matrix"][0][0], result["matrix"][3][0], result["kept"][0]
        sentences.append(
            f"{split}: v0 itself found {100 * own:.0f} % of its queries in its gallery, the replacement finds "
            f"{100 * cross:.0f} % there: {_verdict(kept)}"
        )
    return "; ".join(sentences) + "."


def _verdict(kept: float) -> str:
    """In words, the share of the old accuracy that is left."""
    for least, words in ((1.0, "as good as ever"), (0.75, "still searchable"), (0.25, "damaged")):
        if kept >= least:
            return words
    return "lost"
