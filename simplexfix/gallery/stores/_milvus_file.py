"""What a process that was killed leaves in a file of Milvus Lite, which is a folder with a folder per collection."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from pathlib import Path

from .base import StoreError

__all__ = ["take_over"]

_LOG = re.compile(r"wal_(?:data|delta)_(\d+)\.arrow")  # its write-ahead logs, by number


def take_over(file: str, shown: str) -> None:
    """Ends what a killed process had begun, before this process opens the file.

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
                f"the gallery in {shown} is open in another process: a file of Milvus Lite belongs to one process "
                "at a time; close it there, or use a Milvus server for several"
            ) from None
        for collection in filter(Path.is_dir, Path(file, "collections").iterdir()):
            _mend(collection)


def _mend(collection: Path) -> None:
    """Does what Milvus Lite leaves undone when it opens a collection."""
    if not Path(collection, "schema.json").exists():  # its creation or deletion was not finished
        shutil.rmtree(collection)  # it is not listed, and no collection of its name can be created
        return
    try:
        number = json.loads(Path(collection, "manifest.json").read_text())["active_wal_number"]
    except (OSError, ValueError, KeyError):
        return
    for log in Path(collection, "wal").glob("*.arrow"):
        found = _LOG.fullmatch(log.name)
        # the rows of earlier logs are in data files; Milvus Lite would read them a second time
        if found and number is not None and int(found[1]) < number:
            log.unlink()
