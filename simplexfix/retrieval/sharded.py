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
from ..labelled import FeatureRows, GalleryClasses, LabelledItems, Rows, VersionFeatures, check_versions
from ._ranks import Ranks, ShardInfo, shard_rows
from .class_means import nearest_without
from .nearest_items import nearest_other

__all__ = ["instance_hits", "nearest_class_mean_hits", "sharded_cosine_topk"]

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

    def read() -> tuple[tuple[Tensor, Tensor, int], ShardInfo]:
        queries, rows = FeatureRows("query", query), FeatureRows("shard", shard)
        same = _common("sharded_cosine_topk", queries, rows)
        depth = check_integer("k", k)
        if not 1 <= depth < 2**31:
            raise ValueError(f"k must lie between 1 and 2^31 - 1, got {depth}")
        searched, items = _alike(queries, rows)
        return (searched, items, depth), ShardInfo(same | {"k": depth, "queries": _checksum(searched)}, len(rows))

    (queries, rows, k), infos = ranks.agree(read)
    scores, ids = _search(ranks, queries, rows, k, [info.rows for info in infos])
    return scores.to(queries.device), ids.to(queries.device)


def instance_hits(version: VersionFeatures, group: dist.ProcessGroup | None = None) -> NDArray[np.bool_]:
    """Which queries' nearest item, by cosine, of all ranks' shards has their label.

    Args:
        version: the same queries on every rank, and this rank's shard as the gallery, which may be empty but not on
            all ranks.  Ids, where given, are those of the shard's items.
        group: as in `sharded_cosine_topk`.

    Returns:
        [Q] bool on the host, on every rank.

    Raises:
        TypeError, ValueError: on every rank: no rows, and as `sharded_cosine_topk`.
        RankDiedError: a rank is gone.
    """
    ranks = Ranks(group)

    def read() -> tuple[tuple[LabelledItems, Tensor, Tensor], ShardInfo]:
        queries, rows, items, same = _read_shard("sharded_hits of instance", version)
        searched, shard = queries.whole(), rows.whole()
        same |= {"queries and labels": _checksum(searched, items.query_labels)}
        return (items, searched, shard), ShardInfo(same, len(rows), leaves_out=_leaves_out(items))

    (items, queries, rows), infos = ranks.agree(read)
    counts = _counts(infos)
    begin, labels = sum(counts[: ranks.rank]), items.gallery_labels
    itself = np.where(items.excluded >= 0, items.excluded + begin, -1)
    if any(info.leaves_out for info in infos):
        _, ids = _search(ranks, queries, rows, 2, counts)
        itself = ranks.maximum(torch.from_numpy(itself)).numpy()
    else:
        _, ids = _search(ranks, queries, rows, 1, counts)
    nearest = nearest_other(ids.numpy(), itself) - begin
    here = (nearest >= 0) & (nearest < len(labels))
    hits = torch.zeros(len(here), dtype=torch.uint8)
    hits[torch.from_numpy(here)] = torch.from_numpy(labels[nearest[here]] == items.query_labels[here]).to(torch.uint8)
    return ranks.maximum(hits).bool().numpy()


