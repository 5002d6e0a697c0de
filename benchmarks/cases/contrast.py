"""Loss and gradient of the old/new contrast: our blocked, fused kernels against PyTorch with B x B matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import gradient_errors, gradient_step
from torch import Tensor

import simplexfix.functional as SF
from simplexfix import _reference


def plain(new: Tensor, old: Tensor, target: Tensor, negatives: str) -> Tensor:
    return _reference.contrast_rows(old, new, target, target, 0, mu=10.0, negatives=negatives).mean()


@dataclass
class ContrastCase:
    """B rows of 100 classes; the gradient is with respect to the new features."""

    rows: int
    d: int
    negatives: str = "zero_mask"
    device: str = "cpu"
    error_name = "gradient error"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.new = torch.randn(self.rows, self.d, generator=generator).to(self.device)
        self.old = torch.randn(self.rows, self.d, generator=generator).to(self.device)
        self.target = torch.randint(100, (self.rows,), generator=generator).to(self.device)

    @property
    def name(self) -> str:
        return f"contrast+gradient B={self.rows} d={self.d} {self.negatives}"

    def losses(self, compiled: bool = True) -> dict[str, Callable[..., Tensor]]:
        found = {
            "simplexfix": lambda new, old, target: SF.old_new_contrast(new, old, target, negatives=self.negatives),
            "plain, eager": lambda new, old, target: plain(new, old, target, self.negatives),
        }
        if compiled:
            torch.compiler.reset()
            found["plain, torch.compile"] = torch.compile(found["plain, eager"], fullgraph=True)
        return found

    def candidates(self, compiled: bool = True) -> dict[str, Callable[[], object]]:
        return {name: self._step(loss) for name, loss in self.losses(compiled).items()}

    def _step(self, loss: Callable[..., Tensor]) -> Callable[[], object]:
        return gradient_step(lambda new: loss(new, self.old, self.target), self.new)

    def limits(self) -> dict[str, Callable[[], object]]:
        """The two matrix products, which every implementation needs."""
        u, v = F.normalize(self.old), F.normalize(self.new)

        def products() -> None:
            similarity = u @ v.T
            similarity.T @ u

        return {"two products": products}

    def errors(self, skipped: Collection[str] = ()) -> dict[str, float]:
        truth = gradient_step(lambda new: plain(new, self.old.double(), self.target, self.negatives), self.new.double())
        return gradient_errors(self.candidates(compiled=False), truth, skipped)


CASES = [ContrastCase(256, 1023), ContrastCase(8192, 1023)]
