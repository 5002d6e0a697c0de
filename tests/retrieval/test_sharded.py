"""Tests galleries sharded over processes: the bits of one process, the same error on all ranks, no hanging rank."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import needs_library
from exact_search import hard_gallery, queries_for
from processes import Child, free_port, run_ranks
from torch import Tensor
from versions import pair, versions

import simplexfix
from simplexfix.compatibility import compatibility_matrix
from simplexfix.labelled import LabelledItems
from simplexfix.retrieval import (
    PROTOCOLS,
    Protocol,
    RankDiedError,
    cosine_topk,
    nearest_class_mean,
    process_group,
    shard_rows,
    sharded,
    sharded_cosine_topk,
)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo processes"
)
N = 203


def sharded_hits(name: str, *arguments: Any, group: dist.ProcessGroup | None = None, **ids: Any) -> np.ndarray:
    """Calls the sharded hits for separate arrays: queries and labels, and this rank's rows and labels."""
    return PROTOCOLS[name].sharded_hits(pair(*arguments, **ids), group)


def whole_hits(name: str, *arguments: Any, **ids: Any) -> np.ndarray:
    return PROTOCOLS[name].hits(pair(*arguments, **ids))


means, items = (partial(sharded_hits, name) for name in ("nearest_class_mean", "instance"))


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Returns the environment variables that torchrun sets."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def shards(n: int, size: int) -> list[list[slice]]:
    """Returns the rows of each rank in four splits.

    They are: even; all rows on the last rank; none on the first and last rank (of two ranks, a third on the first); one
    row on the first rank.
    """
    cuts = [
        [shard_rows(n, rank, size).start for rank in range(size)] + [n],
        [0] * size + [n],
        [0, *(n * (rank - 1) // max(1, size - 2) for rank in range(1, size)), n] if size > 2 else [0, n // 3, n],
        [0] + [min(n, 1 + rank * 5) for rank in range(size - 1)] + [n],
    ]
    return [[slice(*pair) for pair in pairwise(cut)] for cut in cuts]


def same_bits(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(found[0].view(torch.int32), expected[0].view(torch.int32)) and torch.equal(found[1], expected[1])


def gallery_and_queries(kind: str, n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    gallery = hard_gallery(kind, n, d, rng)
    return torch.from_numpy(gallery), torch.from_numpy(queries_for(gallery, 20, rng))


def check_searches(rank: int, size: int, kinds: Sequence[str]) -> None:
    for seed, kind in enumerate(kinds):
        gallery, query = gallery_and_queries(kind, N, 19, seed)
        for cut in shards(N, size):
            for k in (1, 9, 64, N, N + 40):
                found = sharded_cosine_topk(query, gallery[cut[rank]], k)
                assert same_bits(found, cosine_topk(query, gallery, k)), (kind, cut, k)


def check_kinds_of_rows(rank: int, size: int) -> None:
    gallery, query = gallery_and_queries("duplicates", N, 40, 7)
    cut = shards(N, size)[3]
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        whole, asked = gallery.to(dtype), query.to(dtype)
        assert same_bits(sharded_cosine_topk(asked, whole[cut[rank]], 12), cosine_topk(asked, whole, 12)), dtype
    strided, asked = gallery[:, ::2], query[:, 1::2].requires_grad_()
    found = sharded_cosine_topk(asked, strided[cut[rank]], 12)
    assert same_bits(found, cosine_topk(asked.detach(), strided, 12))
    assert not found[0].requires_grad
    mapped = gallery.numpy().copy()
    mapped.flags.writeable = False
    assert same_bits(sharded_cosine_topk(query.detach().numpy(), mapped[cut[rank]], 3), cosine_topk(query, gallery, 3))
    for rows, asked in ((gallery[:0], query), (gallery[:1], query), (gallery, query[:0])):
        mine = rows[shard_rows(len(rows), rank, size)]
        assert same_bits(sharded_cosine_topk(asked, mine, 4), cosine_topk(asked, rows, 4))


def check_protocols(rank: int, size: int, kinds: Sequence[str]) -> None:
    for seed, kind in enumerate(kinds):
        gallery, query = gallery_and_queries(kind, N, 19, seed)
        generator = torch.Generator().manual_seed(seed)
        # ids above 2^24 and below 0; class 8 * 2^40 is only in the queries; most classes lie on several ranks
        labels = torch.randint(-3, 8, (N,), generator=generator) * 2**40
        wanted = torch.randint(-3, 9, (len(query),), generator=generator) * 2**40
        for cut in shards(N, size):
            for name in PROTOCOLS:
                for dtype in (torch.float32, torch.float64):
                    args = query.to(dtype), wanted, (gallery.to(dtype) * (1 + 1e-9)), labels
                    found = sharded_hits(name, args[0], wanted, args[2][cut[rank]], labels[cut[rank]])
                    assert np.array_equal(found, whole_hits(name, *args)), (kind, cut, name, dtype)
                # every other query is a gallery row, by its id
                itself = torch.arange(len(query)) * 7 % N
                ids = torch.where(torch.arange(len(query)) % 2 == 0, itself, N + itself) * 2**33
                asked = torch.where((torch.arange(len(query)) % 2 == 0)[:, None], gallery[itself], query)
                row_ids = torch.arange(N) * 2**33
                found = sharded_hits(
                    name, asked, wanted, gallery[cut[rank]], labels[cut[rank]],
                    query_ids=ids, gallery_ids=row_ids[cut[rank]],
                )  # fmt: skip
                expected = whole_hits(name, asked, wanted, gallery, labels, query_ids=ids, gallery_ids=row_ids)
                assert np.array_equal(found, expected), (kind, cut, name)


def check_sums(rank: int, size: int) -> None:
    """The query (1, 0) finds class 7 or 8, depending on the last bits of the sum of class 7; class 8 is (1, 1)."""
    tiny = 2.0**-30
    cases = [
        # added row by row, the ones are lost beside 1e16; partial sums would keep them
        ([[1e16, 0.1], [1, 0.1], [1, 0.1], [1, 0.1], [1, 0.1], [-1e16, 0.1]], torch.float32, 8),
        # ranks exchange float64 sums
        ([[1, 0], [tiny, tiny / 4], [0, 0], [0, 0], [0, 0], [-1, 0]], torch.float32, 7),
        # float64 rows are rounded to float32, as everywhere
        ([[1 + tiny, tiny / 4], [0, 0], [0, 0], [0, 0], [0, 0], [-1, 0]], torch.float64, 8),
    ]
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([7, 7, 7, 7, 7, 7, 8])
    cut = {2: [slice(0, 2), slice(2, 7)], 4: [slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 7)]}[size]
    for rows, dtype, nearest in cases:
        gallery = torch.tensor([*rows, [1, 1]], dtype=dtype)
        for mine in (gallery[cut[rank]], gallery.numpy()[cut[rank]]):
            for label in (7, 8):
                found = means(query, [label], mine, labels[cut[rank]])
                assert found.tolist() == [label == nearest], (rows, dtype)
        assert whole_hits("nearest_class_mean", query, [nearest], gallery, labels).tolist() == [True]


def check_matrix(rank: int, size: int, group: dist.ProcessGroup) -> None:
    generator = torch.Generator().manual_seed(3)
    galleries = [torch.randn(60, 9, generator=generator) for _ in range(3)]
    queries = [rows[::4] + 0.4 * torch.randn(15, 9, generator=generator) for rows in galleries]
    labels = torch.arange(60) % 11
    mine = shard_rows(60, rank, size)
    for protocol in PROTOCOLS.values():
        ours = Protocol("sharded", score=lambda v, of=protocol: float(of.sharded_hits(v, group).mean()))
        own_rows = [rows[mine] for rows in galleries]
        found = compatibility_matrix(versions(queries, own_rows, labels[::4], labels[mine]), ours)
        expected = compatibility_matrix(versions(queries, galleries, labels[::4], labels), protocol)
        assert 0 < expected[2, 0] < 1
        np.testing.assert_array_equal(found, expected)


def refusal(call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[type[Exception], str]:
    """Returns the error's type and text; its traceback would keep the frames, and so the group, alive."""
    try:
        call(*args)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def check_refusals(rank: int, size: int) -> None:
    """Bad input of one rank raises the same error on every rank, and the group stays usable."""
    last = rank == size - 1
    rows, labels, wrong = torch.eye(6), torch.arange(6), size - 1
    holed = rows.clone()
    holed[4, 2] = torch.nan
    topk = sharded_cosine_topk

    def with_ids(query_ids: Tensor) -> np.ndarray:
        return items(rows, labels, rows, labels, query_ids=query_ids, gallery_ids=labels)

    cases: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], type[Exception], str]] = [
        # the arguments of all ranks but the last, and those of the last
        (
            topk,
            (rows, rows, 2),
            (rows[:, :4], rows, 2),
            ValueError,
            f"rank {wrong}: query and shard must have the same",
        ),
        (topk, (rows, rows, 2), (rows[:, :4], rows[:, :4], 2), ValueError, r"same shape of the query, got \[6, 6\] on"),
        (topk, (rows, rows, 2), (rows[:4], rows, 2), ValueError, rf"\[6, 6\] on rank 0 and \[4, 6\] on rank {wrong}"),
        (topk, (rows, rows, 2), (rows.double(), rows.double(), 2), ValueError, "same query dtype, got float32 on rank"),
        (topk, (rows, rows, 2), (rows, rows.double(), 2), TypeError, f"rank {wrong}: query and shard must have the s"),
        (topk, (rows, rows, 2), (rows, rows, 3), ValueError, f"the same k, got 2 on rank 0 and 3 on rank {wrong}"),
        (topk, (rows, rows, 2), (rows, rows, 0), ValueError, f"rank {wrong}: k must lie between 1 and"),
        (topk, (rows, rows, 2), (rows, rows, 1.5), TypeError, f"rank {wrong}: k must be an integer"),
        (topk, (rows, rows, 2), (rows.flip(0), rows, 2), ValueError, r"all ranks must have the same queries"),
        (topk, (rows, rows, 2), (rows, holed, 2), ValueError, f"rank {wrong}: shard row 4 holds nan or inf"),
        (topk, (rows, rows, 2), (holed, rows, 2), ValueError, f"rank {wrong}: query row 4 holds nan or inf"),
        (topk, (rows, rows, 2), (rows, rows.tolist(), 2), TypeError, f"rank {wrong}: shard must be a torch.Tensor or"),
        (topk, (rows, rows, 2), (rows, rows[0], 2), ValueError, f"rank {wrong}: shard must have 2 dimensions"),
        (topk, (rows, rows.long(), 2), (rows, rows, 2), TypeError, "rank 0: shard must be float32"),
        (means, (rows, labels, rows, labels), (rows, labels, holed, labels), ValueError, "gallery row 4 holds nan"),
        (means, (rows, labels, rows, labels), (rows, labels + 1, rows, labels), ValueError, "same queries and labels"),
        (means, (rows, labels, rows[:0], labels[:0]), (rows, labels, rows[:0], labels[:0]), ValueError, "no rows: the"),
        (items, (rows, labels, rows[:0], labels[:0]), (rows, labels, rows[:0], labels[:0]), ValueError, "no rows: the"),
        (means, (rows, labels, 2e38 * rows, labels), (rows, labels, 2e38 * rows, labels), ValueError, "class 0 add up"),
        (
            means,
            (rows, list("abcdef"), rows, list("abcdef")),
            (rows, list("abcdef"), rows, list("abcdeg")),
            ValueError,
            "same names of labels, got 6 of CRC-32",
        ),
        (with_ids, (labels,), (labels + 1,), ValueError, "same query_ids, got CRC-32"),
    ]
    for call, others, mine, error, message in cases:
        refused = refusal(call, mine if last else others)
        assert refused[0] is error
        assert re.search(message, refused[1]), refused
        said: list[Any] = [None] * size
        dist.all_gather_object(said, refused)
        assert said == [refused] * size
    with pytest.raises(ValueError, match="same call, got sharded_hits of"):
        (means if last else items)(rows, labels, rows, labels)
    assert sharded_cosine_topk(rows, rows, 1)[1].tolist() == [[row] for row in range(6)]


def check_part_of_the_world(rank: int, size: int) -> None:
    """Ranks are those of the group, not of the world."""
    group = dist.new_group(list(range(1, size)))
    gallery, query = gallery_and_queries("duplicates", N, 19, 1)
    labels, wanted = torch.arange(N) % 9, torch.arange(len(query)) % 9
    if not rank:
        with pytest.raises(ValueError, match="this process is not in group"):
            sharded_cosine_topk(query, gallery, 5, group=group)
        return
    mine = shard_rows(N, rank - 1, size - 1)
    assert same_bits(sharded_cosine_topk(query, gallery[mine], 5, group=group), cosine_topk(query, gallery, 5))
    found = means(query, wanted, gallery[mine], labels[mine], group=group)
    assert np.array_equal(found, whole_hits("nearest_class_mean", query, wanted, gallery, labels))


def work_of_a_rank(rank: int, size: int, port: int) -> None:
    os.environ.update(environment(rank, size, port))
    torch.set_num_threads(1)
    gc.disable()  # without the collector, a reference cycle would keep the group alive
    with process_group() as group:
        assert (group.rank(), group.size()) == (rank, size)
        check_searches(rank, size, ("normal", "duplicates", "one row", "one-hot", "signs", "zeros", "clusters 1e-7"))
        check_kinds_of_rows(rank, size)
        check_protocols(rank, size, ("normal", "one-hot", "duplicates", "heavy tail"))
        check_sums(rank, size)
        check_matrix(rank, size, group)
        check_refusals(rank, size)
        check_part_of_the_world(rank, size)
        # Several blocks of queries, of rows and of columns, each with a smaller last one.
        sharded._BLOCK_CANDIDATES, sharded._SUM_NUMBERS, sharded._SUM_COLUMNS = 700, 200, 8
        check_searches(rank, size, ["duplicates"])
        check_protocols(rank, size, ["heavy tail"])
        check_sums(rank, size)
        sharded._BLOCK_CANDIDATES, sharded._BLOCK_NUMBERS = 2**24, 60
        check_searches(rank, size, ["one-hot"])
    assert not dist.is_initialized()
    left = weakref.ref(group)
    del group
    assert left() is None


@needs_library
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_results_equal_one_process_to_the_bit(size: int) -> None:
    run_ranks(work_of_a_rank, size, free_port())


def search_until_a_rank_dies(how: str) -> None:
    rows, labels = torch.eye(8), torch.arange(8)
    version = LabelledItems(labels, labels).version(rows, rows)
    with process_group() as group:
        hurried = dist.new_group(timeout=timedelta(seconds=2))
        nearest_class_mean.sharded_hits(version, None)
        print("ready", flush=True)
        if how == "is killed":
            while True:
                nearest_class_mean.sharded_hits(version, None)
        if group.rank() == 1:
            if how == "raises":
                raise MemoryError("no room for the shard")
            time.sleep(600)
        if how == "hangs":
            nearest_class_mean.sharded_hits(version, hurried)


@pytest.mark.parametrize("how", ["is killed", "raises", "hangs"])
def test_a_rank_that_dies_ends_the_others_with_a_message(how: str, tmp_path: Path) -> None:
    """The survivor is in a search, in the barrier at the end, or in a search that times out."""
    port = free_port()
    survivor, dies = (
        Child(search_until_a_rank_dies, how, folder=tmp_path, environment=environment(rank, 2, port))
        for rank in range(2)
    )
    try:
        while dies.printed() != b"ready\n":
            assert not dies.has_ended(), dies.wait()
            time.sleep(0.01)
        if how == "is killed":
            dies.kill()
        done = survivor.wait(timeout=60)
        assert done.returncode == 1
        assert b"RankDiedError: rank 0 of 2 lost another process, which ended or timed out" in done.stderr
        if how == "raises":
            assert b"MemoryError: no room for the shard" in dies.wait(timeout=60).stderr
    finally:
        for process in (survivor, dies):
            process.kill()
            process.wait()


def test_a_missing_rank_is_an_error_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(RankDiedError, match="the processes could not form a group"),
        process_group(timeout=timedelta(seconds=1)),
    ):
        pass
    assert not dist.is_initialized()


