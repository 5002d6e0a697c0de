"""Processes that read items ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .._seeds import renew_lock
from .folders import ImageFileError

__all__ = ["lost_readers_named", "read_ahead"]

_R = TypeVar("_R")
_T = TypeVar("_T")


def read_ahead(read: Callable[[_R], _T], requests: Iterable[_R], *, workers: int) -> Generator[_T, None, None]:
    """`map(read, requests)`, in order, by so many processes that work ahead; 0 for this one, which does not.

    Args:
        read: the same in every process; it draws from no generator.
        requests: what each call takes; without tensors, which would be sent by files.
        workers: at least 0.  They end when the iterator is closed, and within seconds of the death of this process.

    Raises:
        ImageFileError: by `read`; its other errors come with the worker's traceback as their message.
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
        generator=torch.Generator(),  # or it would draw from the global one
    )
    for found in loader:
        if isinstance(found, ImageFileError):
            raise found
        yield found


@contextmanager
def lost_readers_named() -> Iterator[None]:
    """
    Raises:
        ChildProcessError: a process that read ahead was ended; torch raises from a signal handler, anywhere.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise ChildProcessError(
            f"a process that reads data was ended: {error} Where memory was short, use fewer workers or a smaller "
            "batch, and in a container more shared memory (--shm-size)"
        ) from None


class _Reader(Dataset[Any], Generic[_R, _T]):
    def __init__(self, read: Callable[[_R], _T]) -> None:
        self.read = read

    def __getitem__(self, request: Any) -> _T | ImageFileError:
        try:
            return self.read(request)
        except ImageFileError as error:  # its message says all
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _begin(worker: int) -> None:
    renew_lock()
