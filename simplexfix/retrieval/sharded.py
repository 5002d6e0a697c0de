"""Exact search in a gallery that one machine does not hold: each rank of a process group has some of its rows.

Rank r holds the rows [n_0 + ... + n_(r-1), n_0 + ... + n_r) of the gallery, its shard, possibly none; all ranks have
the same queries and call the same function.  Every rank gets the result, with the bits that one process with the whole
gallery gets from the function without "sharded" in its name, where the compiled library runs on all of them
(plain PyTorch's matrix product may differ in the last bit with the number of rows).

Before any work the ranks tell each other what they were given.  Bad input on one of them, and input in which they
differ, is one and the same error on all.  A rank that dies is a `RankDiedError` on the others.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_integer
from ..functional import cosine_topk
from ._inputs import Features, Ids, Rows, read_labels
from ._ranks import Facts, Ranks, shard_rows
from .protocols import share

__all__ = [
    "sharded_cosine_topk",
    "sharded_instance_accuracy",
    "sharded_instance_hits",
    "sharded_nearest_class_mean_accuracy",
    "sharded_nearest_class_mean_hits",
]

# Of one search: 200 MB of all ranks' places and 256 MB of queries, against the shard's being normalised anew for each.
_BLOCK_PLACES = 2**24
_BLOCK_NUMBERS = 2**26
_SUM_NUMBERS = 2**20  # rows that are added at a time, in float64
_SUM_COLUMNS = 256  # that pass along the ranks together: while one rank adds these, the rank before adds the next


def sharded_cosine_topk(
    query: Rows, shard: Rows, k: int, *, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each query by cosine, exactly, of all ranks' shards.

        scores, ids = cosine_topk(query, torch.cat(shards), k)

    Only scores and ids travel, k of each per query and rank; memory beside them is bounded.

    Args:
        query: [Q, d] tensor or array of floating numbers, finite, the same on every rank.  float64 is rounded to
            float32.
        shard: [n, d], dtype and device of the query, finite; n differs between ranks and may be 0.
        k: at least 1.  Where the gallery has fewer rows, id -1 with score -inf follows.
        group: gloo processes; None: all.  On GPUs the default backend, "cpu:gloo,cuda:nccl", does.

    Returns:
        scores [Q, k] float32 descending; ids [Q, k] int64, rows of the whole gallery; both on the device of the query.
        Ties are ordered by lower id.  No gradient flows.

    Raises:
        TypeError, ValueError: on every rank, as `cosine_topk` on any of them, by its number and the row in its shard;
            ranks that differ in d, dtype, k or the queries (these by CRC-32).
        ValueError: no process group, or one without gloo.
        RankDiedError: a rank is gone.
    """
    ranks = Ranks(group)

    def read() -> tuple[tuple[Tensor, Tensor, int], Facts]:
        queries, rows = Features("query", query, may_be_empty=True), Features("shard", shard, may_be_empty=True)
        same = _common("sharded_cosine_topk", queries, rows)
        depth = check_integer("k", k)
        if not 1 <= depth < 2**31:
            raise ValueError(f"k must lie between 1 and 2^31 - 1, got {depth}")
        searched, items = _alike(queries, rows)
        return (searched, items, depth), Facts(same | {"k": depth, "queries": _checksum(searched)}, len(rows))

    (queries, rows, k), facts = ranks.agree(read)
    scores, ids = _search(ranks, queries, rows, k, [fact.rows for fact in facts])
    return scores.to(queries.device), ids.to(queries.device)


def sharded_instance_accuracy(
    query: Rows, query_labels: Ids, shard: Rows, shard_labels: Ids, *, group: dist.ProcessGroup | None = None
) -> float:
    """`instance_accuracy` of all ranks' shards: a protocol for `compatibility_matrix`, whose galleries are shards.

    Arguments and errors as of `sharded_instance_hits`.
    """
    return share(sharded_instance_hits(query, query_labels, shard, shard_labels, group=group))


