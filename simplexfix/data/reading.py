"""Prefetching: worker processes read items before they are used."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .._seeds import renew_lock
from .image_files import ImageFileError

__all__ = ["lost_readers_named", "read_ahead"]

_R = TypeVar("_R")
_T = TypeVar("_T")


def read_ahead(read: Callable[[_R], _T], requests: Iterable[_R], *, workers: int) -> Generator[_T, None, None]:
    """Yields `map(read, requests)` in order; `workers` processes prefetch the results.

    Args:
        read: function whose result does not depend on the process.
        requests: arguments of the calls; use arrays, since torch would send tensors through shared memory.
        workers: number of processes; 0 calls `read` in this process.  Workers exit when the iterator is closed, and
            when this process is killed.

    Raises:
        ImageFileError: `read` raised it.  Other errors keep their type; their message has the worker's traceback.
    """
    if not workers:
        yield from map(read, requests)
        return
    loader: DataLoader[Any] = DataLoader(
        _Reader(read),
        sampler=requests,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # otherwise the loader draws from the global generator
    )
    for found in loader:
        if isinstance(found, ImageFileError):
            raise found
        yield found


@contextmanager
def lost_readers_named() -> Iterator[None]:
    """Converts torch's error about a killed worker to a clear one; torch's signal handler may raise it anywhere.

    Raises:
        ChildProcessError: a process that read ahead was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise ChildProcessError(
            f"a process that reads data was killed: {error} If memory ran out, use fewer workers or a smaller batch, "
            "and in a container more shared memory (--shm-size)"
        ) from None


class _Reader(Dataset[Any], Generic[_R, _T]):
    def __init__(self, read: Callable[[_R], _T]) -> None:
        self.read = read

    def __getitem__(self, request: Any) -> _T | ImageFileError:
        try:
            return self.read(request)
        except ImageFileError as error:  # returned: torch would add a traceback to the message if it were raised
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _begin(worker: int) -> None:
    renew_lock()
    threading.Thread(target=_exit_with_the_parent, daemon=True).start()


def _exit_with_the_parent() -> None:
    """Exits with the parent.  torch does so only without a fork server, which lives as long as its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
