"""States in files: written atomically, verified by checksum, never pickled."""

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
_KEY = "simplexfix"  # key in the file's metadata
_PLAIN = (str, int, bool, type(None))


class CheckpointError(ValueError):
    """A file is not a checkpoint, or was changed after it was written; the message names the file."""


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a state to one safetensors file; the metadata holds values other than tensors as JSON, and a checksum.

    Equal states give equal files.  The write is atomic, and on return the file is on disk.  Tensors are stored
    contiguous and are read back contiguous on the CPU; tensors that share memory are stored as separate copies.

    Args:
        path: path of the file; its folder must exist.
        state: nested mappings, lists and tuples of tensors, strings, numbers (also nan and inf) and None, with strings
            or integers as keys.  Types are preserved, except that mappings are read back as dicts.

    Raises:
        TypeError: the state holds something else; the message names the place.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from simplexfix.training import read_state, write_state
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_state(Path(folder, "state"), {"step": 3, "mean": torch.ones(2)})
        ...     read_state(Path(folder, "state"))
        {'step': 3, 'mean': tensor([1., 1.])}
    """
    write_whole(path, encoded(state)[0])


def encoded(state: Mapping[str, Any]) -> tuple[bytes, str]:
    """Returns the bytes that `write_state` writes, and the state's `fingerprint`."""
    save = safetensors().torch.save
    text, tensors = _taken_apart(state)
    checksum = _checksum(text, tensors)
    # one metadata entry: safetensors writes several in random order, and equal states must give equal files
    return save(tensors, {_KEY: f"{_FORMAT} {checksum} {text}"}), checksum


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the state that `write_state` wrote.

    Raises:
        CheckpointError: the file is truncated, damaged, has another format or is not a checkpoint.
        OSError: the file cannot be read.
    """
    library = safetensors()
    os.stat(path)
    try:
        with library.safe_open(path, framework="pt") as file:
            version, _, rest = (file.metadata() or {}).get(_KEY, "").partition(" ")
            checksum, _, text = rest.partition(" ")
            if version != _FORMAT:
                raise CheckpointError(
                    f"{os.fspath(path)} is not a checkpoint of format {_FORMAT}, its format is {version or None!r}"
                )
            # a copy: matrix products may round differently for tensors that are not aligned to 64 bytes
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be read, it may be truncated or damaged: {error}") from error
    if _checksum(text, tensors) != checksum:
        raise CheckpointError(f"{os.fspath(path)} is damaged: its checksum does not match")
    state = _restored(json.loads(text), tensors)
    assert isinstance(state, dict)
    return state


def fingerprint(state: Mapping[str, Any]) -> str:
    """Returns the SHA-256 that `write_state` stores with a state."""
    return _checksum(*_taken_apart(state))


def safetensors() -> Any:
    """Imports safetensors; raises with the install command if it is missing."""
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
    """Converts a value to JSON; a tensor is stored in `tensors` under its place and replaced by that name.

    A value without a JSON type becomes an object with one key that starts with "$".
    """
    if isinstance(value, Tensor):
        # a copy: safetensors raises for tensors that share memory
        tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": place}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise TypeError(
                    f"keys of a state must be strings or integers, got {key!r} at {place or 'the top level'}"
                )
        items = {key: _plain(entry, f"{place}.{key}" if place else str(key), tensors) for key, entry in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        return {"$items": [[key, entry] for key, entry in items.items()]}
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry, f"{place}.{i}", tensors) for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"$tuple": entries}
    raise TypeError(
        f"a state holds tensors, numbers, strings and None, got {type(value).__name__} at {place or 'the top level'}"
    )


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
    """Returns the SHA-256 of the JSON and of the tensors by name: each one's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
