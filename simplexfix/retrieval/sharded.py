"""Exact search in a gallery that is sharded over the ranks of a process group.

Rank r holds the rows [n_0 + ... + n_(r-1), n_0 + ... + n_r) of the gallery; a shard may be empty.  All ranks have the
same queries and call the same function, and every rank gets the whole result.  With the compiled library the result is
bitwise equal to that of one process with the whole gallery.  In plain PyTorch the last bit may differ, because the
rounding of a matrix product depends on its number of rows.

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
_BLOCK_PLACES = 2**24
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
    """Returns the hits of protocol "instance": whether the nearest item of all shards has the query's label.

    Args:
        version: the same queries on every rank, and this rank's shard as the gallery.  A shard may be empty, but not
            all of them.  Gallery ids, if given, are those of the shard's items.
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
    """Returns the hits of protocol "nearest_class_mean" over all shards.

    The class sums pass from rank to rank on the host, and each rank adds its rows in order; this is the summation
    order of one process.  Then each rank searches its share of the queries.  Rows that are left out of their class are
    sent to all ranks, in blocks of queries.

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
    found = torch.zeros(-(-len(queries) // ranks.size), dtype=torch.uint8)  # gloo gathers tensors of equal length
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
    """Recomputes hits of this rank's queries whose own gallery item, on any rank, is left out of its class."""
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
    # names are coded per shard, so all ranks must have the same names for equal codes
    for kind, names in (("labels", items.label_names), ("ids", items.id_names)):
        same[f"names of {kind}"] = names and f"{len(names)} of CRC-32 {zlib.crc32(chr(0).join(names).encode()):08x}"
    same["query_ids"] = None if items.query_ids is None else f"CRC-32 {zlib.crc32(items.query_ids.data):08x}"
    return queries, rows, items, same


def _common(call: str, queries: FeatureRows, rows: FeatureRows) -> dict[str, object]:
    """Checks that query and shard have one width; returns the properties that must be equal on all ranks."""
    if queries.width != rows.width:
        raise ValueError(f"query and shard must have the same number of columns, got {queries.width} and {rows.width}")
    shape = [len(queries), queries.width]
    return {"call": call, "shape of the query": shape, "query dtype": queries.dtype, "shard dtype": rows.dtype}


def _alike(queries: FeatureRows, rows: FeatureRows) -> tuple[Tensor, Tensor]:
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
    counts = [info.rows for info in infos]
    if not sum(counts):
        raise ValueError("the gallery has no rows: the shards of all ranks are empty")
    return counts


def _search(ranks: Ranks, queries: Tensor, rows: Tensor, k: int, counts: list[int]) -> tuple[Tensor, Tensor]:
    """`cosine_topk` over all shards, on the host; `counts` are their numbers of rows."""
    scores = torch.full((len(queries), k), -math.inf)
    ids = torch.full((len(queries), k), -1)
    depth = min(k, max(counts))  # the most rows that one shard can return
    if not depth:
        return scores, ids
    kept = min(k, depth * ranks.size)
    size = max(1, min(_BLOCK_PLACES // (depth * ranks.size), _BLOCK_NUMBERS // queries.shape[1]))
    for begin in range(0, len(queries), size):
        block = slice(begin, begin + size)
        near, places = (found.cpu() for found in cosine_topk(queries[block], rows, depth))
        places[places >= 0] += sum(counts[: ranks.rank])
        # Ids ascend from shard to shard, and equal scores have ascending ids within a shard: a stable sort keeps the
        # order of ties.
        merged, order = torch.cat(ranks.gather(near), 1).sort(dim=1, descending=True, stable=True)
        scores[block, :kept] = merged[:, :kept]
        ids[block, :kept] = torch.cat(ranks.gather(places), 1).gather(1, order[:, :kept])
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
