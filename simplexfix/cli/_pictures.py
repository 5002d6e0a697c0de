"""The demo's two pictures: compatibility matrices side by side, and neighbours before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..report.figures import default_style
from ..retrieval import cosine_topk
from ..training.omniglot import OmniglotData

HIT, MISS = "#1a7f37", "#cf222e"
NEIGHBOURS, QUERIES = 5, 6


@default_style({})
def save_matrices(path: Path, methods: dict[str, Any], titles: dict[str, str]) -> None:
    """Heat maps of the nearest-class-mean matrices, a column per method, a row per search."""
    splits = ("seen", "unseen")
    figure = Figure(figsize=(3.3 * len(titles), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(splits), len(titles), squeeze=False)
    for row, split in zip(grid, splits, strict=True):
        for axes, (method, title) in zip(row, titles.items(), strict=True):
            result = methods[method][split]["nearest_class_mean"]
            matrix = np.array([[np.nan if x is None else 100 * x for x in line] for line in result["matrix"]])
            axes.imshow(matrix, cmap="viridis", vmin=0, vmax=100)
            for i, j in np.argwhere(~np.isnan(matrix)):
                # an upgrade that beats the old version's own search stands in bold
                better = i > j and matrix[i, j] > matrix[j, j]
                axes.text(
                    j,
                    i,
                    f"{matrix[i, j]:.0f}",
                    ha="center",
                    va="center",
                    color="black" if matrix[i, j] > 60 else "white",
                    fontweight="bold" if better else "normal",
                    fontsize=12,
                )
            size = len(matrix)
            axes.axhline(size - 1.5, color="white", linewidth=3)  # above the replacement
            axes.set_xticks(range(size), [f"v{j}" for j in range(size)])
            axes.set_yticks(range(size), [f"v{i}" for i in range(size)])
            axes.set_title(f"{title}\n{split}: AC {result['AC']:.2f}, AA {100 * result['AA']:.0f}", fontsize=10)
            for side in axes.spines.values():
                side.set_visible(False)
        row[0].set_ylabel("query by")
    for axes in grid[-1]:
        axes.set_xlabel("gallery by")
    figure.suptitle("Accuracy in percent. v3 replaces the network; no gallery was ever reprocessed.", fontsize=11)
    figure.savefig(path, dpi=110)


@default_style({})
def save_neighbours(
    path: Path, data: OmniglotData, embeddings: dict[str, Any], titles: dict[str, str], seed: int
) -> None:
    """Queries and their nearest items of the v0 gallery, before (v2) and after (v3) the replacement."""
    query, gallery = data.query["seen"], data.gallery["seen"]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(query.labels), generator=generator)[:QUERIES]
    panels = [(method, version) for method in ("hoc", "er") for version in (2, 3)]
    columns = 1 + len(panels) * (NEIGHBOURS + 1)
    figure = Figure(figsize=(0.42 * columns, 0.42 * QUERIES + 1.0))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.0, 0.98, 0.86))
    axes.set_xlim(-0.6, columns)
    axes.set_ylim(QUERIES - 0.4, -0.6)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.text(0, -0.75, "query", ha="center", va="bottom", fontsize=9)
    for row, at in enumerate(chosen.tolist()):
        _draw(axes, query.inputs[at], 0, row, None)
    for panel, (method, version) in enumerate(panels):
        rows = embeddings[method]
        _, ids = cosine_topk(rows["query"]["seen"][version][chosen], rows["gallery"]["seen"][0], NEIGHBOURS)
        left = 1.5 + panel * (NEIGHBOURS + 1)
        when = "before: v2 searches" if version == 2 else "after: v3 searches"
        axes.text(left + 2, -0.75, f"{titles[method]}\n{when}", ha="center", va="bottom", fontsize=9)
        for row in range(len(chosen)):
            for rank in range(NEIGHBOURS):
                item = int(ids[row, rank])
                hit = bool(gallery.labels[item] == query.labels[chosen[row]])
                _draw(axes, gallery.inputs[item], left + rank, row, hit)
    figure.suptitle(
        "The five nearest items of the v0 gallery, seen characters; ✓ green: right, ✗ red: wrong", fontsize=10, y=0.985
    )
    figure.savefig(path, dpi=130)


def _draw(axes: Any, image: torch.Tensor, x: float, y: float, hit: bool | None) -> None:
    half = 0.42
    axes.imshow(1 - image.numpy(), cmap="gray", vmin=0, vmax=1, extent=(x - half, x + half, y + half, y - half))
    colour = "black" if hit is None else HIT if hit else MISS
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
