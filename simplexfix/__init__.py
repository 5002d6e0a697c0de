"""simplexfix: stationary, and therefore compatible, representations.

Swap the embedding model, keep the index.
"""

from importlib.metadata import version

from . import functional, polytopes
from .functional import cosine_topk
from .heads import CubeHead, OrthoplexHead, SimplexHead
from .retrieval import CosineIndex
from .slots import SlotRegistry

__version__ = version("simplexfix")
__all__ = [
    "CosineIndex",
    "CubeHead",
    "OrthoplexHead",
    "SimplexHead",
    "SlotRegistry",
    "__version__",
    "cosine_topk",
    "functional",
    "polytopes",
]
