"""Tests `write_whole` on links, devices, pipes and descriptors; it refuses folders, sockets and block devices."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from simplexfix._files import write_whole

CONTENT = b"content\n" * 100
root = pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes needs root")


def test_a_link_stays_and_its_target_is_replaced(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    target.write_bytes(b"old")
    target.chmod(0o640)
    before = target.stat().st_ino
    (tmp_path / "second").symlink_to("folder/target")
    (tmp_path / "first").symlink_to("second")
    write_whole(tmp_path / "first", CONTENT)
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert target.read_bytes() == CONTENT
    assert target.stat().st_mode & 0o777 == 0o640
    assert target.stat().st_ino != before  # a new file replaces the old one by rename
    assert sorted(os.listdir(tmp_path / "folder")) == ["target"]


def test_the_target_of_a_dangling_link_is_created(tmp_path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    write_whole(tmp_path / "link", CONTENT)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "nothing").read_bytes() == CONTENT
    (tmp_path / "lost").symlink_to("no/folder")
    with pytest.raises(FileNotFoundError, match="lost"):
        write_whole(tmp_path / "lost", CONTENT)


def test_links_in_a_circle_are_an_error(tmp_path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="a'"):
        write_whole(tmp_path / "a", CONTENT)
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "b").is_symlink()


@root
def test_a_device_is_written_into(tmp_path) -> None:
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (tmp_path / "link").symlink_to("null")
    for name in ("null", "link"):
        write_whole(tmp_path / name, CONTENT)
        assert stat.S_ISCHR(os.stat(tmp_path / name).st_mode)
    os.mknod(tmp_path / "full", stat.S_IFCHR | 0o666, os.makedev(1, 7))
    with pytest.raises(OSError, match=r"No space left on device.*full"):
        write_whole(tmp_path / "full", CONTENT)
    assert stat.S_ISCHR(os.stat(tmp_path / "full").st_mode)


@root
def test_a_block_device_is_refused(tmp_path) -> None:
    os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o666, os.makedev(250, 250))  # a device without a driver
    with pytest.raises(OSError, match=r"not a regular file, character device or pipe.*disk"):
        write_whole(tmp_path / "disk", CONTENT)
    assert stat.S_ISBLK(os.stat(tmp_path / "disk").st_mode)


def test_a_named_pipe_is_written_into(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    write_whole(tmp_path / "pipe", CONTENT)
    reader.join(10)
    assert read == [CONTENT]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_folder_and_a_socket_are_refused(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for name in ("folder", "socket"):
            with pytest.raises(OSError, match=f"not a regular file, character device or pipe.*{name}"):
                write_whole(tmp_path / name, CONTENT)
        assert stat.S_ISSOCK(os.stat(tmp_path / "socket").st_mode)
    assert sorted(os.listdir(tmp_path)) == ["folder", "socket"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
@pytest.mark.parametrize("kind", ["file", "pipe"])
@pytest.mark.parametrize("target", ["/dev/fd/{}", "/proc/self/fd/{}", "link", "chain"])
def test_a_descriptor_is_written_at_its_current_offset(tmp_path, target: str, kind: str) -> None:
    """A process writes to a descriptor directly, then by `write_whole`, then directly again; all three must follow."""
    program = (
        "import os, sys\nfrom simplexfix._files import write_whole\n"
        "descriptor = int(sys.argv[2])\n"
        "os.write(descriptor, b'before\\n')\n"
        "write_whole(sys.argv[1], b'content\\n')\n"
        "os.write(descriptor, b'after\\n')\n"
    )
    read, write = os.pipe() if kind == "pipe" else (-1, os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT))
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{write}")
    (tmp_path / "chain").symlink_to("link")
    path = target.format(write) if "{}" in target else str(tmp_path / target)
    subprocess.run([sys.executable, "-c", program, path, str(write)], pass_fds=[write], check=True)
    os.close(write)
    if kind == "pipe":
        with open(read, "rb") as file:
            written = file.read()
    else:
        written = (tmp_path / "file").read_bytes()
        assert (tmp_path / "file").is_file()
    assert written == b"before\ncontent\nafter\n"
    assert (tmp_path / "link").is_symlink()
