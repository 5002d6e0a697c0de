"""Files, and folders of them, that appear whole or not at all; and text files as people save them."""

from __future__ import annotations

import codecs
import errno
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["read_text", "write_folder", "write_whole"]

# UTF-32 first: its mark begins with that of UTF-16
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, or in an encoding that a byte-order mark at its start names; without the mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such text.
    """
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    remedy = "save it as UTF-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in {encoding.upper().removesuffix('-SIG')}: {error}; {remedy}") from None
    if "\0" in text:  # of UTF-16 without a mark every second byte is 0
        raise ValueError(f"it holds zero bytes, as UTF-16 without a byte-order mark does; {remedy}")
    return text


_BEGIN = 64  # bytes of a target's name that the temporary one begins with


def write_whole(path: str | bytes | os.PathLike[str], content: bytes | Iterable[bytes]) -> None:
    """Writes a file that appears whole or not at all; after an error or a crash the file is as it was before.

    The content is written to a temporary file in the same folder, synchronized, and renamed.  A file that was there
    keeps its mode, and a symbolic link stays and its target is replaced.  A device, a pipe and a descriptor of this
    process (/dev/stdout, /dev/fd/3) stay what they are: the content is written into them.

    Args:
        content: bytes, or chunks that are made while the file is written.

    Raises:
        OSError: it cannot be written; names the path.
    """
    path = os.fsencode(path)
    chunks = (content,) if isinstance(content, bytes) else content
    try:
        if not _written_into(path, chunks):
            target = os.path.realpath(path)
            if os.path.islink(target):  # links in a circle
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            _replace(target, chunks)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None


def _written_into(path: bytes, chunks: Iterable[bytes]) -> bool:
    """Writes the content in place if a rename would destroy the target; returns whether it did."""
    descriptor = _own_descriptor(path)
    mode = os.stat(path).st_mode if descriptor is None and os.path.exists(path) else 0
    if descriptor is not None:
        opened = os.dup(descriptor)  # opened again, a regular file would be written from its start
    elif stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        opened = os.open(path, os.O_WRONLY)
    elif mode and not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file, character device or pipe")
    else:
        return False
    with open(opened, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
    return True


def _own_descriptor(path: bytes) -> int | None:
    """n, if the path leads to /proc/self/fd/n; a rename cannot replace the file of such a link."""
    for _ in range(40):  # links that the kernel follows
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder or b".")
        if re.fullmatch(rb"/proc/%d(/task/\d+)?/fd" % os.getpid(), folder) and name.isdigit():
            return int(name)
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    return None


def _replace(path: bytes, chunks: Iterable[bytes]) -> None:
    temporary = _beside(path, b"tmp")
    try:
        # the mode first: what others may not read is never there for them
        mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            if mode is not None:  # what the umask took away as well
                os.fchmod(file.fileno(), mode)
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
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
    hidden = os.fsencode(path.with_name(f".{path.name}"))
    made, aside = (Path(os.fsdecode(_beside(hidden, ending))) for ending in (b"tmp", b"old"))
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


def _beside(path: bytes, ending: bytes) -> bytes:
    """A path in the same folder for this thread alone: its name begins as the target's, and is short for every target.

    A target's name may be as long as the file system allows: 255 bytes, or 143 where names are encrypted.
    """
    folder, name = os.path.split(path)
    begin = name[:_BEGIN].decode("utf-8", "ignore").encode()  # no part of a character
    return os.path.join(folder, b"%s.%d-%d.%s" % (begin, os.getpid(), threading.get_ident(), ending))


def _sync(folder: bytes) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
