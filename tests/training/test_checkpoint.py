"""Tests that written states are restored, and that changed files are detected."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from simplexfix.training import CheckpointError, Checkpoints, CheckpointWarning, read_state, write_state

STATE = {
    "tensors": [torch.arange(6).view(2, 3), torch.tensor(1.5, dtype=torch.float64), torch.empty(0, 4)],
    "formats": {"half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "bits": torch.tensor([True, False])},
    "numbers": [0.1, math.inf, -math.inf, 3, True, None, 2**70, 1e-320],
    "steps": {0: {"exp_avg": torch.ones(2)}, 7: (1, 2.5, "x"), "text": "ü\n"},
    "odd": {"$tensor": "not one", "$other": [()]},
    "nothing": {},
}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_written_states_are_read_back(tmp_path: Path) -> None:
    write_state(tmp_path / "x", STATE)
    assert equal(STATE, read_state(tmp_path / "x"))
    for _ in range(8):
        write_state(tmp_path / "y", STATE)
        assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    write_state(tmp_path / "x", {"nan": math.nan})
    assert math.isnan(read_state(tmp_path / "x")["nan"])


def test_tensors_are_read_to_aligned_memory(tmp_path: Path) -> None:
    """Products of unaligned tensors may have other bits than those of the tensors that were written."""
    write_state(tmp_path / "x", {f"t{i}": torch.ones(2 * i + 1) for i in range(9)})
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read_state(tmp_path / "x").values())


def test_tensors_with_shared_memory_or_strides_are_read_back(tmp_path: Path) -> None:
    rows = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    write_state(tmp_path / "x", {"a": rows, "b": rows.t() if rows.ndim == 2 else rows[1:], "c": rows})
    read = read_state(tmp_path / "x")
    assert torch.equal(read["a"], rows)
    assert torch.equal(read["b"], rows[1:])
    assert read["a"].is_contiguous()


def test_flipped_bits_and_truncations_are_detected(tmp_path: Path) -> None:
    write_state(tmp_path / "x", STATE)
    content = (tmp_path / "x").read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / "y").write_bytes(damaged)
        try:
            read = read_state(tmp_path / "y")
        except CheckpointError as error:
            refused += str(tmp_path / "y") in str(error)
        else:
            assert equal(STATE, read)  # padding, or another encoding of the same content
    assert refused > 390
    for size in {0, 1, 7, 8, 100, len(content) // 2, len(content) - 1}:
        (tmp_path / "y").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="y cannot be read, it may be truncated or damaged"):
            read_state(tmp_path / "y")


def test_damaged_checkpoints_are_skipped_with_warnings(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", keep=3)
    assert checkpoints.newest() is None
    for step in (5, 900, 20, 1000, 1001):
        path = checkpoints.save(step, {"step": step})
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "step-000000900.safetensors",
        "step-000001000.safetensors",
        "step-000001001.safetensors",
    ]
    assert checkpoints.newest() == (1001, {"step": 1001})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(CheckpointWarning, match=r"step-000001001.safetensors cannot be read, it may be truncated"):
        assert checkpoints.newest() == (1000, {"step": 1000})
    second = path.with_name("step-000001000.safetensors")
    second.write_bytes(second.read_bytes().replace(b'step\\":1000', b'step\\":1002'))
    with pytest.warns(CheckpointWarning) as warned:
        assert checkpoints.newest() == (900, {"step": 900})
    assert "step-000001001.safetensors cannot be read" in str(warned[0].message)
    assert "step-000001000.safetensors is damaged: its checksum does not match" in str(warned[1].message)
    checkpoints.clear()
    assert checkpoints.newest() is None


def test_bad_input(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(TypeError, match=r"a state holds tensors, numbers, strings and None, got set at a\.1"):
        write_state(tmp_path / "x", {"a": [0, {1, 2}]})
    with pytest.raises(TypeError, match=r"keys of a state must be strings or integers, got 1\.5 at a"):
        write_state(tmp_path / "x", {"a": {1.5: 0}})
    assert not list(tmp_path.iterdir())
    save_file({"a": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="x is not a checkpoint of format 1, its format is None"):
        read_state(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "y")
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
