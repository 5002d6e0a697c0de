"""Trains several runs in parallel processes with one thread each, so results do not depend on the number of cores."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from ..training import Progress, RunConfig, train_run
from ._interrupts import delayed

__all__ = ["train_side_by_side"]

Chain = Mapping[str, RunConfig]


def train_side_by_side(
    chains: Sequence[Chain], folder: Path, *, on_step: Callable[[str, Progress], None]
) -> dict[str, dict[str, Any]]:
    """Trains all runs and returns their reports by name; an exception terminates all processes.

    Args:
        chains: mappings from names to configurations; one process trains the runs of a chain in order.
        folder: folder that gets a subfolder with the name of each run.
        on_step: function that is called with a run's name and progress after each of its steps.

    Raises:
        ChildProcessError: a process was killed.
        OSError: as in `train_run`.
        RuntimeError: a run failed with another error; the message holds its traceback.
    """
    context = multiprocessing.get_context("spawn")  # a forked process would copy torch's locks without its threads
    processes: dict[Any, SpawnProcess] = {}
    reports: dict[str, dict[str, Any]] = {}
    try:
        for chain in chains:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_train, args=(sender, chain, folder), daemon=True)
            with delayed():
                # The new process inherits this mask: only this process handles Ctrl-C, and it terminates the others.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    process.start()
                    processes[receiver] = process
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            sender.close()
        running = dict(processes)
        while running:
            ready: list[Any] = wait(list(running))
            for receiver in ready:
                try:
                    name, message = receiver.recv()
                except EOFError:
                    process = running.pop(receiver)
                    process.join()
                    if process.exitcode:
                        raise ChildProcessError(
                            f"a training process ended with exit code {process.exitcode}; if the machine was "
                            "out of memory, close other programs and try again"
                        ) from None
                    continue
                if isinstance(message, Progress):
                    on_step(name, message)
                elif isinstance(message, Exception):
                    raise message
                else:
                    reports[name] = message
    finally:
        for process in processes.values():
            process.terminate()
            process.join()
    return {name: reports[name] for chain in chains for name in chain}


def _train(sender: Connection, chain: Chain, folder: Path) -> None:
    torch.set_num_threads(1)
    name = ""

    def send(message: Progress | dict[str, Any] | Exception) -> None:
        sender.send((name, message))

    try:
        for name, config in chain.items():
            send(train_run(config, folder / name, on_step=send))
    except BrokenPipeError:
        return  # the parent process is gone
    except OSError as error:
        send(error)
    except Exception:
        send(RuntimeError(f"the run {name} failed:\n{traceback.format_exc()}"))
