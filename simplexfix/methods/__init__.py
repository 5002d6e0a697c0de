"""Training methods for compatible models, one file per method; `base` defines their interface."""

from .asnn import ASNN
from .base import Method, ReadsOldEmbeddings
from .bct import BCT
from .er import ER
from .fd import FD
from .hoc import HOC
from .oca import OCA, oca_loss
from .qdc import QDC, info_nce
from .simplex import Simplex

__all__ = [
    "ASNN",
    "BCT",
    "ER",
    "FD",
    "HOC",
    "OCA",
    "QDC",
    "Method",
    "ReadsOldEmbeddings",
    "Simplex",
    "info_nce",
    "oca_loss",
]
