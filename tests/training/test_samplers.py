"""Tests batches of new and remembered rows: epochs, halves, independence of the number of processes, and resuming."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import nn

from simplexfix.training import BalancedSampler, read_state, write_state
from simplexfix.training.samplers import check_lone_row

SIZES = [(100, 30, 16), (64, 5, 16), (7, 200, 12), (3, 2, 16), (90, 0, 12)]  # (new, remembered, batch)


@pytest.mark.parametrize(("new", "remembered", "batch"), SIZES)
def test_every_row_once_in_an_epoch_half_and_half(new: int, remembered: int, batch: int) -> None:
    sampler = BalancedSampler(new, remembered, batch, seed=3)
    steps = 3 * max(new, remembered)
    drawn = list(islice(sampler, steps))
    half = batch // 2 if remembered else batch
    assert {(len(a), len(b)) for a, b in drawn} == {(half, batch - half)}
    for rows, stream in ((new, torch.cat([a for a, _ in drawn])), (remembered, torch.cat([b for _, b in drawn]))):
        assert stream.dtype == torch.int64
        epochs = [stream[start : start + rows].tolist() for start in range(0, len(stream) - rows + 1, max(rows, 1))]
        assert len(epochs) >= 3 or not rows
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
        if rows > 8:
            assert epochs[0] != epochs[1]
            assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("new", "remembered", "batch"), SIZES[:2] + SIZES[4:])
def test_ranks_share_out_the_batch_of_one_process(new: int, remembered: int, batch: int, world: int) -> None:
    whole = BalancedSampler(new, remembered, batch, seed=3)
    ranks = [BalancedSampler(new, remembered, batch, seed=3, rank=rank, world=world) for rank in range(world)]
    for _ in range(25):
        parts = [next(rank) for rank in ranks]
        for side, rows in enumerate(next(whole)):
            assert len({len(part[side]) for part in parts}) == 1
            assert torch.equal(torch.stack([part[side] for part in parts], dim=1).flatten(), rows)


@pytest.mark.parametrize(("new", "remembered", "batch"), SIZES)
@pytest.mark.parametrize("before", [0, 1, 2, 17])
def test_a_state_from_between_any_batches_goes_on_alike(tmp_path, new, remembered, batch, before: int) -> None:
    pytest.importorskip("safetensors", reason="states are written as safetensors")
    sampler = BalancedSampler(new, remembered, batch, seed=3)
    for _ in range(before):
        next(sampler)
    write_state(tmp_path / "s.safetensors", sampler.state_dict())
    expected = list(islice(sampler, 40))
    again = BalancedSampler(new, remembered, batch, seed=99)  # the state replaces the seed
    next(again)
    again.load_state_dict(read_state(tmp_path / "s.safetensors"))
    for a, b in zip(expected, islice(again, 40), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_other_numbers_of_processes_go_on_with_the_same_batches() -> None:
    pair = [BalancedSampler(50, 20, 16, seed=3, rank=rank, world=2) for rank in range(2)]
    for _ in range(9):
        saved = [next(rank) for rank in pair]
    one = BalancedSampler(50, 20, 16, seed=0)
    one.load_state_dict(pair[1].state_dict())
    for _ in range(9):
        saved = [next(rank) for rank in pair]
        for side, rows in enumerate(next(one)):
            assert torch.equal(rows[0::2], saved[0][side])
            assert torch.equal(rows[1::2], saved[1][side])


def test_the_order_is_the_seeds_and_nobody_elses() -> None:
    state = torch.get_rng_state()
    first = [next(BalancedSampler(40, 40, 16, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], first[2][0])
    assert not torch.equal(first[0][0], first[0][1])  # the two orders are independent


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: BalancedSampler(0, 4, 8, seed=0), "new must be at least 1 and remembered at least 0, got 0 and 4"),
        (lambda: BalancedSampler(5, -1, 8, seed=0), "new must be at least 1 and remembered at least 0, got 5 and -1"),
        (lambda: BalancedSampler(5, 4, 1, seed=0), "batch must hold a row, and two where some are remembered, got 1"),
        (lambda: BalancedSampler(5, 0, 0, seed=0), "batch must hold a row, and two where some are remembered, got 0"),
        (lambda: BalancedSampler(5, 4, 8, seed=0, rank=2, world=2), r"rank must lie in \[0, 2\), the processes, got 2"),
        (
            lambda: BalancedSampler(5, 4, 8, seed=0, world=3),
            "4 new and 4 remembered rows of a batch cannot be shared out evenly over 3 processes",
        ),
        (
            lambda: BalancedSampler(5, 4, 8, seed=0).load_state_dict(BalancedSampler(6, 4, 8, seed=0).state_dict()),
            r"the state is of rows \[6, 4\] \(new, remembered\), here are \[5, 4\]",
        ),
        (
            lambda: BalancedSampler(5, 4, 8, seed=0).load_state_dict(BalancedSampler(5, 4, 6, seed=0).state_dict()),
            r"the state is of sizes \[3, 3\] \(new, remembered\), here are \[4, 4\]",
        ),
    ],
)
def test_bad_input(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize(
    ("batch", "world", "accumulate", "least"),
    [(1, 1, 1, 2), (2, 2, 1, 4), (4, 2, 2, 8), (4, 2, 1, None), (8, 2, 2, None), (2, 1, 1, None)],
)
def test_parts_of_one_row_are_refused_with_statistics_of_batches(
    batch: int, world: int, accumulate: int, least: int | None
) -> None:
    """Also with several processes, but not with SyncBatchNorm, which torch does not run on a CPU."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    split = {"batch": batch, "world": world, "accumulate": accumulate}
    if least is None:
        check_lone_row("mine", network, torch.zeros(1, 3), **split)
    else:
        says = (
            rf"batch must be at least {least}: mine has .* {batch} rows over {world} processes with {accumulate} parts"
        )
        with pytest.raises(ValueError, match=says):
            check_lone_row("mine", network, torch.zeros(1, 3), **split)
    check_lone_row("mine", nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4)), torch.zeros(1, 3), **split)
    check_lone_row("mine", nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.zeros(1, 3), **split)
    assert network[1].num_batches_tracked == 0
    assert network.training
