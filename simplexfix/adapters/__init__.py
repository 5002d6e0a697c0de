"""Maps between encoders that nobody trains: new queries search a gallery that an old encoder extracted."""

from .base import Adapter, AdapterMethod
from .hoc_refined import HOCRefined
from .lambda_orthogonal import LambdaOrthogonal
from .low_rank import LowRank
from .mlp import MLP
from .procrustes import Procrustes
from .ridge import Ridge
from .simplex_junction import SimplexJunction
from .slerp import Slerp
from .whitened_procrustes import WhitenedProcrustes

__all__ = [
    "MLP",
    "Adapter",
    "AdapterMethod",
    "HOCRefined",
    "LambdaOrthogonal",
    "LowRank",
    "Procrustes",
    "Ridge",
    "SimplexJunction",
    "Slerp",
    "WhitenedProcrustes",
]
