"""Trains the versions of a configuration, or resumes a stopped run, and evaluates them at the end."""

from __future__ import annotations

import argparse
import atexit
import difflib
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from ..models.external import LIBRARIES
from ..training import CheckpointError, processes
from ..training.config import overridden, plain, read_config, read_mapping
from ..training.presets import PRESETS
from ..training.run import searches_of, train_run
from ..training.run_config import RunConfig
from ._progress import progress_on
from ._terminal import criteria_text

BAD_INPUT = 2


def run(arguments: argparse.Namespace) -> int:
    """Runs the verb; under torchrun every process calls it."""
    try:
        config = _config(arguments)
        if arguments.print_config:
            print(json.dumps(asdict(config), indent=1))
            return 0
        folder = arguments.out or Path("runs") / Path(arguments.config).stem
        with _group(), progress_on(sys.stderr) as show:
            report = train_run(config, folder, on_step=show)
            first = processes.rank() == 0
    except CheckpointError as error:  # a finished version is damaged; damaged checkpoints are skipped
        remedy = (
            "delete this file and run the same command again, which writes it again, on the same machine bit for bit"
        )
        print(f"simplexfix train: {error}; {remedy}", file=sys.stderr)
        return BAD_INPUT
    except (ValueError, TypeError, FloatingPointError) as error:
        print(f"simplexfix train: {error}", file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        if error.name not in LIBRARIES:  # LIBRARIES have no extra: their error has the command
            raise
        print(f"simplexfix train: {error}", file=sys.stderr)
        return BAD_INPUT
    if first:
        for search, protocols in searches_of(report).items():
            for name, entry in protocols.items():
                print(f"{search}, {name.replace('_', ' ')}: {criteria_text(entry['criteria'])}")
        print(f"{folder} holds versions, logs and report.json")
    return 0


def _config(arguments: argparse.Namespace) -> RunConfig:
    if arguments.config in PRESETS:
        content = plain(PRESETS[arguments.config])
    elif not Path(arguments.config).exists():
        near = difflib.get_close_matches(arguments.config, PRESETS, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]}? " if near else ""
        raise FileNotFoundError(
            f"{arguments.config} is neither a file nor a preset; {guess}presets: {', '.join(PRESETS)}"
        )
    else:
        content = read_mapping(Path(arguments.config))
    return read_config(RunConfig, overridden(content, arguments.changes))


@contextmanager
def _group() -> Iterator[None]:
    """Context manager for the process group, if torchrun started this process."""
    if "RANK" not in os.environ or not dist.is_torchelastic_launched():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    atexit.register(gc.collect)  # as in retrieval.process_group: the group's threads end before the interpreter
    try:
        yield
    finally:
        # Reference cycles may keep DistributedDataParallel alive as the last owner of the group.  It would free the
        # group without releasing the GIL, and deadlock if the group's thread still frees the tensors of a broadcast.
        gc.collect()
        dist.destroy_process_group()
