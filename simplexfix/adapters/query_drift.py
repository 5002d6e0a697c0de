"""Query drift compensation: queries of a fine-tuned encoder search an index that an earlier version built."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import check_features, check_integer, check_new_and_old, check_tensor
from .._reference import unit_rows
from .._states import CheckpointError, read_state, write_state
from .._text import listed

__all__ = ["QueryDrift"]

_KIND, _FORMAT = "simplexfix query drift", 1
_STATISTICS = ("versions", "counts", "sums", "squares")  # one row a step


class QueryDrift(nn.Module):
    """The mean drift of queries over the versions of one encoder, subtracted from queries that search an older index.

        D_t   = mean over queries q of  n(f_t(q)) - n(f_{t-1}(q)),    n(x) = x / |x|
        q_hat = n(f_t(q)) - sum_{s = j+1 .. t} D_s                    index built by version j, query by version t

    It needs neither documents nor labels, and stores one vector per step.  The versions must be fine-tunes of one
    encoder, each of the version before it: a translation between independent encoders has no meaning.
    `explained_fraction` measures how much of the drift is a translation.

        drift = QueryDrift(384)
        for queries in training_queries_of_version_2:        # evaluation mode, no gradient
            drift.update(f_2(queries), f_1(queries), version=2)
        index.search(drift.compensate(f_2(queries), from_version=2, to_version=1), k=10)

    Sums are float64, so the order of batches changes results only by rounding.  `module.to(dtype)` and `module.half()`
    do not change the dtype of the statistics.

    Args:
        embedding_dim: d, width of the features of all versions.
        normalize: whether rows are L2-normalised before they are compared; a zero row stays zero.

    Attributes:
        versions: [S] int64, ascending: t of each step from version t - 1 to version t.
        counts: [S] int64, queries of each step.
        sums: [S, d] float64, sum of n(f_t(q)) - n(f_{t-1}(q)).
        squares: [S] float64, sum of the squared lengths of these differences.
        normalized: bool, the option `normalize`; it is part of the state_dict, and `load_state_dict` sets it.

    Raises:
        TypeError, ValueError: embedding_dim is not an integer of at least 1; normalize is not a bool.

    Reference:
        Goswami et al., "Query Drift Compensation: Enabling Compatibility in Continual Learning of Retrieval Embedding
        Models", 2025, arXiv 2506.00037.  Their code subtracts the drifts of all steps, whichever index is searched.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import QueryDrift
        >>> old, move = torch.randn(64, 8), torch.randn(8)
        >>> drift = QueryDrift(8, normalize=False)
        >>> drift.update(old + move, old, version=1)                    # queries by version 1 and by version 0
        >>> torch.allclose(drift.compensate(old + move, from_version=1, to_version=0), old, atol=1e-4)
        True
    """

    versions: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor
    normalized: Tensor

    def __init__(self, embedding_dim: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.embedding_dim = check_integer("embedding_dim", embedding_dim)
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be True or False, got {normalize!r}")
        self.register_buffer("versions", torch.empty(0, dtype=torch.int64))
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64))
        self.register_buffer("sums", torch.empty(0, self.embedding_dim, dtype=torch.float64))
        self.register_buffer("squares", torch.empty(0, dtype=torch.float64))
        self.register_buffer("normalized", torch.tensor(normalize))

    @property
    def normalize(self) -> bool:
        """Whether rows are L2-normalised before they are compared."""
        return bool(self.normalized)

    def extra_repr(self) -> str:
        return f"embedding_dim={self.embedding_dim}, normalize={self.normalize}, versions={self.versions.tolist()}"

    @torch.no_grad()
    def update(self, new: Tensor, old: Tensor, *, version: int) -> None:
        """Adds a batch of queries to the step from `version` - 1 to `version`.

        Args:
            new: [B, d] floating, finite: the queries by f_t, in evaluation mode; B may be 0.
            old: [B, d], dtype and device of new: the same queries by f_{t-1}.
            version: t, at least 1.

        Raises:
            TypeError, ValueError: features have another dtype or width, a row holds nan or inf, or `version` is below
                1.  The statistics do not change then.
        """
        version = _check_version("version", version, least=1)
        self._check_width("new", new)
        self._check_width("old", old)
        check_new_and_old("new", new, old)
        moves = self._rows("new", new) - self._rows("old", old)
        self._add(version, len(moves), moves.sum(0), moves.square().sum())

    def merge(self, other: QueryDrift) -> None:
        """Adds the sums of another accumulator, as if its queries had been passed to `update`.

        Raises:
            TypeError: `other` is not a QueryDrift.
            ValueError: `other` has another width or another `normalize`, or is this accumulator itself.
        """
        if not isinstance(other, QueryDrift):
            raise TypeError(f"other must be a QueryDrift, got {type(other).__name__}")
        if other is self:
            raise ValueError("other must be another accumulator: its queries would count twice")
        for name in ("embedding_dim", "normalize"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"both accumulators must have the same {name}, got {mine} and {theirs}")
        for version, count, total, square in zip(*(getattr(other, name) for name in _STATISTICS), strict=True):
            self._add(int(version), int(count), total, square)

    def merged_ranks(self, group: dist.ProcessGroup | None = None) -> QueryDrift:
        """Returns a new accumulator of the queries of all processes, equal on each; this one does not change.

        A process may have no query of a step, for example if its loader was exhausted.

        Args:
            group: process group; None for all processes.

        Raises:
            ValueError: widths or `normalize` differ; raised on every process.
        """
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, self._state(), group=group)
        total = QueryDrift(self.embedding_dim, normalize=self.normalize).to(self.sums.device)
        for state in everyone:  # in rank order: the same bits on every rank
            total.merge(QueryDrift._of(state))
        return total

    def drift(self, version: int) -> Tensor:
        """Returns D_t, [d] float64: the mean drift of the step from `version` - 1 to `version`.

        Raises:
            ValueError: no query of that step was added.
        """
        at = self._place(version)
        return self.sums[at] / self.counts[at]

    def explained_fraction(self, version: int) -> float:
        """Returns the fraction of a step's drift that the translation D_t explains, in [0, 1]; nan if no query moved.

            |D_t|^2 / mean |n(f_t(q)) - n(f_{t-1}(q))|^2

        Raises:
            ValueError: no query of that step was added.
        """
        at = self._place(version)
        square = float(self.squares[at] / self.counts[at])
        # for a pure translation |D_t|^2 may exceed the mean by rounding
        return min(1.0, float(self.drift(version).square().sum()) / square) if square > 0 else math.nan

    def compensate(
        self, query: Tensor, *, from_version: int, to_version: int, normalize_result: bool = False
    ) -> Tensor:
        """Returns queries for an index that an earlier version built, minus the drifts between both versions.

            n(query) - sum_{s = to_version + 1 .. from_version} D_s

        Args:
            query: [B, d] floating, finite, by version `from_version`.
            from_version: t, the version that embedded the queries.
            to_version: j <= t, the version that built the index; j = t subtracts nothing.
            normalize_result: whether to L2-normalise the result.  Rankings stay the same, scores by inner product
                change; use it if a threshold applies to inner products.

        Returns:
            [B, d] in the dtype of the query, computed in float64.

        Raises:
            TypeError, ValueError: as in `update`; `from_version` is below `to_version`; a step has no queries.
        """
        newest = _check_version("from_version", from_version)
        oldest = _check_version("to_version", to_version)
        if newest < oldest:
            raise ValueError(
                f"from_version embedded the queries and to_version built the index, which must not be newer, got "
                f"from_version {newest} and to_version {oldest}"
            )
        self._check_width("query", query)
        out = self._rows("query", query)
        for version in range(oldest + 1, newest + 1):
            out = out - self.drift(version).to(query.device)
        return (unit_rows(out) if normalize_result else out).to(query.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with a checksum (docs/reference/formats.md).  Equal accumulators make equal files.

        Raises:
            OSError: the file cannot be written.
        """
        write_state(path, self._state())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QueryDrift:
        """Returns the drift that `save` wrote, on the CPU.

        Raises:
            OSError: the file cannot be read.
            CheckpointError: the file is truncated, damaged, or something else than a query drift.
        """
        state = read_state(path)
        if (state.get("kind"), state.get("format")) != (_KIND, _FORMAT):
            raise CheckpointError(
                f"{os.fspath(path)} must hold a {_KIND!r} of format {_FORMAT}, it holds {state.get('kind')!r} of "
                f"format {state.get('format')!r}"
            )
        return cls._of(state)

    def _state(self) -> dict[str, Any]:
        return {
            "kind": _KIND,
            "format": _FORMAT,
            "embedding_dim": self.embedding_dim,
            "normalize": self.normalize,
            **{name: getattr(self, name).cpu() for name in _STATISTICS},
        }

    @classmethod
    def _of(cls, state: dict[str, Any]) -> QueryDrift:
        made = cls(state["embedding_dim"], normalize=state["normalize"])
        for name in _STATISTICS:
            setattr(made, name, state[name])
        return made

    def _add(self, version: int, count: int, total: Tensor, square: Tensor) -> None:
        if not count:
            return
        device = self.sums.device
        at = int(torch.searchsorted(self.versions, version))
        if at == len(self.versions) or int(self.versions[at]) != version:
            for name, new in (("versions", version), ("counts", 0), ("sums", 0.0), ("squares", 0.0)):
                own = getattr(self, name)
                setattr(self, name, torch.cat([own[:at], own.new_full((1, *own.shape[1:]), new), own[at:]]))
        self.counts[at] += count
        self.sums[at] += total.to(device)
        self.squares[at] += square.to(device)

    def _place(self, version: int) -> int:
        version = _check_version("version", version, least=1)
        at = (self.versions == version).nonzero()
        if not len(at):
            there = listed(f"version {number}" for number in self.versions.tolist())
            raise ValueError(
                f"no query was added for the step from version {version - 1} to version {version}, so its drift is "
                f"unknown; steps with queries lead to {there}; update(new, old, version={version}) adds queries"
            )
        return int(at[0])

    def _check_width(self, name: str, features: Tensor) -> None:
        check_tensor(name, features)
        if features.ndim != 2 or features.shape[1] != self.embedding_dim:
            raise ValueError(
                f"{name} must have shape [B, {self.embedding_dim}], got {list(features.shape)}; all versions must be "
                "fine-tunes of one encoder: between independent encoders, of other widths or axes, a translation has "
                "no meaning"
            )
        check_features(name, features)

    def _rows(self, name: str, features: Tensor) -> Tensor:
        """Returns the rows in float64, normalised if `normalize` is True."""
        rows = features.double()
        bad = (~rows.isfinite()).any(1).nonzero()
        if len(bad):
            raise ValueError(f"{name} row {int(bad[0])} holds nan or inf")
        return unit_rows(rows) if self.normalize else rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QueryDrift:
        """Moves the module to another device; the statistics stay float64."""
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, own in before.items():
            moved = getattr(self, name)
            if moved.dtype != own.dtype:
                setattr(self, name, own.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Resizes the statistics to the number of steps in the state."""
        for name in _STATISTICS:
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.ndim == own.ndim and given.shape[1:] == own.shape[1:]:
                setattr(self, name, own.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_version(name: str, version: int, *, least: int = 0) -> int:
    version = check_integer(name, version)
    if version < least:
        raise ValueError(f"{name} must be at least {least}: versions count from 0, got {version}")
    return version
