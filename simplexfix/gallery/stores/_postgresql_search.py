"""A search in PostgreSQL: pgvector scans for candidates, which are ordered exactly here; filters on payload."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...functional import cosine_topk
from .._state import State
from ._common import as_json, comparable_fields, too_wide
from ._postgresql_connections import Connection
from ._postgresql_copy import given_vectors, searchable, text_of
from ._versions_index import merge_rankings
from .base import Ranking

__all__ = ["array_of", "fields_of", "search"]

_LARGE = re.compile(r"e\+|\d{19}")  # in the JSON of each number whose value `comparable` changes
_SPARE = 16  # candidates beyond k: the order of nearly equal cosines may differ in float32


def search(
    connection: Connection,
    state: State,
    queries: NDArray[np.float32],
    k: int,
    where: Mapping[str, tuple[Any, ...]] | None,
) -> Ranking:
    """Implements `Store.search`.

    Args:
        state: gives the width of each version.

    Raises:
        psycopg.errors.DataException: the gallery has rows of a width that is not in `state`.
    """
    widths = {version: member.identity.embedding_dim for version, member in state.live.items()}
    width = queries.shape[1]
    for version in [version for version in widths if widths[version] > width]:
        if connection.execute("select from rows where version = %s limit 1", [version]).fetchone() is not None:
            raise too_wide(width, version, widths[version])
    narrow = sorted({narrower for narrower in widths.values() if narrower < width})
    given: dict[str, Any] = {"candidates": k + _SPARE}
    query = "%(query)s::vector"
    if narrow:
        cases = " ".join(f"when version = any(%(of_{w})s::integer[]) then %(query_{w})s::vector" for w in narrow)
        query = f"case {cases} else {query} end"
        for w in narrow:
            given[f"of_{w}"] = array_of(version for version in widths if widths[version] == w)
    # A zero vector has a cosine of 0 here, and a distance of NaN in pgvector.
    statement = f"""
        select id, version, bits, vector_send(vector) from (
          select id from vectors where {_condition(where, given)}
          order by coalesce(nullif(vector <=> {query}, 'NaN'), 1), id limit %(candidates)s
        ) as best join vectors using (id)
    """
    rankings = []
    for exact, normal in zip(queries, searchable(queries)[0], strict=True):
        given["query"] = text_of(normal)
        for w in narrow:
            given[f"query_{w}"] = text_of(searchable(exact[None, :w])[0][0])
        found = connection.execute(statement, given, binary=True).fetchall()
        groups: dict[int, list[tuple[Any, ...]]] = {}
        for row in found:
            groups.setdefault(len(row[3]), []).append(row)
        rankings.append(merge_rankings([_rerank(exact, k, rows) for rows in groups.values()], 1, k))
    if not rankings:
        return merge_rankings([], 0, k)
    scores, ids, versions = (np.concatenate(column) for column in zip(*rankings, strict=True))
    return scores, ids, versions


def _rerank(query: NDArray[np.float32], k: int, rows: list[tuple[Any, ...]]) -> Ranking:
    """Ranks candidates of one width by `cosine_topk`: [1, k] scores, ids and versions.

    Args:
        query: [d]; narrower vectors are compared with its leading dimensions.
        rows: id, version, bits and vector of each candidate.
    """
    rows = sorted(rows, key=lambda row: row[0])  # cosine_topk orders equal scores by row
    ids, versions, bits, values = zip(*rows, strict=True)
    vectors = given_vectors(values, bits)
    narrow = torch.from_numpy(query[None, : vectors.shape[1]])
    scores, at = (found.numpy() for found in cosine_topk(narrow, torch.from_numpy(vectors), k))
    return scores, np.where(at >= 0, np.array(ids)[at], -1), np.where(at >= 0, np.array(versions)[at], -1)


def _condition(where: Mapping[str, tuple[Any, ...]] | None, given: dict[str, Any]) -> str:
    """The SQL condition of a filter; its parameters are added to `given`."""
    if not where:
        return "true"
    conditions = []
    for number, (key, values) in enumerate(where.items()):
        given[f"key_{number}"] = key
        given[f"values_{number}"] = array_of(as_json(value) for value in values)
        conditions.append(f"fields -> %(key_{number})s::text = any(%(values_{number})s::jsonb[])")
    return f"id in (select id from rows where {' and '.join(conditions)})"


def fields_of(payload: str) -> str:
    """JSON of the entries that filters read: those with plain values, with numbers converted by `comparable`."""
    if not ("[" in payload or payload.find("{", 1) > 0 or "\\u" in payload or _LARGE.search(payload)):
        return payload
    fields = comparable_fields(json.loads(payload))
    return as_json({key: value for key, value in fields.items() if _is_storable(key) and _is_storable(value)})


def _is_storable(value: Any) -> bool:
    """Whether jsonb can store it: text without U+0000, finite numbers."""
    return "\0" not in value if isinstance(value, str) else not isinstance(value, float) or math.isfinite(value)


def array_of(values: Iterable[int | str]) -> str:
    """An SQL array as text: the server parses it faster than Python builds a typed one."""
    return "{" + ",".join(map(_element, values)) + "}"


def _element(value: int | str) -> str:
    if isinstance(value, int):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
