"""Tests `QueryDrift`, which subtracts the mean change (drift) of queries between versions of one encoder.

It undoes translations exactly, does not depend on batches and ranks, and is saved in files.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_ranks
from torch import nn

from simplexfix.adapters import QueryDrift
from simplexfix.training import CheckpointError, write_state

safetensors = pytest.importorskip("safetensors.torch")

D = 6


def features(rows: int = 40, seed: int = 0, *, d: int = D) -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))


def fine_tuned(versions: int = 3, *, rows: int = 40) -> list[torch.Tensor]:
    """Returns features of the same queries by an encoder and by `versions` successive fine-tunes of it."""
    out = [features(rows)]
    for t in range(versions):
        out.append(out[-1] + 0.2 * features(rows, t + 1) + 0.5 * features(1, 100 + t))
    return out


def accumulated(by_version: list[torch.Tensor], *, normalize: bool = True, batch: int = 16) -> QueryDrift:
    """Returns the drift between successive versions, updated in batches."""
    drift = QueryDrift(D, normalize=normalize)
    for t in range(1, len(by_version)):
        for new, old in zip(by_version[t].split(batch), by_version[t - 1].split(batch), strict=True):
            drift.update(new, old, version=t)
    return drift


def mean_change(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (F.normalize(new.double()) - F.normalize(old.double())).mean(0)


def test_a_translation_is_undone_exactly() -> None:
    # integers, whose sums are exact in float64
    old = torch.randint(-9, 9, (32, D), generator=torch.Generator().manual_seed(0)).double()
    translation = torch.tensor([3.0, -1.0, 0.0, 7.0, 2.0, -5.0], dtype=torch.float64)
    drift = accumulated([old, old + translation], normalize=False)
    assert torch.equal(drift.drift(1), translation)
    assert torch.equal(drift.compensate(old + translation, from_version=1, to_version=0), old)
    assert drift.explained_fraction(1) == 1.0


def test_only_drifts_between_the_two_versions_are_subtracted() -> None:
    """The authors' code subtracts the drifts of all steps, regardless of the searched index."""
    by_version = fine_tuned(3)
    drift = accumulated(by_version)
    steps = {t: mean_change(by_version[t], by_version[t - 1]) for t in (1, 2, 3)}
    query = F.normalize(by_version[3].double())
    for to, between in ((3, ()), (2, (3,)), (1, (2, 3)), (0, (1, 2, 3))):
        expected = query - sum((steps[t] for t in between), torch.zeros(D, dtype=torch.float64))
        found = drift.compensate(by_version[3].double(), from_version=3, to_version=to)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    found = drift.compensate(by_version[2].double(), from_version=2, to_version=1)
    torch.testing.assert_close(found, F.normalize(by_version[2].double()) - steps[2], rtol=0, atol=1e-14)


def test_explained_fraction_against_its_definition() -> None:
    """It is |mean change|^2 / mean |change|^2, as docs/guides/replacing.md defines it."""
    by_version = fine_tuned(2)
    drift = accumulated(by_version)
    for t in (1, 2):
        changes = F.normalize(by_version[t].double()) - F.normalize(by_version[t - 1].double())
        expected = changes.mean(0).square().sum() / changes.square().sum(1).mean()
        assert drift.explained_fraction(t) == pytest.approx(float(expected), rel=1e-12)
        assert 0 < drift.explained_fraction(t) < 1
    unchanged = accumulated([by_version[0], by_version[0]])
    assert math.isnan(unchanged.explained_fraction(1))
    assert not unchanged.drift(1).any()


