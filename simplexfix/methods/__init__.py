"""Ways to train a compatible model, one small file each behind the protocol of `base`."""

from .asnn import ASNN
from .base import Method
from .bct import BCT
from .er import ER
from .fd import FD
from .hoc import HOC
from .simplex import Simplex

__all__ = ["ASNN", "BCT", "ER", "FD", "HOC", "Method", "Simplex"]
