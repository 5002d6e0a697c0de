"""Lock of a training's folder: two trainings would write to one log and delete each other's checkpoints."""

from __future__ import annotations

import fcntl
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from . import processes
from .checkpoint import CheckpointWarning

__all__ = ["FolderInUseError", "folder_lock"]

_held: list[BinaryIO] = []


class FolderInUseError(ValueError):
    """Another process trains in the folder."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Context manager that locks a folder: the first process of a group locks the file `log.jsonl` for all of them.

    The operating system releases the lock if the process dies.

    Args:
        folder: folder of the training; it is created if it is missing.

    Raises:
        FolderInUseError: another process or group holds the lock; raised on every process.

    Warns:
        CheckpointWarning: the file system does not support locks.
    """
    first = processes.rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "ab") if first else nullcontext() as file:
        said = None if file is None else _refusal(file, folder)
        if (said := processes.broadcast(said)) is not None:
            raise FolderInUseError(said)
        if file is not None:
            _register_close_in_forked_processes()
            _held.append(file)
        try:
            yield
        finally:
            if file is not None:
                _held.remove(file)


@functools.cache
def _register_close_in_forked_processes() -> None:
    """Registers once that forked children close lock files: a lock lasts while any process has its file open."""
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


def _refusal(file: BinaryIO, folder: Path) -> str | None:
    """Locks the file; returns the error message if another process holds the lock, else None."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"another process trains in {folder}: wait for it, or stop it; then the same call resumes"
    except OSError as error:
        says = f"{folder} cannot be locked, let no two processes train there: {error}"
        warnings.warn(says, CheckpointWarning, stacklevel=4)
    return None
