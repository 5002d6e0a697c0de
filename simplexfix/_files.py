"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import threading

__all__ = ["write_whole"]


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
    folder = os.open(os.path.dirname(path) or b".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
