"""A folder of `config.json` and one safetensors file, each part with its checksum: what models and adapters share.

The weights come first, under a name made of their checksum; then `config.json`, which names them, takes the place of
the one before by a rename; then the old weights go.  So at every moment the folder holds one whole model.
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
    "check_writable",
    "read_config",
    "read_weights",
    "write_model_folder",
]

_NAME_PARTS = ("version", "class_names")  # the same model under other names gives the same embeddings


class ModelFolderError(ValueError):
    """A folder holds no model, or not as it was written, or not one of this backbone; the message says what."""


@dataclass(frozen=True)
class FolderFormat:
    """What a `config.json` holds beside format, checksums and the name of the weights.

    Args:
        kind: "model" or "adapter", of which format, file names and messages are made.
        number: of the format.
        parts: keys with a checksum each.
        optional: keys of parts that may be missing.
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
        """What a killed `write_whole` leaves."""
        return re.compile(rf"({self.weights.pattern}|config\.json)\.\d+-\d+\.tmp")

    def parts_of(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Those with a checksum."""
        return (*self.parts, *(name for name in self.optional if name in config))


MODEL = FolderFormat("model", 1, ("backbone", "head", "preprocessing", "slots", "version"), ("class_names",))
ADAPTER = FolderFormat("adapter", 1, ("adapter", "encoders", "version"))


def write_model_folder(
    folder: Path, config: dict[str, Any], state: Mapping[str, Any], written: FolderFormat
) -> dict[str, Any]:
    """Writes the parts and tensors, in the place of those that were there; other files stay.

    Returns:
        The config with its checksums.

    Raises:
        ModelFolderError: the folder holds the `config.json` of something else.
        OSError: it cannot be written.
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
    """Before hours of work: the folder can be written, and holds nothing of another kind.  Leaves nothing behind.

    Raises:
        ModelFolderError, OSError: as `write_model_folder`.
    """
    file = folder / "config.json"
    if file.exists():
        _check_ours(file, written)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def add_checksums(config: Mapping[str, Any], weights: str, written: FolderFormat) -> dict[str, Any]:
    """The config with format, checksums and fingerprint, of weights with this checksum."""
    out = {"format": written.name, "format_number": written.number, **config}
    out["weights"] = f"{written.kind}-{weights[:16]}.safetensors"
    out["sha256"] = {**{part: _checksum(out[part]) for part in written.parts_of(out)}, "weights": weights}
    out["fingerprint"] = _fingerprint(out["sha256"])
    return out


def read_config(folder: Path, *formats: FolderFormat) -> dict[str, Any]:
    """As it was written: every part gives its checksum.

    Raises:
        FileNotFoundError: there is no such folder.
        ModelFolderError: it holds nothing of these formats, or was changed; says what.
    """
    kinds = " or ".join(written.kind for written in formats)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; models are read from local folders, nothing is downloaded")
    file = folder / "config.json"
    if not file.exists():
        raise ModelFolderError(f"{folder} holds no {kinds}: it has no config.json")
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelFolderError(f"{file} cannot be read, it may be damaged: {error}") from None
    found = [written for written in formats if isinstance(config, dict) and config.get("format") == written.name]
    if not found:
        raise ModelFolderError(f"{file} is of no {kinds} that save_pretrained has written")
    written = found[0]
    if config.get("format_number") != written.number:
        raise ModelFolderError(
            f"{file} is of format {config.get('format_number')!r}, this version of simplexfix reads {written.number}"
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
    """The tensors that `read_config`'s config names.

    Raises:
        ModelFolderError: they are missing, damaged or others.
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


def _check_ours(file: Path, written: FolderFormat) -> None:
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelFolderError(
            f"{file} cannot be read, it may be damaged: {error}; delete it for the {written.kind} to be written again, "
            "or take another folder if it is of something else"
        ) from None
    if not isinstance(config, dict) or config.get("format") != written.name:
        raise ModelFolderError(f"{file} is of something else and would be lost; take another folder")


def _clear(folder: Path, names: re.Pattern[str], *, but: str = "") -> None:
    """Removes the weights of models before, or files that killed processes left half written."""
    for path in list(folder.iterdir()):
        if names.fullmatch(path.name) and path.name != but:
            path.unlink()


def _checksum(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(checksums: Mapping[str, str]) -> str:
    """Of all parts but the names."""
    return _checksum({part: checksum for part, checksum in checksums.items() if part not in _NAME_PARTS})
