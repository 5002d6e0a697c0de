"""Exact search in a gallery that is sharded over the ranks of a process group.

Rank r has shard r: rows [n_0 + ... + n_(r-1), n_0 + ... + n_r) of the gallery, where shard i has n_i >= 0 rows.
All ranks have the same queries and call the same function, and every rank gets the whole result.  With the compiled
library the result is bitwise equal to that of one process with the whole gallery.  In plain PyTorch the last bit may
differ, because the rounding of a matrix product depends on its number of rows.

The ranks exchange a description of their arguments first.  Invalid or differing arguments raise the same error on all
ranks.  If a rank dies, the others raise `RankDiedError`.
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
from ..labelled import FeatureRows, GalleryClasses, LabelledItems, Rows, VersionFeatures, check_versions
from ._ranks import Ranks, ShardInfo, shard_rows
from .class_means import nearest_without
from .nearest_items import nearest_other

__all__ = ["instance_hits", "nearest_class_mean_hits", "sharded_cosine_topk"]

# Sizes of one search: at most 200 MB of all ranks' candidates and 256 MB of queries.  Each search normalises the shard
# again, so fewer and larger searches are faster.
_BLOCK_CANDIDATES = 2**24
_BLOCK_NUMBERS = 2**26
_SUM_NUMBERS = 2**20  # float64 numbers per block of rows that are summed
_SUM_COLUMNS = 256  # columns per pipeline step: while a rank adds these, the previous rank adds the next ones


def sharded_cosine_topk(
    query: Rows, shard: Rows, k: int, *, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the k rows of all shards with the largest cosine similarity to each query; the search is exact.

        scores, ids = cosine_topk(query, torch.cat(shards), k)

    Ranks exchange only k scores and ids per query and rank; further memory is bounded.

    Args:
        query: [Q, d] floating tensor or array, finite, the same on every rank.  float64 is rounded to float32.
        shard: [n, d] in the dtype and on the device of the query, finite; n may differ between ranks and may be 0.
        k: from 1 to 2^31 - 1.  If k exceeds the number of rows, the remaining places hold id -1 and score -inf.
        group: process group with a gloo backend; None for all processes.  On GPUs torch's default backend,
            "cpu:gloo,cuda:nccl", has it.

    Returns:
        scores [Q, k] float32 in descending order, and ids [Q, k] int64, rows of the whole gallery; both on the query's
        device.  Equal scores are ordered by ascending id.  They have no gradient.

    Raises:
        TypeError, ValueError: on every rank, if `cosine_topk` would raise on one of them; the message names the rank
            and the row of its shard.  Also if ranks differ in d, dtype, k or the queries (compared by CRC-32).
        ValueError: there is no process group, or the group has no gloo backend.
        RankDiedError: another rank died or did not answer in time.
    """
    ranks = Ranks(group)

    def read() -> tuple[tuple[Tensor, Tensor, int], ShardInfo]:
        queries, rows = FeatureRows("query", query), FeatureRows("shard", shard)
        same = _same_on_all_ranks("sharded_cosine_topk", queries, rows)
        checked_k = check_integer("k", k)
        if not 1 <= checked_k < 2**31:
            raise ValueError(f"k must lie between 1 and 2^31 - 1, got {checked_k}")
        query_tensor, shard_tensor = _float32_tensors(queries, rows)
        same |= {"k": checked_k, "queries": _checksum(query_tensor)}
        return (query_tensor, shard_tensor, checked_k), ShardInfo(same, len(rows))

    (queries, rows, k), infos = ranks.agree(read)
    scores, ids = _search(ranks, queries, rows, k, [info.rows for info in infos])
    return scores.to(queries.device), ids.to(queries.device)


def instance_hits(version: VersionFeatures, group: dist.ProcessGroup | None = None) -> NDArray[np.bool_]:
    """Returns the hits of protocol "instance": whether the nearest item of all shards has the query's label.

    Args:
        version: the same queries on every rank, and this rank's shard as the gallery.  A shard may be empty, but not
            all shards.  Gallery ids, if given, are those of the shard's items.
        group: as in `sharded_cosine_topk`.

    Returns:
        [Q] bool on the host, the same on every rank.

    Raises:
        TypeError, ValueError: on every rank, as in `sharded_cosine_topk`.
        ValueError: all shards are empty.
        RankDiedError: another rank died or did not answer in time.
    """
    ranks = Ranks(group)

    def read() -> tuple[tuple[LabelledItems, Tensor, Tensor], ShardInfo]:
        queries, rows, items, same = _read_shard("sharded_hits of instance", version)
        query_tensor, shard = queries.whole(), rows.whole()
        same |= {"queries and labels": _checksum(query_tensor, items.query_labels)}
        return (items, query_tensor, shard), ShardInfo(same, len(rows), leaves_out=_leaves_out(items))

    (items, queries, rows), infos = ranks.agree(read)
    counts = _counts(infos)
    begin, labels = sum(counts[: ranks.rank]), items.gallery_labels
    excluded = np.where(items.excluded >= 0, items.excluded + begin, -1)  # rows of the whole gallery
    if any(info.leaves_out for info in infos):
        _, ids = _search(ranks, queries, rows, 2, counts)
        excluded = ranks.maximum(torch.from_numpy(excluded)).numpy()
    else:
        _, ids = _search(ranks, queries, rows, 1, counts)
    nearest = nearest_other(ids.numpy(), excluded) - begin
    local = (nearest >= 0) & (nearest < len(labels))  # queries whose nearest item is in this rank's shard
    hits = torch.zeros(len(local), dtype=torch.uint8)
    hits[torch.from_numpy(local)] = torch.from_numpy(labels[nearest[local]] == items.query_labels[local]).to(
        torch.uint8
    )
    return ranks.maximum(hits).bool().numpy()


