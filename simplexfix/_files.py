"""Files, and folders of them, that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_folder", "write_whole"]


def write_whole(path: str | bytes | os.PathLike[str], content: bytes) -> None:
    """Written beside, synced, renamed: after an error or a crash the file is as it was before.  It keeps its mode.

    Raises:
        OSError: it cannot be written; names the path.
    """
    path = os.fsencode(path)
    temporary = path + b".%d-%d.tmp" % (os.getpid(), threading.get_ident())
    try:
        # the mode first: what others may not read is never there for them
        mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            if mode is not None:  # what the umask took away as well
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None
        raise
    _sync(os.path.dirname(path) or b".")


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """A folder of these files, named by their paths in it, in the place of the one that was there, which is deleted.

    Written beside, synced, exchanged by two renames: after an error the folder is as it was before, and a crash between
    the two leaves both whole, under other names.  It keeps its mode.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    suffix = f"{os.getpid()}-{threading.get_ident()}"
    made, aside = path.with_name(f".{path.name}.{suffix}.tmp"), path.with_name(f".{path.name}.{suffix}.old")
    try:
        made.mkdir()
        for name, content in files.items():
            file = made / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "xb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
        for folder in (made, *(entry for entry in made.rglob("*") if entry.is_dir())):
            _sync(os.fsencode(folder))
        if path.exists():
            made.chmod(path.stat().st_mode & 0o777)
            path.rename(aside)
        made.rename(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        shutil.rmtree(made, ignore_errors=True)
        raise
    _sync(os.fsencode(path.parent))
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: bytes) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