def test_calls_without_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no process group: start the processes with torchrun"):
        sharded_cosine_topk(torch.eye(3), torch.eye(3), 1)
    for name in environment(0, 1, 1):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK expected, but not set"), process_group():
        pass


def test_one_process_is_a_group_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    query, gallery = torch.randn(5, 7), torch.randn(30, 7)
    with process_group() as group:
        assert same_bits(sharded_cosine_topk(query, gallery, 3), cosine_topk(query, gallery, 3))
        with pytest.raises(ValueError, match="twice"), process_group():
            pass
        assert group.size() == 1
    assert not dist.is_initialized()


def test_an_error_on_all_ranks_releases_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group kept alive by a cycle until interpreter exit made some processes abort with SIGABRT."""
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    groups: list[weakref.ref[dist.ProcessGroup]] = []

    def search() -> None:
        with process_group() as group:
            groups.append(weakref.ref(group))
            sharded_cosine_topk(torch.eye(3), torch.eye(3), 0)

    gc.disable()
    try:
        with pytest.raises(ValueError, match="rank 0: k must lie between 1"):
            search()
        assert groups[0]() is None
    finally:
        gc.enable()


IN_A_CIRCLE = """
import atexit, gc, weakref
atexit.register(lambda: print("held" if group() else "gone"))  # runs after what process_group registers
from simplexfix.retrieval import process_group
gc.disable()
with process_group() as whole:
    group, circle = weakref.ref(whole), [whole]
    circle.append(circle)
del whole, circle
assert group() is not None
"""


def test_a_reference_cycle_does_not_keep_the_group_until_exit() -> None:
    here = {**os.environ, **environment(0, 1, free_port()), "PYTHONPATH": str(Path(simplexfix.__file__).parents[1])}
    assert subprocess.check_output([sys.executable, "-c", IN_A_CIRCLE], env=here, text=True) == "gone\n"


def test_shard_rows() -> None:
    assert [shard_rows(10, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)]
    assert [shard_rows(1, rank, 3) for rank in range(3)] == [slice(0, 0), slice(0, 0), slice(0, 1)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0, 1), ValueError, "n must be at least 0, got -1"),
        ((5, 2, 2), ValueError, r"rank must lie in \[0, world_size\), got 2 of 2"),
        ((5, -1, 2), ValueError, r"rank must lie in \[0, world_size\), got -1 of 2"),
        ((5, 0, 0), ValueError, r"rank must lie in \[0, world_size\), got 0 of 0"),
        ((5.0, 0, 1), TypeError, "n must be an integer"),
    ],
)
def test_shard_rows_of_bad_input(arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shard_rows(*arguments)
