"""Data sets, augmentation, and features from files.  Nothing here downloads anything."""

from .augment import RandomWarp
from .features import FeatureFileError, Features, load_features
from .omniglot import Omniglot, load_omniglot

__all__ = ["FeatureFileError", "Features", "Omniglot", "RandomWarp", "load_features", "load_omniglot"]
