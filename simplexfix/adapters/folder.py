"""Saves and loads adapters: `config.json` describes the adapter, a safetensors file holds its tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .._states import fingerprint
from ..models import ModelIdentity
from ..models._config import (
    ADAPTER,
    ModelFolderError,
    add_checksums,
    check_writable,
    read_config,
    read_weights,
    write_model_folder,
)
from ..models.folder import adapter_identity
from .maps import AffineMap, LocalMap, LowRankMap, ResidualMap

if TYPE_CHECKING:
    from .base import Adapter

__all__ = ["check_adapter_folder", "identity_of", "load_adapter", "save_adapter"]

_MAPS: dict[str, type[nn.Module]] = {
    "affine": AffineMap,
    "low_rank": LowRankMap,
    "residual": ResidualMap,
    "local": LocalMap,
}
_ROLES = ("query_map", "gallery_map")


def save_adapter(
    adapter: Adapter, folder: str | os.PathLike[str], *, version: int, name: str, old: str | None, new: str | None
) -> ModelIdentity:
    """Implements `Adapter.save_pretrained`."""
    identity = identity_of(adapter, version=version, name=name, old=old, new=new)  # raises before anything is written
    write_model_folder(Path(folder), _config(adapter, version, name, old, new), adapter.state_dict(), ADAPTER)
    return identity


def check_adapter_folder(folder: str | os.PathLike[str]) -> None:
    """Raises the errors of `Adapter.save_pretrained` for this folder, so that a caller can check it before a fit."""
    check_writable(Path(folder), ADAPTER)


def identity_of(adapter: Adapter, *, version: int, name: str, old: str | None, new: str | None) -> ModelIdentity:
    """Implements `Adapter.identity`."""
    config = _config(adapter, version, name, old, new)
    return adapter_identity(add_checksums(config, fingerprint(adapter.state_dict()), ADAPTER))


def load_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the constructor arguments of the `Adapter` that a folder holds."""
    folder = Path(folder)
    config = read_config(folder, ADAPTER)
    state = read_weights(folder, config)
    spec = config["adapter"]
    try:
        maps = {role: _map(spec[role], role, state) for role in _ROLES}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFolderError(f"{folder / 'config.json'}: {error}") from error
    return {**maps, "alpha": spec["alpha"], "method": spec["method"]}


def _config(adapter: Adapter, version: int, name: str, old: str | None, new: str | None) -> dict[str, Any]:
    for role, encoder in (("old", old), ("new", new)):
        if encoder is not None and not isinstance(encoder, str):
            given = type(encoder).__name__
            raise TypeError(f"{role} must be None or a string, the encoder's fingerprint or name, got {given}")
    kinds = {kind: name for name, kind in _MAPS.items()}
    maps = {role: getattr(adapter, role) for role in _ROLES}
    return {
        "version": {"number": version, "name": name},
        "adapter": {
            **{role: None if made is None else kinds[type(made)] for role, made in maps.items()},
            "alpha": adapter.alpha,
            "in_features": adapter.in_features,
            "old_features": adapter.old_features,
            "embedding_dim": adapter.embedding_dim,
            "method": adapter.method,
        },
        "encoders": {"old": old, "new": new},
    }


def _map(kind: str | None, role: str, state: Mapping[str, Any]) -> nn.Module | None:
    if kind is None:
        return None
    if kind not in _MAPS:
        raise ValueError(f"{role} of kind {kind!r} is unknown; known: {', '.join(_MAPS)}")
    tensors = {key.removeprefix(f"{role}."): value for key, value in state.items() if key.startswith(f"{role}.")}
    return _MAPS[kind](**tensors)
