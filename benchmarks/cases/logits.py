"""Logits of the fixed simplex and the gradient of z: ours against the dense matrix, eager and compiled torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from measure import copy_in_place, gradient_errors, gradient_step
from torch import Tensor

import simplexfix.functional as SF
from simplexfix import _reference
from simplexfix.polytopes import simplex_prototypes

from .loss import DENSE_LIMIT

Logits = Callable[[Tensor], Tensor]


@dataclass
class LogitsCase:
    """B = `rows`, K = `num_classes`, with a random upstream gradient."""

    rows: int
    num_classes: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    error_name = "gradient error"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        z, upstream = (torch.randn(self.rows, self.num_classes - i, generator=generator) for i in (1, 0))
        self.z, self.upstream = (x.to(self.device, self.dtype) for x in (z, upstream))

    @property
    def name(self) -> str:
        return f"logits+gradient B={self.rows} K={self.num_classes} {str(self.dtype).removeprefix('torch.')}"

    def logits(self, compiled: bool = True) -> dict[str, Logits]:
        found: dict[str, Logits] = {"simplexfix": SF.simplex_logits, "closed form, eager": _reference.simplex_logits}
        if compiled:
            torch.compiler.reset()
            found["closed form, torch.compile"] = torch.compile(_reference.simplex_logits, fullgraph=True)
        if self.num_classes**2 <= DENSE_LIMIT:
            w = simplex_prototypes(self.num_classes, dtype=self.dtype).to(self.device)
            found["dense matrix"] = lambda z: z @ w.T
        return found

    def candidates(self, compiled: bool = True) -> dict[str, Callable[[], object]]:
        return {name: self._step(logits) for name, logits in self.logits(compiled).items()}

    def _step(self, logits: Logits) -> Callable[[], object]:
        return gradient_step(logits, self.z, self.upstream)

    def limits(self) -> dict[str, Callable[[], object]]:
        """Minimum traffic: forward reads z, writes the logits; backward reads their gradient, writes that of z."""
        return {"copy bandwidth": copy_in_place(2 * self.z.numel(), self.dtype, self.device)}

    def errors(self, skipped: Collection[str] = ()) -> dict[str, float]:
        truth = gradient_step(_reference.simplex_logits, self.z.double(), self.upstream.double())
        return gradient_errors(self.candidates(compiled=False), truth, skipped)


CASES = [LogitsCase(512, 1024), LogitsCase(256, 8192)]
