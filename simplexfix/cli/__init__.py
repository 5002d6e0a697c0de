"""The command line: one file per verb, each with `add_arguments(parser)` and `run(arguments) -> exit code`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import demo, doctor, evaluate, gate, runs, train

__all__ = ["main"]

_VERBS = {"demo": demo, "doctor": doctor, "evaluate": evaluate, "gate": gate, "runs": runs, "train": train}
_EXTRAS = {
    "PIL": "cli",
    "matplotlib": "cli",
    "pyarrow": "parquet",
    "rich": "cli",
    "safetensors": "safetensors",
    "sklearn": "calibration",
    "tensorboard": "tensorboard",
    "tqdm": "train",
    "wandb": "wandb",
    "yaml": "train",
}  # which extra brings a package


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; 2 where the arguments are wrong or a package is missing."""
    parser = argparse.ArgumentParser(
        prog="simplexfix", description="Compatible representations: swap your embedding model, keep your index."
    )
    parser.add_argument("--version", action="version", version=f"simplexfix {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in _VERBS.items():
        summary = (module.__doc__ or "").split("\n", 1)[0]
        verb = verbs.add_parser(name, help=summary, description=summary)
        module.add_arguments(verb)
    arguments, rest = parser.parse_known_args(argv)
    # argparse ends a list of positional arguments at the first option: what comes after one is of that list, too
    if hasattr(arguments, "changes") and not any(text.startswith("-") for text in rest):
        arguments.changes += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(_VERBS[arguments.verb].run(arguments))
    except OSError as error:
        print(f"simplexfix {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        remedy = f"pip install 'simplexfix[{_EXTRAS[package]}]'"
        print(f"simplexfix {arguments.verb} needs {package}: {remedy}", file=sys.stderr)
        return 2
