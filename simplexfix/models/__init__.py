"""Small plain networks, and the pair of backbone and head that one version of a model is."""

from .convnet import SmallConvNet
from .embedding import EmbeddingModel
from .mlp import FeatureMLP

__all__ = ["EmbeddingModel", "FeatureMLP", "SmallConvNet"]
