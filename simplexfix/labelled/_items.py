"""The items that all versions share: their classes or relevance judgements, ids and groups."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._checks import check_integer
from ._columns import Ids, Rows, check_unique, code_names, read_column
from ._judgements import JudgedPairs, RelevanceJudgements, id_names
from ._rows import FeatureRows

if TYPE_CHECKING:
    from ._versions import VersionFeatures

__all__ = ["GalleryClasses", "LabelledItems"]


class GalleryClasses(NamedTuple):
    """The classes of a gallery.

    Attributes:
        ids: [C] int64 class ids in ascending order.
        places: [N] int64, for each item the index of its class in `ids`.
        sizes: [C] int64, items per class.
    """

    ids: NDArray[np.int64]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def find(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns for each label its index in `ids`, or -1 if the gallery has no such class."""
        place = np.searchsorted(self.ids, labels).clip(max=len(self.ids) - 1)
        return np.where(self.ids[place] == labels, place, -1)


class LabelledItems:
    """Queries and gallery items with their class labels; all model versions are compared on the same items.

    If a query is itself a gallery item, give ids: the gallery item with the query's id is then left out of the query's
    search, of its class mean and of every count (leave-one-out).  `from_judgements` builds items with relevance
    judgements instead of labels, `without_labels` items that have neither.

    Args:
        query_labels: [Q] int64 integers or names; Q >= 1.
        gallery_labels: [N] integers or names, like `query_labels`; equal labels mean the same class.
        query_ids, gallery_ids: [Q] and [N] integers or names, both or neither; gallery ids are unique.
        query_groups: [Q] integers or names; rules of `upgrade_gate` can refer to a group.
        ignored_labels: classes to remove from gallery and queries, such as junk with label -1 in Market-1501.

    Attributes:
        query_labels, gallery_labels: [Q] and [N] int64.  These and all following arrays leave out ignored items.
            Reading them raises ValueError if the items have no labels.
        label_names, id_names: names of the label codes and of the id codes; None if these were integers.
        query_ids, gallery_ids: [Q] and [N] int64, or None.
        query_groups: [Q] integers or strings, or None.
        excluded: [Q] int64, index of the gallery item that is the query itself, or -1.
        query_rows, gallery_rows: [Q] and [N] int64, the row of each item in the arrays that were given.
        given: numbers of queries and gallery items that were given, ignored ones included.
        ignored_labels: as given, in ascending order.
        judgements: the relevance judgements; None if there are none.
        judged: the judgements as pairs of item indices; None if there are none.

    Raises:
        TypeError: labels, ids or groups have a wrong type.
        ValueError: lengths differ, there is no query, a gallery id is a duplicate, only one of the two id arrays is
            given, or no item has an ignored label.

    Example:
        >>> import numpy as np
        >>> from simplexfix.labelled import LabelledItems
        >>> items = LabelledItems(["cat", "dog"], ["dog", "cat", "cat"])
        >>> items.num_relevant
        array([2, 1])
        >>> v0 = items.version(np.eye(2), np.ones((3, 2)), name="v0")      # features by one model
        >>> v0.gallery.width
        2
    """

    query_ids: NDArray[np.int64] | None
    gallery_ids: NDArray[np.int64] | None
    id_names: tuple[str, ...] | None
    query_groups: NDArray[Any] | None
    ignored_labels: tuple[int | str, ...]
    judgements: RelevanceJudgements | None
    judged: JudgedPairs | None
    _query_labels: NDArray[np.int64] | None
    _gallery_labels: NDArray[np.int64] | None

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
        labels = _pair("labels", query_labels, gallery_labels)
        if not len(labels[0]):
            raise ValueError("query_labels is empty: there must be at least one query")
        self._set_rows(len(labels[0]), len(labels[1]))
        self._query_labels, self._gallery_labels, self.label_names = labels
        self._set_ids(query_ids, gallery_ids)
        self._set_groups(query_groups)
        self._keep(None, None)
        if len(ignored_labels):
            self._ignore(ignored_labels)

    @classmethod
    def from_judgements(
        cls, judgements: RelevanceJudgements, query_ids: Ids, gallery_ids: Ids, *, query_groups: Ids | None = None
    ) -> LabelledItems:
        """Returns items with relevance judgements instead of labels.

        Queries without a judgement are left out, as in trec_eval.  The gallery item with the query's id is left out of
        the query's search.

        Args:
            judgements: judgements of these items; each id in them must be one of the ids below.
            query_ids, gallery_ids: [Q] and [N] integers or names, unique.  They are compared as text: 7 equals "7".
            query_groups: [Q] integers or names; rules of `upgrade_gate` can refer to a group.

        Raises:
            TypeError: `judgements` is not a `RelevanceJudgements`, or ids or groups have a wrong type.
            ValueError: lengths differ, there is no query, an id is a duplicate, a judged id has no row, or a query is
                judged with the gallery item of the same id.
        """
        if not isinstance(judgements, RelevanceJudgements):
            raise TypeError(
                f"judgements must be RelevanceJudgements, got {type(judgements).__name__}; RelevanceJudgements.load "
                "reads a file, from_dict takes a mapping"
            )
        items = cls.__new__(cls)
        queries, gallery = (
            id_names(read_column(name, ids)) for name, ids in (("query_ids", query_ids), ("gallery_ids", gallery_ids))
        )
        items._set_rows(len(queries), len(gallery))
        items.query_ids, items.gallery_ids, items.id_names = code_names("query_ids", queries, "gallery_ids", gallery)
        for name, codes in (("query_ids", items.query_ids), ("gallery_ids", items.gallery_ids)):
            check_unique(name, codes, items.id_names)
        items._set_groups(query_groups)
        items.judgements = judgements
        items.judged = JudgedPairs.match(judgements, queries, gallery)
        items._keep(np.unique(items.judged.queries), None)
        itself = items.judged.items == items.excluded[items.judged.queries]
        if itself.any():
            name = queries[items.query_rows[items.judged.queries[itself.argmax()]]]
            raise ValueError(
                f"{judgements.source} judges query {str(name)!r} with the gallery item of the same id, which is the "
                "query itself and is left out; if their ids are unrelated, put a prefix before those of one"
            )
        return items

    @classmethod
    def without_labels(
        cls,
        num_queries: int,
        num_gallery: int,
        *,
        query_ids: Ids | None = None,
        gallery_ids: Ids | None = None,
        query_groups: Ids | None = None,
    ) -> LabelledItems:
        """Returns items without labels or relevance judgements; ids and groups are optional.

        Args:
            num_queries, num_gallery: Q and N, at least 1.
            query_ids, gallery_ids, query_groups: as in `LabelledItems`.

        Raises:
            TypeError, ValueError: as in `LabelledItems`.
            ValueError: a number of items is below 1.
        """
        for name, count in (("num_queries", num_queries), ("num_gallery", num_gallery)):
            if check_integer(name, count) < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        items = cls.__new__(cls)
        items._set_rows(num_queries, num_gallery)
        items._set_ids(query_ids, gallery_ids)
        items._set_groups(query_groups)
        items._keep(None, None)
        return items

    @property
    def has_labels(self) -> bool:
        return self._query_labels is not None

    @property
    def query_labels(self) -> NDArray[np.int64]:
        return self._labels(self._query_labels)

    @property
    def gallery_labels(self) -> NDArray[np.int64]:
        return self._labels(self._gallery_labels)

    def version(
        self,
        query: Rows,
        gallery: Rows,
        *,
        name: str | None = None,
        prefixes: Ids = (),
        fingerprint: str | None = None,
    ) -> VersionFeatures:
        """Returns the features that one model extracted from these items, as a `VersionFeatures`.

        Args:
            query: [Q, d] floating; values must be finite in float32, the dtype of all comparisons.  A tensor, an
                array, a memory-mapped file, or a column of vectors of pandas, pyarrow or Hugging Face datasets.  Rows
                of ignored items are included.
            gallery: [N, d], likewise.
            name: name of the version in reports and messages.
            prefixes: widths of older versions, below d.  The leading dimensions of this version's queries, normalised
                again, can search galleries of these widths (`EmbeddingModel.prefixes`).
            fingerprint: fingerprint of the model (`ModelIdentity.fingerprint`); gate results record it.

        Raises:
            TypeError: features are not floating, or prefixes are not integers.
            ValueError: features are not one row per item, or a prefix is outside [1, d).
        """
        from ._versions import VersionFeatures, read_prefixes

        prefix = "" if name is None else f"{name}."
        parts = []
        column = "labels" if self.has_labels else "ids"
        for part, rows in (("query", query), ("gallery", gallery)):
            features = FeatureRows(f"{prefix}{part}", rows)
            count, kept = (self.given[0], self.query_rows) if part == "query" else (self.given[1], self.gallery_rows)
            if len(features) != count:
                expected = f"{part}_{column} has shape [{count}]"
                if not self.has_labels and self.gallery_ids is None:
                    expected = f"there are {count} such items"
                raise ValueError(f"{features.name} has {len(features)} rows, {expected}")
            parts.append(features if len(kept) == count else features.take(kept))
        widths = read_prefixes(prefixes, parts[0].width)
        return VersionFeatures(self, parts[0], parts[1], name, prefixes=widths, fingerprint=fingerprint)

    def ignoring(self, labels: Sequence[int | str]) -> LabelledItems:
        """Returns a copy of the items without some classes.

        Args:
            labels: labels of the classes to remove.

        Raises:
            ValueError: no item has one of the labels, or no query would be left.
        """
        out = copy(self)
        out._ignore(labels)
        return out

    def take(self, queries: NDArray[np.int64] | None = None, gallery: NDArray[np.int64] | None = None) -> LabelledItems:
        """Returns the items at these indices; None for all of them."""
        out = copy(self)
        out._keep(queries, gallery)
        return out

    def __repr__(self) -> str:
        return f"LabelledItems of {len(self.query_rows)} queries and {len(self.gallery_rows)} gallery items"

    @cached_property
    def gallery_classes(self) -> GalleryClasses:
        """Classes of the gallery: ids, the class of each item, and sizes."""
        return GalleryClasses(*np.unique(self.gallery_labels, return_inverse=True, return_counts=True))

    @property
    def num_relevant(self) -> NDArray[np.int64]:
        """Number of relevant gallery items of each query, [Q] int64; the query itself does not count."""
        if self.judged is not None:
            return self.judged.num_relevant
        if not len(self.gallery_labels):
            return np.zeros(len(self.query_labels), dtype=np.int64)
        place = self.gallery_classes.find(self.query_labels)
        found: NDArray[np.int64] = np.where(place >= 0, self.gallery_classes.sizes[place], 0)
        itself = self.excluded >= 0
        found[itself] -= self.gallery_labels[self.excluded[itself]] == self.query_labels[itself]
        return found

    @property
    def num_unjudged(self) -> int | None:
        """Number of queries that were left out because they have no judgement; None if the items have no judgements."""
        if self.judgements is None:
            return None
        return self.given[0] - len(np.unique(self.judgements.query_ids))

    def grades(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the relevance grades of ranked gallery items.

        Args:
            places: [Q, k] int64 indices of gallery items, -1 for no item.

        Returns:
            [Q, k] int64: the judged grade; with labels 1 for the query's class and 0 for others.
        """
        if self.judged is None:
            alike = (self.gallery_labels[places] == self.query_labels[:, None]) & (places >= 0)
            return np.asarray(alike, dtype=np.int64)
        return self.judged.find(places)

    def _labels(self, labels: NDArray[np.int64] | None) -> NDArray[np.int64]:
        if labels is None and self.judgements is None:
            raise ValueError(
                "these items have no labels: pass labels, or use protocol 'agreement@10', which needs none"
            )
        if labels is None:
            raise ValueError(
                "labels are required, but these items have relevance judgements instead; a ranking metric as protocol, "
                "such as 'ndcg@10', needs no labels"
            )
        return labels

    def _set_rows(self, queries: int, gallery: int) -> None:
        """Initializes the rows of all given items; labels, ids, groups and judgements are unset."""
        self._query_labels = self._gallery_labels = self.label_names = None
        self.query_ids = self.gallery_ids = self.id_names = None
        self.judgements = self.judged = None
        self.ignored_labels = ()
        self.given = queries, gallery
        self.query_rows, self.gallery_rows = (np.arange(count) for count in self.given)

    def _set_ids(self, query_ids: Ids | None, gallery_ids: Ids | None) -> None:
        if (query_ids is None) != (gallery_ids is None):
            given, missing = ("gallery_ids", "query_ids") if query_ids is None else ("query_ids", "gallery_ids")
            raise ValueError(
                f"{given} without {missing}: both say which gallery item is the query itself; pass neither"
            )
        if query_ids is not None and gallery_ids is not None:
            self.query_ids, self.gallery_ids, self.id_names = _pair("ids", query_ids, gallery_ids)
            _check_length("query", self.given[0], "query_ids", self.query_ids)
            _check_length("gallery", self.given[1], "gallery_ids", self.gallery_ids)
            check_unique("gallery_ids", self.gallery_ids)

    def _set_groups(self, query_groups: Ids | None) -> None:
        self.query_groups = None
        if query_groups is not None:
            self.query_groups = read_column("query_groups", query_groups).copy()
            _check_length("query", self.given[0], "query_groups", self.query_groups)

    def _number(self, label: int | str) -> int:
        if self.label_names is None:
            try:
                return int(label)
            except ValueError:
                raise ValueError(f"ignored_labels holds {label!r}, and labels are integers") from None
        return self.label_names.index(str(label)) if str(label) in self.label_names else -1

    def _ignore(self, labels: Sequence[int | str]) -> None:
        if self.judgements is not None:
            raise ValueError("ignored_labels needs labels, and these items have relevance judgements in their place")
        if not self.has_labels:
            raise ValueError("ignored_labels needs labels, and these items have none")
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
        """Restricts the items to these indices and makes all arrays read-only."""
        self.__dict__.pop("gallery_classes", None)
        if self.judged is not None:
            self.judged = self.judged.take(queries, gallery)
        for at, names in (
            (queries, ("_query_labels", "query_ids", "query_groups", "query_rows")),
            (gallery, ("_gallery_labels", "gallery_ids", "gallery_rows")),
        ):
            for name in names if at is not None else ():
                whole = getattr(self, name)
                setattr(self, name, None if whole is None else whole[at])
        self.excluded = np.full(len(self.query_rows), -1, dtype=np.int64)
        if self.query_ids is not None and self.gallery_ids is not None and len(self.gallery_ids):
            order = np.argsort(self.gallery_ids)
            place = order[np.searchsorted(self.gallery_ids, self.query_ids, sorter=order).clip(max=len(order) - 1)]
            self.excluded = np.where(self.gallery_ids[place] == self.query_ids, place, -1)
        for value in self.__dict__.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False


def _pair(kind: str, query: Ids, gallery: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...] | None]:
    names = f"query_{kind}", f"gallery_{kind}"
    columns = [read_column(name, values) for name, values in zip(names, (query, gallery), strict=True)]
    first, second, found = code_names(names[0], columns[0], names[1], columns[1])
    return first.copy(), second.copy(), found


def _check_length(rows_name: str, count: int, name: str, values: NDArray[Any]) -> None:
    if len(values) != count:
        raise ValueError(f"{rows_name} has {count} rows, {name} has shape {list(values.shape)}")
