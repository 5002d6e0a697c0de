"""The configuration of a run's training method."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch.distributed as dist

from .._checks import check_name
from ..methods import ASNN, BCT, ER, FD, HOC, OCA, QDC, Method, Simplex
from ..slots import SlotRegistry
from . import processes
from .config import check_fits

__all__ = ["ER_PRETRAINED", "SIMPLEX", "MethodConfig"]

# Replacements of these methods are pre-trained with ER, those of the methods in SIMPLEX with `Simplex`.
ER_PRETRAINED = ("asnn", "bct", "er", "fd", "nnp", "oca")
SIMPLEX = ("hoc", "simplex")

_NEIGHBOURS = ("asnn", "nnp")
_OF_NEIGHBOURS = {"neighbours": _NEIGHBOURS, "queue": _NEIGHBOURS, "alpha": ("nnp",)}

_BELONGS = {
    **dict.fromkeys(("slots", "normalize"), SIMPLEX),
    "weight": ("fd", "bct", "qdc"),
    "distance": ("fd",),
    "classification": ("fd", "bct", "hoc"),
    **dict.fromkeys(("lambda_", "mu", "negatives", "anchor"), ("hoc",)),
    "scale": ("bct", "er", "fd", "hoc", "qdc", "simplex"),
    **dict.fromkeys(
        ("embedding_dim", "extra", "weights", "temperature", "label_smoothing", "normalize_prototypes", "rotation"),
        ("oca",),
    ),
    "gather": ("hoc", "qdc"),
}


@dataclass(frozen=True)
class MethodConfig:
    """A method of `simplexfix.methods` and its options.

    An option that the chosen method does not use must have its default.

    Args:
        name: "er", "fd", "bct" or "oca" (learnable classifier), "asnn" or "nnp" (nearest neighbours), "simplex" or
            "hoc" (fixed simplex), or "qdc" (retrieval data sets, no classifier).
        slots: K, the number of slots of the simplex.
        normalize: whether the simplex normalises embeddings; a learnable classifier does if it has a scale.
        scale: factor of the logits, above 0; None for 1, or for 50 with "qdc".  With a classification by neighbours
            only pre-training uses it.
        weight: weight of FD's distance or BCT's influence loss, above 0, or of QDC's distillation, at least 0.
        distance: "cosine" or "l2", as in `simplexfix.methods.FD`.
        lambda_, mu, negatives, anchor: as in `simplexfix.functional.hoc_loss`.
        gather: whether HOC's negatives and QDC's documents come from all processes.
        classification: first term of the loss of fd, bct and hoc: "cross_entropy", "asnn" or "nnp".  Replacements are
            always pre-trained by cross-entropy.
        neighbours, queue, alpha: as in `simplexfix.methods.ASNN`.
        embedding_dim, extra, weights, temperature, label_smoothing, normalize_prototypes, rotation: as in
            `simplexfix.methods.OCA`.

    Raises:
        ValueError: a name is unknown, an option is out of range, or an option that the method does not use is set.
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
    classification: str = "cross_entropy"
    neighbours: int = 10
    queue: int = 4096
    alpha: float = 1.0
    embedding_dim: int = 128
    extra: int = 32
    weights: tuple[float, ...] = (5.0, 10.0, 5.0)
    temperature: float = 1.0
    label_smoothing: float = 0.1
    normalize_prototypes: bool = False
    rotation: str = "orthogonal"

    def __post_init__(self) -> None:
        check_name("name", self.name, (*ER_PRETRAINED, *SIMPLEX, "qdc"))
        check_fits(self, "name", _BELONGS)
        check_name("classification", self.classification, ("cross_entropy", *_NEIGHBOURS))
        used = {self.name, self.classification}
        for option in fields(self):
            kinds = _OF_NEIGHBOURS.get(option.name)
            if kinds is not None and not used & set(kinds) and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"{option.name} needs name or classification={' or '.join(map(repr, kinds))}, got "
                    f"{getattr(self, option.name)!r} with name={self.name!r} and "
                    f"classification={self.classification!r}; leave it out"
                )
        self.method(SlotRegistry(self.slots), "default")  # constructors check the values

    def _neighbours(self) -> ASNN | None:
        """Returns the nearest-neighbour loss of this configuration, or None if it has none."""
        loss = self.name if self.name in _NEIGHBOURS else self.classification
        if loss not in _NEIGHBOURS:
            return None
        return ASNN(
            loss=loss,
            neighbours=self.neighbours,
            queue=self.queue,
            alpha=self.alpha,
            group=self._group(),
        )

    def _group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.gather and processes.world_size() > 1 else None

    def method(self, slots: SlotRegistry, namespace: str) -> Method:
        neighbours = self._neighbours()
        if neighbours is not None and self.name in _NEIGHBOURS:
            return neighbours
        if self.name == "er":
            return ER(scale=self.scale)
        if self.name == "fd":
            return FD(weight=self.weight, distance=self.distance, scale=self.scale, classification=neighbours)
        if self.name == "bct":
            return BCT(weight=self.weight, scale=self.scale, classification=neighbours)
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
        if self.name == "qdc":
            return QDC(weight=self.weight, scale=50.0 if self.scale is None else self.scale, group=self._group())
        scale = 1.0 if self.scale is None else self.scale
        if self.name == "simplex":
            return Simplex(slots, namespace, normalize=self.normalize, scale=scale)
        cross_entropy = neighbours is None  # otherwise normalize and scale are options of pre-training only
        return HOC(
            slots,
            namespace,
            normalize=self.normalize and cross_entropy,
            scale=scale if cross_entropy else 1.0,
            lambda_=self.lambda_,
            mu=self.mu,
            negatives=self.negatives,
            anchor=self.anchor,
            group=self._group(),
            classification=neighbours,
        )

    def pretraining(self) -> MethodConfig:
        """Returns the configuration of pre-training; equal for several methods, so that they can share the networks."""
        if self.name in ER_PRETRAINED:
            return MethodConfig("er", scale=self.scale)
        return MethodConfig("simplex", slots=self.slots, normalize=self.normalize, scale=self.scale)

    def goes_on_with(self, source: str) -> bool:
        """Returns whether a replacement keeps the head of its pre-training; else it gets a new head.

        `source` is that of `ReplacementConfig`, "apart" or "tasks".
        A simplex head fits any classes.  A linear head fits only the classes that it was trained on.  ER does not
        train the heads of OCA and of classification by neighbours without a simplex.
        """
        linear = self.name in ("er", "fd", "bct") and self.classification == "cross_entropy"
        return self.name in SIMPLEX or (linear and source == "tasks")