def nearest_class_mean_hits(version: VersionFeatures, group: dist.ProcessGroup | None = None) -> NDArray[np.bool_]:
    """Returns the hits of protocol "nearest_class_mean" over all shards.

    The class sums pass from rank to rank on the host, and each rank adds its rows in order; this is the summation
    order of one process.  Then each rank searches an equal part of the queries.  Rows that are left out of their class
    are sent to all ranks, in blocks of queries.

    Args:
        version, group: as in `instance_hits`; query and shard may be on different devices.

    Returns:
        [Q] bool on the host, the same on every rank.

    Raises:
        TypeError, ValueError, RankDiedError: as in `instance_hits`.
        ValueError: the sum of a class exceeds float32's range.
    """
    ranks = Ranks(group)

    def read() -> tuple[tuple[LabelledItems, Tensor, FeatureRows], ShardInfo]:
        queries, rows, items, same = _read_shard("sharded_hits of nearest_class_mean", version)
        for _ in rows.blocks():  # raises for nan and inf
            pass
        query_tensor = queries.whole()
        same |= {"queries and labels": _checksum(query_tensor, items.query_labels)}
        info = ShardInfo(same, len(rows), np.unique(items.gallery_labels), _leaves_out(items))
        return (items, query_tensor, rows), info

    (items, queries, rows), infos = ranks.agree(read)
    _counts(infos)
    classes = np.unique(np.concatenate([info.classes for info in infos if info.classes is not None]))
    index = np.searchsorted(classes, items.gallery_labels)
    leaves_out = any(info.leaves_out for info in infos)
    sums = _sums_over_ranks(
        ranks, rows, torch.from_numpy(index), len(classes), torch.float64 if leaves_out else torch.float32
    )
    bad = (~sums.float().isfinite()).any(1).nonzero()
    if len(bad):
        raise ValueError(f"the rows of class {classes[int(bad[0])]} add up to more than float32 holds")
    counts = np.zeros(len(classes), dtype=np.int64)
    if leaves_out:
        local_counts = torch.from_numpy(np.bincount(index, minlength=len(classes)))
        counts = torch.stack(ranks.gather(local_counts)).sum(0).numpy()
    gallery = GalleryClasses(classes, index, counts)
    parts = [shard_rows(len(queries), rank, ranks.size) for rank in range(ranks.size)]
    part = parts[ranks.rank]
    templates = sums.float().to(queries.device)
    _, ids = cosine_topk(queries[part], templates, 1)
    query_class = gallery.find(items.query_labels[part])
    hits = (ids[:, 0].cpu().numpy() == query_class) & (query_class >= 0)
    if leaves_out:
        _leave_out(ranks, queries, rows, items, gallery, sums, query_class, part, hits)
    padded = torch.zeros(-(-len(queries) // ranks.size), dtype=torch.uint8)  # gloo gathers tensors of equal length
    padded[: len(hits)] = torch.from_numpy(hits)
    all_hits = [rank_hits[: p.stop - p.start] for rank_hits, p in zip(ranks.gather(padded), parts, strict=True)]
    return torch.cat(all_hits).bool().numpy()


def _leave_out(
    ranks: Ranks,
    queries: Tensor,
    rows: FeatureRows,
    items: LabelledItems,
    gallery: GalleryClasses,
    sums: Tensor,
    query_class: NDArray[np.int64],
    part: slice,
    hits: NDArray[np.bool_],
) -> None:
    """Recomputes in place the hits of this rank's queries that share their id with a gallery item of any shard.

    That item is left out of its class.  `part` is the slice of this rank's queries; `query_class` and `hits` cover it.
    """
    size = max(1, _BLOCK_NUMBERS // queries.shape[1])
    for begin in range(0, len(queries), size):
        excluded = items.excluded[begin : begin + size]
        local = np.flatnonzero(excluded >= 0)  # queries whose excluded item is in this rank's shard
        excluded_class = torch.full((len(excluded),), -1)
        excluded_class[local] = torch.from_numpy(gallery.places[excluded[local]])
        excluded_rows = torch.full((len(excluded), rows.width), -math.inf)
        excluded_rows[local] = rows.take(excluded[local]).block_tensor(0, len(local)).cpu()
        ranks.maximum(excluded_class)  # one rank has each item, the others have -1 and -inf
        ranks.maximum(excluded_rows)
        at = np.flatnonzero(excluded_class.numpy() >= 0)
        at = at[(begin + at >= part.start) & (begin + at < part.stop)]
        if len(at):
            block = queries[torch.from_numpy(begin + at).to(queries.device)]
            best_two = cosine_topk(block, sums.float().to(queries.device), 2)
            classes = excluded_class.numpy()[at]
            nearest = nearest_without(
                block.cpu(), excluded_rows[at], sums, classes, gallery.sizes[classes] == 1, best_two
            )
            expected = query_class[begin + at - part.start]
            hits[begin + at - part.start] = (nearest == expected) & (expected >= 0)


def _leaves_out(items: LabelledItems) -> bool:
    return bool((items.excluded >= 0).any())


def _read_shard(
    call: str, version: VersionFeatures
) -> tuple[FeatureRows, FeatureRows, LabelledItems, dict[str, object]]:
    (checked,) = check_versions([version], [""], shards=True)
    queries, rows, items = version.query, version.gallery, checked.items
    same = _same_on_all_ranks(call, queries, rows)
    # each shard numbers its names, so equal numbers need equal names on all ranks
    for kind, names in (("labels", items.label_names), ("ids", items.id_names)):
        same[f"names of {kind}"] = names and f"{len(names)} of CRC-32 {zlib.crc32(chr(0).join(names).encode()):08x}"
    same["query_ids"] = None if items.query_ids is None else f"CRC-32 {zlib.crc32(items.query_ids.data):08x}"
    return queries, rows, items, same


def _same_on_all_ranks(call: str, queries: FeatureRows, rows: FeatureRows) -> dict[str, object]:
    """Checks that query and shard have one width; returns the properties that must be equal on all ranks."""
    if queries.width != rows.width:
        raise ValueError(f"query and shard must have the same number of columns, got {queries.width} and {rows.width}")
    shape = [len(queries), queries.width]
    return {"call": call, "shape of the query": shape, "query dtype": queries.dtype, "shard dtype": rows.dtype}


def _float32_tensors(queries: FeatureRows, rows: FeatureRows) -> tuple[Tensor, Tensor]:
    """Returns both in float32 after the checks of `cosine_topk`: finite, of one dtype, on one device."""
    if queries.dtype != rows.dtype:
        raise TypeError(f"query and shard must have the same dtype, got {queries.dtype} and {rows.dtype}")
    first, second = (features.whole() for features in (queries, rows))
    if first.device != second.device:
        raise ValueError(f"query and shard must be on the same device, got {first.device} and {second.device}")
    return first, second


def _checksum(queries: Tensor, labels: NDArray[np.int64] | None = None) -> str:
    """CRC-32 of the queries and labels; it detects mistakes and is three times as fast as a cryptographic hash."""
    value = zlib.crc32(queries.cpu().contiguous().numpy().data)
    return f"{value if labels is None else zlib.crc32(labels.data, value):08x}"


def _counts(infos: list[ShardInfo]) -> list[int]:
    """Returns the number of rows of each shard; raises ValueError if all are empty."""
    counts = [info.rows for info in infos]
    if not sum(counts):
        raise ValueError("the gallery has no rows: the shards of all ranks are empty")
    return counts


def _search(ranks: Ranks, queries: Tensor, rows: Tensor, k: int, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Returns `cosine_topk` over all shards, on the host; `counts` are the shards' numbers of rows."""
    scores = torch.full((len(queries), k), -math.inf)
    ids = torch.full((len(queries), k), -1)
    depth = min(k, max(counts))  # the most rows that one shard can return
    if not depth:
        return scores, ids
    found = min(k, depth * ranks.size)
    size = max(1, min(_BLOCK_CANDIDATES // (depth * ranks.size), _BLOCK_NUMBERS // queries.shape[1]))
    for begin in range(0, len(queries), size):
        block = slice(begin, begin + size)
        local_scores, local_ids = (result.cpu() for result in cosine_topk(queries[block], rows, depth))
        local_ids[local_ids >= 0] += sum(counts[: ranks.rank])
        # Ids ascend from shard to shard, and equal scores have ascending ids within a shard: a stable sort keeps the
        # order of ties.
        merged, order = torch.cat(ranks.gather(local_scores), 1).sort(dim=1, descending=True, stable=True)
        scores[block, :found] = merged[:, :found]
        ids[block, :found] = torch.cat(ranks.gather(local_ids), 1).gather(1, order[:, :found])
    return scores, ids


def _sums_over_ranks(ranks: Ranks, rows: FeatureRows, index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Sums all shards' rows by class, in row order in float64; returns [classes, d] rounded to `dtype`."""
    out = torch.empty(classes, rows.width, dtype=dtype)
    for first in range(0, rows.width, _SUM_COLUMNS):
        last = min(rows.width, first + _SUM_COLUMNS)
        sums = ranks.take_from_previous(torch.zeros(classes, last - first, dtype=torch.float64))
        for begin, block in rows.columns(last, first).blocks(max(1, _SUM_NUMBERS // rows.width)):
            sums.index_add_(0, index[begin : begin + len(block)], torch.from_numpy(block.astype(np.float64)))
        ranks.pass_to_next(sums)
        if ranks.is_last:
            out[:, first:last] = sums
    return ranks.take_from_last(out)
