"""Figures of the evaluation report, each in a light and a dark theme."""

from __future__ import annotations

import functools
import io
import logging
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..compatibility import Regression, VersionPairs, compatibility_table
from ..compatibility.pairs import HISTOGRAM_BINS
from ..retrieval.verification import score_histogram
from .colours import DARK, LIGHT, Theme, readable, shade
from .evaluation import EvaluationReport

__all__ = ["Drawn", "Shown", "draw", "draw_matrices", "load_sheet"]

SHOWN = 24  # maximum number of regressions with images
PIXELS = 160  # longer side of a thumbnail
_FAMILY = "DejaVu Sans"  # included in matplotlib


@dataclass(frozen=True)
class Drawn:
    """A figure as SVG (PNG if it shows photographs) in both themes, with a description in words."""

    light: bytes
    dark: bytes
    words: str


@dataclass(frozen=True)
class Shown:
    """A regression with its images: "query", and the gallery items "found" and "own"."""

    regression: Regression
    images: dict[str, Image.Image]


def draw(report: EvaluationReport, sheet: Sequence[Shown]) -> dict[str, Drawn]:
    """Draws all figures of a report; returns them by file name."""
    figures = {"matrix.svg": _both(lambda theme: _matrix(report, theme), _matrix_words(report))}
    if report.upgrades:
        verbs = "improves and worsens" if report.has_scores else "mends and breaks"
        words = f"Queries that each upgrade {verbs} on the gallery of the version before, in percent."
        figures["flips.svg"] = _both(lambda theme: _flips(report, theme), words)
    if report.backfill:
        words = "Score against the fraction of the gallery that the newest version has extracted again, for each order."
        figures["backfill.svg"] = _both(lambda theme: _backfill(report, theme), words)
    if report.pairs is not None:
        words = "True-accept rate against false-accept rate of pairs, before the upgrade and after it."
        figures["roc.svg"] = _both(lambda theme: _roc(report, theme), words)
        words = "How scores of pairs of one class, and of two, are spread, before the upgrade and after it."
        figures["scores.svg"] = _both(lambda theme: _scores(report, theme), words)
    if sheet:
        figures["regressions.png"] = _both(
            lambda theme: _sheet(report, sheet, theme), "The worst regressions as images.", "png"
        )
    return figures


def load_sheet(regressions: Sequence[Regression], paths: Mapping[str, Sequence[Path]]) -> list[Shown]:
    """Reads the images of the worst regressions, and no others.

    Raises:
        ValueError: an image cannot be read; the message names its path.
    """
    shown = []
    for regression in regressions[:SHOWN]:
        images = {"query": _thumbnail(paths["query"][regression.query])}
        if "gallery" in paths:
            images["found"] = _thumbnail(paths["gallery"][regression.found_item])
            images["own"] = _thumbnail(paths["gallery"][regression.own_item])
        shown.append(Shown(regression, images))
    return shown


