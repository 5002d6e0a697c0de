"""Data and evaluation of runs over a sequence of retrieval data sets, with one version and one index per data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..adapters import QueryDrift
from ..data import Preprocessing, Tokens, Vectors
from ..labelled import LabelledItems, RelevanceJudgements
from ..models import EmbeddingModel, token_ids
from ..report.evaluation import Criteria
from ..retrieval.protocols import read_protocol
from .items import Items
from .resume import describe
from .retrieval_sets import RetrievalSet, load_retrieval_set
from .run_config import RunConfig
from .scenario import Task

__all__ = ["RetrievalData", "RetrievalJudge", "SearchedSet", "load_retrieval_data", "pair_items", "training_queries"]

METRIC = "ndcg@10"


def pair_items(found: RetrievalSet, documents: Tensor, queries: Tensor, *, negatives: int) -> Items:
    """Returns all pairs of a training query and a relevant document, in the layout of `simplexfix.methods.QDC`.

    Args:
        found: the data set.
        documents: [N, ...] inputs of its documents.
        queries: [Q, ...] inputs of its queries, of the same shape and dtype.
        negatives: n, the number of hard negatives per query; the first n in `hard_negatives.tsv` are taken.

    Returns:
        Items with inputs [P, 2 + n, ...] (query, document, negatives), one for each of P judgements above 0.  Labels
        are row numbers of the relevant documents.

    Raises:
        ValueError: a query has fewer than n hard negatives; the message names it.
    """
    query_rows, document_rows = _row_numbers(found.query_ids), _row_numbers(found.document_ids)
    rows: list[list[int]] = []
    for query, document in _relevant_pairs(found.train):
        hard = found.hard_negatives.get(query, ())[:negatives]
        if len(hard) < negatives:
            raise ValueError(
                f"every query must have {negatives} hard negatives (data.hard_negatives), query {query!r} has "
                f"{len(hard)} in hard_negatives.tsv"
            )
        rows.append([query_rows[query], *(document_rows[id_] for id_ in (document, *hard))])
    at = torch.tensor(rows)
    inputs = torch.cat([queries[at[:, :1]], documents[at[:, 1:]]], 1)
    return Items(inputs, at[:, 1].contiguous())


def training_queries(found: RetrievalSet) -> list[str]:
    """Returns the ids of training queries with a relevant document, without duplicates."""
    return _once(query for query, _ in _relevant_pairs(found.train))


def _relevant_pairs(judgements: RelevanceJudgements) -> list[tuple[str, str]]:
    relevant = judgements.grades > 0
    return list(zip(judgements.query_ids[relevant].tolist(), judgements.item_ids[relevant].tolist(), strict=True))


def _once(ids: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(ids))


def _row_numbers(ids: Sequence[str]) -> dict[str, int]:
    return {id_: row for row, id_ in enumerate(ids)}


@dataclass(frozen=True, eq=False)
class SearchedSet:
    """The inputs of one data set for searches and for measuring drift.

    Args:
        name: name of the data set.
        documents: [N, ...] inputs of the corpus.
        queries: [Q, ...] inputs of the test queries.
        items: ids of documents and test queries, and the test judgements.
        train_queries: [M, ...] inputs of the training queries that have a relevant document, without duplicates.
    """

    name: str
    documents: Tensor
    queries: Tensor
    items: LabelledItems
    train_queries: Tensor

    @classmethod
    def of(cls, name: str, found: RetrievalSet, documents: Tensor, queries: Tensor) -> SearchedSet:
        """Selects the test and training queries from the inputs [Q, ...] of all queries of a data set."""
        rows = _row_numbers(found.query_ids)
        test = _once(found.test.query_ids.tolist())
        at, train_at = (torch.tensor([rows[id_] for id_ in ids]) for ids in (test, training_queries(found)))
        items = LabelledItems.from_judgements(found.test, test, list(found.document_ids))
        return cls(name, documents, queries[at], items, queries[train_at])

    def score(self, queries: Tensor, documents: Tensor) -> float:
        """Returns nDCG@10 of exact cosine search, from embeddings of queries [Q, d] and documents [N, d]."""
        return read_protocol(METRIC).score(self.items.version(queries, documents))


@dataclass(frozen=True, eq=False)
class RetrievalData:
    """The data of a run over retrieval data sets, with the interface of `run_data.RunData`.

    Attributes:
        tasks: one task per data set, with the items of `pair_items`.
        searched: the data set of each task.
        prepare: preprocessing of input rows.
    """

    tasks: list[Task]
    searched: list[SearchedSet]
    prepare: Preprocessing
    augment: None = None

    @property
    def inputs(self) -> int:
        """Width of a row: number of features, or of tokens."""
        return int(self.searched[0].queries.shape[-1])

    def fingerprint(self) -> dict[str, object]:
        """Returns a fingerprint of all inputs and judgements."""
        parts: dict[str, object] = {f"task {t}": task.items.fingerprint() for t, task in enumerate(self.tasks)}
        for t, found in enumerate(self.searched):
            for name in ("documents", "queries", "train_queries"):
                rows = getattr(found, name)
                parts[f"task {t} {name}"] = Items(rows, torch.zeros(len(rows), dtype=torch.int64)).fingerprint()
            judged = found.items.judged
            assert judged is not None
            parts[f"task {t} relevance"] = describe([judged.queries, judged.items, judged.grades])
        return parts

    def first_inputs(self, count: int) -> Tensor:
        """Returns the inputs of the first `count` training queries."""
        return self.searched[0].train_queries[:count]

    def class_names(self) -> dict[str, list[str]]:
        """Returns an empty dict: retrieval data has no classes."""
        return {}

    def names_of(self, task: int) -> None:
        """Returns None: retrieval data has no classes."""


def load_retrieval_data(config: RunConfig) -> RetrievalData:
    """Reads the data sets of `tasks.sets`, which are folders in `data.path`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, a query has too few hard negatives, or features of two sets differ in width.
    """
    assert config.data.path is not None
    tasks, searched = [], []
    texts = config.model.kind == "text"
    for name in config.tasks.sets:
        found = load_retrieval_set(Path(config.data.path) / name, features=not texts)
        inputs = _tokens_of(config) if texts else _same
        documents, queries = inputs(found.documents), inputs(found.queries)
        items = pair_items(found, documents, queries, negatives=config.data.hard_negatives)
        tasks.append(Task(items, range(len(documents))))
        searched.append(SearchedSet.of(name, found, documents, queries))
    widths = {found.name: found.documents.shape[1] for found in searched}
    if len(set(widths.values())) > 1:
        raise ValueError(
            "features of all sets must have one width: " + ", ".join(f"{name} has {w}" for name, w in widths.items())
        )
    return RetrievalData(
        tasks, searched, Tokens(config.data.tokens) if texts else Vectors(searched[0].documents.shape[1])
    )


def _tokens_of(config: RunConfig) -> Callable[[Any], Tensor]:
    assert config.model.path is not None
    return partial(token_ids, config.model.path, length=config.data.tokens)


def _same(rows: Any) -> Tensor:
    assert isinstance(rows, Tensor)
    return rows


class RetrievalJudge:
    """Judges all versions of a sequence of retrieval data sets, with and without drift compensation.

        C[t, j] = nDCG@10 of the test queries of set j by version t in the index of set j by version j,    j <= t

    No index is built again.  "ndcg@10" searches with unchanged queries, "ndcg@10_compensated" with queries after
    `QueryDrift.compensate`.

    Args:
        data: data of the run.
        extract: (version, inputs) -> [N, d] unit embeddings on the CPU.
        folder: folder of the run.  From the second task on, `drift.safetensors` in a task's folder holds all drifts so
            far.
    """

    def __init__(self, data: RetrievalData, extract: Callable[[EmbeddingModel, Tensor], Tensor], folder: Path) -> None:
        self.data = data
        self.extract = extract
        self.folder = folder
        self.indexes: list[Tensor] = []
        self.queries: list[list[Tensor]] = []
        self.drift: QueryDrift | None = None
        self.last: EmbeddingModel | None = None

    def add(self, t: int, version: EmbeddingModel) -> None:
        """Builds the index of data set t by version t (in evaluation mode); measures the drift since version t - 1."""
        found = self.data.searched[t]
        self.indexes.append(self.extract(version, found.documents))
        self.queries.append([self.extract(version, earlier.queries) for earlier in self.data.searched[: t + 1]])
        if self.drift is None:
            self.drift = QueryDrift(self.indexes[0].shape[1])
        if self.last is not None:
            new, old = (self.extract(model, found.train_queries) for model in (version, self.last))
            self.drift.update(new, old, version=t)
            self.drift.save(self.folder / f"task-{t:02d}" / "drift.safetensors")
        self.last = version

    def report(self) -> dict[str, Any]:
        """Returns JSON values: matrices C in "search", and the last version's scores in indexes that it built."""
        assert self.drift is not None
        assert self.last is not None
        size = len(self.indexes)
        plain, moved = np.full((size, size), np.nan), np.full((size, size), np.nan)
        for t in range(size):
            for j, queries in enumerate(self.queries[t]):
                compensated = self.drift.compensate(queries, from_version=t, to_version=j)
                for matrix, rows in ((plain, queries), (moved, compensated)):
                    matrix[t, j] = self.data.searched[j].score(rows, self.indexes[j])
        anew = [
            found.score(self.queries[-1][j], self.extract(self.last, found.documents))
            for j, found in enumerate(self.data.searched)
        ]
        return {
            "sets": [found.name for found in self.data.searched],
            "search": {METRIC: _entry(plain), f"{METRIC}_compensated": _entry(moved)},
            f"reindexed_{METRIC}": anew,
            "explained_fraction": [None, *(_number(self.drift.explained_fraction(t)) for t in range(1, size))],
        }


def _entry(matrix: NDArray[np.float64]) -> dict[str, Any]:
    rows = [[_number(value) for value in row] for row in matrix.tolist()]
    return {"matrix": rows, "criteria": Criteria.of(matrix).as_dict()}


def _number(value: float) -> float | None:
    """Returns None for nan, which JSON lacks."""
    return None if math.isnan(value) else value
