"""Embedding models: backbones, heads, and model versions that are saved to folders with an identity."""

from .convnet import SmallConvNet
from .embedding import EmbeddingModel
from .external import external_backbone
from .feature_head import FeatureHead
from .folder import ModelFolderError, read_identity
from .identity import ModelIdentity
from .linear import LinearHead
from .mlp import FeatureLinear, FeatureMLP
from .neighbour import NeighbourHead
from .oca import OCAHead
from .resnet import ResNet18
from .text import TextEncoder, token_ids

__all__ = [
    "EmbeddingModel",
    "FeatureHead",
    "FeatureLinear",
    "FeatureMLP",
    "LinearHead",
    "ModelFolderError",
    "ModelIdentity",
    "NeighbourHead",
    "OCAHead",
    "ResNet18",
    "SmallConvNet",
    "TextEncoder",
    "external_backbone",
    "read_identity",
    "token_ids",
]
