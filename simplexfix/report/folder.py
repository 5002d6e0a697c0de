"""Writes a report folder: report.json, report.html and figures, which replace an earlier report as a whole."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .._files import write_folder

if TYPE_CHECKING:
    from .evaluation import EvaluationReport

__all__ = ["check_replaceable", "content_of", "files_of", "save"]

MADE_BY = "simplexfix evaluate"  # identifies a report.json as written by this package
FIGURES = ("matrix.svg", "flips.svg", "backfill.svg", "roc.svg", "scores.svg", "regressions.png")


def content_of(report: EvaluationReport) -> dict[str, Any]:
    """Returns the content of report.json."""
    return {
        "made_by": MADE_BY,
        "simplexfix": __version__,
        "inputs": list(report.inputs),
        "seed": report.seed,
        "zero_rows": [dict(zip(("query", "gallery"), counts, strict=True)) for counts in report.zero_rows],
        **report.as_dict(),
    }


def files_of(report: EvaluationReport, images: Mapping[str, Sequence[Path]] | None) -> dict[str, bytes]:
    """Returns the files of the folder by name; `images` as in `EvaluationReport.save`."""
    from . import figures, page

    _check_images(report, images or {})
    content = content_of(report)
    sheet = figures.load_sheet(report.regressions, images) if images else []
    drawn = figures.draw(report, sheet)
    text = json.dumps(content, indent=1, allow_nan=False)
    return {
        "report.json": f"{text}\n".encode(),
        "report.html": page.render(report, content, drawn, sheet).encode(),
        **{f"figures/{name}": figure.light for name, figure in drawn.items()},
    }


def save(report: EvaluationReport, folder: Path, images: Mapping[str, Sequence[Path]] | None) -> None:
    """Implements `EvaluationReport.save`."""
    check_replaceable(folder)
    files = files_of(report, images)
    check_replaceable(folder)  # again, since drawing takes seconds
    write_folder(folder, files)


def check_replaceable(folder: Path) -> None:
    """Checks that a folder is missing, empty, or holds only a report, so that it may be replaced.

    Raises:
        ValueError: the folder holds something else, or the path is a file.
        OSError: the parent folder is missing, or symbolic links form a cycle.
    """
    if not folder.exists():
        target = Path(os.path.realpath(folder))  # Path.resolve raises RuntimeError for cycles of links
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
        target.parent.stat()
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a report needs a folder: name another")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{folder} is the current folder or around it and cannot be replaced: name another")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    if not found:
        return
    try:
        there = json.loads((folder / "report.json").read_bytes())
    except (OSError, ValueError):
        there = None
    if not isinstance(there, dict) or there.get("made_by") != MADE_BY:
        raise ValueError(f"{folder} holds something else than a report; it stays as it is: name another")
    ours = {"report.json", "report.html", "figures", *(f"figures/{name}" for name in FIGURES)}
    others = [name for name in found if name not in ours]
    if others:
        raise ValueError(f"{folder} holds {others[0]} beside a report; it stays as it is: move that, or name another")


def _check_images(report: EvaluationReport, images: Mapping[str, Sequence[Path]]) -> None:
    if images and "query" not in images:
        raise ValueError("images of the gallery are shown beside those of the queries: give images of 'query', too")
    counts, ignored = report.counts, report.ignored
    unjudged = 0 if report.judgements is None else report.judgements.queries_left_out
    given = {"query": counts.queries + ignored.queries + unjudged, "gallery": counts.gallery + ignored.gallery}
    for part, paths in images.items():
        if part not in given:
            raise ValueError(f"images must be of 'query' and 'gallery', got {part!r}")
        if len(paths) != given[part]:
            raise ValueError(f"images of {part!r} must be {given[part]} paths, one per item, got {len(paths)}")
