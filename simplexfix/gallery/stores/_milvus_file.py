"""Repairs a file of Milvus Lite after a process that had it open was killed.

The "file" is a folder; `collections` in it has one folder per collection.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from pathlib import Path

from .base import StoreError

__all__ = ["repair"]

_LOG = re.compile(r"wal_(?:data|delta)_(\d+)\.arrow")  # a numbered write-ahead log


def repair(file: str, url: str) -> None:
    """Deletes what a killed process left incomplete, before this process opens the file.

    Args:
        file: path of the file.
        url: url of the gallery, for the error message.

    Raises:
        StoreError: another process has the file open; milvus-lite's own error does not name this cause.
    """
    lock = Path(file, "LOCK")
    if not lock.is_file():  # a new file
        return
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(
                f"the gallery in {url} is open in another process: a file of Milvus Lite belongs to one process "
                "at a time; close it there, or use a Milvus server if several processes need the gallery"
            ) from None
        for collection in filter(Path.is_dir, Path(file, "collections").iterdir()):
            _repair_collection(collection)


def _repair_collection(collection: Path) -> None:
    """Deletes remains that Milvus Lite itself does not delete when it opens a collection."""
    if not Path(collection, "schema.json").exists():  # its creation or deletion was not finished
        shutil.rmtree(collection)  # Milvus Lite does not list it, and refuses a new one of its name
        return
    try:
        number = json.loads(Path(collection, "manifest.json").read_text())["active_wal_number"]
    except (OSError, ValueError, KeyError):
        return
    for log in Path(collection, "wal").glob("*.arrow"):
        match = _LOG.fullmatch(log.name)
        # the rows of earlier logs are in data files; Milvus Lite would read them a second time
        if match and number is not None and int(match[1]) < number:
            log.unlink()
