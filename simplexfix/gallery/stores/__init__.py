"""Stores of a gallery: folder.py, postgresql.py and milvus.py each have one class with the methods of `Store`."""

from __future__ import annotations

import os
from typing import Any

from .._state import State
from .base import Overview, Store, StoredRows, StoreError
from .folder import FolderStore

__all__ = ["Overview", "Store", "StoreError", "StoredRows", "create_store", "open_store"]

_URLS = (
    "the path of a folder, FILE.db#NAME or http://HOST:PORT#NAME (Milvus), or postgresql://USER@HOST:PORT/DATABASE#NAME"
)


def create_store(url: str | os.PathLike[str], state: State, event: dict[str, Any]) -> Store:
    """A new store with this state, and this event as the first of its history."""
    text = _text(url)
    return _kind(text).create(text, state, event)


def open_store(url: str | os.PathLike[str]) -> Store:
    text = _text(url)
    return _kind(text).open(text)


def _text(url: str | os.PathLike[str]) -> str:
    text = os.fspath(url)
    if not isinstance(text, str) or not text:
        raise TypeError(f"url must be {_URLS}, got {url!r}")
    return text


def _kind(url: str) -> type[Store]:
    """The class of store for a url.  Stores with optional dependencies are imported only if the url is theirs."""
    scheme, has_scheme, _ = url.partition("://")
    if scheme in ("postgresql", "postgres") and has_scheme:
        try:
            from .postgresql import PostgresStore
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a gallery in PostgreSQL needs psycopg: pip install 'simplexfix[postgresql]'", name=error.name
            ) from error
        return PostgresStore

    if (scheme in ("http", "https") and has_scheme) or (not has_scheme and ".db#" in url):
        try:
            import pymilvus  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a gallery in Milvus needs pymilvus: pip install 'simplexfix[milvus]'", name=error.name
            ) from error
        from .milvus import MilvusStore

        return MilvusStore

    if has_scheme:  # the rest may hold a password
        raise ValueError(f"url must be {_URLS}, got {scheme}://...: there is no such store")
    if "#" in url:
        raise ValueError(f"url must be {_URLS}; the path of a folder has no #, got {url!r}")
    return FolderStore
