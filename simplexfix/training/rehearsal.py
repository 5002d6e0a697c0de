"""Rehearsal memory: a few items of each earlier class, chosen at random or by herding, whose chosen items
have a mean feature near the class mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_integer, check_name
from ..data.dataset_rows import DatasetRows
from ..labelled import FeatureRows, Ids, Rows, read_ids
from .items import Items

__all__ = ["SELECTIONS", "Rehearsal", "herding_rows", "random_rows"]

SELECTIONS = ("random", "herding")


def random_rows(labels: Ids, per_class: int, generator: np.random.Generator) -> Tensor:
    """Returns `per_class` random rows of each class, or all rows of a smaller class.

    Args:
        labels: [N] integer class ids.
        per_class: rows of each class, at least 1.
        generator: each call draws one permutation of all N rows from it.

    Returns:
        [n] int64 row indices, grouped by class in ascending order of ids.  With a generator in the same state,
        a smaller `per_class` returns a prefix of each class's rows.

    Raises:
        TypeError: labels or `per_class` are not integers.
        ValueError: labels are not [N], or `per_class` is below 1.

    Example:
        >>> import numpy as np
        >>> from simplexfix.training import random_rows
        >>> random_rows([7, 7, 7, 4], 2, np.random.default_rng(0))
        tensor([3, 2, 0])
    """
    check_budget(per_class)
    ids = read_ids("labels", labels, "labels", len(labels))
    drawn = generator.permutation(len(ids))
    rows = [drawn[ids[drawn] == c][:per_class] for c in np.unique(ids)]
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *rows]))


def herding_rows(features: Rows, labels: Ids, per_class: int) -> Tensor:
    """Selects rows of each class greedily, so that their mean approximates the class mean (herding).

        x_i = features_i / |features_i|,    m = mean of x over the class
        k-th choice = argmin_i | m - (x_i + sum of the k - 1 chosen) / k |     over rows not yet chosen

    Sums are in float64, and ties go to the lower row.  Means are not normalised again.  A zero feature stays zero.

    Args:
        features: [N, d] floating, finite.
        labels: [N] integer class ids.
        per_class: rows of each class, at least 1; all rows of a smaller class are returned, in the order of choice.

    Returns:
        [n] int64 row indices, grouped by class in ascending order of ids, each class in the order of choice.  A smaller
        `per_class` returns a prefix of each class's rows.

    Raises:
        TypeError: features are not floating, or labels or `per_class` are not integers.
        ValueError: shapes do not fit, a feature is nan or inf (the message names its row), or `per_class` is below 1.

    Reference:
        Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017, arXiv 1611.07725,
        algorithm 4.

    Example:
        >>> import numpy as np
        >>> from simplexfix.training import herding_rows
        >>> herding_rows(np.array([[1.0, 0.0], [1.0, 0.4], [1.0, 0.5]]), [7, 7, 7], 2)
        tensor([1, 0])
    """
    check_budget(per_class)
    held = FeatureRows("features", features)
    for _ in held.blocks():  # raises for nan and inf
        pass
    rows = held.tensor().detach().cpu()
    ids = read_ids("labels", labels, "features", len(held))
    chosen = []
    for c in np.unique(ids):
        of_class = np.flatnonzero(ids == c)
        x = rows[torch.from_numpy(of_class)].double().numpy()
        x /= np.maximum(np.abs(x).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)  # so squares do not underflow
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        mean, total, left = x.mean(axis=0), np.zeros(x.shape[1]), np.ones(len(x), dtype=bool)
        for k in range(1, min(per_class, len(x)) + 1):
            # squared norm of k times the difference; without a matrix product, so equal rows give equal bits
            apart = np.where(left, np.square(k * mean - total - x).sum(axis=1), np.inf)
            best = int(apart.argmin())
            left[best] = False
            total += x[best]
            chosen.append(int(of_class[best]))
    return torch.tensor(chosen, dtype=torch.int64)


class Rehearsal:
    """A memory of a few items of each class, for a custom training loop.

        memory = Rehearsal(20, selection="herding", generator=np.random.default_rng(0))
        memory.add_class(7, inputs, features)      # at the end of the task with class 7
        batch = new_items.joined(memory.sample(64))

    Args:
        per_class: items of each class, at least 1.
        selection: "random" (`random_rows`) or "herding" (`herding_rows`).
        generator: made by `numpy.random.default_rng`.  The memory draws items and batches from it; other draws from it
            change the results.

    Raises:
        TypeError: `per_class` is not an integer, or the generator has another bit generator than PCG64.
        ValueError: `per_class` is below 1, or the selection is unknown.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from simplexfix.training import Rehearsal
        >>> memory = Rehearsal(2, generator=np.random.default_rng(0))
        >>> memory.add_class(7, torch.randn(10, 4))
        >>> memory.classes, len(memory), memory.sample(3).labels.tolist()
        ([7], 2, [7, 7, 7])
    """

    def __init__(self, per_class: int, *, selection: str = "random", generator: np.random.Generator) -> None:
        check_budget(per_class)
        check_name("selection", selection, SELECTIONS)
        if not isinstance(generator, np.random.Generator) or not isinstance(generator.bit_generator, np.random.PCG64):
            raise TypeError(
                "generator must be made by numpy.random.default_rng(seed) (bit generator PCG64), "
                f"got {getattr(generator, 'bit_generator', generator)!r}"
            )
        self.per_class = per_class
        self.selection = selection
        self._generator = generator
        self._items: Items | None = None
        self._left = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return 0 if self._items is None else len(self._items.labels)

    @property
    def classes(self) -> list[int]:
        """Ids of the classes in memory, ascending."""
        found: list[int] = [] if self._items is None else torch.unique(self._items.labels).tolist()
        return found

    def items(self) -> Items:
        """Returns all items in memory: classes in order of addition, the items of a class in order of choice.

        Raises:
            ValueError: the memory is empty.
        """
        if self._items is None:
            raise ValueError("the memory is empty: call add_class first")
        return self._items

    def add_class(self, class_id: int, inputs: Tensor | DatasetRows, features: Rows | None = None) -> None:
        """Adds a class: selects up to `per_class` of its items and stores them.

        If a class gets new items later, pop the stored inputs, join them with the new ones, by `torch.cat` or
        `stored.joined(inputs)` of `DatasetRows`, and add the class again; with herding, pass features of all of them.

        Args:
            class_id: a class that is not in memory.
            inputs: [N, ...], N >= 1, all of this class, with the item shape and dtype of the classes in memory.  Rows
                of `DatasetRows` are stored as row indices and read lazily.
            features: [N, d] floating, of these inputs by the current model; required for "herding", else None.

        Raises:
            TypeError: `class_id` is not an integer, or features are not floating.
            ValueError: the class is in memory already, inputs are empty or differ in shape or dtype, or features are
                missing, not used by this selection, or not one row per input.
        """
        class_id = check_integer("class_id", class_id)
        if class_id in self.classes:
            raise ValueError(
                f"class {class_id} is in memory already: to replace its items, call pop_class({class_id}) first"
            )
        if not len(inputs):
            raise ValueError(f"inputs of class {class_id} must have at least one row")
        if self._items is not None and (
            inputs.shape[1:] != self._items.inputs.shape[1:] or inputs.dtype != self._items.inputs.dtype
        ):
            there = self._items.inputs
            raise ValueError(
                f"inputs must be {there.dtype} [N, {', '.join(map(str, there.shape[1:]))}] like those in memory, "
                f"got {inputs.dtype} {list(inputs.shape)}"
            )
        labels = torch.full((len(inputs),), class_id)
        if self.selection == "herding":
            if features is None:
                raise ValueError('selection="herding" needs features [N, d]: pass them')
            if len(features) != len(inputs):
                raise ValueError(f"features has {len(features)} rows, inputs has {len(inputs)}")
            rows = herding_rows(features, labels, self.per_class)
        elif features is not None:
            raise ValueError('features must be left out: selection="random" does not use them')
        else:
            rows = random_rows(labels, self.per_class, self._generator)
        chosen = Items(inputs[rows.to(inputs.device)], labels[rows])
        self._hold(chosen if self._items is None else self._items.joined(chosen))

    def pop_class(self, class_id: int) -> Tensor | DatasetRows:
        """Removes a class and returns its inputs [n, ...] in order of choice.

        Raises:
            ValueError: the class is not in memory.
        """
        if self._items is None or class_id not in self.classes:
            raise ValueError(f"class {class_id} is not in memory, which has {self.classes}")
        of_class = self._items.labels == class_id
        popped, kept = (self._items.take(mask.nonzero()[:, 0]) for mask in (of_class, ~of_class))
        self._hold(kept if len(kept.labels) else None)
        inputs: Tensor | DatasetRows = popped.inputs
        return inputs

    def sample(self, count: int) -> Items:
        """Returns the next `count` items of an endless sequence of random permutations of the memory.

        A change of the memory starts a new permutation.

        Raises:
            ValueError: the memory is empty, or `count` is below 1.
        """
        items = self.items()
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        while len(self._left) < count:
            self._left = torch.cat([self._left, torch.from_numpy(self._generator.permutation(len(items.labels)))])
        rows, self._left = self._left[:count], self._left[count:]
        return items.take(rows)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as tensors and plain values for `simplexfix.training.write_state`.

        Inputs of `DatasetRows` are read and stored as a tensor.
        """
        return {
            "per_class": self.per_class,
            "selection": self.selection,
            "inputs": None if self._items is None else self._items.read(),
            "labels": None if self._items is None else self._items.labels,
            "left": self._left,
            "generator": self._generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the items and the state of the generator by those of a saved state.

        Raises:
            ValueError: the state has another `per_class` or selection.
        """
        for name in ("per_class", "selection"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state has {name}={state[name]!r}, but this memory has {getattr(self, name)!r}: "
                    f"load it into Rehearsal with {name}={state[name]!r}"
                )
        self._items = None if state["inputs"] is None else Items(state["inputs"], state["labels"])
        self._left = state["left"]
        self._generator.bit_generator.state = state["generator"]

    def _hold(self, items: Items | None) -> None:
        self._items = items
        self._left = torch.empty(0, dtype=torch.int64)


def check_budget(per_class: int) -> None:
    if check_integer("per_class", per_class) < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
