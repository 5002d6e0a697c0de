"""Maps between frozen encoders, with which new queries search a gallery that an old encoder extracted."""

from .adapted import adapted_version
from .base import Adapter, AdapterMethod
from .chain import Chain, fit_chain
from .gallery_correction import GalleryCorrection
from .hoc_refined import HOCRefined
from .lambda_orthogonal import LambdaOrthogonal
from .local_correction import LocalCorrection
from .low_rank import LowRank
from .mlp import MLP
from .procrustes import Procrustes
from .query_drift import QueryDrift
from .ridge import Ridge
from .select import Judged, Selection, select_adapter, select_chain
from .simplex_junction import SimplexJunction
from .slerp import Slerp
from .whitened_procrustes import WhitenedProcrustes

__all__ = [
    "MLP",
    "Adapter",
    "AdapterMethod",
    "Chain",
    "GalleryCorrection",
    "HOCRefined",
    "Judged",
    "LambdaOrthogonal",
    "LocalCorrection",
    "LowRank",
    "Procrustes",
    "QueryDrift",
    "Ridge",
    "Selection",
    "SimplexJunction",
    "Slerp",
    "WhitenedProcrustes",
    "adapted_version",
    "fit_chain",
    "select_adapter",
    "select_chain",
]
