"""Atomic writes of files and folders, and reading of text files: byte-order marks, and JSON with duplicate keys."""

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
from typing import Any

__all__ = ["read_text", "unique_keys", "write_folder", "write_whole"]

# UTF-32 first: its little-endian mark begins with UTF-16's
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text file in UTF-8, or in the encoding of its byte-order mark; the mark is removed.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not text in that encoding.
    """
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    remedy = "save it as UTF-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in {encoding.upper().removesuffix('-SIG')}: {error}; {remedy}") from None
    if "\0" in text:  # in UTF-16 without a mark every second byte of ASCII text is 0
        raise ValueError(f"it holds zero bytes, as UTF-16 without a byte-order mark does; {remedy}")
    return text


_BEGIN = 64  # a temporary name begins with at most this many bytes of the target's name


def unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Returns an object of JSON or YAML as a dict; `json.loads` takes this function as `object_pairs_hook`.

    Raises:
        ValueError: a key comes twice; without this check the last value would be used.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in names if names.count(key) > 1)!r} comes twice")
    return content


def write_whole(path: str | bytes | os.PathLike[str], content: bytes | Iterable[bytes]) -> None:
    """Writes a file atomically: after an error or a crash an earlier file is unchanged.

    The content is written to a temporary file in the same folder, synchronized, and renamed.  An earlier file's mode is
    kept.  A symbolic link stays, and its target is replaced.  A device, a pipe or a descriptor of this process
    (/dev/stdout, /dev/fd/3) is written in place, without a rename.

    Args:
        path: path of the file.
        content: bytes, or an iterable of chunks that is consumed during the write.

    Raises:
        OSError: the file cannot be written; the error holds the path.
    """
    path = os.fsencode(path)
    chunks = (content,) if isinstance(content, bytes) else content
    try:
        if not _written_into(path, chunks):
            target = os.path.realpath(path)
            if os.path.islink(target):  # a cycle of links
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            _replace(target, chunks)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None


def _written_into(path: bytes, chunks: Iterable[bytes]) -> bool:
    """Writes the content in place if a rename would destroy the target; returns whether it did."""
    descriptor = _own_descriptor(path)
    mode = os.stat(path).st_mode if descriptor is None and os.path.exists(path) else 0
    if descriptor is not None:
        opened = os.dup(descriptor)  # reopening a regular file would reset the offset to its start
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
    """Returns n if the path leads to /proc/self/fd/n, whose file a rename cannot replace; else None."""
    for _ in range(40):  # the kernel follows at most 40 links
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
        # set the mode at creation, so that a private file is never readable by others
        mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            if mode is not None:  # restore bits that the umask removed
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
    """Writes a folder of files; it replaces an earlier folder, which is deleted.

    The new folder is written beside the old one, synchronized, and exchanged by two renames.  After an error the old
    folder is unchanged.  A crash between the renames leaves both folders complete, under temporary names.  The mode of
    an earlier folder is kept.

    Args:
        path: path of the folder.
        files: content of each file by its path in the folder.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
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
    """Returns a temporary path in the target's folder that is unique to this thread and begins like the target's name.

    The name is short, since a target's name may have the maximum length (255 bytes, or 143 on eCryptfs).
    """
    folder, name = os.path.split(path)
    begin = name[:_BEGIN].decode("utf-8", "ignore").encode()  # drop a character that is cut in half
    return os.path.join(folder, b"%s.%d-%d.%s" % (begin, os.getpid(), threading.get_ident(), ending))


def _sync(folder: bytes) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
