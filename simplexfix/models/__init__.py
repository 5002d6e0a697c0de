"""Small plain networks, those of other libraries, and the pair of backbone and head that is a version of a model."""

from .convnet import SmallConvNet
from .embedding import EmbeddingModel
from .external import external_backbone
from .folder import ModelFolderError, read_identity
from .identity import ModelIdentity
from .linear import LinearHead
from .mlp import FeatureMLP
from .neighbour import NeighbourHead
from .oca import OCAHead
from .resnet import ResNet18

__all__ = [
    "EmbeddingModel",
    "FeatureMLP",
    "LinearHead",
    "ModelFolderError",
    "ModelIdentity",
    "NeighbourHead",
    "OCAHead",
    "ResNet18",
    "SmallConvNet",
    "external_backbone",
    "read_identity",
]
