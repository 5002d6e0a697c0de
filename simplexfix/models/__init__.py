"""Small plain networks, and the pair of backbone and head that one version of a model is."""

from .convnet import SmallConvNet
from .embedding import EmbeddingModel
from .folder import ModelFolderError, read_identity
from .identity import ModelIdentity
from .linear import LinearHead
from .mlp import FeatureMLP

__all__ = [
    "EmbeddingModel",
    "FeatureMLP",
    "LinearHead",
    "ModelFolderError",
    "ModelIdentity",
    "SmallConvNet",
    "read_identity",
]
