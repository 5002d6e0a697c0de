"""Draws a compatibility matrix on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compatibility import compatibility_table
from ..report.colours import LIGHT, readable, shade

__all__ = ["heat_map", "marks"]


def marks(terminal: Any) -> dict[bool, str]:
    """Returns the marks of compatible (True) and other upgrades (False) in the terminal's encoding."""
    return {True: "+", False: "-"} if terminal.options.ascii_only else {True: "✓", False: "✗"}


def heat_map(
    matrix: NDArray[np.float64],
    names: Sequence[str],
    terminal: Any,
    *,
    width: int | None = None,
    scale: tuple[float, float] | None = None,
) -> Any:
    """Returns the matrix as rich text.

    Depending on the width, cells show percent with one decimal, whole percent, or only marks and colours.

    Args:
        matrix: [T, T] scores in [0, 1], nan above the diagonal.
        names: names of the T versions.
        terminal: rich's console that prints the text.
        width: width in characters; None for the terminal's width.
        scale: scores of the first and of the last colour; None for the smallest and the largest of the matrix.
    """
    from rich.text import Text

    size, names = len(matrix), [name[-20:] for name in names]
    left = max(map(len, names)) + 1
    room = ((width or terminal.width) - left) // size
    cells = 8 if room >= 8 else 4 if room >= 4 else 2
    compatible, mark = compatibility_table(matrix).compatible, marks(terminal)
    lowest, highest = scale or (np.nanmin(matrix), np.nanmax(matrix))
    text = Text()
    if cells > 2:
        heads = (name[1 - cells :] for name in names)
        text.append(" " * left + "".join(f"{name:>{cells - 1}} " for name in heads) + "\n", style="dim")
    for i, name in enumerate(names):
        text.append(f"{name:<{left}}", style="dim")
        for j in range(i + 1):
            value = 100 * matrix[i, j]
            sign = " " if i == j else mark[bool(compatible[i, j])]
            cell = f"{value:.1f}{sign}" if cells == 8 else f"{value:.0f}{sign}" if cells == 4 else f"{sign} "
            ground = shade(LIGHT, (matrix[i, j] - lowest) / (highest - lowest) if highest > lowest else 0.5)
            text.append(f"{cell:>{cells}}", style=f"{readable(ground)} on {ground}")
        text.append("\n")
    return text
