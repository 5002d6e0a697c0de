"""Describes configurations, compares them on resume, and reads `run.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_resumable", "describe", "differences", "read_run_record"]

_ABSENT = object()


def describe(value: Any) -> Any:
    """Returns a JSON description of an object's configuration, which is the same in every process.

    | object                  | description                                                       |
    | ----------------------- | ----------------------------------------------------------------- |
    | dataclass               | class and fields                                                  |
    | object with `to_dict`   | the result of `to_dict`                                           |
    | tensor, numeric array   | shape, dtype and checksum                                         |
    | list, set, mapping      | description of each entry                                         |
    | function, class         | qualified name                                                    |
    | `functools.partial`     | function and bound arguments                                      |
    | other                   | class and attributes, except `group` and those that begin with _  |
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted((describe(entry) for entry in value), key=repr)
    if isinstance(value, Tensor):  # as bytes, for NumPy has no bfloat16
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _checksum(value.shape, str(value.dtype).removeprefix("torch."), content.tobytes())
    if isinstance(value, np.ndarray):
        return (
            describe(value.tolist())
            if value.dtype.hasobject
            else _checksum(value.shape, str(value.dtype), value.tobytes())
        )
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if hasattr(value, "to_dict"):
        return describe(value.to_dict())
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    name = {"type": f"{type(value).__module__}.{type(value).__qualname__}"}
    if isinstance(value, partial):
        bound = {"function": value.func, "arguments": value.args, "keywords": value.keywords}
        return {**name, **{key: describe(entry) for key, entry in bound.items()}}
    if is_dataclass(value):
        return {**name, **{field.name: describe(getattr(value, field.name)) for field in fields(value)}}
    public = {key: entry for key, entry in sorted(getattr(value, "__dict__", {}).items()) if not key.startswith("_")}
    # a process group is not configuration: a training may resume with another one
    return {**name, **{key: describe(entry) for key, entry in public.items() if key != "group"}}


def _checksum(shape: Sequence[int], dtype: str, content: bytes) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": dtype, "sha256": hashlib.sha256(content).hexdigest()}


def differences(then: Any, now: Any, place: str = "") -> list[str]:
    """Returns the differences of two descriptions, each as "key.sub: was A, is B"."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = list(then) + [key for key in now if key not in then]
        return [
            line
            for key in keys
            for line in differences(then.get(key, _ABSENT), now.get(key, _ABSENT), f"{place}.{key}" if place else key)
        ]
    if isinstance(then, tuple):
        then = list(then)
    if isinstance(now, tuple):
        now = list(now)
    same = then == now or (then != then and now != now)  # nan
    return [] if same else [f"{place}: was {_shown(then)}, is {_shown(now)}"]


def check_resumable(then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Checks that a training may resume, which requires equal descriptions.

    Args:
        then: description at its start.
        now: description of this call.
        what: file or folder, for the error message.

    Raises:
        ValueError: the descriptions differ; the message lists all differences.
    """
    found = differences(then, now)
    if found:
        raise ValueError(
            f"{what} was written with other settings or data; use another folder, or the earlier settings and data:\n  "
            + "\n  ".join(found)
        )


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)


def read_run_record(file: Path) -> dict[str, Any]:
    """Reads the `run.json` of a run; "config" holds its configuration, "data" the fingerprint of its data.

    Raises:
        ValueError: the file is damaged; the message names it and the remedy.
        OSError: the file cannot be read.
    """
    try:
        record = json.loads(file.read_bytes())
        if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in ("config", "data")):
            raise ValueError('it must hold the objects "config" and "data"')
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged: {error}; delete it and train again with the same configuration; "
            "finished tasks do not resume with another one"
        ) from None
    result: dict[str, Any] = record
    return result