def test_batches_and_accumulators_add_up_in_any_order() -> None:
    by_version = fine_tuned(2, rows=64)
    one_batch = accumulated(by_version, batch=64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    parts = [QueryDrift(D), QueryDrift(D)]
    for at, rows in enumerate(order.split(7)):
        for t in (2, 1):  # the later version comes first; `versions` is ascending all the same
            parts[at % 2].update(by_version[t][rows], by_version[t - 1][rows], version=t)
    parts[1].merge(parts[0])
    assert parts[1].versions.tolist() == one_batch.versions.tolist() == [1, 2]
    assert parts[1].counts.tolist() == one_batch.counts.tolist() == [64, 64]
    torch.testing.assert_close(parts[1].sums, one_batch.sums, rtol=0, atol=1e-13)
    torch.testing.assert_close(parts[1].squares, one_batch.squares, rtol=1e-14, atol=0)


def test_the_result_may_be_normalized_for_thresholds() -> None:
    by_version = fine_tuned(1)
    drift = accumulated(by_version)
    options = {"from_version": 1, "to_version": 0}
    plain = drift.compensate(by_version[1], **options)
    unit = drift.compensate(by_version[1], **options, normalize_result=True)
    assert plain.dtype == unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(40))
    assert (plain.norm(dim=1) - 1).abs().max() > 0.01
    gallery = F.normalize(by_version[0])
    assert torch.equal((plain @ gallery.T).argmax(1), (unit @ gallery.T).argmax(1))
    zero = drift.compensate(torch.zeros(1, D), from_version=1, to_version=1, normalize_result=True)
    assert not zero.any()


def test_compensation_is_differentiable_in_the_query() -> None:
    drift = accumulated(fine_tuned(1))
    query = features(3, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: drift.compensate(q, from_version=1, to_version=0, normalize_result=True), query
    )


def test_steps_without_queries_add_nothing() -> None:
    """A rank or version without queries contributes nothing; the authors' code divides by 0 there."""
    by_version = fine_tuned(1)
    drift = accumulated(by_version)
    before = drift.drift(1)
    drift.update(by_version[1][:0], by_version[0][:0], version=1)
    assert torch.equal(drift.drift(1), before)
    drift.update(by_version[1][:0], by_version[0][:0], version=2)
    drift.merge(QueryDrift(D))
    assert drift.versions.tolist() == [1]
    for call in (lambda: drift.drift(2), lambda: drift.explained_fraction(2)):
        with pytest.raises(ValueError, match=r"no query was added .* version 1 to version 2.*lead to version 1;"):
            call()
    with pytest.raises(ValueError, match="from version 1 to version 2"):
        drift.compensate(by_version[1], from_version=2, to_version=0)
    with pytest.raises(ValueError, match="lead to nothing"):
        QueryDrift(D).compensate(by_version[1], from_version=1, to_version=0)


