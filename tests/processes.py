"""Processes that start in milliseconds: a fork server that has imported torch and this package forks them.

An interpreter that imports torch takes more than two seconds of CPU time.  The server runs no backward pass and no
parallel loop, since neither survives a fork.  Tests of an interpreter's start and exit (its file system encoding, its
environment before imports, its exit with a full stream) start real interpreters instead.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

CONTEXT = multiprocessing.get_context("forkserver")
# All tests of a process share one server, which imports the modules that any of them needs, if installed. torch would
# import torch._dynamo with the first optimizer, which takes more than a second.
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed",
        "simplexfix.training",
        "simplexfix.cli.evaluate",
        "simplexfix.cli.gate",
        "simplexfix.report.figures",
        "pymilvus",
        "milvus_lite.adapter.grpc.server",
    ]
)


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in free:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in free]


def run_ranks(function: Callable[..., None], size: int, *arguments: object) -> None:
    """Runs function(rank, size, *arguments) in `size` processes; raises the first error."""
    torch.multiprocessing.start_processes(function, (size, *arguments), nprocs=size, start_method="forkserver")


class Done(NamedTuple):
    returncode: int
    stdout: bytes
    stderr: bytes


class Child:
    """A process that runs function(*arguments) in `folder`, with `environment` added to this process's.

    Args:
        stdout, stderr: "file": `wait` returns the content; "left": a pipe without a reader; "full": /dev/full;
            "closed": no stream.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: object,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        stdout: str = "file",
        stderr: str = "file",
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = {n: Path(self._folder.name, str(n)) for n in (1, 2)}
        streams = {1: stdout, 2: stderr}
        whole = {**os.environ, **(environment or {})}
        self._process = CONTEXT.Process(target=_run, args=(function, arguments, folder, whole, streams, self._files))
        self._process.start()

    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def printed(self) -> bytes:
        return self._files[1].read_bytes() if self._files[1].exists() else b""

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 240) -> Done:
        """Returns the exit code and output; kills a process that takes longer."""
        self._process.join(timeout)
        self._process.kill()
        self._process.join()
        assert self._process.exitcode is not None
        contents = (file.read_bytes() if file.exists() else b"" for file in self._files.values())
        return Done(self._process.exitcode, *contents)


def without_figures() -> None:
    """Replaces each SVG by an empty one: drawing takes nine tenths of the time of an evaluation."""
    from simplexfix.report import figures

    encode, empty = figures._encode, b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    figures._encode = lambda make, theme, kind: empty if kind == "svg" else encode(make, theme, kind)


class Command(Child):
    """`simplexfix ARGUMENTS` in a process; `before` runs in it before the command."""

    def __init__(self, *arguments: str, folder: Path, before: Callable[[], None] | None = None, **options: Any) -> None:
        super().__init__(_command, arguments, before, folder=folder, **options)


def command(*arguments: str, folder: Path, **options: Any) -> Done:
    return Command(*arguments, folder=folder, **options).wait()


def _command(arguments: tuple[str, ...], before: Callable[[], None] | None) -> None:
    sys.argv = ["simplexfix", *arguments]
    if before is not None:
        before()
    runpy.run_module("simplexfix", run_name="__main__")


def _run(
    function: Callable[..., None],
    arguments: tuple[object, ...],
    folder: Path,
    environment: dict[str, str],
    streams: dict[int, str],
    files: dict[int, Path],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    for descriptor, kind in streams.items():
        _redirect(descriptor, kind, files[descriptor])
    sys.stdout = sys.__stdout__ = _stream(1, streams[1], "strict")
    sys.stderr = sys.__stderr__ = _stream(2, streams[2], "backslashreplace")
    code: Any = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        code = 120  # the exit code of an interpreter that cannot flush standard output
    os._exit(code if isinstance(code, int) else 1)


def _redirect(descriptor: int, kind: str, file: Path) -> None:
    if kind == "closed":
        os.close(descriptor)
        return
    if kind == "left":
        reader, opened = os.pipe()
        os.close(reader)
    else:
        opened = os.open("/dev/full" if kind == "full" else file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, descriptor)
    os.close(opened)


def _stream(descriptor: int, kind: str, errors: str) -> io.TextIOWrapper | None:
    """Returns the stream that an interpreter opens for the descriptor, by PYTHONIOENCODING and PYTHONUNBUFFERED."""
    if kind == "closed":
        return None
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    encoding, _, given = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    raw = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding or "utf-8",
        given if given and descriptor == 1 else errors,
        write_through=unbuffered,
        line_buffering=descriptor == 2,
    )
