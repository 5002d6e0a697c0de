"""Features of labelled items by one model version, and checks that several versions share their items."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_name
from ._columns import Ids, read_integers
from ._files import FEATURES, JUDGED, VERSION, FeatureFileError, read_arrays
from ._items import LabelledItems
from ._judgements import RelevanceJudgements
from ._rows import FeatureRows

__all__ = ["VersionFeatures", "check_versions", "check_widths", "ignoring", "read_prefixes"]


@dataclass(frozen=True, eq=False)
class VersionFeatures:
    """Features of labelled items by one model version.

    Make one with `LabelledItems.version` (arrays) or `VersionFeatures.load` (files).

    Attributes:
        items: the queries and gallery items.
        query: [Q, d] features of the queries.
        gallery: [N, d] features of the gallery items; N may be 0 in one process's shard.
        name: name of the version, or None.
        path: file that the features were read from, or None.
        prefixes: widths of older galleries that the leading dimensions of the queries can search, ascending.
        fingerprint: fingerprint of the model, or None if unknown.

    Example:
        >>> import numpy as np
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems([0, 1], [1, 0, 0])
        >>> rng = np.random.default_rng(0)
        >>> v0 = items.version(rng.normal(size=(2, 8)), rng.normal(size=(3, 8)), name="v0")
        >>> v1 = items.version(rng.normal(size=(2, 8)), rng.normal(size=(3, 8)), name="v1")
        >>> pair = v0.searched_by(v1)                       # queries of v1, gallery of v0
        >>> pair.query.width, len(pair.gallery)
        (8, 3)
    """

    items: LabelledItems
    query: FeatureRows
    gallery: FeatureRows
    name: str | None = None
    path: Path | None = None
    prefixes: tuple[int, ...] = ()
    fingerprint: str | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        ignored_labels: Sequence[int | str] = (),
        judgements: RelevanceJudgements | None = None,
        needs_labels: bool = True,
    ) -> VersionFeatures:
        """Reads and checks features, labels, ids and groups of one version (formats: docs/reference/formats.md).

        `.npy` and `.safetensors` files are memory-mapped; `.npz` and `.parquet` files are read into memory.

        Args:
            path: an `.npz` file, a folder of `.npy` files, a `.safetensors` file, a `.parquet` file, or a folder with
                `query.parquet` and `gallery.parquet`.
            name: name of the version; None for the file name without its suffix.
            ignored_labels: classes to remove, as in `LabelledItems`.
            judgements: relevance judgements to use instead of labels.  Labels in the file are not read then, and the
                file must hold ids of queries and gallery items.
            needs_labels: False to read a file without labels too, for `upgrade_gate` by agreement.

        Raises:
            FileNotFoundError, OSError: the file cannot be opened.
            FeatureFileError: the file is damaged, an array is missing or invalid, or a row holds nan, inf or numbers
                outside float32's range; the message names file, array and row.
            ModuleNotFoundError: safetensors (for `.safetensors`) or pyarrow (for `.parquet`) is not installed.
        """
        path = Path(path)
        form = JUDGED if judgements is not None else VERSION if needs_labels else FEATURES
        arrays = read_arrays(path, form)
        try:
            items = _items_of(arrays, judgements)
            items = items.ignoring(ignored_labels) if len(ignored_labels) else items
            version = items.version(arrays["query"], arrays["gallery"], prefixes=arrays.get("prefixes", ()))
            for part in (version.query, version.gallery):
                if not len(part.rows):
                    raise ValueError(f"{part.name} has no rows")
                part.hashes()
            if version.query.dtype != version.gallery.dtype:
                raise ValueError(
                    f"query is {version.query.dtype} and gallery is {version.gallery.dtype}: save both alike"
                )
            if version.query.width != version.gallery.width:
                raise ValueError(
                    f"query has {version.query.width} columns, gallery has {version.gallery.width}: "
                    "both must be by one model"
                )
        except (TypeError, ValueError) as error:
            raise FeatureFileError(f"{path}: {error}") from None
        return replace(
            version,
            query=version.query.renamed(f"{path}: query"),
            gallery=version.gallery.renamed(f"{path}: gallery"),
            name=name or (path.name if path.is_dir() else path.stem),
            path=path,
        )

    @property
    def label(self) -> str:
        """Path of the version, or its name, for error messages."""
        return str(self.path or self.name)

    @property
    def zero_rows(self) -> tuple[int, int]:
        """Numbers of all-zero rows in query and gallery; such a row has cosine 0 to every vector."""
        return self.query.zero_rows, self.gallery.zero_rows

    @cached_property
    def bit_equal(self) -> int:
        """Number of queries with a bitwise equal gallery row that is not excluded by its id.

        Such a query is most likely a gallery item itself: it then finds itself at rank 1 with any model.
        """
        asked = self.query.hashes()
        unknown = (self.items.excluded < 0) & (asked != 0)
        return int(np.isin(asked[unknown], self.gallery.hashes()).sum())

    def searched_by(self, new: VersionFeatures, *, widths: str = "equal") -> VersionFeatures:
        """Returns the queries of another version with the gallery of this one.

        Args:
            new: another version of the same items.
            widths: "equal" raises if the widths differ, unless this gallery's width is one of `new.prefixes`; then the
                leading dimensions of the queries are used.  "leading" always compares the leading dimensions that both
                versions have.

        Returns:
            A `VersionFeatures` with `new.query` and `self.gallery`, cut to a common width.

        Raises:
            ValueError: the versions have different items, or different widths with `widths="equal"`.
        """
        old, new = check_versions((self, new), ("old", "new"))
        return old.pair(new, widths)

    def pair(self, new: VersionFeatures, widths: str) -> VersionFeatures:
        """Does `searched_by` without the check that both versions have the same items."""
        check_name("widths", widths, ("equal", "leading"))
        asked, held = new.query.width, self.gallery.width
        if widths == "equal" and not self.fits(new):
            narrower = held < asked and new is not self
            remedy = f"; give {new.label} prefixes=[{held}] if it was trained so" if narrower else ""
            raise ValueError(
                f"{new.query.name} has {asked} columns, {self.gallery.name} has {held}: features of different width "
                f'cannot be compared{remedy}; widths="leading" compares the leading dimensions that both have'
            )
        width = min(asked, held)
        return VersionFeatures(self.items, new.query.columns(width), self.gallery.columns(width), name=self.name)

    def fits(self, new: VersionFeatures) -> bool:
        """Returns whether the queries of `new`, or one of their prefixes, have the width of this gallery."""
        return self.gallery.width in (new.query.width, *new.prefixes)

    def take(
        self, queries: NDArray[np.int64] | None = None, gallery: NDArray[np.int64] | None = None
    ) -> VersionFeatures:
        """Returns the version for the queries and gallery items at these indices (None: all); rows are read lazily."""
        return self._of(self.items.take(queries, gallery), queries, gallery)

    def _of(
        self, items: LabelledItems, queries: NDArray[np.int64] | None, gallery: NDArray[np.int64] | None
    ) -> VersionFeatures:
        return replace(
            self,
            items=items,
            query=self.query if queries is None else self.query.take(queries),
            gallery=self.gallery if gallery is None else self.gallery.take(gallery),
        )

    def _called(self, role: str) -> VersionFeatures:
        """Returns the version, with `role` as its name if it has none and `role` is not empty."""
        if self.name is not None or not role:
            return self
        query, gallery = self.query.renamed(f"{role}.query"), self.gallery.renamed(f"{role}.gallery")
        return replace(self, query=query, gallery=gallery, name=role)


def _items_of(arrays: Mapping[str, Any], judgements: RelevanceJudgements | None) -> LabelledItems:
    """Builds the items from a version's arrays."""
    if judgements is not None:
        return LabelledItems.from_judgements(
            judgements, arrays["query_ids"], arrays["gallery_ids"], query_groups=arrays.get("query_groups")
        )
    optional: dict[str, Any] = {name: arrays.get(name) for name in ("query_ids", "gallery_ids", "query_groups")}
    labels = [arrays[name] for name in ("query_labels", "gallery_labels") if name in arrays]
    if len(labels) == 2:
        return LabelledItems(*labels, **optional)
    if labels:
        raise ValueError("query_labels and gallery_labels must both be there, or neither")
    queries, gallery = (len(FeatureRows(part, arrays[part])) for part in ("query", "gallery"))
    return LabelledItems.without_labels(queries, gallery, **optional)


