"""Where a gallery is kept: one file per store, each with the methods of `Store`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .._state import State
from .base import Counts, Store, StoredRows, StoreError
from .folder import FolderStore

__all__ = ["Counts", "Store", "StoreError", "StoredRows", "create_store", "open_store"]


def create_store(url: str | os.PathLike[str], state: State, event: dict[str, Any]) -> Store:
    """A new store with this state, and this event as the first of its history."""
    return FolderStore.create(_folder(url), state, event)


def open_store(url: str | os.PathLike[str]) -> Store:
    return FolderStore.open(_folder(url))


def _folder(url: str | os.PathLike[str]) -> Path:
    text = os.fspath(url)
    if not isinstance(text, str) or not text:
        raise TypeError(f"url must be the path of a folder, got {url!r}")
    if "://" in text or "#" in text:
        raise ValueError(f"url must be the path of a folder, without :// and #, got {text!r}: there is no other store")
    return Path(text)
