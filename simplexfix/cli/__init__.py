"""The command line: `_arguments.py` has its grammar, and one file per verb has `run(arguments) -> exit code`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from ._arguments import parse
from ._interrupts import Interrupts, delayed
from ._terminal import standard_streams, write_error

__all__ = ["main"]

BAD_INPUT = 2
CRASHED = 70  # EX_SOFTWARE of sysexits.h: exit code 1 of `gate` means that a rule failed
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

_EXTRAS = {
    "PIL": "cli",
    "matplotlib": "cli",
    "psycopg": "postgresql",
    "pymilvus": "milvus",
    "pyarrow": "parquet",
    "rich": "cli",
    "safetensors": "safetensors",
    "sklearn": "calibration",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "yaml": "train",
}  # package -> extra that installs it
_AFTER_CTRL_C = {
    "adapt": "no adapter was written; run the same command to start again",
    "demo": "nothing is kept; run the same command to start again",
    "embed": "no file was written; run the same command to start again",
    "evaluate": "no report was written; run the same command to start again",
    "gallery": "added and replaced rows stay; run the same command to continue",
    "gate": "there is no verdict; run the same command to start again",
    "train": "the same command resumes from the last checkpoint",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        The verb's exit code.  2 if an argument is wrong, a package is missing, a file cannot be read or written, or
        standard output cannot be written; 70 after an unexpected error; 130 after Ctrl-C.  If a reader closes the pipe
        of standard output, as `head` does, the exit code stays the same.
    """
    with standard_streams():
        try:
            arguments = parse(argv)
        except SystemExit:  # after help or a wrong argument
            if _is_output_lost("simplexfix"):
                raise SystemExit(BAD_INPUT) from None
            raise
        with Interrupts() as interrupts:
            code = _run(arguments, interrupts)
        return BAD_INPUT if _is_output_lost(f"simplexfix {arguments.verb}") else code


def _is_output_lost(program: str) -> bool:
    """Returns whether standard output could not be written, and prints why."""
    error = write_error(sys.stdout)
    if error is not None:
        print(f"{program}: standard output cannot be written: {error.strerror}", file=sys.stderr)
    return error is not None


def _run(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    # A notebook sets a backend that may not be installed here.  Figures are written to files.
    os.environ.pop("MPLBACKEND", None)
    try:
        with delayed():  # KeyboardInterrupt may be swallowed while torch is imported
            verb = importlib.import_module(f".{arguments.verb}", __name__)
        return int(verb.run(arguments))
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except OSError as error:
        _complain(arguments, str(error))
        return BAD_INPUT
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in _EXTRAS:
            print(
                f"simplexfix {arguments.verb} needs {package}: pip install 'simplexfix[{_EXTRAS[package]}]'",
                file=sys.stderr,
            )
            return BAD_INPUT
        traceback.print_exc()
    except Exception:
        if interrupts.count:  # C code of a library may turn KeyboardInterrupt into another error
            return _interrupted(arguments)
        traceback.print_exc()
    return CRASHED


def _interrupted(arguments: argparse.Namespace) -> int:
    if os.environ.get("RANK", "0") == "0":
        _complain(arguments, f"interrupted; {_AFTER_CTRL_C.get(arguments.verb, 'run the same command to start again')}")
    return INTERRUPTED


def _complain(arguments: argparse.Namespace, text: str) -> None:
    print(f"simplexfix {arguments.verb}: {text}", file=sys.stderr)