def ignoring(versions: Sequence[VersionFeatures], labels: Sequence[int | str]) -> list[VersionFeatures]:
    """Returns versions of the same items without the items of some classes."""
    old = versions[0].items
    items = old.ignoring(labels)
    kept = [
        np.flatnonzero(np.isin(before, after))
        for before, after in ((old.query_rows, items.query_rows), (old.gallery_rows, items.gallery_rows))
    ]
    return [version._of(items, *kept) for version in versions]


def check_versions(
    versions: Sequence[VersionFeatures], roles: Sequence[str] | None = None, *, shards: bool = False
) -> list[VersionFeatures]:
    """Checks that versions have the same items, and returns them with one shared `items` object and a name each.

    Two versions have the same items if their labels are equal, and also their ids and groups where both have these.
    Ids or groups that only some versions have are used for all.

    Args:
        versions: at least one version.
        roles: names for versions without a name, "" for none; None for v0, v1, ...
        shards: whether galleries may be empty, as in one process's shard.

    Raises:
        TypeError: an entry is not a `VersionFeatures`.
        ValueError: there is no version, a gallery is empty, or items differ; the message names both versions, the
            array and the first differing row.
    """
    if not len(versions):
        raise ValueError("versions must hold at least one version")
    roles = roles or [f"v{i}" for i in range(len(versions))]
    for role, version in zip(roles, versions, strict=True):
        if not isinstance(version, VersionFeatures):
            raise TypeError(
                f"{role or 'version'} must be a VersionFeatures, got {type(version).__name__}; "
                "LabelledItems(query_labels, gallery_labels).version(query, gallery) makes one"
            )
    named = [version._called(role) for role, version in zip(roles, versions, strict=True)]
    first = named[0]
    items = first.items
    for other in named[1:]:
        if other.items is not items:
            _check_same_items(first, other)
            if items.query_ids is None and other.items.query_ids is not None:
                items = other.items if items.query_groups is None else _joined(other.items, items)
            elif items.query_groups is None and other.items.query_groups is not None:
                items = _joined(items, other.items)
    if not shards and not len(items.gallery_rows):
        raise ValueError(f"{first.gallery.name} has no rows")
    return [version if version.items is items else replace(version, items=items) for version in named]


