"""Renders the report as one self-contained HTML page without scripts.

The template is report.html.jinja; this file formats numbers and encodes images for it.  Each number of report.json is
in a `<data>` element, whose `value` has all its digits.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ..compatibility import Interval
from .colours import DARK, LIGHT, Theme, readable, shade
from .evaluation import EvaluationReport
from .figures import ORDER_WORDS, Drawn, Shown

__all__ = ["render"]

NUMBERED = 12  # up to this number of versions, cells of the matrix show a decimal and a mark
REGRESSION_HEAD = ("query", "class", "found class", "score", "own class’s", "margin", "found item", "own item")
SCORE_HEAD = (
    "query",
    "before",
    "after",
    "first item’s cosine",
    "relevant item’s",
    "margin",
    "first item",
    "relevant item",
)


def render(
    report: EvaluationReport, content: Mapping[str, Any], figures: Mapping[str, Drawn], sheet: Sequence[Shown]
) -> str:
    """Returns the HTML page.

    Args:
        report: the report.
        content: content of report.json.
        figures: figures by file name.
        sheet: regressions with their images.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        count=lambda value: f"{value:,}",
        data=_data,
        fixed=lambda value, digits: f"{value:.{digits}f}",
        general=lambda value: f"{value:g}",
        image=_image_uri,
        p_value=lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
        percent=_percent,
        short=_short,
        signed=_signed,
        svg=lambda drawing: _uri(drawing, "svg+xml"),
    )
    low, high = float(np.nanmin(report.matrix)), float(np.nanmax(report.matrix))
    return environment.get_template("report.html.jinja").render(
        report=report,
        content=content,
        figures=figures,
        sheet=sheet,
        style=Markup(_style()),
        low=low,
        high=high,
        dense=len(report.matrix) > NUMBERED,
        heat_map=_heat_map(report, low, high),
        scales=[("light", ",".join(LIGHT.scale)), ("dark", ",".join(DARK.scale))],
        score=_score(report),
        order_words=ORDER_WORDS,
        backfill_heads=["re-extracted, percent", *(ORDER_WORDS[curve.order_name] for curve in report.backfill)],
        regression_head=SCORE_HEAD if report.has_scores else REGRESSION_HEAD,
        pairs_versions=_pairs_versions(report),
        pairs_heads=_pairs_heads(report),
        threshold=_threshold(report),
        criteria=_criteria(report),
    )


class _Cell(NamedTuple):
    value: float
    name: str  # name of the <data> element
    kind: str  # "own" on the diagonal, else "yes" or "no": whether the upgrade is compatible
    style: str
    hint: str


def _heat_map(report: EvaluationReport, low: float, high: float) -> list[list[_Cell]]:
    fractions = (report.matrix - low) / (high - low) if high > low else np.full(report.matrix.shape, 0.5)
    return [[_heat_cell(report, i, j, fractions[i, j]) for j in range(i + 1)] for i in range(len(report.matrix))]


def _heat_cell(report: EvaluationReport, i: int, j: int, fraction: float) -> _Cell:
    value, (low, high) = report.matrix[i, j], report.intervals[i, j]
    colours = [
        colour for theme in (LIGHT, DARK) for colour in (shade(theme, fraction), readable(shade(theme, fraction)))
    ]
    style = ";".join(f"--{name}:{colour}" for name, colour in zip(("l", "li", "d", "di"), colours, strict=True))
    hint = f"{report.names[i]} searches the gallery of {report.names[j]}: {_percent(value)} %"
    hint += f" [{_percent(low)}, {_percent(high)}]"
    kind = "own" if i == j else "yes" if report.table.compatible[i, j] else "no"
    hint += {"own": "", "yes": ", compatible", "no": ", not compatible"}[kind]
    return _Cell(value, f"C-{i}-{j}", kind, style, hint)


