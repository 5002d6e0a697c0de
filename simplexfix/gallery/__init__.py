"""A gallery that is upgraded while it serves: admit, search, backfill, roll back, retire."""

from ._state import AdmissionError, StrangerError
from .gallery import Gallery, Hits
from .stores import StoredRows, StoreError

__all__ = ["AdmissionError", "Gallery", "Hits", "StoreError", "StoredRows", "StrangerError"]
