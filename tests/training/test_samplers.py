"""Tests `BalancedSampler`: order and halves of its batches, several processes, resuming, and bad input."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import nn

from simplexfix.training import BalancedSampler, read_state, write_state
from simplexfix.training.samplers import check_batch_norm

SIZES = [(100, 30, 16), (64, 5, 16), (7, 200, 12), (3, 2, 16), (90, 0, 12)]  # (new, remembered, batch)


@pytest.mark.parametrize(("new", "remembered", "batch"), SIZES)
def test_an_epoch_has_each_row_once_and_batches_are_half_new(new: int, remembered: int, batch: int) -> None:
    sampler = BalancedSampler(new, remembered, batch, seed=3)
    steps = 3 * max(new, remembered)
    batches = list(islice(sampler, steps))
    new_half, remembered_half = zip(*batches, strict=True)
    half = batch // 2 if remembered else batch
    assert {(len(a), len(b)) for a, b in batches} == {(half, batch - half)}
    for rows, stream in ((new, torch.cat(new_half)), (remembered, torch.cat(remembered_half))):
        assert stream.dtype == torch.int64
        epochs = [stream[start : start + rows].tolist() for start in range(0, len(stream) - rows + 1, max(rows, 1))]
        assert len(epochs) >= 3 or not rows
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
        if rows > 8:
            assert epochs[0] != epochs[1]
            assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("new", "remembered", "batch"), SIZES[:2] + SIZES[4:])
def test_ranks_split_the_batch_of_one_process(new: int, remembered: int, batch: int, world_size: int) -> None:
    whole = BalancedSampler(new, remembered, batch, seed=3)
    ranks = [
        BalancedSampler(new, remembered, batch, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for _ in range(25):
        per_rank = [next(rank) for rank in ranks]
        for half, rows in enumerate(next(whole)):
            assert len({len(batch_[half]) for batch_ in per_rank}) == 1
            assert torch.equal(torch.stack([batch_[half] for batch_ in per_rank], dim=1).flatten(), rows)


@pytest.mark.parametrize(("new", "remembered", "batch"), SIZES)
@pytest.mark.parametrize("drawn_before", [0, 1, 2, 17])
def test_a_restored_sampler_returns_the_same_batches(tmp_path, new, remembered, batch, drawn_before: int) -> None:
    pytest.importorskip("safetensors", reason="states are written as safetensors")
    sampler = BalancedSampler(new, remembered, batch, seed=3)
    for _ in range(drawn_before):
        next(sampler)
    write_state(tmp_path / "s.safetensors", sampler.state_dict())
    expected = list(islice(sampler, 40))
    restored = BalancedSampler(new, remembered, batch, seed=99)  # the state replaces the seed
    next(restored)
    restored.load_state_dict(read_state(tmp_path / "s.safetensors"))
    for before, after in zip(expected, islice(restored, 40), strict=True):
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


def test_one_process_resumes_the_state_of_two() -> None:
    pair = [BalancedSampler(50, 20, 16, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(9):
        for rank in pair:
            next(rank)
    one = BalancedSampler(50, 20, 16, seed=0)
    one.load_state_dict(pair[1].state_dict())
    for _ in range(9):
        per_rank = [next(rank) for rank in pair]
        for half, rows in enumerate(next(one)):
            assert torch.equal(rows[0::2], per_rank[0][half])
            assert torch.equal(rows[1::2], per_rank[1][half])


def test_the_order_depends_on_the_seed_alone() -> None:
    global_state = torch.get_rng_state()
    first = [next(BalancedSampler(40, 40, 16, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], first[2][0])
    assert not torch.equal(first[0][0], first[0][1])  # new and remembered rows have independent orders


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BalancedSampler(0, 4, 8, seed=0), "new must be at least 1 and remembered at least 0, got 0 and 4"),
        (lambda: BalancedSampler(5, -1, 8, seed=0), "new must be at least 1 and remembered at least 0, got 5 and -1"),
        (
            lambda: BalancedSampler(5, 4, 1, seed=0),
            "batch must be at least 1, or at least 2 with remembered rows, got 1",
        ),
        (
            lambda: BalancedSampler(5, 0, 0, seed=0),
            "batch must be at least 1, or at least 2 with remembered rows, got 0",
        ),
        (
            lambda: BalancedSampler(5, 4, 8, seed=0, rank=2, world_size=2),
            r"rank must lie in \[0, 2\), the processes, got 2",
        ),
        (
            lambda: BalancedSampler(5, 4, 8, seed=0, world_size=3),
            "4 new and 4 remembered rows of a batch are not divisible by 3 processes",
        ),
        (
            lambda: BalancedSampler(5, 4, 8, seed=0).load_state_dict(BalancedSampler(6, 4, 8, seed=0).state_dict()),
            r"the state has rows \[6, 4\] \(new, remembered\), but this sampler has \[5, 4\]",
        ),
        (
            lambda: BalancedSampler(5, 4, 8, seed=0).load_state_dict(BalancedSampler(5, 4, 6, seed=0).state_dict()),
            r"the state has sizes \[3, 3\] \(new, remembered\), but this sampler has \[4, 4\]",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("batch", "world_size", "accumulate", "smallest"),
    [(1, 1, 1, 2), (2, 2, 1, 4), (4, 2, 2, 8), (4, 2, 1, None), (8, 2, 2, None), (2, 1, 1, None)],
)
def test_batch_norm_needs_two_rows_in_each_part(
    batch: int, world_size: int, accumulate: int, smallest: int | None
) -> None:
    """SyncBatchNorm computes statistics over all processes, so it accepts one row; torch cannot run it on a CPU."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    split = {"batch": batch, "world_size": world_size, "accumulate": accumulate}
    if smallest is None:
        check_batch_norm("mine", network, torch.zeros(1, 3), **split)
    else:
        message = (
            rf"batch must be at least {smallest}: mine has .* {batch} rows over {world_size} processes "
            rf"with {accumulate} parts"
        )
        with pytest.raises(ValueError, match=message):
            check_batch_norm("mine", network, torch.zeros(1, 3), **split)
    check_batch_norm("mine", nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4)), torch.zeros(1, 3), **split)
    check_batch_norm("mine", nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.zeros(1, 3), **split)
    assert network[1].num_batches_tracked == 0
    assert network.training
