"""Colour themes of the evaluation report, light and dark, for terminal, figures and page."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DARK", "LIGHT", "Theme", "readable", "shade"]


@dataclass(frozen=True)
class Theme:
    """Colours of one theme; `scale` holds the heat map's colours from the lowest to the highest score."""

    ground: str
    ink: str
    muted: str
    grid: str
    old: str
    new: str
    good: str
    bad: str
    scale: tuple[str, ...]


LIGHT = Theme(
    ground="#ffffff",
    ink="#16202e",
    muted="#596579",
    grid="#dfe4ec",
    old="#8a94a6",
    new="#2158d0",
    good="#14753a",
    bad="#c0262d",
    scale=("#eef3fc", "#b9cff5", "#7aa4ea", "#3d74d6", "#1b469f"),
)
DARK = Theme(
    ground="#161c26",
    ink="#e8ecf3",
    muted="#9aa6b8",
    grid="#2c3645",
    old="#8a94a6",
    new="#7fabff",
    good="#54c98a",
    bad="#ff7b7b",
    scale=("#1d2a40", "#254474", "#3263ad", "#5a8fe0", "#a5c6ff"),
)


def shade(theme: Theme, fraction: float) -> str:
    """Returns the colour of the scale at a position in [0, 1], interpolated linearly."""
    at = min(max(fraction, 0.0), 1.0) * (len(theme.scale) - 1)
    low = min(int(at), len(theme.scale) - 2)
    pairs = zip(_channels(theme.scale[low]), _channels(theme.scale[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in pairs)


def readable(ground: str) -> str:
    """Returns black or white, whichever has the higher contrast with the background; at least 4.58 : 1."""
    luminance = _luminance(ground)
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def _luminance(colour: str) -> float:
    """Returns the relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
