"""Prints docs/reference/cli.md from the parsers of the command line.

python tools/cli_reference.py > docs/reference/cli.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from simplexfix.cli._arguments import VERBS

HEAD = """# Command line

`simplexfix VERB --help` prints the same. `simplexfix --version` prints the release.

| exit code | meaning |
| --- | --- |
| 0 | done; for `gate` and `adapt`: passed, or better than the old encoder |
| 1 | `gate`: a rule fails; `adapt`: no candidate is better; `gallery`: stale rows are left, or an image is unreadable |
| 2 | bad input, a missing package, or a file that cannot be read or written |
| 70 | an error of this package, with its traceback |
| 130 | Ctrl-C |
"""


def placeholders(action: argparse.Action) -> list[str]:
    """Returns the names of the values that follow a flag, or the names of a positional argument."""
    if action.nargs == 0:
        return []
    if isinstance(action.metavar, tuple):
        return list(action.metavar)
    if action.metavar is None and action.choices is not None:
        return ["{" + ",".join(map(str, action.choices)) + "}"]
    name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    return [f"[{name}]" if action.nargs == "?" else name]


def written(action: argparse.Action) -> str:
    """Returns an argument as it is typed."""
    text = " ".join([*action.option_strings[:1], *placeholders(action)])
    many = {"+": f"{text} ...", "*": f"[{text} ...]"}
    return many.get(str(action.nargs), text)


def section(name: str, summary: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the text of one verb, or of one action of a verb; its table lists every argument but --help."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    yield f"{'##' if ' ' not in name else '###'} {name}\n\n{summary}\n"
    nested = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    for action in nested:
        summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for inner, added in action.choices.items():
            yield from section(f"{name} {inner}", summaries[inner], added)
    if nested:
        return
    needed = [written(action) for action in actions if action.required and action.option_strings]
    placed = [written(action) for action in actions if not action.option_strings]
    for group in parser._mutually_exclusive_groups:
        if group.required:
            needed.append("(" + " | ".join(written(action) for action in group._group_actions) + ")")
    yield "```text\n" + " ".join(["simplexfix", name, *placed, *needed, "[OPTION ...]"]) + "\n```\n"
    rows = [
        f"| `{written(action)}` | {(action.help or f'default: {action.default}').replace('|', chr(92) + '|')} |"
        for action in actions
    ]
    yield "\n".join(["| argument | meaning |", "| --- | --- |", *rows]) + "\n"


def main() -> None:
    print(HEAD)
    sections = []
    for name, (summary, add_arguments) in VERBS.items():
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        sections += section(name, summary, parser)
    print("\n".join(sections), end="")


if __name__ == "__main__":
    main()