def _pairs_versions(report: EvaluationReport) -> list[tuple[str, Any]]:
    """Returns names and pair verifications of the last upgrade's versions."""
    pairs = report.pairs
    if pairs is None:
        return []
    if pairs.after is None:
        return [(report.names[-1], pairs.before)]
    return [(report.names[-2], pairs.before), (report.names[-1], pairs.after)]


def _pairs_heads(report: EvaluationReport) -> list[str]:
    fars = [] if report.pairs is None else report.pairs.before.fars
    return ["", "equal error, percent", "area", *(f"TAR at FAR {100 * far:g} %" for far in fars)]


def _threshold(report: EvaluationReport) -> dict[str, Any] | None:
    """Returns the values of the section on the service's threshold; None without a threshold."""
    if report.pairs is None or report.pairs.threshold is None:
        return None
    move, old, new = report.pairs.threshold, report.names[-2], report.names[-1]
    ratio = move.unmoved.far / move.before.far
    return {
        "move": move,
        "times": "about as many" if 0.95 < ratio < 1.05 else f"{ratio:.2g} times as many",
        "interval": _ends(move.interval, 1, 4),
        "rows": [
            (f"{old}, in service", move.before, ""),
            (f"{new}, threshold left as it is", move.unmoved, _ends(move.far_interval, 100, 3)),
            (f"{new}, threshold that keeps the FAR", move.after, ""),
        ],
    }


def _ends(interval: Interval, times: float, digits: int) -> str:
    return f" [{times * interval.low:.{digits}f}, {times * interval.high:.{digits}f}]"


def _criteria(report: EvaluationReport) -> list[tuple[str, float, str, str, str]]:
    """Rows of the criteria table: name, value, formatted value, meaning and formula."""
    c = report.criteria
    rows = [
        (
            "AC",
            c.ac,
            f"{c.ac:.4f}",
            "fraction of upgrades that are compatible",
            "2 / (T (T − 1)) · #{ i > j : C[i, j] > C[j, j] }",
        ),
        (
            "AA",
            c.aa,
            f"{_percent(c.aa)} %",
            "mean score, of all versions on all galleries so far",
            "2 / (T (T + 1)) · Σ C[i, j] for j ≤ i",
        ),
        (
            "BC",
            c.bc,
            f"{_signed(c.bc)} points",
            "what the newest gains on old galleries",
            "mean over j < T − 1 of C[T − 1, j] − C[j, j]",
        ),
        (
            "FC",
            c.fc,
            f"{_signed(c.fc)} points",
            "score in the previous gallery minus score in the own gallery",
            "mean over i ≥ 1 of C[i, i − 1] − C[i, i]",
        ),
    ]
    return [(*row[:2], "–" if math.isnan(row[1]) else row[2], *row[3:]) for row in rows]


def _data(shown: Any, value: float, name: str = "") -> Markup:
    """Returns a `<data>` element with the shown text, and the number in JSON notation as its value."""
    number = float(value)
    called = Markup(' id="{}"').format(name) if name else ""
    text = "null" if math.isnan(number) else repr(number)
    return Markup('<data value="{}"{}>{}</data>').format(text, called, shown)


def _image_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.save(file, kind, quality=85)
    return _uri(file.getvalue(), kind)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"…{name[-17:]}"


def _score(report: EvaluationReport) -> str:
    if report.has_scores:
        return f"mean {report.protocol} of the queries, items ranked by cosine"
    if report.protocol == "instance":
        return "fraction of queries whose nearest gallery item, by cosine, is of their class"
    return "fraction of queries nearest, by cosine, to the template of their class, the mean of its gallery items"


def _variables(theme: Theme) -> str:
    names = ("ground", "ink", "muted", "grid", "old", "new", "good", "bad")
    return "".join(f"--{name}:{getattr(theme, name)};" for name in names)


def _style() -> str:
    return (
        f":root{{{_variables(LIGHT)}--page:#f4f6fa;--soft:#f6f8fb}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}--page:#0e131b;--soft:#1b2330}}}}\n"
        + Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    )
