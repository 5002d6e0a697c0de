"""Which class has which vertex: namespaces, both ends of the slots, no collisions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sized
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import check_integer

__all__ = ["SlotRegistry"]

_FORMAT = 1
_CAPACITY = 1024  # bytes of the journal at first


class SlotRegistry(nn.Module):
    """Gives classes their slots, the vertices of the fixed polytope, and never takes one back.

    A class is known by a namespace (a data set, a tenant, a stage of training) and its int64 id.  New
    classes take slots from the low end (0, 1, ...) or from the high end (K - 1, K - 2, ...) in the order
    in which they come, so pre-training and fine-tuning can grow towards each other, as in deployed
    models.  Growing changes no slot given before.  Tensors that it makes are on the CPU, whatever torch's default.

        slots = SlotRegistry(1024)
        slots.add("imagenet", range(600))                     # slots 0 .. 599
        slots.add("cifar100", range(10), end="high")          # slots 1023 .. 1014
        target = slots.lookup("cifar100", labels)             # [B] int64, ready for the loss

    It is a module without parameters, so that a head can hold it.  Its one buffer, which is not part of the
    state_dict, is a journal of the classes that were added.  `AveragedModel`, which copies or averages buffers, and
    `DistributedDataParallel`, which broadcasts them, thereby add to a copy of a registry what was added to its
    original.

    Args:
        num_slots: K, the vertices allocated in advance; at least 2.
    """

    _journal: Tensor

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        num_slots = check_integer("num_slots", num_slots)
        if num_slots < 2:
            raise ValueError(f"num_slots must be at least 2, got {num_slots}")
        self.num_slots = num_slots
        # Runs in the order they were given: namespace, first class id, first slot, count, +1 or -1.  Class ids
        # of a run count up by one; slots count up from the low end and down from the high end.
        self._given: list[tuple[str, int, int, int, int]] = []
        self._ends = {"low": 0, "high": num_slots - 1}
        self._given_below = 0  # all slots below have a class; a lower bound until the journal is read
        # of lookup, on each device: class ids ascending, their slots
        self._tables: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        # Text that only grows: num_slots, then a line for each run and each lengthening of the last run.  The buffer
        # has +1 or -1 for each bit and 0 after the end.  A mean of a journal and a longer one keeps the longer one's
        # signs, whatever the positive weights, in any floating dtype.
        self._text = f"{num_slots}\n"
        self.register_buffer("_journal", torch.empty(0, dtype=torch.float32, device="cpu"), persistent=False)
        self._write_journal(0)

    @property
    def _runs(self) -> list[tuple[str, int, int, int, int]]:
        self._read_journal()
        return self._given

    @property
    def _next(self) -> dict[str, int]:
        self._read_journal()
        return self._ends

    def __len__(self) -> int:
        return sum(count for _, _, _, count, _ in self._runs)

    def extra_repr(self) -> str:
        used = ", ".join(f"{name}: {len(self.classes(name))}" for name in self.namespaces)
        return f"num_slots={self.num_slots}, {used or 'empty'}"

    @property
    def namespaces(self) -> list[str]:
        """Names in the order they came."""
        return list(dict.fromkeys(run[0] for run in self._runs))

    @property
    def free(self) -> int:
        """How many slots no class has."""
        return len(self.free_slots)

    @property
    def free_slots(self) -> range:
        """The slots that no class has, which lie side by side."""
        ends = self._next
        return range(ends["low"], ends["high"] + 1)

    def add(self, namespace: str, classes: Iterable[int], *, end: str = "low") -> Tensor:
        """Gives each class the next free slot of one end.

        Args:
            namespace: non-empty name.
            classes: integer ids, each new in this namespace.
            end: "low" or "high".

        Returns:
            [n] int64 slots, in the order of `classes`.

        Raises:
            TypeError: a class id is not an integer.
            ValueError: a class is there already, or the slots do not suffice; nothing is added then.
        """
        if not namespace or not isinstance(namespace, str):
            raise ValueError(f"namespace must be a non-empty string, got {namespace!r}")
        if end not in ("low", "high"):
            raise ValueError(f"end must be 'low' or 'high', got {end!r}")
        if isinstance(classes, Sized) and len(classes) > self.free:
            self._refuse(namespace, len(classes))  # before anything of that size is made
        ids = _integers(classes)
        known = {i for name, start, _, count, _ in self._runs if name == namespace for i in range(start, start + count)}
        for i, class_id in enumerate(ids):
            if class_id in known:
                raise ValueError(
                    f"class {class_id} of namespace {namespace!r} has a slot already, or comes twice (position {i}); "
                    "a slot is given once and kept"
                )
            known.add(class_id)
        if len(ids) > self.free:
            self._refuse(namespace, len(ids))
        step = 1 if end == "low" else -1
        first = slot = self._next[end]
        lines = []
        for class_id, count in _consecutive(ids):
            lines.append(self._append(namespace, class_id, slot, count, step))
            slot += count * step
        self._ends[end] = slot
        self._tables.clear()
        self._given_below = self._ends["low"] if self.free else self.num_slots
        written = len(self._text)
        self._text += "".join(lines)
        self._write_journal(written)
        return torch.arange(first, first + len(ids) * step, step, dtype=torch.int64, device="cpu")

    def lookup(self, namespace: str, classes: Tensor, *, missing: int | None = None) -> Tensor:
        """Slots of class ids.

        Args:
            namespace: one that was added.
            classes: int64 ids, any shape, any device.
            missing: what stands for a class without a slot, in place of the error, for which the host waits for a GPU.

        Returns:
            int64 slots, same shape and device.

        Raises:
            TypeError: `classes` is not int64.
            ValueError: the namespace or a class has no slots.
        """
        if classes.dtype != torch.int64:
            raise TypeError(f"classes must be int64, got {classes.dtype}")
        ids, slots = self._table(namespace, classes.device)
        if not len(ids):
            raise ValueError(f"namespace {namespace!r} has no slots; known: {self.namespaces}")
        at = torch.searchsorted(ids, classes.contiguous()).clamp_max(len(ids) - 1)
        unknown = ids[at] != classes
        if missing is not None:
            return slots[at].masked_fill(unknown, missing)
        if unknown.any():
            raise ValueError(f"class {int(classes[unknown][0])} has no slot in namespace {namespace!r}; add it first")
        return slots[at]

    def classes(self, namespace: str) -> Tensor:
        """[n] int64 class ids of a namespace, in the order they came; empty for an unknown name."""
        runs = [
            torch.arange(first, first + count, device="cpu")
            for name, first, _, count, _ in self._runs
            if name == namespace
        ]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device="cpu")

    def used(self) -> Tensor:
        """[n] int64, the slots that have a class, ascending."""
        low = torch.arange(self._next["low"], device="cpu")
        return torch.cat([low, torch.arange(self._next["high"] + 1, self.num_slots, device="cpu")])

    def owner(self, slot: int) -> tuple[str, int] | None:
        """(namespace, class id) of a slot, or None where it is free."""
        slot = check_integer("slot", slot)
        for name, first, first_slot, count, step in self._runs:
            offset = (slot - first_slot) * step
            if 0 <= offset < count:
                return name, first + offset
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON or a state_dict; `from_dict` is its inverse."""
        return {"format": _FORMAT, "num_slots": self.num_slots, "runs": [list(run) for run in self._runs]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> SlotRegistry:
        """The registry that `to_dict` described.

        Raises:
            ValueError: the format is unknown, or two classes share a slot.
        """
        if saved.get("format") != _FORMAT:
            raise ValueError(f"slot registry of format {saved.get('format')!r}, this version reads {_FORMAT}")
        num_slots = saved["num_slots"]
        registry = cls(num_slots)
        for name, first, first_slot, count, step in saved["runs"]:
            if step not in (1, -1) or not 1 <= count <= num_slots:
                raise ValueError(
                    f"run of {name!r} has count {count} and step {step}: not a slot registry of {num_slots}"
                )
            end = "low" if step == 1 else "high"
            if first_slot != registry._next[end]:
                owner = registry.owner(first_slot)
                raise ValueError(
                    f"slot {first_slot} of {name!r} collides with {owner}"
                    if owner
                    else f"slot {first_slot} of {name!r} is out of order"
                )
            registry.add(name, range(first, first + count), end=end)
        return registry

    def _refuse(self, namespace: str, wanted: int) -> NoReturn:
        held = ", ".join(f"{name!r} holds {len(self.classes(name))}" for name in self.namespaces) or "none is held"
        raise ValueError(
            f"namespace {namespace!r} needs {wanted} slots, {self.free} of {self.num_slots} are free ({held}); "
            "allocate more slots when the model is first made"
        )

    def _append(self, namespace: str, class_id: int, slot: int, count: int, step: int) -> str:
        """Adds a run, or lengthens the last one that it continues; returns the line for the journal."""
        if self._given:
            name, first, first_slot, length, last_step = self._given[-1]
            if (name, first + length, first_slot + length * step, last_step) == (namespace, class_id, slot, step):
                self._given[-1] = (name, first, first_slot, length + count, step)
                return f"{count}\n"
        self._given.append((namespace, class_id, slot, count, step))
        return f"{json.dumps([namespace, class_id, count, step])}\n"

    def _write_journal(self, start: int) -> None:
        """Writes the text from byte `start` on into the buffer, which is replaced by a larger one where it is full."""
        journal, size = self._journal, len(self._text)
        if 8 * size > len(journal) or journal.is_inference():
            capacity = max(_CAPACITY, 1 << (size - 1).bit_length())
            journal, start = torch.zeros(8 * capacity, dtype=journal.dtype, device=journal.device), 0
            self._journal = journal
        bits = np.unpackbits(np.frombuffer(self._text[start:].encode("ascii"), np.uint8))
        journal[8 * start : 8 * size] = torch.from_numpy(2.0 * bits - 1.0).to(journal)
        self._mark_read()

    def _mark_read(self) -> None:
        journal = self._journal
        self._read = (journal, None if journal.is_inference() else journal._version)  # the latter have no version

    def _read_journal(self) -> None:
        """Adds the classes that others have written into the buffer since it was read last."""
        journal = self._buffers["_journal"]
        assert journal is not None
        seen, version = self._read
        if journal.is_meta or (journal is seen and (version is None or journal._version == version)):
            return
        self._mark_read()  # first: the next lines read the runs, which would call this again
        bits = journal.detach().cpu().float().numpy()
        size = np.count_nonzero(bits)
        try:
            text = np.packbits(bits[:size] > 0).tobytes().decode("ascii")
            if text != self._text:
                self._replay(text)
        except (IndexError, TypeError, ValueError):  # no journal, or the mean of two that differ
            self._renew_journal()

    def _renew_journal(self) -> None:
        self._journal = torch.empty(0, dtype=self._journal.dtype, device=self._journal.device)
        self._write_journal(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotRegistry:
        self._read_journal()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._renew_journal()  # to_empty may leave the journal of a freed registry
        return self

    def _replay(self, text: str) -> None:
        """Adds the classes of a longer journal.

        Raises:
            IndexError, TypeError, ValueError: the text is no journal of as many slots, or takes a slot back.
        """
        num_slots, *lines = text.splitlines()
        if num_slots != str(self.num_slots):
            raise ValueError(f"a journal of {self.num_slots} slots begins with their number, got {num_slots!r}")
        other = SlotRegistry(self.num_slots)
        for line in lines:
            run = json.loads(line)
            if isinstance(run, int):
                name, first, _, length, step = other._given[-1]
                run = [name, first + length, run, step]
            name, first, count, step = run
            other.add(name, range(first, first + count), end="low" if step == 1 else "high")
        for name in dict.fromkeys(run[0] for run in self._given):
            ids, slots = self._table(name, torch.device("cpu"))
            if not torch.equal(other.lookup(name, ids, missing=-1), slots):
                raise ValueError(f"the journal gives classes of namespace {name!r} other slots")
        self._given, self._ends, self._text = other._given, other._ends, other._text
        self._given_below = other._given_below
        self._tables.clear()

    def _table(self, namespace: str, device: torch.device) -> tuple[Tensor, Tensor]:
        runs, key = self._runs, (namespace, device)
        if key not in self._tables:
            slots = [
                torch.arange(first, first + step * count, step, device="cpu")
                for name, _, first, count, step in runs
                if name == namespace
            ]
            ids, order = self.classes(namespace).sort()
            self._tables[key] = ids.to(device), (torch.cat(slots)[order] if slots else ids).to(device)
        return self._tables[key]


def _integers(classes: Iterable[int]) -> list[int]:
    if isinstance(classes, Tensor) and classes.is_floating_point():
        raise TypeError(f"class ids must be integers, got {classes.dtype}")
    ids = classes.tolist() if isinstance(classes, Tensor) else list(classes)
    for class_id in ids:
        if isinstance(class_id, (bool, Tensor)) or not hasattr(class_id, "__index__"):
            raise TypeError(f"class ids must be integers, got {class_id!r}")
        if not -(2**63) <= class_id < 2**63 - 1:
            raise ValueError(f"class ids must lie in [-2^63, 2^63 - 2], got {class_id}")
    return [int(class_id) for class_id in ids]


def _consecutive(ids: list[int]) -> list[tuple[int, int]]:
    """Runs of ids that count up by one: (first, how many)."""
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1] + 1]
    return [(ids[start], end - start) for start, end in pairwise([*starts, len(ids)])]
