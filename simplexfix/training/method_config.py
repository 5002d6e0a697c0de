"""The part of a run's configuration that is the method."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from .._checks import check_name
from ..methods import BCT, ER, FD, HOC, OCA, Method, Simplex
from ..slots import SlotRegistry
from . import processes
from .config import check_fits

__all__ = ["LEARNABLE", "MethodConfig"]

LEARNABLE = ("bct", "er", "fd", "oca")  # methods with a learnable classifier for each network

_BELONGS = {
    **dict.fromkeys(("slots", "normalize"), ("hoc", "simplex")),
    "weight": ("fd", "bct"),
    "distance": ("fd",),
    **dict.fromkeys(("lambda_", "mu", "negatives", "anchor", "gather"), ("hoc",)),
    "scale": ("bct", "er", "fd", "hoc", "simplex"),
    **dict.fromkeys(
        ("embedding_dim", "extra", "weights", "temperature", "label_smoothing", "normalize_prototypes", "rotation"),
        ("oca",),
    ),
}


@dataclass(frozen=True)
class MethodConfig:
    """A way to train, of `simplexfix.methods`.

    Args:
        name: "er", "fd", "bct" or "oca", with a learnable classifier; "simplex" or "hoc", with the fixed one.
        slots: K of the simplex.
        normalize: of the simplex; a learnable classifier with a scale is always normalised.
        scale: of the logits; None for plain ones.
        weight: of FD's distance and of BCT's influence loss.
        distance: of FD.
        lambda_, mu, negatives, anchor: of `hoc_loss`.
        gather: negatives of HOC from all processes.
        embedding_dim, extra, weights, temperature, label_smoothing, normalize_prototypes, rotation: of `OCA`.
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
    embedding_dim: int = 128
    extra: int = 32
    weights: tuple[float, ...] = (5.0, 10.0, 5.0)
    temperature: float = 1.0
    label_smoothing: float = 0.1
    normalize_prototypes: bool = False
    rotation: str = "orthogonal"

    def __post_init__(self) -> None:
        check_name("name", self.name, (*LEARNABLE, "hoc", "simplex"))
        check_fits(self, "name", _BELONGS)

    def method(self, slots: SlotRegistry, namespace: str) -> Method:
        if self.name == "er":
            return ER(scale=self.scale)
        if self.name == "fd":
            return FD(weight=self.weight, distance=self.distance, scale=self.scale)
        if self.name == "bct":
            return BCT(weight=self.weight, scale=self.scale)
        if self.name == "oca":
            return OCA(
                embedding_dim=self.embedding_dim,
                extra=self.extra,
                weights=self.weights,
                temperature=self.temperature,
                label_smoothing=self.label_smoothing,
                normalize_prototypes=self.normalize_prototypes,
                rotation=self.rotation,
            )
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
            group=dist.group.WORLD if self.gather and processes.world() > 1 else None,
        )

    def pretraining(self) -> MethodConfig:
        """What this one is where there is no old model: pre-training that methods may share."""
        if self.name in LEARNABLE:
            return MethodConfig("er", scale=self.scale)
        return MethodConfig("simplex", slots=self.slots, normalize=self.normalize, scale=self.scale)
