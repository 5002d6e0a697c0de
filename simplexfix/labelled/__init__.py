"""One door for labelled features: items, what each version extracted of them, and the files these are kept in."""

from ._columns import Ids, Rows, read_column, read_hits, read_ids, read_integers
from ._files import FeatureFileError, find_versions, is_version, load_rows, map_array
from ._items import GalleryClasses, LabelledItems
from ._rows import FeatureRows, row_slices, row_squares, unit_rows
from ._versions import VersionFeatures, check_versions, ignoring

__all__ = [
    "FeatureFileError",
    "FeatureRows",
    "GalleryClasses",
    "Ids",
    "LabelledItems",
    "Rows",
    "VersionFeatures",
    "check_versions",
    "find_versions",
    "ignoring",
    "is_version",
    "load_rows",
    "map_array",
    "read_column",
    "read_hits",
    "read_ids",
    "read_integers",
    "row_slices",
    "row_squares",
    "unit_rows",
]
