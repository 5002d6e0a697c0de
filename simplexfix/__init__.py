"""simplexfix: stationary, and therefore compatible, representations.

A new version of an embedding model can search the index that an older version filled.

Public names are imported on first use: `import simplexfix` alone imports neither torch nor the compiled library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import functional, polytopes
    from .functional import cosine_topk
    from .heads import CubeHead, OrthoplexHead, SimplexHead
    from .retrieval import CosineIndex
    from .slots import SlotRegistry

    __version__: str

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

_MODULES = (
    "adapters",
    "compatibility",
    "data",
    "functional",
    "gallery",
    "integrations",
    "labelled",
    "methods",
    "models",
    "neighbours",
    "polytopes",
    "report",
    "retrieval",
    "training",
)
_HOMES = {
    "CosineIndex": "retrieval",
    "CubeHead": "heads",
    "OrthoplexHead": "heads",
    "SimplexHead": "heads",
    "SlotRegistry": "slots",
    "cosine_topk": "functional",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")  # it also sets the attribute
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version(__name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
