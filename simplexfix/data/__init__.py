"""Data sets and augmentation.  Nothing here downloads anything."""

from .augment import RandomWarp
from .omniglot import Omniglot, load_omniglot

__all__ = ["Omniglot", "RandomWarp", "load_omniglot"]
