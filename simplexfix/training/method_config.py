"""The part of a run's configuration that is the method."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch.distributed as dist

from .._checks import check_name
from ..methods import ASNN, BCT, ER, FD, HOC, OCA, QDC, Method, Simplex
from ..slots import SlotRegistry
from . import processes
from .config import check_fits

__all__ = ["ER_PRETRAINED", "SIMPLEX", "MethodConfig"]

# methods whose replacements are pre-trained by ER; those of SIMPLEX by `Simplex`
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
    """A method of `simplexfix.methods`, and its options.

    Args:
        name: "er", "fd", "bct" or "oca", with a learnable classifier; "asnn" or "nnp", by nearest neighbours; "simplex"
            or "hoc", with the fixed one; "qdc", for retrieval data sets, with none.
        slots: K of the simplex.
        normalize: of the simplex; a learnable classifier with a scale is always normalised.
        scale: of the logits; None for plain ones, and for 50 of qdc.  Without logits, as by neighbours, of
            pre-training alone.
        weight: of FD's distance, of BCT's influence loss, and of QDC's distillation, of which 0 is none.
        distance: of FD.
        lambda_, mu, negatives, anchor: of `hoc_loss`.
        gather: negatives of HOC, documents of QDC from all processes.
        classification: of fd, bct and hoc: "cross_entropy", or "asnn" or "nnp" in its place.  Replacements are
            pre-trained by cross-entropy all the same.
        neighbours, queue, alpha: of `ASNN`, alone or as classification.
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
                    f"{option.name} is of name or classification={' or '.join(map(repr, kinds))}, got "
                    f"{getattr(self, option.name)!r} with name={self.name!r} and "
                    f"classification={self.classification!r}; leave it out"
                )
        self.method(SlotRegistry(self.slots), "default")  # which checks the values

    def _neighbours(self) -> ASNN | None:
        """Classification by neighbours, alone or of another method."""
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
        return dist.group.WORLD if self.gather and processes.world() > 1 else None

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
        cross_entropy = neighbours is None  # else normalisation and scale are of pre-training
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
        """What this one is where there is no old model: pre-training that methods may share."""
        if self.name in ER_PRETRAINED:
            return MethodConfig("er", scale=self.scale)
        return MethodConfig("simplex", slots=self.slots, normalize=self.normalize, scale=self.scale)

    def goes_on_with(self, source: str) -> bool:
        """Whether a replacement that was pre-trained on this source keeps its head: else its backbone gets a new one.

        The vertices of a simplex are those of any classes; a linear classifier must have learned the same ones.  OCA,
        and classification by neighbours without a simplex, have heads that ER does not train.
        """
        linear = self.name in ("er", "fd", "bct") and self.classification == "cross_entropy"
        return self.name in SIMPLEX or (linear and source == "tasks")
