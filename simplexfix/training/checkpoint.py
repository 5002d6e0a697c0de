"""States on disk: whole or not there, checked when read, and never pickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_whole

__all__ = ["CheckpointError", "CheckpointWarning", "Checkpoints", "fingerprint", "read_state", "write_state"]

_FORMAT = "1"
_KEY = "simplexfix"  # of the metadata
_PLAIN = (str, int, bool, type(None))


class CheckpointError(ValueError):
    """A file is no checkpoint, or not as it was written; the message names it."""


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over."""


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
    save = _safetensors().torch.save
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(state, "", tensors), allow_nan=False, separators=(",", ":"))
    # one entry: of several, safetensors writes the order by chance, and equal states would be unequal files
    write_whole(path, save(tensors, {_KEY: f"{_FORMAT} {_checksum(text, tensors)} {text}"}))


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_state` was given.

    Raises:
        CheckpointError: the file is truncated, damaged, of another format, or something else.
        OSError: it cannot be read.
    """
    safetensors = _safetensors()
    os.stat(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            version, _, rest = (file.metadata() or {}).get(_KEY, "").partition(" ")
            checksum, _, text = rest.partition(" ")
            if version != _FORMAT:
                raise CheckpointError(
                    f"{os.fspath(path)} is no checkpoint of format {_FORMAT}, its format is {version or None!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be read, it may be truncated or damaged: {error}") from error
    if _checksum(text, tensors) != checksum:
        raise CheckpointError(f"{os.fspath(path)} is damaged: what it holds does not give its checksum")
    state = _restored(json.loads(text), tensors)
    assert isinstance(state, dict)
    return state


def fingerprint(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state that `write_state` could write."""
    tensors: dict[str, Tensor] = {}
    return _checksum(json.dumps(_plain(state, "", tensors), allow_nan=False, separators=(",", ":")), tensors)


class Checkpoints:
    """The last few states of one training in a folder, by step.

    Args:
        folder: made if it is not there.
        keep: how many of the newest stay; older ones are a way back when the newest turns out to be damaged.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        _safetensors()  # rather here than after the first hours
        self.folder = Path(folder)
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Written as `write_state` does, then the oldest go."""
        path = self.folder / f"step-{step:09d}.safetensors"
        write_state(path, state)
        for _, old in self._steps()[self.keep :]:
            old.unlink()
        return path

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest that is as it was written, or None.

        Warns:
            CheckpointWarning: for each newer one that is not; names file and reason.
        """
        for step, path in self._steps():
            try:
                return step, read_state(path)
            except (CheckpointError, OSError) as error:
                warnings.warn(f"checkpoint passed over: {error}", CheckpointWarning, stacklevel=2)
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The state of one step; errors as `read_state`."""
        return read_state(self.folder / f"step-{step:09d}.safetensors")

    def clear(self) -> None:
        """Removes them all, and what killed processes left in the middle of writing: the training is done."""
        for path in [path for _, path in self._steps()] + list(self.folder.glob("*.safetensors.*.tmp")):
            path.unlink()

    def _steps(self) -> list[tuple[int, Path]]:
        """Newest first."""
        found = [(re.fullmatch(r"step-(\d+)\.safetensors", path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoints need safetensors: pip install 'simplexfix[train]'", name="safetensors"
        ) from error
    return safetensors


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