def _thumbnail(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            upright.thumbnail((PIXELS, PIXELS))
            return upright
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {path} cannot be read: {error}") from None


def _both(make: Callable[[Theme], Figure], words: str, kind: str = "svg") -> Drawn:
    return Drawn(_encode(make, LIGHT, kind), _encode(make, DARK, kind), words)


def _encode(make: Callable[[Theme], Figure], theme: Theme, kind: str) -> bytes:
    # no date and a fixed salt, so that equal reports have equal bytes
    options: dict[Any, Any] = {
        "svg.hashsalt": "simplexfix",
        "svg.fonttype": "path",
        "font.family": _FAMILY,
        "font.size": 8.5,
        "text.parse_math": False,  # a dollar sign in a version name is plain text
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with default_style(options), _no_font_log():
        figure = make(theme)
        _choose_fonts(figure)
        figure.set_facecolor(theme.ground)
        for axes in figure.axes:
            axes.set_facecolor(theme.ground)
        FigureCanvasAgg(figure)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


@contextmanager
def default_style(options: dict[Any, Any]) -> Iterator[None]:
    """Applies matplotlib's built-in defaults and these options, so that a user's matplotlibrc has no effect."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(options)
        yield


def _matrix_words(report: EvaluationReport) -> str:
    low, high = 100 * np.nanmin(report.matrix), 100 * np.nanmax(report.matrix)
    return f"Heat map of the compatibility matrix of {len(report.names)} versions, {low:.1f} to {high:.1f} percent."


def _matrix(report: EvaluationReport, theme: Theme) -> Figure:
    side = float(np.clip(0.62 * len(report.matrix), 2.6, 11)) + 1.6
    figure = Figure(figsize=(side + 0.7, side), layout="constrained")
    axes = figure.subplots()
    scale = float(np.nanmin(report.matrix)), float(np.nanmax(report.matrix))
    image = _heat_map(axes, report.matrix, report.names, theme, scale)
    axes.set_xlabel("gallery by")
    axes.set_ylabel("query by")
    _colour_bar(figure, image, axes)
    return figure


def draw_matrices(grid: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """Returns a PNG with the matrices of several version sequences, on one colour scale.

    Args:
        grid: search -> method -> `EvaluationReport.as_dict()`; one row per search and one column per method.
    """
    matrices = [np.array(entry["matrix"], dtype=float) for row in grid.values() for entry in row.values()]
    scale = float(np.nanmin(matrices)), float(np.nanmax(matrices))

    def make(theme: Theme) -> Figure:
        rows, columns = len(grid), len(matrices) // len(grid)
        figure = Figure(figsize=(3 * columns + 0.9, 3.5 * rows), layout="constrained")
        panels: Any = figure.subplots(rows, columns, squeeze=False)
        titled = [(f"{method}, {search}", entry) for search, row in grid.items() for method, entry in row.items()]
        for axes, (title, entry), matrix in zip(panels.flat, titled, matrices, strict=True):
            names = [version["name"] for version in entry["versions"]]
            image = _heat_map(axes, matrix, names, theme, scale)
            criteria = entry["criteria"]
            axes.set_title(f"{title}\nAC {criteria['AC']:.2f}, AA {100 * criteria['AA']:.1f}", fontsize=9)
        for axes in panels[:, 0]:
            axes.set_ylabel("query by")
        for axes in panels[-1]:
            axes.set_xlabel("gallery by")
        _colour_bar(figure, image, panels)
        return figure

    return _encode(make, LIGHT, "png")


def _heat_map(
    axes: Any, matrix: NDArray[np.float64], names: Sequence[str], theme: Theme, scale: tuple[float, float]
) -> Any:
    """Draws the cells with their scores in percent; `scale` holds the scores of the first and of the last colour."""
    size, (low, high) = len(matrix), scale
    colours = LinearSegmentedColormap.from_list("scores", theme.scale)
    spread = high - low or 1.0
    image = axes.imshow(100 * matrix, cmap=colours, vmin=100 * low, vmax=100 * (low + spread))
    compatible = compatibility_table(matrix).compatible
    for i, j in np.argwhere(~np.isnan(matrix)):
        ground = shade(theme, (matrix[i, j] - low) / spread)
        text = f"{100 * matrix[i, j]:.{1 if size <= 12 else 0}f}"
        mark = "" if i == j or size > 12 else "\n✓" if compatible[i, j] else "\n✗"
        axes.text(j, i, text + mark, ha="center", va="center", color=readable(ground), fontsize=9 if size <= 12 else 6)
    every = max(1, size // 16)
    ticks = range(0, size, every)
    axes.set_xticks(ticks, [_short(names[i]) for i in ticks], rotation=0 if size <= 6 else 60)
    axes.set_yticks(ticks, [_short(names[i]) for i in ticks])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _colour_bar(figure: Figure, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label("score in percent")


def _flips(report: EvaluationReport, theme: Theme) -> Figure:
    upgrades = report.successive_upgrades
    figure = Figure(figsize=(5.0, 0.7 + 0.26 * len(upgrades)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(upgrades))
    mended = np.array([100 * upgrade.positive_flip_rate for upgrade in upgrades])
    broken = np.array([100 * upgrade.negative_flip_rate for upgrade in upgrades])
    for values, colour in ((mended, theme.good), (-broken, theme.bad)):
        axes.barh(rows, values, color=colour, height=0.62)
        for row, value in zip(rows, values, strict=True):
            axes.annotate(
                f"{abs(value):.1f}",
                (value, row),
                xytext=(3 if colour == theme.good else -3, 0),
                textcoords="offset points",
                ha="left" if colour == theme.good else "right",
                va="center",
                color=theme.muted,
                fontsize=8,
            )
    reach = 1.18 * max(float(mended.max()), float(broken.max()), 0.5)
    axes.set_xlim(-reach, reach)
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    axes.set_yticks(rows, [f"{_short(report.names[u.old])} → {_short(report.names[u.new])}" for u in upgrades])
    axes.set_ylim(len(upgrades) - 0.4, -0.6)
    axes.tick_params(length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    lower, higher = ("worse", "better") if report.has_scores else ("broken", "mended")
    axes.set_xlabel(f"← {lower}      percent of queries      {higher} →")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


ORDER_WORDS = {
    "random": "in random order",
    "farthest_from_class_mean": "farthest from class mean first",
    "lowest_margin": "lowest margin first",
}


def _backfill(report: EvaluationReport, theme: Theme) -> Figure:
    figure = Figure(figsize=(5.0, 2.9), layout="constrained")
    axes = figure.subplots()
    styles = {
        "random": (theme.old, "--"),
        "farthest_from_class_mean": (theme.new, "-"),
        "lowest_margin": (theme.good, "-"),
    }
    for curve in report.backfill:
        colour, line = styles[curve.order_name]
        label = f"{ORDER_WORDS[curve.order_name]}: {100 * curve.area:.1f}"
        axes.plot(
            100 * curve.fractions,
            100 * curve.scores,
            line,
            color=colour,
            label=label,
            marker="o",
            markersize=3.5,
            linewidth=2,
        )
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlim(-1, 101)
    axes.set_xlabel("percent of the gallery extracted again")
    axes.set_ylabel("score in percent")
    legend = axes.legend(frameon=False, labelcolor=theme.ink, title="mean over the backfill, percent", alignment="left")
    legend.get_title().set_color(theme.muted)
    return figure


def _pairs(report: EvaluationReport, theme: Theme) -> list[tuple[str, VersionPairs, str]]:
    """Returns name, pair verification and colour of each version of the last upgrade."""
    pairs = report.pairs
    assert pairs is not None
    if pairs.after is None:
        return [(report.names[-1], pairs.before, theme.new)]
    return [(report.names[-2], pairs.before, theme.old), (report.names[-1], pairs.after, theme.new)]


def _roc(report: EvaluationReport, theme: Theme) -> Figure:
    figure = Figure(figsize=(5.0, 2.9), layout="constrained")
    axes = figure.subplots()
    for name, pairs, colour in _pairs(report, theme):
        label = f"{_short(name)}: equal error {100 * pairs.equal_error_rate:.2f} %"
        axes.plot(pairs.curve_far, 100 * pairs.curve_tar, color=colour, linewidth=2, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")  # the default formatter uses math text
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("false-accept rate")
    axes.set_ylabel("true-accept rate, percent")
    axes.set_ylim(top=101)
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    axes.legend(frameon=False, labelcolor=theme.ink, loc="lower right")
    return figure


def _scores(report: EvaluationReport, theme: Theme) -> Figure:
    versions, pairs = _pairs(report, theme), report.pairs
    figure = Figure(figsize=(5.0, 1.1 + 1.25 * len(versions)), layout="constrained")
    grid: Any = figure.subplots(len(versions), 1, sharex=True, squeeze=False)
    ends = []
    for at, (axes, (name, found, _)) in enumerate(zip(grid.flat, versions, strict=True)):
        edges, *kinds = score_histogram(found.results, HISTOGRAM_BINS)
        for counts, colour in zip(kinds, (theme.good, theme.bad), strict=True):
            axes.stairs(counts / counts.sum(), edges, color=colour, fill=True, alpha=0.45, linewidth=0)
            axes.stairs(counts / counts.sum(), edges, color=colour, linewidth=1.2)
            some = np.flatnonzero(counts)
            ends += [edges[some[0]], edges[some[-1] + 1]]
        if pairs is not None and pairs.threshold is not None:
            move = pairs.threshold
            axes.axvline(move.before.threshold, color=theme.muted, linewidth=1.2, linestyle="--")
            if at:
                axes.axvline(move.after.threshold, color=theme.ink, linewidth=1.4)
        axes.set_yticks([])
        axes.set_ylabel(_short(name), rotation=0, ha="right", va="center", color=theme.ink)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
    grid[0, 0].set_xlim(min(ends), max(ends))
    grid[-1, 0].set_xlabel("score of a pair, cosine")
    handles: list[Any] = [
        Patch(color=colour, alpha=0.6, label=label)
        for colour, label in ((theme.good, "same class"), (theme.bad, "other class"))
    ]
    if pairs is not None and pairs.threshold is not None:
        handles += [
            Line2D([], [], color=theme.muted, linewidth=1.2, linestyle="--", label="threshold in service"),
            Line2D([], [], color=theme.ink, linewidth=1.4, label="threshold that keeps the FAR"),
        ]
    figure.legend(handles=handles, frameon=False, labelcolor=theme.ink, loc="outside upper center", ncols=2)
    return figure


def _sheet(report: EvaluationReport, sheet: Sequence[Shown], theme: Theme) -> Figure:
    kinds = list(sheet[0].images)
    columns = min(len(sheet), 8 // len(kinds) if len(kinds) > 1 else 8)
    rows = -(-len(sheet) // columns)
    figure = Figure(figsize=(1.25 * columns * len(kinds), 1.65 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns * len(kinds), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for at, shown in enumerate(sheet):
        row, column = divmod(at, columns)
        regression = shown.regression
        own, found = (
            "" if label is None else f"\nclass {_short(report.class_name(label))}"
            for label in (regression.label, regression.found_label)
        )
        labels = {"query": f"query {regression.query}{own}", "found": f"found{found}", "own": f"right{own}"}
        for k, kind in enumerate(kinds):
            axes = grid[row, column * len(kinds) + k]
            axes.imshow(np.asarray(shown.images[kind]))
            colour = {"query": theme.ink, "found": theme.bad, "own": theme.good}[kind]
            axes.set_title(labels[kind], fontsize=7, color=colour)
    return figure


def _short(name: str) -> str:
    """Returns the last 14 characters of a name; characters that no installed font has are escaped, as "\\u65b0"."""
    drawn = [c if _family_of(c) else c.encode("unicode_escape").decode() for c in name]
    if sum(map(len, drawn)) <= 14:
        return "".join(drawn)
    while drawn and sum(map(len, drawn)) > 13:
        del drawn[0]
    return f"…{''.join(drawn)}"


def _choose_fonts(figure: Figure) -> None:
    """Adds families to texts with characters that the default font lacks; matplotlib uses the first with a glyph."""
    ticks = [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    for text in {*figure.findobj(Text), *ticks}:
        others = {_family_of(c) for c in text.get_text()} - {_FAMILY, None}
        if others:
            text.set_fontfamily([_FAMILY, *sorted(filter(None, others))])


@functools.cache
def _family_of(character: str) -> str | None:
    """Returns the default family or the first installed one, by name, that has the character; None if none has it."""
    if unicodedata.category(character) in ("Cc", "Cn", "Cs"):
        return None
    found = (family for family, file in _installed().items() if ord(character) in _characters(file))
    return next(found, None)


@functools.cache
def _installed() -> dict[str, str]:
    """Maps each family to its upright font file nearest to regular weight; the default family first, then by name."""
    # leave out matplotlib's Last Resort font, which has a box for every code point
    entries = [
        entry
        for entry in font_manager.fontManager.ttflist
        if (entry.style, entry.stretch) == ("normal", "normal") and not entry.name.startswith("Last Resort")
    ]
    entries.sort(key=lambda e: (e.name != _FAMILY, e.name, abs(int(e.weight) - 400), str(e.fname)))
    files: dict[str, str] = {}
    for entry in entries:
        files.setdefault(entry.name, str(entry.fname))
    return files


@functools.cache
def _characters(file: str) -> Collection[int]:
    return font_manager.get_font(file).get_charmap().keys()


@contextmanager
def _no_font_log() -> Iterator[None]:
    """Silences matplotlib's log about families without a regular weight; it uses the available weight anyway."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
