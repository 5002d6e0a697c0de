"""The registry that maps classes to slots, the vertices of the fixed polytope."""

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
_CAPACITY = 1024  # initial bytes of the journal


class SlotRegistry(nn.Module):
    """Assigns a slot, a vertex of the fixed polytope, to each class; an assignment is permanent.

    A class is identified by a namespace (a data set, a tenant, a stage of training) and its int64 id.  New classes
    get the next free slot from the low end (0, 1, ...) or from the high end (K - 1, K - 2, ...).  Pre-training can use
    one end and fine-tuning the other.  Adding classes changes no earlier assignment.  Returned tensors are on the
    CPU unless stated otherwise; torch's default device has no effect.

    The registry is a module without parameters, so a head can hold it.  It has one buffer, which is not part of the
    state_dict: a journal of the classes that were added.  The journal carries new classes to copies of the registry:
    `AveragedModel` copies or averages buffers, and `DistributedDataParallel` broadcasts them.

    Args:
        num_slots: K, the number of slots, fixed from the start; at least 2.

    Raises:
        TypeError: `num_slots` is not an integer.
        ValueError: `num_slots` is below 2.

    Example:
        >>> import torch
        >>> from simplexfix import SlotRegistry
        >>> slots = SlotRegistry(1024)
        >>> _ = slots.add("imagenet", range(600))               # slots 0 .. 599
        >>> _ = slots.add("cifar100", range(10), end="high")    # slots 1023 .. 1014
        >>> slots.lookup("cifar100", torch.tensor([0, 9]))      # int64 targets for the loss
        tensor([1023, 1014])
        >>> slots.owner(1014)
        ('cifar100', 9)
    """

    _journal: Tensor

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        num_slots = check_integer("num_slots", num_slots)
        if num_slots < 2:
            raise ValueError(f"num_slots must be at least 2, got {num_slots}")
        self.num_slots = num_slots
        # Runs in the order of assignment: namespace, first class id, first slot, count, step.  Class ids in a run
        # ascend by one; slots ascend (step 1, low end) or descend (step -1, high end).
        self._given: list[tuple[str, int, int, int, int]] = []
        self._ends = {"low": 0, "high": num_slots - 1}
        self._given_below = 0  # all slots below have a class; a lower bound until the journal is read
        # Cache of `lookup` per namespace and device: class ids in ascending order, and their slots.
        self._tables: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        # Append-only text: num_slots, then a line for each new run and each extension of the last run.  The buffer
        # holds +1 or -1 for each bit and 0 after the end.  A weighted mean of a journal and a longer one keeps the
        # signs of the longer one, for any positive weights and any floating dtype.
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
        """Names of namespaces, in the order in which they were added."""
        return list(dict.fromkeys(run[0] for run in self._runs))

    @property
    def free(self) -> int:
        """Number of slots without a class."""
        return len(self.free_slots)

    @property
    def free_slots(self) -> range:
        """Slots without a class; they are contiguous."""
        ends = self._next
        return range(ends["low"], ends["high"] + 1)

    def add(self, namespace: str, classes: Iterable[int], *, end: str = "low") -> Tensor:
        """Assigns the next free slot of one end to each class.

        Args:
            namespace: non-empty name.
            classes: integer ids in [-2^63, 2^63 - 2], each new in this namespace.
            end: "low" or "high".

        Returns:
            [n] int64 slots, in the order of `classes`.

        Raises:
            TypeError: a class id is not an integer.
            ValueError: a class has a slot already, an argument is out of range, or too few slots are free.  Then the
                registry is unchanged.
        """
        if not namespace or not isinstance(namespace, str):
            raise ValueError(f"namespace must be a non-empty string, got {namespace!r}")
        if end not in ("low", "high"):
            raise ValueError(f"end must be 'low' or 'high', got {end!r}")
        if isinstance(classes, Sized) and len(classes) > self.free:
            self._refuse(namespace, len(classes))  # before anything of that size is allocated
        ids = _integers(classes)
        known = {i for name, start, _, count, _ in self._runs if name == namespace for i in range(start, start + count)}
        for i, class_id in enumerate(ids):
            if class_id in known:
                raise ValueError(
                    f"class {class_id} of namespace {namespace!r} has a slot already, or comes twice (position {i}): "
                    "pass only new classes, each once"
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
        """Returns the slots of class ids.

        Args:
            namespace: a namespace with classes.
            classes: int64 ids, any shape, any device.
            missing: result for a class without a slot; None to raise instead, which synchronizes with a GPU.

        Returns:
            int64 slots, in the shape and on the device of `classes`.

        Raises:
            TypeError: `classes` is not int64.
            ValueError: the namespace has no classes, or a class has no slot and `missing` is None.
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
        """Returns the class ids [n] int64 of a namespace in the order of addition; empty for an unknown name."""
        runs = [
            torch.arange(first, first + count, device="cpu")
            for name, first, _, count, _ in self._runs
            if name == namespace
        ]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device="cpu")

    def used(self) -> Tensor:
        """Returns the slots [n] int64 that have a class, in ascending order."""
        low = torch.arange(self._next["low"], device="cpu")
        return torch.cat([low, torch.arange(self._next["high"] + 1, self.num_slots, device="cpu")])

    def owner(self, slot: int) -> tuple[str, int] | None:
        """Returns (namespace, class id) of a slot, or None if the slot is free."""
        slot = check_integer("slot", slot)
        for name, first, first_slot, count, step in self._runs:
            offset = (slot - first_slot) * step
            if 0 <= offset < count:
                return name, first + offset
        return None

    def to_dict(self) -> dict[str, Any]:
        """Returns the registry as numbers, strings and lists for JSON; `from_dict` is the inverse."""
        return {"format": _FORMAT, "num_slots": self.num_slots, "runs": [list(run) for run in self._runs]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> SlotRegistry:
        """Returns the registry that `to_dict` saved.

        Raises:
            ValueError: the format is unknown, a run is malformed, or two classes share a slot.
        """
        if saved.get("format") != _FORMAT:
            raise ValueError(
                f"slot registry must have format {_FORMAT}, got {saved.get('format')!r}; install a newer simplexfix"
            )
        num_slots = saved["num_slots"]
        registry = cls(num_slots)
        for name, first, first_slot, count, step in saved["runs"]:
            if step not in (1, -1) or not 1 <= count <= num_slots:
                raise ValueError(
                    f"damaged slot registry: run of {name!r} must have count 1 to {num_slots} and step 1 or -1, "
                    f"got {count} and {step}"
                )
            end = "low" if step == 1 else "high"
            if first_slot != registry._next[end]:
                owner = registry.owner(first_slot)
                raise ValueError(
                    f"damaged slot registry: slot {first_slot} of {name!r} collides with {owner}"
                    if owner
                    else f"damaged slot registry: a run must begin at slot {registry._next[end]}, "
                    f"got slot {first_slot} of {name!r}"
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
        """Adds a run, or extends the last run if this one continues it; returns the line for the journal."""
        if self._given:
            name, first, first_slot, length, last_step = self._given[-1]
            if (name, first + length, first_slot + length * step, last_step) == (namespace, class_id, slot, step):
                self._given[-1] = (name, first, first_slot, length + count, step)
                return f"{count}\n"
        self._given.append((namespace, class_id, slot, count, step))
        return f"{json.dumps([namespace, class_id, count, step])}\n"

    def _write_journal(self, start: int) -> None:
        """Writes the text from byte `start` on into the buffer; a full buffer is replaced by a larger one."""
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
        self._read = (journal, None if journal.is_inference() else journal._version)  # inference tensors: no version

    def _read_journal(self) -> None:
        """Adds the classes that other code wrote into the buffer (a broadcast, an average) since the last read."""
        journal = self._buffers["_journal"]
        assert journal is not None
        seen, version = self._read
        if journal.is_meta or (journal is seen and (version is None or journal._version == version)):
            return
        self._mark_read()  # before reading the runs below, which would recurse into this function
        bits = journal.detach().cpu().float().numpy()
        size = np.count_nonzero(bits)
        try:
            text = np.packbits(bits[:size] > 0).tobytes().decode("ascii")
            if text != self._text:
                self._replay(text)
        except (IndexError, TypeError, ValueError):  # not a journal, or an average of two different ones
            self._renew_journal()

    def _renew_journal(self) -> None:
        self._journal = torch.empty(0, dtype=self._journal.dtype, device=self._journal.device)
        self._write_journal(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotRegistry:
        self._read_journal()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._renew_journal()  # `to_empty` leaves uninitialized memory, possibly the journal of a freed registry
        return self

    def _replay(self, text: str) -> None:
        """Replaces the runs by those of a longer journal.

        Raises:
            IndexError, TypeError, ValueError: the text is not a journal of the same `num_slots`, or it changes the
                slot of a class.
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
    """Splits ids into runs that ascend by one: (first id, length)."""
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1] + 1]
    return [(ids[start], end - start) for start, end in pairwise([*starts, len(ids)])]
