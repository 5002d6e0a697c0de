"""Features of the same items by several encoders, read in blocks from memory-mapped files or from memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..labelled import FeatureRows, Ids, Rows, read_column
from .maps import unit

__all__ = ["Features", "PairedFeatures"]

Features: TypeAlias = Rows | FeatureRows
BLOCK_BYTES = 2**25  # size of a block of one version's rows as float64


@dataclass(frozen=True, eq=False)
class PairedFeatures:
    """Rows of all versions i, oldest first: [N, f_i] of items, which may have labels, and [M, f_i] of a sample.

    Attributes:
        versions: one `FeatureRows` for each encoder, all of the same N items.
        sample: rows of further items, without labels; None for no sample.
        labels: [N] int64, the items' classes as numbers 0 to C - 1; None if they are unknown.
        num_classes: C, 0 without labels.
        device: device of the blocks.
    """

    versions: tuple[FeatureRows, ...]
    sample: tuple[FeatureRows, ...] | None
    labels: NDArray[np.int64] | None
    num_classes: int
    device: torch.device

    @classmethod
    def read(
        cls,
        versions: Sequence[Features],
        labels: Ids | None = None,
        sample: Sequence[Features] | None = None,
        *,
        names: Sequence[str],
        device: torch.device | str | None = None,
    ) -> PairedFeatures:
        """Checks rows, labels and sample.

        Args:
            versions: [N, f_i] floating, oldest first.
            labels: [N] integers or names.
            sample: [M, f_i] of further items by the same encoders.
            names: names of the versions, for messages.
            device: device of the blocks; None for that of the newest version's rows.

        Raises:
            TypeError, ValueError: rows, labels or sample do not fit together; the message names them.
        """
        rows = _same_items([_named(name, given) for name, given in zip(names, versions, strict=True)])
        if len(rows[0]) < 2:
            raise ValueError(f"{names[0]} has {len(rows[0])} rows: adapters are fitted on at least 2 items")
        further = None
        if sample is not None:
            if len(sample) != len(rows):
                raise ValueError(
                    f"sample must hold rows by each of {len(rows)} encoders, oldest first, got {len(sample)}"
                )
            further = _same_items(
                [_named(f"{name}'s sample", given) for name, given in zip(names, sample, strict=True)]
            )
            for own, more in zip(rows, further, strict=True):
                if own.width != more.width:
                    raise ValueError(f"{more.name} has {more.width} columns, {own.name} has {own.width}")
            if not len(further[0]):
                further = None
        classes, numbers = 0, None
        if labels is not None:
            column = read_column("labels", labels)
            if len(column) != len(rows[0]):
                raise ValueError(f"labels must have {len(rows[0])} entries, one for each row, got {len(column)}")
            found, places = np.unique(column, return_inverse=True)
            classes, numbers = len(found), places.astype(np.int64)
        if device is None:
            newest = rows[-1].rows
            device = newest.device if isinstance(newest, Tensor) else torch.device("cpu")
        return cls(tuple(rows), None if further is None else tuple(further), numbers, classes, torch.device(device))

    def __len__(self) -> int:
        """Returns the number of all rows: N of the items and M of the sample."""
        return self.num_items + (0 if self.sample is None else len(self.sample[0]))

    @property
    def num_items(self) -> int:
        return len(self.versions[0])

    def width(self, version: int) -> int:
        return self.versions[version].width

    def take(self, items: NDArray[np.int64], sample: NDArray[np.int64] | None = None) -> PairedFeatures:
        """Returns these items and these rows of the sample (None for all); classes are renumbered."""
        more = self.sample
        if more is not None and sample is not None:
            more = tuple(rows.take(sample) for rows in more) if len(sample) else None
        taken = replace(self, versions=tuple(rows.take(items) for rows in self.versions), sample=more)
        if self.labels is None:
            return taken
        found, places = np.unique(self.labels[items], return_inverse=True)
        return replace(taken, labels=places.astype(np.int64), num_classes=len(found))

    def blocks(self, *which: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Yields blocks of (unit float64 rows of these versions, their classes or None), items before the sample."""
        sources = [(self.versions, self.labels)]
        if self.sample is not None:
            sources.append((self.sample, None))
        step = max(1, BLOCK_BYTES // (8 * max(self.width(i) for i in which)))
        for versions, labels in sources:
            for begin in range(0, len(versions[0]), step):
                end = min(len(versions[0]), begin + step)
                rows = tuple(self._unit(versions[i].block_tensor(begin, end), torch.float64) for i in which)
                for i in which:  # otherwise all pages that were read would stay in this process's memory
                    versions[i].release()
                yield rows, None if labels is None else torch.from_numpy(labels[begin:end]).to(self.device)

    def gather(self, version: int, at: Tensor) -> Tensor:
        """Returns unit float32 rows [n, f] of a version; row numbers from N on are rows of the sample."""
        places = at.numpy()
        own = places < self.num_items
        out = np.empty((len(places), self.width(version)), dtype=np.float32)
        out[own] = self.versions[version].gather(places[own])
        if self.sample is not None and not own.all():
            out[~own] = self.sample[version].gather(places[~own] - self.num_items)
        return self._unit(torch.from_numpy(out), torch.float32)

    def _unit(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return unit(rows.to(self.device), dtype)


def _named(name: str, rows: Features) -> FeatureRows:
    return rows if isinstance(rows, FeatureRows) else FeatureRows(name, rows)


def _same_items(versions: list[FeatureRows]) -> list[FeatureRows]:
    for other in versions[1:]:
        if len(other) != len(versions[0]):
            raise ValueError(
                f"{versions[0].name} and {other.name} must have a row for each of the same items, in the same order, "
                f"got {len(versions[0])} and {len(other)} rows"
            )
    return versions
