"""Versions for tests, of loose arrays."""

from __future__ import annotations

from simplexfix.labelled import LabelledItems, VersionFeatures


def pair(query, query_labels, gallery, gallery_labels, **ids) -> VersionFeatures:
    """Queries and a gallery."""
    return LabelledItems(query_labels, gallery_labels, **ids).version(query, gallery)


def versions(queries, galleries, query_labels, gallery_labels, **ids) -> list[VersionFeatures]:
    """One version for each of the queries and galleries."""
    items = LabelledItems(query_labels, gallery_labels, **ids)
    return [items.version(*rows) for rows in zip(queries, galleries, strict=True)]


def upgrade(old_query, new_query, query_labels, gallery, gallery_labels, *, new_gallery=None, **ids):
    """Old and new version, of which only the old gallery is searched unless a new one is given."""
    items = LabelledItems(query_labels, gallery_labels, **ids)
    old = items.version(old_query, gallery)
    return old, items.version(new_query, gallery if new_gallery is None else new_gallery)
