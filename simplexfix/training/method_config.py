"""The part of a run's configuration that is the method."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from .._checks import check_name
from ..methods import BCT, ER, FD, HOC, QDC, Method, Simplex
from ..slots import SlotRegistry
from . import processes
from .config import check_fits

__all__ = ["LEARNABLE", "SIMPLEX", "MethodConfig"]

LEARNABLE = ("bct", "er", "fd")  # methods with a classifier for each network, and features for embeddings
SIMPLEX = ("hoc", "simplex")

_BELONGS = {
    **dict.fromkeys(("slots", "normalize"), SIMPLEX),
    "weight": ("fd", "bct", "qdc"),
    "distance": ("fd",),
    **dict.fromkeys(("lambda_", "mu", "negatives", "anchor"), ("hoc",)),
    "gather": ("hoc", "qdc"),
}


@dataclass(frozen=True)
class MethodConfig:
    """A way to train, of `simplexfix.methods`.

    Args:
        name: "er", "fd" or "bct", with a learnable classifier; "simplex" or "hoc", with the fixed
            one; "qdc", for retrieval data sets, with none.
        slots: K of the simplex.
        normalize: of the simplex; a learnable classifier with a scale is always normalised.
        scale: of the logits; None for plain ones, and for 50 of qdc.
        weight: of FD's distance, of BCT's influence loss, and of QDC's distillation, of which 0 is none.
        distance: of FD.
        lambda_, mu, negatives, anchor: of `hoc_loss`.
        gather: negatives of HOC, documents of QDC from all processes.
    """

    name: str = "hoc"
    slots: int = 1024
    normalize: bool = False
    scale: float | None = None
    weight: float = 1.0
    distance: str = "cosine"
    lambda_: float = 0.1
    mu: float = 10.0
    negatives: str = "zero_mask"
    anchor: str = "old"
    gather: bool = True

    def __post_init__(self) -> None:
        check_name("name", self.name, (*LEARNABLE, *SIMPLEX, "qdc"))
        check_fits(self, "name", _BELONGS)

    def method(self, slots: SlotRegistry, namespace: str) -> Method:
        if self.name == "er":
            return ER(scale=self.scale)
        if self.name == "fd":
            return FD(weight=self.weight, distance=self.distance, scale=self.scale)
        if self.name == "bct":
            return BCT(weight=self.weight, scale=self.scale)
        group = dist.group.WORLD if self.gather and processes.world() > 1 else None
        if self.name == "qdc":
            return QDC(weight=self.weight, scale=50.0 if self.scale is None else self.scale, group=group)
        scale = 1.0 if self.scale is None else self.scale
        if self.name == "simplex":
            return Simplex(slots, namespace, normalize=self.normalize, scale=scale)
        return HOC(
            slots,
            namespace,
            normalize=self.normalize,
            scale=scale,
            lambda_=self.lambda_,
            mu=self.mu,
            negatives=self.negatives,
            anchor=self.anchor,
            group=group,
        )

    def pretraining(self) -> MethodConfig:
        """What this one is where there is no old model: pre-training that methods may share."""
        if self.name in LEARNABLE:
            return MethodConfig("er", scale=self.scale)
        return MethodConfig("simplex", slots=self.slots, normalize=self.normalize, scale=self.scale)
