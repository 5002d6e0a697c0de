"""The items that all versions share: classes, ids and groups, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._columns import Ids, Rows, check_unique, code_names, read_column
from ._rows import FeatureRows

if TYPE_CHECKING:
    from ._versions import VersionFeatures

__all__ = ["GalleryClasses", "LabelledItems"]

_WHY_LABELS = "class ids are integers from end to end, for a float32 holds none above 2^24 exactly"
_WHY_IDS = "ids are integers from end to end"


class GalleryClasses(NamedTuple):
    """Attributes: ids: [C] int64, ascending; places: [N] each item's class among them; sizes: [C] items of each."""

    ids: NDArray[np.int64]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def find(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each label's class, -1 where there is none."""
        place = np.searchsorted(self.ids, labels).clip(max=len(self.ids) - 1)
        return np.where(self.ids[place] == labels, place, -1)


class LabelledItems:
    """Queries and gallery items with their classes; features of every version are of these, in this order.

        items = LabelledItems(query_labels, gallery_labels)
        v0 = items.version(query, gallery, name="v0")

    A query that is in the gallery itself is named by ids: the gallery item with the query's id is left out of its
    search, of the mean of its class, and of every count (leave-one-out).

    Args:
        query_labels: [Q] integers, any that int64 holds, or names; Q >= 1.
        gallery_labels: [N] of the same kind: the same integer, or name, is the same class.
        query_ids, gallery_ids: [Q], [N] integers or names, both or neither; each gallery id comes once.
        query_groups: [Q] integers or names: groups that rules of `upgrade_gate` may be made for.
        ignored_labels: gallery items of these classes are removed, as distractors and junk of label -1 are in
            Market-1501; queries of these classes are not counted.

    Attributes:
        query_labels, gallery_labels: [Q], [N] int64, of what is not ignored, as all that follows.
        label_names, id_names: the names that labels, and ids, number; None where they were integers.
        query_ids, gallery_ids: int64, or None.
        query_groups: [Q] integers or strings, or None.
        excluded: [Q] int64, the gallery item that is the query itself; -1 if none is.
        query_rows, gallery_rows: [Q], [N] int64, the rows of these items among those that were given.
        given: how many queries and gallery items were given, the ignored ones among them.
        ignored_labels: as given, in ascending order.

    Raises:
        TypeError: labels, ids or groups of another kind.
        ValueError: lengths that do not match, no query, an id that comes twice, one of the ids without the other, or
            an ignored label that no item has.
    """

    def __init__(
        self,
        query_labels: Ids,
        gallery_labels: Ids,
        *,
        query_ids: Ids | None = None,
        gallery_ids: Ids | None = None,
        query_groups: Ids | None = None,
        ignored_labels: Sequence[int | str] = (),
    ) -> None:
        labels = _pair("labels", query_labels, gallery_labels, _WHY_LABELS)
        self.query_labels, self.gallery_labels, self.label_names = labels
        self.query_ids: NDArray[np.int64] | None = None
        self.gallery_ids: NDArray[np.int64] | None = None
        self.id_names: tuple[str, ...] | None = None
        if (query_ids is None) != (gallery_ids is None):
            given, missing = ("gallery_ids", "query_ids") if query_ids is None else ("query_ids", "gallery_ids")
            raise ValueError(
                f"{given} without {missing}: both say which gallery item is the query itself; pass neither"
            )
        if query_ids is not None:
            self.query_ids, self.gallery_ids, self.id_names = _pair("ids", query_ids, gallery_ids, _WHY_IDS)
            _check_length("query", len(self.query_labels), "query_ids", self.query_ids)
            _check_length("gallery", len(self.gallery_labels), "gallery_ids", self.gallery_ids)
            check_unique("gallery_ids", self.gallery_ids)
        self.query_groups: NDArray[Any] | None = None
        if query_groups is not None:
            self.query_groups = read_column("query_groups", query_groups, "groups are integers or strings").copy()
            _check_length("query", len(self.query_labels), "query_groups", self.query_groups)
        self.given = len(self.query_labels), len(self.gallery_labels)
        self.query_rows, self.gallery_rows = (np.arange(count) for count in self.given)
        self.ignored_labels: tuple[int | str, ...] = ()
        self._keep(None, None)
        if len(ignored_labels):
            self._ignore(ignored_labels)

    def version(
        self, query: Rows, gallery: Rows, *, name: str | None = None, fingerprint: str | None = None
    ) -> VersionFeatures:
        """What one model extracted of these items.

        Args:
            query: [Q, d] floating, finite (in float32, in which all features are compared): a tensor, an array, a
                memory-mapped file, or a column of vectors of pandas, pyarrow or Hugging Face datasets.  Rows of ignored
                items are to be there.
            gallery: [N, d], the same.
            name: of the version, for reports and messages.
            fingerprint: of the model, as `ModelIdentity.fingerprint`: a gate result then says which models it judged.

        Raises:
            TypeError, ValueError: features that are not [rows, d] floating numbers, or not one row an item.
        """
        from ._versions import VersionFeatures

        prefix = "" if name is None else f"{name}."
        parts = []
        for part, rows, labels in (("query", query, "query_labels"), ("gallery", gallery, "gallery_labels")):
            features = FeatureRows(f"{prefix}{part}", rows)
            count, kept = (self.given[0], self.query_rows) if part == "query" else (self.given[1], self.gallery_rows)
            if len(features) != count:
                raise ValueError(f"{features.name} has {len(features)} rows, {labels} has shape [{count}]")
            parts.append(features if len(kept) == count else features.take(kept))
        return VersionFeatures(self, parts[0], parts[1], name, fingerprint=fingerprint)

    def ignoring(self, labels: Sequence[int | str]) -> LabelledItems:
        """These items without those of the given classes.

        Raises:
            ValueError: a label that no item has, or no query is left.
        """
        out = copy(self)
        out._ignore(labels)
        return out

    def take(self, queries: NDArray[np.int64] | None = None, gallery: NDArray[np.int64] | None = None) -> LabelledItems:
        """These queries and these gallery items, by their places here; None: all."""
        out = copy(self)
        out._keep(queries, gallery)
        return out

    def __repr__(self) -> str:
        return f"LabelledItems of {len(self.query_labels)} queries and {len(self.gallery_labels)} gallery items"

    @cached_property
    def gallery_classes(self) -> GalleryClasses:
        """The classes of the gallery."""
        return GalleryClasses(*np.unique(self.gallery_labels, return_inverse=True, return_counts=True))

    @property
    def num_relevant(self) -> NDArray[np.int64]:
        """[Q] gallery items of the query's class, without itself."""
        if not len(self.gallery_labels):
            return np.zeros(len(self.query_labels), dtype=np.int64)
        place = self.gallery_classes.find(self.query_labels)
        found: NDArray[np.int64] = np.where(place >= 0, self.gallery_classes.sizes[place], 0)
        itself = self.excluded >= 0
        found[itself] -= self.gallery_labels[self.excluded[itself]] == self.query_labels[itself]
        return found

    def _number(self, label: int | str) -> int:
        if self.label_names is None:
            try:
                return int(label)
            except ValueError:
                raise ValueError(f"ignored_labels holds {label!r}, and labels are integers") from None
        return self.label_names.index(str(label)) if str(label) in self.label_names else -1

    def _ignore(self, labels: Sequence[int | str]) -> None:
        numbers = [self._number(label) for label in labels]
        for label, number in zip(labels, numbers, strict=True):
            if not (self.query_labels == number).any() and not (self.gallery_labels == number).any():
                raise ValueError(f"ignored_labels holds {label!r}, which is the label of no query and no gallery item")
        kept = [np.flatnonzero(np.isin(of, numbers, invert=True)) for of in (self.query_labels, self.gallery_labels)]
        if not len(kept[0]):
            raise ValueError(f"no query is left without the labels {', '.join(map(str, labels))}")
        self._keep(*kept)
        self.ignored_labels = tuple(sorted({*self.ignored_labels, *labels}, key=str))

    def _keep(self, queries: NDArray[np.int64] | None, gallery: NDArray[np.int64] | None) -> None:
        """Nothing but these; all arrays become read-only."""
        self.__dict__.pop("gallery_classes", None)
        for at, names in (
            (queries, ("query_labels", "query_ids", "query_groups", "query_rows")),
            (gallery, ("gallery_labels", "gallery_ids", "gallery_rows")),
        ):
            for name in names if at is not None else ():
                whole = getattr(self, name)
                setattr(self, name, None if whole is None else whole[at])
        self.excluded = np.full(len(self.query_labels), -1, dtype=np.int64)
        if self.query_ids is not None and self.gallery_ids is not None and len(self.gallery_ids):
            order = np.argsort(self.gallery_ids)
            place = order[np.searchsorted(self.gallery_ids, self.query_ids, sorter=order).clip(max=len(order) - 1)]
            self.excluded = np.where(self.gallery_ids[place] == self.query_ids, place, -1)
        for value in self.__dict__.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False


def _pair(
    kind: str, query: Ids, gallery: Ids, why: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...] | None]:
    names = f"query_{kind}", f"gallery_{kind}"
    columns = [read_column(name, values, why) for name, values in zip(names, (query, gallery), strict=True)]
    if kind == "labels" and not len(columns[0]):
        raise ValueError("query_labels is empty: there must be at least one query")
    first, second, found = code_names(names[0], columns[0], names[1], columns[1])
    return first.copy(), second.copy(), found


def _check_length(rows_name: str, count: int, name: str, values: NDArray[Any]) -> None:
    if len(values) != count:
        raise ValueError(f"{rows_name} has {count} rows, {name} has shape {list(values.shape)}")
