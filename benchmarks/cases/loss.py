"""Cases of loss and gradient of the fixed classifiers: ours against the dense matrix, eager and compiled torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from measure import copy_in_place, gradient_errors, gradient_step
from torch import Tensor

import simplexfix.functional as SF
from simplexfix import _reference
from simplexfix.polytopes import orthoplex_prototypes, simplex_prototypes

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except ImportError:
    LigerFusedLinearCrossEntropyLoss = None
try:
    from cut_cross_entropy import linear_cross_entropy
except ImportError:
    linear_cross_entropy = None

Loss = Callable[[Tensor, Tensor], Tensor]
DENSE_LIMIT = 2**27  # largest number of elements of W in a benchmark


def dense(w: Tensor) -> Loss:
    return lambda z, target: F.cross_entropy(z @ w.T, target)


def fused_dense(w: Tensor) -> dict[str, Loss]:
    """Returns the installed losses that store the vertices W [K, d], but not all logits; they need Triton and a GPU."""
    found: dict[str, Loss] = {}
    if LigerFusedLinearCrossEntropyLoss is not None:
        liger = LigerFusedLinearCrossEntropyLoss()
        found["dense, Liger"] = lambda z, target: liger(w, z, target)
    if linear_cross_entropy is not None and w.dtype in (torch.bfloat16, torch.float16):  # it supports only these dtypes
        found["dense, cut-cross-entropy"] = lambda z, target: linear_cross_entropy(z, w, target)
    return found


@dataclass
class LossCase:
    """B rows and K slots, with random features and targets.

    The cube has K dimensions, a multiple of 64, and 100 of its 2^K vertices have classes.
    """

    rows: int
    num_classes: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    polytope: str = "simplex"
    error_name = "gradient error"

    def __post_init__(self) -> None:
        k = self.num_classes
        d = {"simplex": k - 1, "orthoplex": k // 2, "cube": k}[self.polytope]
        generator = torch.Generator().manual_seed(0)
        self.z = torch.randn(self.rows, d, generator=generator).to(self.device, self.dtype)
        classes = 100 if self.polytope == "cube" else k
        self.target = torch.randint(classes, (self.rows,), generator=generator).to(self.device)
        words = torch.randint(-(2**63), 2**63 - 1, (100, k // 64), generator=generator)
        codes = {"codes": words.to(self.device)} if self.polytope == "cube" else {}
        self.ours: Loss = partial(getattr(SF, f"{self.polytope}_cross_entropy"), **codes)
        self.reference: Loss = partial(getattr(_reference, f"{self.polytope}_cross_entropy"), **codes)

    @property
    def name(self) -> str:
        kind = "" if self.polytope == "simplex" else f"{self.polytope} "
        return f"{kind}loss+gradient B={self.rows} K={self.num_classes} {str(self.dtype).removeprefix('torch.')}"

    def losses(self, compiled: bool = True) -> dict[str, Loss]:
        found = {"simplexfix": self.ours, "closed form, eager": self.reference}
        # code that torch 2.13 compiles for AVX2 reads beyond the end of z, which ends the process at this size
        crashes = self.num_classes == 2**20 and torch.backends.cpu.get_cpu_capability() == "AVX2"
        if compiled and not crashes:
            torch.compiler.reset()
            found["closed form, torch.compile"] = torch.compile(self.reference, fullgraph=True)
        if self.polytope != "cube" and self.num_classes**2 <= DENSE_LIMIT:  # the cube's softmax is over 2^d
            prototypes = simplex_prototypes if self.polytope == "simplex" else orthoplex_prototypes
            w = prototypes(self.num_classes, dtype=self.dtype).to(self.device)
            found["dense matrix"] = dense(w)
            if self.device == "cuda":
                found.update({name: loss for name, loss in fused_dense(w).items() if self._runs(name, loss)})
        return found

    def _runs(self, name: str, loss: Loss) -> bool:
        """Returns whether a peer runs at these sizes, and prints its error if it does not."""
        try:
            self._step(loss)()
        except Exception as error:
            print(f"  {name} left out of {self.name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            return False
        return True

    def candidates(self, compiled: bool = True) -> dict[str, Callable[[], object]]:
        return {name: self._step(loss) for name, loss in self.losses(compiled).items()}

    def _step(self, loss: Loss) -> Callable[[], object]:
        return gradient_step(lambda z: loss(z, self.target), self.z)

    def limits(self) -> dict[str, Callable[[], object]]:
        """Returns a copy with the minimum traffic of loss and gradient: z is read, and as many bytes are written."""
        return {"copy bandwidth": copy_in_place(self.z.numel(), self.dtype, self.device)}

    def errors(self, skipped: Collection[str] = ()) -> dict[str, float]:
        truth = gradient_step(lambda z: self.reference(z, self.target), self.z.double())
        return gradient_errors(self.candidates(compiled=False), truth, skipped)


CASES = [
    LossCase(128, 1024),
    LossCase(512, 1024),
    LossCase(512, 1024, torch.bfloat16),
    LossCase(256, 8192),
    LossCase(256, 8192, torch.bfloat16),
    LossCase(256, 65536),
    LossCase(256, 65536, torch.bfloat16),
    LossCase(16, 2**20),
    LossCase(512, 1024, polytope="orthoplex"),
    LossCase(256, 8192, polytope="orthoplex"),
    LossCase(512, 1024, polytope="cube"),
    LossCase(256, 8192, polytope="cube"),
]
