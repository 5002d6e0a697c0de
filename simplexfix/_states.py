"""States on disk: whole or not there, checked when read, and never pickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._files import write_whole

__all__ = ["CheckpointError", "encoded", "fingerprint", "read_state", "safetensors", "write_state"]

_FORMAT = "1"
_KEY = "simplexfix"  # of the metadata
_PLAIN = (str, int, bool, type(None))


class CheckpointError(ValueError):
    """A file is no checkpoint, or not as it was written; the message names it."""


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """One safetensors file: the tensors, and in its metadata the rest as JSON, a format version and a checksum.

    Equal states make equal files.  The file appears whole or not at all, and has reached the disk on return.  Tensors
    are written contiguous and come back so, on the CPU; what shared memory does so no more.

    Args:
        path: of the file, whose folder is there.
        state: nested mappings, lists and tuples of tensors, strings, numbers (nan and inf too) and None; keys are
            strings or integers, and all of it comes back with its type.

    Raises:
        TypeError: something else is in the state; names its place.
        OSError: it cannot be written.
    """
    write_whole(path, encoded(state)[0])


def encoded(state: Mapping[str, Any]) -> tuple[bytes, str]:
    """The file of `write_state`, and its checksum, which is the state's `fingerprint`."""
    save = safetensors().torch.save
    text, tensors = _taken_apart(state)
    checksum = _checksum(text, tensors)
    # one entry: of several, safetensors writes the order by chance, and equal states would be unequal files
    return save(tensors, {_KEY: f"{_FORMAT} {checksum} {text}"}), checksum


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_state` was given.

    Raises:
        CheckpointError: the file is truncated, damaged, of another format, or something else.
        OSError: it cannot be read.
    """
    library = safetensors()
    os.stat(path)
    try:
        with library.safe_open(path, framework="pt") as file:
            version, _, rest = (file.metadata() or {}).get(_KEY, "").partition(" ")
            checksum, _, text = rest.partition(" ")
            if version != _FORMAT:
                raise CheckpointError(
                    f"{os.fspath(path)} is no checkpoint of format {_FORMAT}, its format is {version or None!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be read, it may be truncated or damaged: {error}") from error
    if _checksum(text, tensors) != checksum:
        raise CheckpointError(f"{os.fspath(path)} is damaged: what it holds does not give its checksum")
    state = _restored(json.loads(text), tensors)
    assert isinstance(state, dict)
    return state


def fingerprint(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state that `write_state` could write."""
    return _checksum(*_taken_apart(state))


def safetensors() -> Any:
    """The library, or an error that says how to get it."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoints and model folders need safetensors: pip install 'simplexfix[train]'", name="safetensors"
        ) from error
    return safetensors


def _taken_apart(state: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    return json.dumps(_plain(state, "", tensors), allow_nan=False, separators=(",", ":")), tensors


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can say of it; a tensor goes into `tensors` under its place and leaves that name.

    Whatever JSON has no word for is an object with one key that starts with "$".
    """
    if isinstance(value, Tensor):
        # a copy: safetensors refuses memory that two names share
        tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": place}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise TypeError(f"keys of a state must be strings or integers, got {key!r} in {place or 'its top'}")
        items = {key: _plain(entry, f"{place}.{key}" if place else str(key), tensors) for key, entry in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        return {"$items": [[key, entry] for key, entry in items.items()]}
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry, f"{place}.{i}", tensors) for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"$tuple": entries}
    raise TypeError(f"a state holds tensors, numbers, strings and None, got {type(value).__name__} at {place or 'top'}")


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (kind, content), *_ = value.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$float":
            return float(content)
        if kind == "$items":
            return {key: _restored(entry, tensors) for key, entry in content}
        if kind == "$tuple":
            return tuple(_restored(entry, tensors) for entry in content)
    return {key: _restored(entry, tensors) for key, entry in value.items()}


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the JSON and of each tensor's name, dtype, shape and bytes, in the order of names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
