"""Applies a model or an adapter to a file of features, block by block: the output appears whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .._text import printable
from ..adapters import Adapter
from ..labelled import FeatureFileError, map_array
from ..models import EmbeddingModel
from ._terminal import in_flags

ROWS = 4096


def run(arguments: argparse.Namespace) -> int:
    try:
        rows, old, embed = _inputs(arguments)
        _write(arguments.output, len(rows), lambda at: embed(*(_tensor(part, at) for part in (rows, *old))))
    except (ValueError, TypeError) as error:
        print(f"simplexfix embed: {printable(in_flags(error))}", file=sys.stderr)
        return 2
    return 0


def _inputs(arguments: argparse.Namespace) -> tuple[Any, list[Any], Callable[..., Tensor]]:
    rows = _read(arguments.input)
    old = [] if arguments.old is None else [_read(arguments.old)]
    if old and len(old[0]) != len(rows):
        raise ValueError(f"--old has {len(old[0])} rows, IN has {len(rows)}: both must be of the same queries")
    if _is_adapter(arguments.model):
        adapter = Adapter.from_pretrained(arguments.model)
        if not arguments.gallery:
            return rows, old, adapter
        if old:
            raise ValueError("--old is for queries: leave it out with --gallery")
        return rows, old, lambda stored: normalize(adapter.gallery(stored).float(), dim=1)
    if old or arguments.gallery:
        raise ValueError(f"--old and --gallery are for adapters, {arguments.model} holds a model")
    model = EmbeddingModel.from_pretrained(arguments.model)
    return rows, old, lambda input: model.extract(input, prepare=model.preprocessing)


def _is_adapter(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_bytes())["format"] == "simplexfix adapter")
    except (OSError, ValueError, KeyError, TypeError):
        return False  # `EmbeddingModel.from_pretrained` says what it is


def _read(path: Path) -> Any:
    if path.suffix != ".npy":
        raise FeatureFileError(f"{path} must be an .npy file")
    rows = map_array(path.parent, path.stem)
    if not rows.ndim or not len(rows):
        raise FeatureFileError(f"{path} has no rows")
    return rows


def _tensor(rows: Any, at: slice) -> Tensor:
    return torch.from_numpy(np.array(rows[at]))  # a copy: mapped rows are read-only


@torch.inference_mode()
def _write(path: Path, count: int, embed: Callable[[slice], Tensor]) -> None:
    if path.suffix != ".npy":
        raise ValueError(f"OUT must be an .npy file, got {path}")
    first = embed(slice(0, min(count, ROWS)))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        out = np.lib.format.open_memmap(temporary, "w+", np.float32, (count, first.shape[1]))
        out[: len(first)] = first.numpy()
        for begin in range(ROWS, count, ROWS):
            out[begin : begin + ROWS] = embed(slice(begin, min(count, begin + ROWS))).numpy()
        out.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
