"""Exact search: ours against faiss and blocked torch, with the share of queries whose ids agree with float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import simplexfix.functional as SF
from simplexfix import _reference

try:
    import faiss
except ModuleNotFoundError:
    faiss = None


@dataclass
class SearchCase:
    """Gaussian rows; the peers get normalised rows and an index built beforehand, ours the raw gallery."""

    queries: int
    rows: int
    d: int
    k: int = 10
    error_name = "wrong places"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.query = torch.randn(self.queries, self.d, generator=generator)
        self.gallery = torch.randn(self.rows, self.d, generator=generator)

    @property
    def name(self) -> str:
        return f"cosine top-{self.k} Q={self.queries} N={self.rows} d={self.d}"

    def candidates(self, compiled: bool = True) -> dict[str, Callable[[], torch.Tensor]]:
        """Searches that return ids; none of them has a compiled form."""
        q, g = F.normalize(self.query), F.normalize(self.gallery)
        found = {
            "simplexfix": lambda: SF.cosine_topk(self.query, self.gallery, self.k)[1],
            "torch mm + topk": lambda: (q @ g.T).topk(self.k).indices,
        }
        if faiss is not None:
            index = faiss.IndexFlatIP(self.d)
            index.add(g.numpy())
            found["faiss IndexFlatIP"] = lambda: torch.from_numpy(index.search(q.numpy(), self.k)[1])
        return found

    def limits(self) -> dict[str, Callable[[], object]]:
        return {}

    def errors(self) -> dict[str, float]:
        """Share of places in the ranking that differ from the float64 definition."""
        _, truth = _reference.cosine_topk(self.query, self.gallery, self.k)
        return {name: float((search() != truth).double().mean()) for name, search in self.candidates().items()}


CASES = [SearchCase(200, 20_000, 128), SearchCase(200, 20_000, 1023), SearchCase(1, 20_000, 1023)]
