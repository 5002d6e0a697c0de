"""The demo's picture of nearest neighbours before and after the model replacement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..models import EmbeddingModel
from ..report.colours import LIGHT
from ..report.figures import default_style
from ..retrieval import cosine_topk
from ..training import Items

__all__ = ["save_neighbours"]

NEIGHBOURS, QUERIES = 5, 6


@default_style({})
def save_neighbours(path: Path, runs: Mapping[str, Path], query: Items, gallery: Items, *, seed: int) -> None:
    """Draws some queries with their nearest items in the v0 gallery, found by v2 and by its replacement v3.

    Args:
        path: path of the PNG file.
        runs: folder of each run by its title.
        query, gallery: drawings [N, 28, 28] and their classes.
        seed: seed of the selection of queries.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = query.take(torch.randperm(len(query.labels), generator=generator)[:QUERIES])
    columns = 1 + 2 * len(runs) * (NEIGHBOURS + 1)
    figure = Figure(figsize=(0.42 * columns, 0.42 * QUERIES + 1.0))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.0, 0.98, 0.86))
    axes.set_xlim(-0.6, columns)
    axes.set_ylim(QUERIES - 0.4, -0.6)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.text(0, -0.75, "query", ha="center", va="bottom", fontsize=9)
    for row, image in enumerate(chosen.inputs):
        _draw(axes, image, 0, row, None)
    for panel, (title, ids) in enumerate(_found(runs, chosen, gallery)):
        left = 1.5 + panel * (NEIGHBOURS + 1)
        axes.text(left + 2, -0.75, title, ha="center", va="bottom", fontsize=9)
        for row, items in enumerate(ids.tolist()):
            for rank, item in enumerate(items):
                hit = bool(gallery.labels[item] == chosen.labels[row])
                _draw(axes, gallery.inputs[item], left + rank, row, hit)
    figure.suptitle(
        "The five nearest items of the v0 gallery, seen characters; ✓ green: right, ✗ red: wrong", fontsize=10, y=0.985
    )
    figure.savefig(path, dpi=130)


def _found(runs: Mapping[str, Path], query: Items, gallery: Items) -> Iterator[tuple[str, Tensor]]:
    """Yields the title of each panel and the found gallery rows [QUERIES, NEIGHBOURS]."""
    for title, folder in runs.items():
        v0, v2, v3 = (EmbeddingModel.from_pretrained(folder / f"task-{t:02d}" / "model") for t in (0, 2, 3))
        stored = v0.extract(gallery.inputs, prepare=v0.preprocessing)
        for when, version in (("before: v2 searches", v2), ("after: v3 searches", v3)):
            asked = version.extract(query.inputs, prepare=version.preprocessing)
            yield f"{title}\n{when}", cosine_topk(asked, stored, NEIGHBOURS)[1]


def _draw(axes: Any, image: Tensor, x: float, y: float, hit: bool | None) -> None:
    half = 0.42
    axes.imshow(1 - image.numpy(), cmap="gray", vmin=0, vmax=1, extent=(x - half, x + half, y + half, y - half))
    colour = "black" if hit is None else LIGHT.good if hit else LIGHT.bad
    axes.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, edgecolor=colour, linewidth=1.6))
    if hit is not None:
        axes.text(
            x + half - 0.02,
            y + half - 0.02,
            "✓" if hit else "✗",
            color=colour,
            fontsize=7,
            ha="right",
            va="bottom",
            fontweight="bold",
        )