def _joined(items: LabelledItems, grouped: LabelledItems) -> LabelledItems:
    """Returns `items` with the groups of `grouped`, which describes the same items."""
    out = items.take()
    out.query_groups = grouped.query_groups
    return out


def _check_same_items(first: VersionFeatures, other: VersionFeatures) -> None:
    a, b = first.items, other.items
    both = f"{first.label} and {other.label}"
    if a.judgements != b.judgements:
        kinds = ["labels" if items.judgements is None else items.judgements.source for items in (a, b)]
        raise ValueError(f"{both} must have the same labels or relevance judgements, got {kinds[0]} and {kinds[1]}")
    for part, counts in zip(("queries", "gallery items"), zip(a.given, b.given, strict=True), strict=True):
        if counts[0] != counts[1] and not (a.has_labels and b.has_labels):
            raise ValueError(f"{both} must be of the same items, got {counts[0]} and {counts[1]} {part}")
    for kind in ("label", "id") if a.judgements is None else ("id",):
        for name in (f"query_{kind}s", f"gallery_{kind}s"):
            x, y = (getattr(items, f"_{name}" if kind == "label" else name) for items in (a, b))
            if x is None or y is None:
                continue
            if x.shape != y.shape:
                raise ValueError(f"{both} must be of the same items: {name} has {len(x)} and {len(y)} entries")
            names = getattr(a, f"{kind}_names"), getattr(b, f"{kind}_names")
            if names[0] != names[1]:
                x, y = (c if n is None else np.array(n)[c] for c, n in zip((x, y), names, strict=True))
                if (names[0] is None) != (names[1] is None):
                    raise ValueError(
                        f"{both} must be of the same items: {name} are {x[0]}, ... and {y[0]}, ..., "
                        "integers in one and names in the other"
                    )
            unlike = x != y
            if unlike.any():
                row = int(unlike.argmax())
                shown = x[row], y[row]
                if names[0] is not None and names[0] == names[1]:
                    shown = names[0][x[row]], names[0][y[row]]
                raise ValueError(
                    f"{both} must be of the same items in the same order: {name} at {row} is {shown[0]} and {shown[1]}"
                )
    for name in ("query_rows", "gallery_rows"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            raise ValueError(f"{both} must ignore the same labels, got {a.ignored_labels} and {b.ignored_labels}")
    groups = [items.query_groups.astype(str) for items in (a, b) if items.query_groups is not None]
    if len(groups) == 2 and (groups[0] != groups[1]).any():
        raise ValueError(f"{both} differ in query_groups")


def check_widths(versions: Sequence[VersionFeatures], widths: str) -> None:
    """Raises ValueError if a version's width does not allow it to search its own gallery or an older one."""
    for i, new in enumerate(versions):
        for old in versions[: i + 1]:
            old.pair(new, widths)


def read_prefixes(prefixes: Ids, width: int) -> tuple[int, ...]:
    """Returns the prefix widths of queries of that width, unique and ascending.

    Raises:
        TypeError: a prefix is not an integer.
        ValueError: a prefix is outside [1, width).
    """
    if not len(prefixes):
        return ()
    found = read_integers("prefixes", prefixes)
    outside = found[(found < 1) | (found >= width)]
    if len(outside):
        raise ValueError(
            f"prefixes must lie in [1, {width}): they are widths of older versions, and below the {width} of this one, "
            f"got {outside[0]}"
        )
    return tuple(sorted(set(found.tolist())))
