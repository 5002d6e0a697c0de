"""Tests slots: each is assigned once, from either end, without collisions."""

from __future__ import annotations

import json

import pytest
import torch

from simplexfix import SlotRegistry


def test_namespaces_at_both_ends() -> None:
    slots = SlotRegistry(1024)
    assert slots.add("imagenet", range(600)).tolist() == list(range(600))
    assert slots.add("cifar100", range(10), end="high").tolist() == [1023 - y for y in range(10)]
    assert slots.add("cifar100", [25, 17], end="high").tolist() == [1013, 1012]
    assert slots.lookup("cifar100", torch.tensor([[17, 0], [25, 9]])).tolist() == [[1012, 1023], [1013, 1014]]
    assert slots.lookup("imagenet", torch.tensor(599)).item() == 599
    assert (len(slots), slots.free, slots.namespaces) == (612, 412, ["imagenet", "cifar100"])
    assert slots.classes("cifar100").tolist() == [*range(10), 25, 17]
    assert slots.used().tolist() == [*range(600), *range(1012, 1024)]


def test_owner() -> None:
    slots = SlotRegistry(8)
    slots.add("a", [5, 6, 2**40])
    slots.add("b", [0, 1], end="high")
    assert [slots.owner(s) for s in range(8)] == [
        ("a", 5),
        ("a", 6),
        ("a", 2**40),
        None,
        None,
        None,
        ("b", 1),
        ("b", 0),
    ]
    assert slots.owner(8) is None
    assert slots.owner(-1) is None


def test_growing_keeps_assigned_slots() -> None:
    slots = SlotRegistry(100)
    ids = torch.tensor([7, 2**50, -3])
    slots.add("x", ids)
    before = slots.lookup("x", ids)
    slots.add("y", range(40))
    slots.add("x", range(100, 120), end="high")
    assert torch.equal(slots.lookup("x", ids), before)


@pytest.mark.parametrize("ends", [["low"], ["high"], ["low", "high", "low"]])
def test_survives_json(ends: list[str]) -> None:
    slots = SlotRegistry(64)
    for i, end in enumerate(ends):
        slots.add(f"n{i % 2}", [100 * i + 3, 100 * i + 4, 100 * i + 1], end=end)
    again = SlotRegistry.from_dict(json.loads(json.dumps(slots.to_dict())))
    assert again.to_dict() == slots.to_dict()
    assert torch.equal(again.used(), slots.used())
    for name in slots.namespaces:
        assert torch.equal(again.lookup(name, slots.classes(name)), slots.lookup(name, slots.classes(name)))
    assert again.add("more", range(5)).tolist() == slots.add("more", range(5)).tolist()


def test_a_million_classes_are_one_run() -> None:
    slots = SlotRegistry(2**20)
    slots.add("default", range(10**6))
    assert len(slots.to_dict()["runs"]) == 1
    assert slots.lookup("default", torch.tensor([999_999])).item() == 999_999


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda s: SlotRegistry(1), ValueError, "num_slots must be at least 2, got 1"),
        (lambda s: s.add("", [1]), ValueError, "namespace must be a non-empty string, got ''"),
        (lambda s: s.add("a", [1], end="top"), ValueError, "end must be 'low' or 'high', got 'top'"),
        (lambda s: s.add("a", [1.5]), TypeError, "class ids must be integers, got 1.5"),
        (lambda s: s.add("a", [True]), TypeError, "class ids must be integers, got True"),
        (lambda s: SlotRegistry(2.5), TypeError, "num_slots must be an integer, got float"),
        (lambda s: SlotRegistry(True), TypeError, "num_slots must be an integer, got bool"),
        (lambda s: s.owner(1.0), TypeError, "slot must be an integer, got float"),
        (
            lambda s: s.add("a", [2**63]),
            ValueError,
            r"class ids must lie in \[-2\^63, 2\^63 - 2\], got 9223372036854775808",
        ),
        (lambda s: s.add("a", torch.tensor([1.9])), TypeError, "class ids must be integers, got torch.float32"),
        (lambda s: s.add("a", range(10**12)), ValueError, "'a' needs 1000000000000 slots, 5 of 8 are free"),
        (
            lambda s: SlotRegistry.from_dict({"format": 1, "num_slots": 8, "runs": [["a", 0, 0, 10**12, 1]]}),
            ValueError,
            "run of 'a' must have count 1 to 8 and step 1 or -1, got 1000000000000 and 1",
        ),
        (lambda s: s.add("old", [9, 2]), ValueError, "class 2 of namespace 'old' has a slot already"),
        (lambda s: s.add("a", [4, 4]), ValueError, r"class 4 of namespace 'a' .* comes twice \(position 1\)"),
        (lambda s: s.add("a", range(6)), ValueError, "'a' needs 6 slots, 5 of 8 are free .'old' holds 3"),
        (lambda s: s.lookup("old", torch.tensor([2, 9])), ValueError, "class 9 has no slot in namespace 'old'"),
        (lambda s: s.lookup("new", torch.tensor([2])), ValueError, r"namespace 'new' has no slots; known: \['old'\]"),
        (lambda s: s.lookup("old", torch.tensor([2.0])), TypeError, "classes must be int64, got torch.float32"),
        (
            lambda s: SlotRegistry.from_dict({"format": 9}),
            ValueError,
            "slot registry must have format 1, got 9",
        ),
        (
            lambda s: SlotRegistry.from_dict(
                {"format": 1, "num_slots": 8, "runs": [["a", 0, 0, 3, 1], ["b", 0, 1, 2, 1]]}
            ),
            ValueError,
            r"slot 1 of 'b' collides with \('a', 1\)",
        ),
        (
            lambda s: SlotRegistry.from_dict({"format": 1, "num_slots": 8, "runs": [["a", 0, 3, 2, 1]]}),
            ValueError,
            "got slot 3 of 'a'",
        ),
    ],
)
def test_bad_input(act, error: type[Exception], message: str) -> None:
    slots = SlotRegistry(8)
    slots.add("old", [1, 2, 3])
    with pytest.raises(error, match=message):
        act(slots)
    assert slots.to_dict() == {"format": 1, "num_slots": 8, "runs": [["old", 1, 0, 3, 1]]}  # nothing has changed
