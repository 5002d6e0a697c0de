"""Cases of exact search: simplexfix against faiss, cuVS, usearch and torch.

The error of a candidate is the fraction of ranks that differ from the float64 definition.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from measure import copy_in_place

import simplexfix.functional as SF
from simplexfix import CosineIndex, _reference

try:
    import faiss
except ModuleNotFoundError:
    faiss = None
try:
    from cuvs.neighbors import brute_force
except ImportError:
    brute_force = None
try:
    import usearch.index as usearch
except ModuleNotFoundError:
    usearch = None


def gpu_peers(q: torch.Tensor, g: torch.Tensor, k: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Returns the installed peers; both use torch's tensors in place."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    if hasattr(faiss, "GpuIndexFlatIP"):
        importlib.import_module("faiss.contrib.torch_utils")  # makes faiss accept tensors, and use torch's stream
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), q.shape[1])
        index.add(g)
        found["faiss GpuIndexFlatIP"] = lambda: index.search(q, k)[1]
    if brute_force is not None:
        torch.cuda.synchronize()  # cuVS has its own stream; its calls return when they have finished
        rows = brute_force.build(g, metric="inner_product")
        found["cuVS brute_force"] = lambda: torch.as_tensor(brute_force.search(rows, q, k)[1], device=q.device)
    return found


@dataclass
class SearchCase:
    """Gaussian rows.  Peers get normalised rows and an index that is built in advance, simplexfix the raw gallery."""

    queries: int
    rows: int
    d: int
    k: int = 10
    device: str = "cpu"
    error_name = "wrong places"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.query = torch.randn(self.queries, self.d, generator=generator).to(self.device)
        self.gallery = torch.randn(self.rows, self.d, generator=generator).to(self.device)

    @property
    def name(self) -> str:
        return f"cosine top-{self.k} Q={self.queries} N={self.rows} d={self.d}"

    def candidates(self, compiled: bool = True) -> dict[str, Callable[[], torch.Tensor]]:
        """Returns searches that return ids; none of them has a compiled form."""
        q, g = F.normalize(self.query), F.normalize(self.gallery)
        found = {
            "simplexfix": lambda: SF.cosine_topk(self.query, self.gallery, self.k)[1],
            "torch mm + topk": lambda: (q @ g.T).topk(self.k).indices,
        }
        if self.device == "cuda":
            found.update(gpu_peers(q, g, self.k))
        elif faiss is not None:
            index = faiss.IndexFlatIP(self.d)
            index.add(g.numpy())
            found["faiss IndexFlatIP"] = lambda: torch.from_numpy(index.search(q.numpy(), self.k)[1])
        return found

    def limits(self) -> dict[str, Callable[[], object]]:
        """Returns a lower bound of the first pass on a GPU: one bfloat16 product; the pass computes two."""
        if self.device == "cpu":
            return {}
        q, g = self.query.bfloat16(), self.gallery.bfloat16()
        return {"bfloat16 matrix product": lambda: q @ g.T}

    def errors(self, skipped: Collection[str] = ()) -> dict[str, float]:
        """Returns the fraction of ranks that differ from the float64 definition."""
        _, truth = _reference.cosine_topk(self.query, self.gallery, self.k)
        return {
            name: float((search() != truth).double().mean())
            for name, search in self.candidates().items()
            if name not in skipped
        }


CASES = [SearchCase(200, 20_000, 128), SearchCase(200, 20_000, 1023), SearchCase(1, 20_000, 1023)]


@lru_cache(maxsize=1)
def unit_rows(kind: str, rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns normalised queries [1000, d] and gallery [rows, d]: Gaussian, or 100 clusters of a width of 1e-3."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        x = rng.standard_normal((n, d), dtype=np.float32)
        if kind == "clusters":
            x = centers[rng.integers(0, 100, n)] + np.float32(1e-3) * x
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    centers = rng.standard_normal((100, d), dtype=np.float32)
    gallery = draw(rows)
    return draw(1000), gallery


@lru_cache(maxsize=1)
def indexes(kind: str, rows: int, d: int) -> dict[str, object]:
    """Returns the indexes of these rows; all cases share them."""
    _, gallery = unit_rows(kind, rows, d)
    found: dict[str, object] = {}
    for name, dtype in (("simplexfix", "float32"), ("simplexfix bfloat16", "bfloat16")):
        found[name] = CosineIndex(d, dtype=dtype)
        found[name].add(gallery)
    if faiss is not None:
        found["faiss IndexFlatIP"] = faiss.IndexFlatIP(d)
        found["faiss IndexFlatIP"].add(gallery)
    return found


@dataclass
class IndexCase:
    """CosineIndex against other indexes, all built in advance from normalised rows."""

    kind: str  # "Gaussian" or "clusters"
    queries: int
    d: int
    k: int = 10
    rows: int = 100_000
    error_name = "wrong places"
    device = "cpu"

    @property
    def name(self) -> str:
        return f"index {self.kind} top-{self.k} Q={self.queries} N={self.rows} d={self.d}"

    def query(self) -> np.ndarray:
        return unit_rows(self.kind, self.rows, self.d)[0][: self.queries]

    def candidates(self, compiled: bool = True) -> dict[str, Callable[[], torch.Tensor]]:
        """Returns searches that return ids; none of them has a compiled form."""
        return self._searches(self.query())

    def _searches(self, q: np.ndarray) -> dict[str, Callable[[], torch.Tensor]]:
        k, found = self.k, {}
        for name, index in indexes(self.kind, self.rows, self.d).items():
            found[name] = lambda index=index: torch.from_numpy(index.search(q, k)[1])
        if usearch is not None and self.queries == 1:  # takes seconds for 1,000 queries
            g = unit_rows(self.kind, self.rows, self.d)[1]
            options = {"metric": usearch.MetricKind.IP, "exact": True, "threads": torch.get_num_threads()}
            found["usearch exact"] = lambda: torch.from_numpy(
                usearch.search(g, q, k, **options).keys.astype(np.int64).reshape(len(q), k)
            )
        return found

    def limits(self) -> dict[str, Callable[[], object]]:
        """Returns a lower bound of the first pass: torch's int8 product, or for one query the reading of the codes."""
        if self.queries == 1:
            return {"copy bandwidth": copy_in_place(self.rows * self.d // 2, torch.int8)}
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            return {}  # without AVX-512 torch multiplies int8 numbers one by one, 50 times slower than our kernel
        q, g = (torch.ones(n, self.d, dtype=torch.int8) for n in (self.queries, self.rows))
        return {"int8 matrix product": lambda: torch._int_mm(q, g.T)}

    def memory(self) -> dict[str, float]:
        """Returns the memory of the index as a multiple of its vectors in float32."""
        plain = 4 * self.rows * self.d
        ours = indexes(self.kind, self.rows, self.d)
        return {name: index.nbytes / plain for name, index in ours.items() if isinstance(index, CosineIndex)}

    def errors(self, skipped: Collection[str] = ()) -> dict[str, float]:
        """Returns the fraction of ranks of the first 50 queries that differ from the float64 definition."""
        q, g = self.query()[:50], unit_rows(self.kind, self.rows, self.d)[1]
        _, truth = _reference.cosine_topk(torch.from_numpy(q), torch.from_numpy(g), self.k)
        return {
            name: float((search() != truth).double().mean())
            for name, search in self._searches(q).items()
            if name not in skipped
        }


INDEX_CASES = [
    IndexCase(kind, queries, d, k)
    for d in (128, 512, 1023)
    for kind in ("Gaussian", "clusters")
    for queries, k in ((1000, 10), (1000, 100), (1000, 1000), (1, 10))
]
