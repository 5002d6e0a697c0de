"""Checks the rules of prose that a script can check (CONTRIBUTING.md, "Prose"), and exits with 1 if one is broken.

python tools/prose.py

1. Pages have no sentence of more than 30 words.  Code spans count as one word; code blocks are skipped.
2. No file in SOURCES has words that were private to this project.
3. Commit subjects after LAST_COMMIT_BEFORE have at most 72 characters.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
SOURCES = (
    "csrc",
    "simplexfix",
    "docs",
    "benchmarks",
    "examples",
    "tests",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
SUFFIXES = {".py", ".md", ".cpp", ".h", ".inc", ".cu", ".cuh", ".jinja"}
MOST_WORDS = 30
MOST_CHARACTERS = 72
LAST_COMMIT_BEFORE = "41e90bf4e6"  # before the rule on subjects
PRIVATE = {  # word -> the term for it
    r"twins?": "reference implementation",
    r"past the caches": "by non-temporal stores",
    r"fore(?:tell|told)": "predict",
    r"made anew": "computed again, or recreated",
    r"lay_(?:left|right)": "pack_a, pack_b",
    r"alone_in": "folder_lock",
    r"by_first": "run_on_rank0",
}


def sentences(page: str) -> Iterator[tuple[int, str]]:
    """Yields line number and text of each sentence; a cell of a table and an item of a list are separate sentences."""
    page = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), page, flags=re.DOTALL)
    page = re.sub(r"^ {4,}(?![-*]|\d+\. ).*$", "", page, flags=re.MULTILINE)  # indented code
    start = 1
    for block in re.split(r"(\n\s*\n|\n(?=\s*(?:[-*|]|\d+\. |#)))", page):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "Code", block))
        for cell in text.split("|") if block.lstrip().startswith("|") else [text]:
            for sentence in re.split(r"(?<=[.!?;:])\s+", cell):
                yield start, " ".join(sentence.split())
        start += block.count("\n")


def long_sentences() -> Iterator[str]:
    for path in PAGES:
        for line, sentence in sentences(path.read_text()):
            words = len(re.findall(r"[^\W\d_][\w'-]*", sentence))
            if words > MOST_WORDS:
                yield f"{path.relative_to(ROOT)}:{line}: {words} words, at most {MOST_WORDS}: {sentence[:60]}..."


def private_words() -> Iterator[str]:
    for path in (file for place in SOURCES for file in [ROOT / place, *(ROOT / place).rglob("*")] if file.is_file()):
        if path.suffix not in SUFFIXES:
            continue
        for number, line in enumerate(path.read_text(errors="replace").split("\n"), 1):
            for word, term in PRIVATE.items():
                if found := re.search(rf"\b{word}\b", line, re.IGNORECASE):
                    yield f"{path.relative_to(ROOT)}:{number}: {found[0]!r}: write {term}"


def long_subjects() -> Iterator[str]:
    """Yields nothing without git, or in a clone without the first commit."""
    log = ["git", "-C", str(ROOT), "log", "--no-merges", "--format=%h %s", f"{LAST_COMMIT_BEFORE}..HEAD"]
    done = subprocess.run(log, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        commit, _, subject = line.partition(" ")
        if len(subject) > MOST_CHARACTERS:
            yield f"commit {commit}: {len(subject)} characters, at most {MOST_CHARACTERS}: {subject}"


def main() -> int:
    broken = [*long_sentences(), *private_words(), *long_subjects()]
    print("\n".join(broken), end="\n" if broken else "")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
