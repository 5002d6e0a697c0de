"""The folder format of models and adapters: `config.json` and one safetensors file, with checksums.

Writing takes three steps.  The weights are written under a name that contains their checksum.  A rename replaces
`config.json`, which holds that name.  Then the old weights are deleted.  So the folder holds a complete model at every
moment.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import write_whole
from .._states import CheckpointError, encoded, fingerprint, read_state

__all__ = [
    "ADAPTER",
    "MODEL",
    "FolderFormat",
    "ModelFolderError",
    "add_checksums",
    "check_ours",
    "check_writable",
    "read_config",
    "read_weights",
    "write_model_folder",
]

_NAME_PARTS = ("version", "class_names")  # names do not change embeddings, so the fingerprint leaves them out


class ModelFolderError(ValueError):
    """A folder holds no model, was changed after it was written, or does not fit the backbone."""


@dataclass(frozen=True)
class FolderFormat:
    """The keys of one kind of `config.json`; format, checksums and the weights' file name are in both kinds.

    Args:
        kind: "model" or "adapter"; it is part of format, file names and messages.
        number: number of the format.
        parts: keys that have a checksum.
        optional: further keys that have a checksum, but may be missing.
    """

    kind: str
    number: int
    parts: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"simplexfix {self.kind}"

    @property
    def weights(self) -> re.Pattern[str]:
        return re.compile(rf"{self.kind}-[0-9a-f]{{16}}\.safetensors")

    @property
    def left_behind(self) -> re.Pattern[str]:
        """Pattern of temporary files that a killed `write_whole` leaves."""
        return re.compile(rf"({self.weights.pattern}|config\.json)\.\d+-\d+\.tmp")

    def parts_of(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the keys of a config that have a checksum."""
        return (*self.parts, *(name for name in self.optional if name in config))


MODEL = FolderFormat("model", 1, ("backbone", "head", "preprocessing", "slots", "version"), ("class_names",))
ADAPTER = FolderFormat("adapter", 1, ("adapter", "encoders", "version"))


def write_model_folder(
    folder: Path, config: dict[str, Any], state: Mapping[str, Any], written: FolderFormat
) -> dict[str, Any]:
    """Writes config and tensors to a folder and replaces an earlier model; other files stay.

    Returns:
        The config with its checksums.

    Raises:
        ModelFolderError: the folder holds the `config.json` of something else.
        OSError: the folder cannot be written.
    """
    content, checksum = encoded(state)
    config = add_checksums(config, checksum, written)
    check_writable(folder, written)
    file = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder, written.left_behind)
    write_whole(folder / config["weights"], content)
    write_whole(file, f"{json.dumps(config, indent=1, allow_nan=False)}\n".encode())
    _clear(folder, written.weights, but=config["weights"])
    return config


def check_writable(folder: Path, written: FolderFormat) -> None:
    """Checks, before a long computation, that the folder can be written and holds nothing of another kind.

    It leaves no file and creates no folder.

    Raises:
        ModelFolderError, OSError: as in `write_model_folder`.
    """
    file = folder / "config.json"
    if file.exists():
        check_ours(file.read_bytes(), str(file), written, other="another folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def add_checksums(config: Mapping[str, Any], weights: str, written: FolderFormat) -> dict[str, Any]:
    """Returns the config with format, checksums and fingerprint; `weights` is the checksum of the weights."""
    out = {"format": written.name, "format_number": written.number, **config}
    out["weights"] = f"{written.kind}-{weights[:16]}.safetensors"
    out["sha256"] = {**{part: _checksum(out[part]) for part in written.parts_of(out)}, "weights": weights}
    out["fingerprint"] = _fingerprint(out["sha256"])
    return out


def read_config(folder: Path, *formats: FolderFormat) -> dict[str, Any]:
    """Reads `config.json` and verifies the checksum of every part.

    Raises:
        FileNotFoundError: there is no such folder.
        ModelFolderError: the folder holds nothing of these formats, or `config.json` was changed.
    """
    kinds = " or ".join(written.kind for written in formats)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one that save_pretrained has written")
    file = folder / "config.json"
    if not file.exists():
        raise ModelFolderError(f"{folder} holds no {kinds}: it has no config.json")
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelFolderError(f"{file} cannot be read, it may be damaged: {error}") from None
    found = [written for written in formats if isinstance(config, dict) and config.get("format") == written.name]
    if not found:
        raise ModelFolderError(f"{file} belongs to no {kinds} that save_pretrained has written")
    written = found[0]
    if config.get("format_number") != written.number:
        raise ModelFolderError(
            f"{file} has format {config.get('format_number')!r}, but this version of simplexfix reads {written.number}"
        )
    keys = {"fingerprint", "format", "format_number", "sha256", "weights", *written.parts}
    if strangers := (set(config) ^ keys) - set(written.optional):
        names = ", ".join(sorted(strangers))
        raise ModelFolderError(f"{file} was changed after it was written: keys missing or unknown: {names}")
    sums = config["sha256"]
    parts = written.parts_of(config)
    if not isinstance(sums, dict) or set(sums) != {*parts, "weights"} or not isinstance(sums["weights"], str):
        raise ModelFolderError(f"{file} was changed after it was written: sha256 differs")
    changed = [part for part in parts if _checksum(config[part]) != sums[part]]
    if config["weights"] != f"{written.kind}-{sums['weights'][:16]}.safetensors":
        changed.append("weights")
    if not changed and _fingerprint(sums) != config["fingerprint"]:
        changed.append("fingerprint")
    if changed:
        raise ModelFolderError(
            f"{file} was changed after it was written: {', '.join(changed)} without its checksum; "
            f"change the {written.kind} and save it again"
        )
    return config


def read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the tensors of a config and verifies their checksum.

    Raises:
        ModelFolderError: the tensors are missing, damaged or do not match the config.
    """
    weights = folder / config["weights"]
    try:
        state = read_state(weights)
    except FileNotFoundError:
        raise ModelFolderError(f"{weights}, which config.json names, is not there") from None
    except CheckpointError as error:
        raise ModelFolderError(str(error)) from error
    if fingerprint(state) != config["sha256"]["weights"]:
        raise ModelFolderError(f"{weights} holds other weights than those that config.json was written for")
    return state


def check_ours(content: bytes, name: str, written: FolderFormat, *, other: str) -> None:
    """Checks that a `config.json` may be overwritten.

    Args:
        content: bytes of the file.
        name: name of the file, for messages.
        written: format that will be written.
        other: a place to use instead, for messages.

    Raises:
        ModelFolderError: the file is of something else.
    """
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ModelFolderError(
            f"{name} cannot be read, it may be damaged: {error}; delete it if it is an old {written.kind}, or use "
            f"{other} if it is something else"
        ) from None
    if not isinstance(config, dict) or config.get("format") != written.name:
        raise ModelFolderError(f"{name} was not written by save_pretrained and would be overwritten; use {other}")


def _clear(folder: Path, names: re.Pattern[str], *, but: str = "") -> None:
    """Deletes files that match: weights of earlier models, or temporary files of killed processes."""
    for path in list(folder.iterdir()):
        if names.fullmatch(path.name) and path.name != but:
            path.unlink()


def _checksum(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(checksums: Mapping[str, str]) -> str:
    """SHA-256 over the checksums of all parts except names."""
    return _checksum({part: checksum for part, checksum in checksums.items() if part not in _NAME_PARTS})
