"""Loss and gradient of the fixed simplex classifier: ours against the dense matrix, eager and compiled torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import copy_in_place
from torch import Tensor

import simplexfix.functional as SF
from simplexfix import _reference
from simplexfix.polytopes import simplex_prototypes

DENSE_LIMIT = 2**27  # elements of W that still fit a benchmark


def dense(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, target: F.cross_entropy(z @ w.T, target)


@dataclass
class LossCase:
    """B rows, K slots; random features and targets of one seed."""

    rows: int
    num_classes: int
    dtype: torch.dtype = torch.float32
    error_name = "gradient error"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        leaf = torch.randn(self.rows, self.num_classes - 1, generator=generator).to(self.dtype).requires_grad_()
        self.z = leaf * 1  # as a junction leaves it: no leaf
        self.target = torch.randint(self.num_classes, (self.rows,), generator=generator)

    @property
    def name(self) -> str:
        return f"loss+gradient B={self.rows} K={self.num_classes} {str(self.dtype).removeprefix('torch.')}"

    def losses(self, compiled: bool = True) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        found = {"simplexfix": SF.simplex_cross_entropy, "closed form, eager": _reference.simplex_cross_entropy}
        if compiled:
            torch.compiler.reset()
            found["closed form, torch.compile"] = torch.compile(_reference.simplex_cross_entropy, fullgraph=True)
        if self.num_classes**2 <= DENSE_LIMIT:
            found["dense matrix"] = dense(simplex_prototypes(self.num_classes, dtype=self.dtype))
        return found  # type: ignore[return-value]

    def candidates(self, compiled: bool = True) -> dict[str, Callable[[], object]]:
        return {name: self._step(loss) for name, loss in self.losses(compiled).items()}

    def _step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(self.z, self.target), self.z)

    def limits(self) -> dict[str, Callable[[], object]]:
        """z read, as much written: the least that loss and gradient can move."""
        return {"copy bandwidth": copy_in_place(self.z.numel(), self.dtype)}

    def errors(self) -> dict[str, float]:
        """Largest error of the gradient against float64, relative to its largest entry."""
        z = self.z.detach().double().requires_grad_()
        (truth,) = torch.autograd.grad(_reference.simplex_cross_entropy(z, self.target), z)
        errors = {}
        for name, loss in self.losses(compiled=False).items():
            (gradient,) = torch.autograd.grad(loss(self.z, self.target), self.z, retain_graph=True)
            errors[name] = float((gradient.double() - truth).abs().max() / truth.abs().max())
        return errors


CASES = [
    LossCase(128, 1024),
    LossCase(512, 1024),
    LossCase(512, 1024, torch.bfloat16),
    LossCase(256, 8192),
    LossCase(256, 8192, torch.bfloat16),
    LossCase(256, 65536),
    LossCase(256, 65536, torch.bfloat16),
    LossCase(16, 2**20),
]