def test_a_file_stores_the_numbers_of_versions(tmp_path: Path) -> None:
    """The authors' code writes drifts under other numbers than it reads."""
    by_version = fine_tuned(4)
    drift = QueryDrift(D)
    for t in (4, 3):
        drift.update(by_version[t], by_version[t - 1], version=t)
    drift.save(tmp_path / "drift.safetensors")
    loaded = QueryDrift.load(tmp_path / "drift.safetensors")
    assert loaded.versions.tolist() == [3, 4]
    assert loaded.normalize is True
    for name, value in drift.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    torch.testing.assert_close(loaded.drift(3), mean_change(by_version[3], by_version[2]), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="from version 1 to version 2"):
        loaded.compensate(by_version[4], from_version=4, to_version=1)
    loaded.update(by_version[2], by_version[1], version=2)  # a version is added after loading
    assert loaded.versions.tolist() == [2, 3, 4]
    drift.save(tmp_path / "same.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "drift.safetensors").read_bytes()


def test_damaged_and_strange_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "drift.safetensors"
    accumulated(fine_tuned(1)).save(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        QueryDrift.load(file)
    write_state(file, {"kind": "something", "sums": torch.ones(1)})
    with pytest.raises(CheckpointError, match="must hold a 'simplexfix query drift' of format 1, it holds 'something'"):
        QueryDrift.load(file)


def test_a_drift_is_saved_within_another_module(tmp_path: Path) -> None:
    """safetensors saves and loads a module that contains a QueryDrift; casts do not change its statistics."""
    model = nn.ModuleDict({"drift": accumulated(fine_tuned(2), normalize=False), "layer": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in model["drift"].state_dict().items()}
    safetensors.save_model(model, tmp_path / "model.safetensors")
    other = nn.ModuleDict({"drift": QueryDrift(D), "layer": nn.Linear(2, 2)})
    safetensors.load_model(other, tmp_path / "model.safetensors")
    other.half()
    assert other["layer"].weight.dtype == torch.float16
    for name, value in before.items():
        assert torch.equal(other["drift"].state_dict()[name], value), name
    assert other["drift"].normalize is False
    with pytest.raises(RuntimeError, match="size mismatch for sums"):
        QueryDrift(D + 1).load_state_dict(before)


def merge_on_a_rank(rank: int, size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        by_version = fine_tuned(2)
        one_process = accumulated(by_version, batch=40)
        local = QueryDrift(D)
        rows = slice(0, 30) if rank == 0 else slice(30, 40)
        local.update(by_version[1][rows], by_version[0][rows], version=1)
        if rank == 0:  # the other rank has no queries of version 2
            local.update(by_version[2], by_version[1], version=2)
        total = local.merged_ranks()
        assert local.counts.tolist() == ([30, 40] if rank == 0 else [10])
        assert total.counts.tolist() == [40, 40]
        torch.testing.assert_close(total.sums, one_process.sums, rtol=0, atol=1e-13)
        sums = [torch.empty_like(total.sums) for _ in range(size)]
        dist.all_gather(sums, total.sums)
        assert torch.equal(sums[0], sums[1])
        other = QueryDrift(D, normalize=rank == 0)
        with pytest.raises(ValueError, match="must have the same normalize"):
            other.merged_ranks()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo processes")
def test_two_processes_have_the_sum_of_both(tmp_path: Path) -> None:
    run_ranks(merge_on_a_rank, 2, str(tmp_path / "rendezvous"))


NAN = features(4)
NAN[2, 1] = math.nan


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda d: d.update(features(4), features(4, d=9), version=1),
            ValueError,
            r"old must have shape \[B, 6\], got",
        ),
        (lambda d: d.update(features(4, d=9), features(4), version=1), ValueError, "between independent encoders"),
        (lambda d: d.compensate(features(4, d=5), from_version=1, to_version=0), ValueError, "independent encoders"),
        (lambda d: d.update(features(4), features(3), version=1), ValueError, "new and old must have the same shape"),
        (lambda d: d.update(features(4), features(4).double(), version=1), TypeError, "must have the same dtype"),
        (lambda d: d.update(features(4).long(), features(4), version=1), TypeError, "new must be float32"),
        (lambda d: d.update(features(4)[0], features(4), version=1), ValueError, r"new must have shape \[B, 6\]"),
        (lambda d: d.update(NAN, features(4), version=1), ValueError, "new row 2 holds nan or inf"),
        (lambda d: d.update(features(4), NAN, version=1), ValueError, "old row 2 holds nan or inf"),
        (lambda d: d.compensate(NAN, from_version=1, to_version=0), ValueError, "query row 2 holds nan or inf"),
        (lambda d: d.update(features(4), features(4), version=0), ValueError, "version must be at least 1"),
        (lambda d: d.update(features(4), features(4), version=1.0), TypeError, "version must be an integer"),
        (lambda d: d.compensate(features(4), from_version=0, to_version=1), ValueError, "which must not be newer, got"),
        (
            lambda d: d.compensate(features(4), from_version=1, to_version=-1),
            ValueError,
            "to_version must be at least 0",
        ),
        (lambda d: d.merge(QueryDrift(7)), ValueError, "the same embedding_dim, got 6 and 7"),
        (lambda d: d.merge(QueryDrift(6, normalize=False)), ValueError, "the same normalize, got True and False"),
        (lambda d: d.merge(d), ValueError, "would count twice"),
        (lambda d: d.merge(np.zeros(3)), TypeError, "other must be a QueryDrift, got ndarray"),
        (lambda d: QueryDrift(0), ValueError, "embedding_dim must be at least 1"),
        (lambda d: QueryDrift(4, normalize="yes"), TypeError, "normalize must be True or False"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    drift = accumulated(fine_tuned(1))
    before = {name: value.clone() for name, value in drift.state_dict().items()}
    with pytest.raises(error, match=message):
        call(drift)
    for name, value in drift.state_dict().items():
        assert torch.equal(value, before[name]), name