def nearest_class_mean_hits(version: VersionFeatures, group: dist.ProcessGroup | None = None) -> NDArray[np.bool_]:
    """Which queries are nearest to the template of their own class, over all ranks' shards.

    The sums of the classes pass along the ranks, each of which adds its rows one by one: the order of one process.
    They are added on the host.  Then each rank searches its part of the queries.  Rows that are left out of their
    class travel to all ranks, a block of queries at a time.

    Args:
        version, group: as of `instance_hits`; device of query and shard may differ.

    Returns:
        [Q] bool on the host, on every rank.

    Raises:
        TypeError, ValueError, RankDiedError: as there; a class whose sum float32 does not hold.
    """
    ranks = Ranks(group)

    def read() -> tuple[tuple[LabelledItems, Tensor, FeatureRows], ShardInfo]:
        queries, rows, items, same = _read_shard("sharded_hits of nearest_class_mean", version)
        for _ in rows.blocks():  # nan and inf
            pass
        searched = queries.whole()
        same |= {"queries and labels": _checksum(searched, items.query_labels)}
        info = ShardInfo(same, len(rows), np.unique(items.gallery_labels), _leaves_out(items))
        return (items, searched, rows), info

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
        mine_of = torch.from_numpy(np.bincount(index, minlength=len(classes)))
        counts = torch.stack(ranks.gather(mine_of)).sum(0).numpy()
    gallery = GalleryClasses(classes, index, counts)
    parts = [shard_rows(len(queries), rank, ranks.size) for rank in range(ranks.size)]
    mine = parts[ranks.rank]
    templates = sums.float().to(queries.device)
    _, ids = cosine_topk(queries[mine], templates, 1)
    own = gallery.find(items.query_labels[mine])
    right = (ids[:, 0].cpu().numpy() == own) & (own >= 0)
    if leaves_out:
        _leave_out(ranks, queries, rows, items, gallery, sums, own, mine, right)
    found = torch.zeros(-(-len(queries) // ranks.size), dtype=torch.uint8)  # gloo gathers tensors of one length
    found[: len(right)] = torch.from_numpy(right)
    whole = [hits[: part.stop - part.start] for hits, part in zip(ranks.gather(found), parts, strict=True)]
    return torch.cat(whole).bool().numpy()


def _leave_out(
    ranks: Ranks,
    queries: Tensor,
    rows: FeatureRows,
    items: LabelledItems,
    gallery: GalleryClasses,
    sums: Tensor,
    own: NDArray[np.int64],
    mine: slice,
    right: NDArray[np.bool_],
) -> None:
    """Judges anew the queries of this rank's part whose item, on any rank, is left out of its class."""
    size = max(1, _BLOCK_NUMBERS // queries.shape[1])
    for begin in range(0, len(queries), size):
        excluded = items.excluded[begin : begin + size]
        here = np.flatnonzero(excluded >= 0)
        of = torch.full((len(excluded),), -1)
        of[here] = torch.from_numpy(gallery.places[excluded[here]])
        taken = torch.full((len(excluded), rows.width), -math.inf)
        taken[here] = rows.take(excluded[here]).block_tensor(0, len(here)).cpu()
        ranks.maximum(of)
        ranks.maximum(taken)
        at = np.flatnonzero(of.numpy() >= 0)
        at = at[(begin + at >= mine.start) & (begin + at < mine.stop)]
        if len(at):
            asked = queries[torch.from_numpy(begin + at).to(queries.device)]
            others = cosine_topk(asked, sums.float().to(queries.device), 2)
            alone = gallery.sizes[of.numpy()[at]] == 1
            nearest = nearest_without(asked.cpu(), taken[at], sums, of.numpy()[at], alone, others)
            wanted = own[begin + at - mine.start]
            right[begin + at - mine.start] = (nearest == wanted) & (wanted >= 0)


def _leaves_out(items: LabelledItems) -> bool:
    return bool((items.excluded >= 0).any())


def _read_shard(
    call: str, version: VersionFeatures
) -> tuple[FeatureRows, FeatureRows, LabelledItems, dict[str, object]]:
    (checked,) = check_versions([version], [""], shards=True)
    queries, rows, items = version.query, version.gallery, checked.items
    same = _common(call, queries, rows)
    # names are numbered with those of the shard: the numbers must mean the same everywhere
    for kind, names in (("labels", items.label_names), ("ids", items.id_names)):
        same[f"names of {kind}"] = names and f"{len(names)} of CRC-32 {zlib.crc32(chr(0).join(names).encode()):08x}"
    same["query_ids"] = None if items.query_ids is None else f"CRC-32 {zlib.crc32(items.query_ids.data):08x}"
    return queries, rows, items, same


def _common(call: str, queries: FeatureRows, rows: FeatureRows) -> dict[str, object]:
    """What must be alike on all ranks, of features of one width."""
    if queries.width != rows.width:
        raise ValueError(f"query and shard must have the same number of columns, got {queries.width} and {rows.width}")
    shape = [len(queries), queries.width]
    return {"call": call, "shape of the query": shape, "query dtype": queries.dtype, "shard dtype": rows.dtype}


def _alike(queries: FeatureRows, rows: FeatureRows) -> tuple[Tensor, Tensor]:
    """Both in float32, all finite, of one dtype and on one device as `cosine_topk` wants them."""
    if queries.dtype != rows.dtype:
        raise TypeError(f"query and shard must have the same dtype, got {queries.dtype} and {rows.dtype}")
    first, second = (features.whole() for features in (queries, rows))
    if first.device != second.device:
        raise ValueError(f"query and shard must be on the same device, got {first.device} and {second.device}")
    return first, second


def _checksum(queries: Tensor, labels: NDArray[np.int64] | None = None) -> str:
    """CRC-32: three times as fast as hashing, and queries differ by mistake, not by design."""
    value = zlib.crc32(queries.cpu().contiguous().numpy().data)
    return f"{value if labels is None else zlib.crc32(labels.data, value):08x}"


def _counts(infos: list[ShardInfo]) -> list[int]:
    counts = [info.rows for info in infos]
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


def _sums_over_ranks(ranks: Ranks, rows: FeatureRows, index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """[classes, d]: the sums of all shards' rows by class, in float64 row after row, rounded to this dtype."""
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
