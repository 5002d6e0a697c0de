"""Relevance judgements (qrels) of pairs of queries and gallery items, in the formats of TREC and BEIR."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import read_text
from .._text import listed
from ._columns import Ids, read_column, read_integers

__all__ = ["JudgedPairs", "RelevanceJudgements", "id_names"]

_BEIR = ["query-id", "corpus-id", "score"]


class RelevanceJudgements:
    """Relevance grades of M pairs of a query id and a gallery item id.

        judgements = RelevanceJudgements.load("qrels/test.tsv")
        items = LabelledItems.from_judgements(judgements, query_ids, gallery_ids)

    An item is relevant if its grade is 1 or more; the gain in nDCG is the grade.  Items with a grade of 0 or less and
    items without a judgement are not relevant.

    Args:
        query_ids, item_ids: [M] integers or names of queries and gallery items; 7 and "7" are the same id.
        grades: [M] integers.
        source: name of these judgements in error messages.

    Attributes:
        query_ids, item_ids: [M] strings.
        grades: [M] int64.

    Raises:
        TypeError: ids are neither integers nor names, or grades are not integers.
        ValueError: there is no judgement, lengths differ, or a pair is judged twice.

    Example:
        >>> from simplexfix.labelled import LabelledItems, RelevanceJudgements
        >>> judgements = RelevanceJudgements([7, 7, 8], [100, 101, 100], [2, 1, 1])  # queries, items, grades
        >>> items = LabelledItems.from_judgements(judgements, query_ids=[7, 8], gallery_ids=[100, 101, 102])
        >>> items.num_relevant
        array([2, 1])
    """

    def __init__(self, query_ids: Ids, item_ids: Ids, grades: Ids, *, source: str = "judgements") -> None:
        self.source = source
        self.query_ids, self.item_ids = (
            id_names(read_column(name, ids)) for name, ids in (("query_ids", query_ids), ("item_ids", item_ids))
        )
        self.grades: NDArray[np.int64] = read_integers("grades", grades).copy()
        lengths = len(self.query_ids), len(self.item_ids), len(self.grades)
        if len(set(lengths)) > 1:
            raise ValueError(f"query_ids, item_ids and grades must be of one length, got {lengths}")
        if not lengths[0]:
            raise ValueError(f"{source} must hold at least one judgement, got none")
        (_, query), (names, item) = (np.unique(ids, return_inverse=True) for ids in (self.query_ids, self.item_ids))
        pairs = query.astype(np.int64) * len(names) + item
        order = np.argsort(pairs, kind="stable")
        again = np.flatnonzero(pairs[order[1:]] == pairs[order[:-1]])
        if len(again):
            first, second = (int(order[again[0] + i]) for i in (0, 1))
            raise ValueError(
                f"{source} must judge each pair once, got query {str(self.query_ids[first])!r} with item "
                f"{str(self.item_ids[first])!r} as judgements {first} and {second}, counted from 0"
            )
        for array in (self.query_ids, self.item_ids, self.grades):
            array.flags.writeable = False

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RelevanceJudgements:
        """Reads relevance judgements from a file of BEIR or TREC.

        BEIR: tab-separated, with a header query-id, corpus-id, score.  TREC: query, iteration, item, grade.

        Args:
            path: text file in one of these formats.

        Raises:
            FileNotFoundError: the file does not exist.
            OSError: the file cannot be read.
            ValueError: the format is unknown, a grade is not an integer, or a pair is judged twice; the message names
                file and line.
        """
        path = Path(path)
        try:
            text = read_text(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is not there; expected a file of relevance judgements: of BEIR, with tabs and a header "
                "query-id, corpus-id, score, or of TREC, with query, iteration, item and grade on each line"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as relevance judgements: {error}") from None
        lines = [(at, line.rstrip("\r")) for at, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not lines:
            raise ValueError(f"{path} must hold at least one judgement, it is empty")
        beir = [cell.strip().lower() for cell in lines[0][1].split("\t")] == _BEIR
        judged = [_read_line(path, at, line, beir) for at, line in (lines[1:] if beir else lines)]
        queries, items, grades = zip(*judged, strict=True) if judged else ((), (), ())
        return cls(queries, items, grades, source=str(path))

    @classmethod
    def from_dict(cls, qrels: Mapping[str, Mapping[str, int]]) -> RelevanceJudgements:
        """Returns the judgements of a mapping {query id: {item id: grade}}, the form of BEIR, pytrec_eval and ranx."""
        judged = [(query, item, grade) for query, of in qrels.items() for item, grade in of.items()]
        queries, items, grades = zip(*judged, strict=True) if judged else ((), (), ())
        return cls(queries, items, grades)

    def __len__(self) -> int:
        """Number of judgements, M."""
        return len(self.grades)

    def __repr__(self) -> str:
        return f"RelevanceJudgements of {len(np.unique(self.query_ids))} queries, {len(self)} pairs"

    def __eq__(self, other: object) -> bool:
        """Compares judgements and their order."""
        if other is self or not isinstance(other, RelevanceJudgements):
            return other is self
        return all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("query_ids", "item_ids", "grades")
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class JudgedPairs:
    """Judgements as pairs of indices of queries and gallery items.

    Attributes:
        queries, items: [M] int64 indices, in ascending order of query, then of item.
        grades: [M] int64.
        num_queries, num_items: Q and N.
    """

    queries: NDArray[np.int64]
    items: NDArray[np.int64]
    grades: NDArray[np.int64]
    num_queries: int
    num_items: int

    @classmethod
    def match(
        cls, judgements: RelevanceJudgements, query_ids: NDArray[np.str_], gallery_ids: NDArray[np.str_]
    ) -> JudgedPairs:
        """Maps the ids of judgements to row indices; ids of rows are unique.

        Raises:
            ValueError: a judged id has no row.
        """
        places = []
        for part, rows, ids in (
            ("query", query_ids, judgements.query_ids),
            ("gallery", gallery_ids, judgements.item_ids),
        ):
            row_of = {name: row for row, name in enumerate(rows.tolist())}
            at = np.array([row_of.get(name, -1) for name in ids.tolist()], dtype=np.int64)
            absent = list(dict.fromkeys(ids[at < 0].tolist()))
            if absent:
                raise ValueError(
                    f"{judgements.source} judges {len(absent)} ids that no row of {part}_ids has: "
                    f"{listed(map(repr, absent))}; {part}_ids are {', '.join(map(repr, rows[:3].tolist()))}, ...; "
                    "remove the judgements, or add the rows"
                )
            places.append(at)
        return cls._sorted(places[0], places[1], judgements.grades, len(query_ids), len(gallery_ids))

    @classmethod
    def _sorted(
        cls,
        queries: NDArray[np.int64],
        items: NDArray[np.int64],
        grades: NDArray[np.int64],
        num_queries: int,
        num_items: int,
    ) -> JudgedPairs:
        order = np.lexsort((items, queries))
        return cls(queries[order], items[order], grades[order], num_queries, num_items)

    def take(self, queries: NDArray[np.int64] | None, gallery: NDArray[np.int64] | None) -> JudgedPairs:
        """Returns the pairs of these queries and gallery items under their new indices; None for all."""
        counts, new_places = [], []
        for count, at, old in ((self.num_queries, queries, self.queries), (self.num_items, gallery, self.items)):
            place = np.arange(count)
            if at is not None:
                place = np.full(count, -1)
                place[at] = np.arange(len(at))
            counts.append(count if at is None else len(at))
            new_places.append(place[old])
        some = (new_places[0] >= 0) & (new_places[1] >= 0)
        return self._sorted(new_places[0][some], new_places[1][some], self.grades[some], counts[0], counts[1])

    @property
    def num_relevant(self) -> NDArray[np.int64]:
        """Number of items that are judged relevant to each query, [Q]."""
        return np.bincount(self.queries[self.grades > 0], minlength=self.num_queries)

    @property
    def ideal_grades(self) -> NDArray[np.int64]:
        """Grades of each query's relevant items in descending order, padded with 0: [Q, max(num_relevant, 1)]."""
        some = self.grades > 0
        queries, grades = self.queries[some], self.grades[some]
        first = np.searchsorted(queries, np.arange(self.num_queries))
        out = np.zeros((self.num_queries, max(1, int(self.num_relevant.max()))), dtype=np.int64)
        # sorted by query, then by descending grade; `queries` is in ascending order already
        out[queries, np.arange(len(queries)) - first[queries]] = grades[np.lexsort((-grades, queries))]
        return out

    def find(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Maps gallery indices [Q, k] (-1 for none) to grades [Q, k]; 0 for pairs without a judgement."""
        keys = self.queries * self.num_items + self.items
        if not len(keys):
            return np.zeros_like(places)
        wanted = np.arange(self.num_queries)[:, None] * self.num_items + places
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where((keys[at] == wanted) & (places >= 0), self.grades[at], 0)

    def relevant_items(self, query: int) -> NDArray[np.int64]:
        """Indices [R] of the items that are judged relevant to one query."""
        of = slice(*np.searchsorted(self.queries, [query, query + 1]))
        return self.items[of][self.grades[of] > 0]


def id_names(column: NDArray[Any]) -> NDArray[np.str_]:
    """Converts ids to strings: integers to decimal text, names to Unicode's composed form (NFC)."""
    if column.dtype.kind != "U":
        return column.astype(str)
    found, places = np.unique(column, return_inverse=True)
    return np.array([unicodedata.normalize("NFC", str(name)) for name in found], dtype=str)[places]


def _read_line(path: Path, at: int, line: str, beir: bool) -> tuple[str, str, int]:
    cells = line.split("\t") if beir else line.split()
    if len(cells) != (3 if beir else 4):
        expected = (
            "query-id, corpus-id and score between tabs"
            if beir
            else "a header of query-id, corpus-id, score between tabs (BEIR) or query, iteration, item, grade (TREC)"
        )
        raise ValueError(f"{path} line {at} must hold {expected}, got {line[:80]!r}")
    query, item, grade = (cells[0], cells[1], cells[2]) if beir else (cells[0], cells[2], cells[3])
    try:
        return query, item, int(grade)
    except ValueError:
        raise ValueError(f"{path} line {at} must hold an integer grade, got {grade!r}") from None
