"""Ways to train a compatible model, one small file each behind the protocol of `base`."""

from .base import Method
from .bct import BCT
from .er import ER
from .fd import FD
from .hoc import HOC
from .qdc import QDC, info_nce
from .simplex import Simplex

__all__ = ["BCT", "ER", "FD", "HOC", "QDC", "Method", "Simplex", "info_nce"]
