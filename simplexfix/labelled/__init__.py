"""Labelled features: the items, the features that each model version extracted from them, and their files."""

from ._columns import Ids, Rows, read_column, read_features, read_hits, read_ids, read_integers, read_query_scores
from ._files import FeatureFileError, find_versions, is_version, load_rows, load_vectors, map_array
from ._items import GalleryClasses, LabelledItems
from ._judgements import RelevanceJudgements
from ._rows import FeatureRows, row_slices, row_squares, to_float32, unit_rows
from ._versions import VersionFeatures, check_versions, check_widths, ignoring

__all__ = [
    "FeatureFileError",
    "FeatureRows",
    "GalleryClasses",
    "Ids",
    "LabelledItems",
    "RelevanceJudgements",
    "Rows",
    "VersionFeatures",
    "check_versions",
    "check_widths",
    "find_versions",
    "ignoring",
    "is_version",
    "load_rows",
    "load_vectors",
    "map_array",
    "read_column",
    "read_features",
    "read_hits",
    "read_ids",
    "read_integers",
    "read_query_scores",
    "row_slices",
    "row_squares",
    "to_float32",
    "unit_rows",
]
