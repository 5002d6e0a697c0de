"""Ways to train a compatible model, one small file each behind the protocol of `base`."""

from .base import Method
from .er import ER
from .hoc import HOC
from .simplex import Simplex

__all__ = ["ER", "HOC", "Method", "Simplex"]
