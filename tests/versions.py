"""Helpers that make `VersionFeatures` from separate arrays."""

from __future__ import annotations

from simplexfix.labelled import LabelledItems, VersionFeatures


def pair(query, query_labels, gallery, gallery_labels, **ids) -> VersionFeatures:
    """Returns a version of queries and gallery."""
    return LabelledItems(query_labels, gallery_labels, **ids).version(query, gallery)


def versions(queries, galleries, query_labels, gallery_labels, **ids) -> list[VersionFeatures]:
    """Returns one version for each pair of queries and gallery."""
    items = LabelledItems(query_labels, gallery_labels, **ids)
    return [items.version(*rows) for rows in zip(queries, galleries, strict=True)]


def upgrade(old_query, new_query, query_labels, gallery, gallery_labels, *, new_gallery=None, **ids):
    """Returns an old and a new version; if `new_gallery` is None, both have the old gallery."""
    items = LabelledItems(query_labels, gallery_labels, **ids)
    old = items.version(old_query, gallery)
    return old, items.version(new_query, gallery if new_gallery is None else new_gallery)
