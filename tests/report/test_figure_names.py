"""Tests names in any script in the figures: drawn with an installed font or escaped, never with a warning."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from simplexfix.labelled import LabelledItems
from simplexfix.report import evaluate

pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")
from matplotlib import font_manager

from simplexfix.report import figures as module

NAMES = ["模型一", "模型二", "mod\u00e8le\t3 \U0001f642", "\udce9v4"]


@pytest.fixture
def report():
    draw, labels = np.random.default_rng(0), np.arange(60) % 6
    versions = [(np.eye(6)[labels] + 0.3 * draw.normal(size=(60, 6))).astype(np.float32) for _ in NAMES]
    items = LabelledItems(labels, labels)
    return evaluate([items.version(rows, rows, name=name) for rows, name in zip(versions, NAMES, strict=True)])


@pytest.fixture
def fonts(monkeypatch):
    """Leaves only the font DejaVu Sans; returns a function that adds another one."""
    usual = [entry for entry in font_manager.fontManager.ttflist if entry.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", usual)

    def clear() -> None:
        module._family_of.cache_clear()
        module._installed.cache_clear()

    def add(file: Path) -> None:
        font_manager.fontManager.addfont(file)
        clear()

    clear()
    yield add
    clear()


def made_font(file: Path, characters: str, weight: int) -> Path:
    """Writes a font with squares for these characters."""
    builder_module = pytest.importorskip("fontTools.fontBuilder")
    pen_module = pytest.importorskip("fontTools.pens.ttGlyphPen")
    names = [".notdef", *(f"uni{ord(c):04X}" for c in characters)]
    pen = pen_module.TTGlyphPen(None)
    for i, corner in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.lineTo if i else pen.moveTo)(corner)
    pen.closePath()
    square = pen.glyph()
    builder = builder_module.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular", "psName": "Squares"})
    builder.setupOS2(usWeightClass=weight)
    builder.setupPost()
    builder.save(file)
    return file


def drawn(report) -> dict[str, bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = module.draw(report, [])
    return {name: figure.light + figure.dark for name, figure in figures.items()}


def test_names_that_no_font_has_are_escaped_without_a_warning(report, fonts) -> None:
    first = drawn(report)
    assert first == drawn(report)
    assert module._short("v新") == r"v\u65b0"
    assert module._short("\t\udce9") == r"\t\udce9"
    assert module._short("模型一") == r"…\u578b\u4e00"  # no character is cut in half
    assert module._short("model number 12") == "…del number 12"


@pytest.mark.parametrize("weight", [400, 500])
def test_names_are_drawn_by_a_font_that_has_them(report, fonts, tmp_path, caplog, weight: int) -> None:
    fonts(made_font(tmp_path / "squares.ttf", "模型一二", weight))
    figures = drawn(report)
    assert figures == drawn(report)
    assert b"Squares-" in figures["matrix.svg"]  # outlines have the name of their font
    assert module._short("模型一") == "模型一"
    assert module._family_of("v") == "DejaVu Sans"
    assert not caplog.records


def test_no_font_is_used_for_control_characters(report) -> None:
    """Uses the installed fonts: mathematical fonts have glyphs at these code points."""
    assert {module._family_of(c) for c in "\t\n\x00\x7f\udce9\uffff"} == {None}
    assert module._family_of("\N{GREEK SMALL LETTER ALPHA}") == "DejaVu Sans"
    drawn(report)
