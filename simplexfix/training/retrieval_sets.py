"""Retrieval data sets in BEIR's layout: corpus, queries, relevance judgements, and hard negatives if there are any."""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..labelled import FeatureRows, RelevanceJudgements

__all__ = ["RetrievalSet", "load_retrieval_set"]


@dataclass(frozen=True, eq=False)
class RetrievalSet:
    """Corpus, queries and relevance judgements of one data set.

    Args:
        document_ids: N ids, in the order of the corpus.
        documents: N texts (title and text), or features [N, d].
        query_ids: Q ids of training and test queries.
        queries: Q texts, or features [Q, d].
        train, test: judgements of these queries and documents; a document with a grade above 0 is relevant.
        hard_negatives: query id -> ids of irrelevant documents near the query; empty if there are none.
    """

    document_ids: tuple[str, ...]
    documents: tuple[str, ...] | Tensor
    query_ids: tuple[str, ...]
    queries: tuple[str, ...] | Tensor
    train: RelevanceJudgements
    test: RelevanceJudgements
    hard_negatives: Mapping[str, tuple[str, ...]]


def load_retrieval_set(folder: Path, *, features: bool = False) -> RetrievalSet:
    """Reads a retrieval data set from a folder.

        corpus.jsonl[.gz]           {"_id": ..., "title": ..., "text": ...} per line; the title is optional
        queries.jsonl[.gz]          {"_id": ..., "text": ...} per line
        qrels/train.tsv, test.tsv   query-id, corpus-id, score; or qrels_train.tsv, qrels_test.tsv
        hard_negatives.tsv          query-id, corpus-id, score, nearest first; optional; the score is not read
        corpus.npy, queries.npy     with `features`: one row per line of the .jsonl file

    The .tsv files have the format of `simplexfix.labelled.RelevanceJudgements.load`.

    Args:
        folder: folder of one data set.
        features: whether to read features instead of texts.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is damaged, has an unknown query or document id, or has no judgement above 0.
    """
    corpus, queries = _texts(folder, "corpus"), _texts(folder, "queries")
    train, test = (
        _judgements(_first_of(folder, f"qrels/{split}.tsv", f"qrels_{split}.tsv"), queries, corpus)
        for split in ("train", "test")
    )
    for judgements in (train, test):
        if not (judgements.grades > 0).any():
            raise ValueError(f"{judgements.source} has no score above 0: nothing is relevant")
    negatives: dict[str, tuple[str, ...]] = {}
    if (file := folder / "hard_negatives.tsv").exists():
        near = _judgements(file, queries, corpus)
        for query, document in zip(near.query_ids.tolist(), near.item_ids.tolist(), strict=True):
            negatives[query] = (*negatives.get(query, ()), document)
    found = RetrievalSet(
        tuple(corpus), tuple(corpus.values()), tuple(queries), tuple(queries.values()), train, test, negatives
    )
    if not features:
        return found
    rows = {name: _features(folder, name, len(ids)) for name, ids in (("corpus", corpus), ("queries", queries))}
    if rows["corpus"].shape[1] != rows["queries"].shape[1]:
        shapes = " and ".join(f"{name} {list(part.shape)}" for name, part in rows.items())
        raise ValueError(f"{folder}: features of corpus and queries must have one width, got {shapes}")
    return replace(found, documents=rows["corpus"], queries=rows["queries"])


def _texts(folder: Path, name: str) -> dict[str, str]:
    """Returns the title and text of each id, in the order of lines."""
    file = _first_of(folder, f"{name}.jsonl", f"{name}.jsonl.gz")
    found: dict[str, str] = {}
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("_id"), (str, int)):
                    raise ValueError('it must be an object with "_id" and "text"')
                if (key := unicodedata.normalize("NFC", str(entry["_id"]))) in found:  # as in judgements
                    raise ValueError(f"_id {key!r} is there twice")
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
            found[key] = " ".join(filter(None, (entry.get("title"), entry.get("text"))))
    if not found:
        raise ValueError(f"{file} has no lines")
    return found


def _judgements(file: Path, queries: Mapping[str, str], documents: Mapping[str, str]) -> RelevanceJudgements:
    found = RelevanceJudgements.load(file)
    for ids, known, name in ((found.query_ids, queries, "queries"), (found.item_ids, documents, "corpus")):
        strangers = [id_ for id_ in ids.tolist() if id_ not in known]
        if strangers:
            raise ValueError(f"{file} has the id {strangers[0]!r}, which is missing in {name}.jsonl")
    return found


def _first_of(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(
        f"{folder} has no {' and no '.join(names)}; expected BEIR's layout: corpus.jsonl, queries.jsonl, "
        "qrels/train.tsv and qrels/test.tsv"
    )


def _features(folder: Path, name: str, lines: int) -> Tensor:
    file = folder / f"{name}.npy"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: it must hold one row of features per line of {name}.jsonl; for texts set "
            'model.kind="text"'
        )
    rows = FeatureRows(name, np.load(file, allow_pickle=False)).whole()
    if len(rows) != lines:
        raise ValueError(f"{file} must have a row for each of the {lines} lines of {name}.jsonl, got {len(rows)}")
    return rows