def sharded_instance_hits(
    query: Rows, query_labels: Ids, shard: Rows, shard_labels: Ids, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Which queries' nearest item, by cosine, of all ranks' shards has their label.

        hits = instance_hits(query, query_labels, torch.cat(shards), torch.cat(all shard_labels))

    Args:
        query: [Q, d] tensor or array of floating numbers, finite, the same on every rank, Q >= 1.
        query_labels: [Q] integer class ids, any values, the same on every rank.
        shard: [n, d], dtype and device of the query, finite; n may be 0, but not on all ranks.
        shard_labels: [n] integers.
        group: as in `sharded_cosine_topk`.

    Returns:
        [Q] bool on the host, on every rank.

    Raises:
        TypeError, ValueError: on every rank: labels of another length or not integers, no rows, and as
            `sharded_cosine_topk`.
        RankDiedError: a rank is gone.
    """
    ranks = Ranks(group)

    def read() -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Facts]:
        queries, rows = Features("query", query), Features("shard", shard, may_be_empty=True)
        same = _common("sharded_instance_hits", queries, rows)
        wanted = read_labels("query_labels", query_labels, "query", len(queries))
        labels = read_labels("shard_labels", shard_labels, "shard", len(rows))
        searched, items = _alike(queries, rows)
        same |= {"queries and labels": _checksum(searched, wanted)}
        return (searched, torch.from_numpy(wanted), items, torch.from_numpy(labels)), Facts(same, len(rows))

    (queries, wanted, rows, labels), facts = ranks.agree(read)
    counts = _counts(facts)
    _, ids = _search(ranks, queries, rows, 1, counts)
    nearest = ids[:, 0] - sum(counts[: ranks.rank])
    here = (nearest >= 0) & (nearest < len(labels))
    hits = torch.zeros(len(wanted), dtype=torch.uint8)
    hits[here] = (labels[nearest[here]] == wanted[here]).to(torch.uint8)
    return ranks.maximum(hits).bool()


def sharded_nearest_class_mean_accuracy(
    query: Rows, query_labels: Ids, shard: Rows, shard_labels: Ids, *, group: dist.ProcessGroup | None = None
) -> float:
    """`nearest_class_mean_accuracy` of all ranks' shards: a protocol for `compatibility_matrix`, as above.

    Arguments and errors as of `sharded_nearest_class_mean_hits`.
    """
    return share(sharded_nearest_class_mean_hits(query, query_labels, shard, shard_labels, group=group))


def sharded_nearest_class_mean_hits(
    query: Rows, query_labels: Ids, shard: Rows, shard_labels: Ids, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Which queries are nearest to the template of their own class, over all ranks' shards.

        hits = nearest_class_mean_hits(query, query_labels, torch.cat(shards), torch.cat(all shard_labels))

    The sums of the classes pass along the ranks, each of which adds its rows one by one: the order of one process.
    They are added on the host.  Then each rank searches its part of the queries.

    Args:
        query, query_labels, shard, shard_labels, group: as in `sharded_instance_hits`; dtype and device of query and
            shard may differ, and float64 rows are added unrounded.

    Returns:
        [Q] bool on the host, on every rank.

    Raises:
        TypeError, ValueError, RankDiedError: as `sharded_instance_hits`; a class whose sum float32 cannot hold.
    """
    ranks = Ranks(group)

    def read() -> tuple[tuple[Tensor, Tensor, Features, NDArray[np.int64]], Facts]:
        queries, rows = Features("query", query), Features("shard", shard, may_be_empty=True)
        same = _common("sharded_nearest_class_mean_hits", queries, rows)
        wanted = read_labels("query_labels", query_labels, "query", len(queries))
        labels = read_labels("shard_labels", shard_labels, "shard", len(rows))
        for begin, end in _sum_blocks(rows):
            bad = (~_doubles(rows, begin, end, 0, rows.width).isfinite()).any(1).nonzero()
            if len(bad):
                raise ValueError(f"shard row {begin + int(bad[0])} holds nan or inf")
        searched = queries.block_tensor(0, len(queries))
        same |= {"queries and labels": _checksum(searched, wanted)}
        return (searched, torch.from_numpy(wanted), rows, labels), Facts(same, len(rows), np.unique(labels))

    (queries, wanted, rows, labels), facts = ranks.agree(read)
    _counts(facts)
    classes = np.unique(np.concatenate([fact.classes for fact in facts if fact.classes is not None]))
    templates = _class_sums(ranks, rows, torch.from_numpy(np.searchsorted(classes, labels)), len(classes))
    bad = (~templates.isfinite()).any(1).nonzero()
    if len(bad):
        raise ValueError(f"the rows of class {classes[int(bad[0])]} add up to more than float32 holds")
    parts = [shard_rows(len(queries), rank, ranks.size) for rank in range(ranks.size)]
    _, ids = cosine_topk(queries[parts[ranks.rank]], templates.to(queries.device), 1)
    nearest = torch.zeros(-(-len(queries) // ranks.size), dtype=torch.int64)  # gloo gathers tensors of one length
    nearest[: len(ids)] = ids[:, 0]
    found = [ids[: part.stop - part.start] for ids, part in zip(ranks.gather(nearest), parts, strict=True)]
    return torch.from_numpy(classes)[torch.cat(found)] == wanted


def _common(call: str, queries: Features, rows: Features) -> dict[str, object]:
    """What must be alike on all ranks, of features of one width."""
    if queries.width != rows.width:
        raise ValueError(f"query and shard must have the same number of columns, got {queries.width} and {rows.width}")
    shape = [len(queries), queries.width]
    return {"call": call, "shape of the query": shape, "query dtype": queries.dtype, "shard dtype": rows.dtype}


def _alike(queries: Features, rows: Features) -> tuple[Tensor, Tensor]:
    """Both in float32, all finite, of one dtype and on one device as `cosine_topk` wants them."""
    if queries.dtype != rows.dtype:
        raise TypeError(f"query and shard must have the same dtype, got {queries.dtype} and {rows.dtype}")
    first, second = (features.block_tensor(0, len(features)) for features in (queries, rows))
    if first.device != second.device:
        raise ValueError(f"query and shard must be on the same device, got {first.device} and {second.device}")
    return first, second


def _checksum(queries: Tensor, labels: NDArray[np.int64] | None = None) -> str:
    """CRC-32: three times as fast as hashing, and queries differ by mistake, not by design."""
    value = zlib.crc32(queries.cpu().contiguous().numpy().data)
    return f"{value if labels is None else zlib.crc32(labels.data, value):08x}"


def _counts(facts: list[Facts]) -> list[int]:
    counts = [fact.rows for fact in facts]
    if not sum(counts):
        raise ValueError("the gallery has no rows: the shards of all ranks are empty")
    return counts


def _search(ranks: Ranks, queries: Tensor, rows: Tensor, k: int, counts: list[int]) -> tuple[Tensor, Tensor]:
    """`cosine_topk` of all shards, on the host; `counts` are their rows."""
    scores = torch.full((len(queries), k), -math.inf)
    ids = torch.full((len(queries), k), -1)
    depth = min(k, max(counts))  # what any rank can give
    if not depth:
        return scores, ids
    kept = min(k, depth * ranks.size)
    size = max(1, min(_BLOCK_PLACES // (depth * ranks.size), _BLOCK_NUMBERS // queries.shape[1]))
    for begin in range(0, len(queries), size):
        block = slice(begin, begin + size)
        near, places = (found.cpu() for found in cosine_topk(queries[block], rows, depth))
        places[places >= 0] += sum(counts[: ranks.rank])
        # In rank order ids rise from part to part, and those of one score within each: a stable sort keeps ties so.
        merged, order = torch.cat(ranks.gather(near), 1).sort(dim=1, descending=True, stable=True)
        scores[block, :kept] = merged[:, :kept]
        ids[block, :kept] = torch.cat(ranks.gather(places), 1).gather(1, order[:, :kept])
    return scores, ids


def _class_sums(ranks: Ranks, rows: Features, index: Tensor, classes: int) -> Tensor:
    """[classes, d]: the sums of all shards' rows by class, in float64 row after row, rounded to float32."""
    out = torch.empty(classes, rows.width)
    for first in range(0, rows.width, _SUM_COLUMNS):
        last = min(rows.width, first + _SUM_COLUMNS)
        sums = ranks.take_from_previous(torch.zeros(classes, last - first, dtype=torch.float64))
        for begin, end in _sum_blocks(rows):
            sums.index_add_(0, index[begin:end], _doubles(rows, begin, end, first, last))
        ranks.pass_to_next(sums)
        if ranks.is_last:
            out[:, first:last] = sums
    return ranks.take_from_last(out)


def _sum_blocks(rows: Features) -> list[tuple[int, int]]:
    size = max(1, _SUM_NUMBERS // rows.width)
    return [(begin, min(len(rows), begin + size)) for begin in range(0, len(rows), size)]


def _doubles(rows: Features, begin: int, end: int, first: int, last: int) -> Tensor:
    """Columns [first, last) of rows [begin, end) in float64, on the host."""
    block = rows.rows[begin:end, first:last]
    if isinstance(block, Tensor):
        return block.detach().cpu().double()
    return torch.from_numpy(block.astype(np.float64))
