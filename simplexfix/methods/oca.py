"""OCA (orthogonal compatible aligned): the leading dimensions are aligned with the old model's class means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_fraction, check_integer, check_name, check_number, check_positive, check_target
from .._reference import accumulate_dtype, no_autocast
from .._text import listed
from ..models import EmbeddingModel, OCAHead
from ..models.linear import check_known
from ..models.oca import ROTATIONS, OCAObjective

__all__ = ["OCA", "oca_loss"]


def oca_loss(
    z: Tensor,
    target: Tensor,
    objective: OCAObjective,
    *,
    weights: Sequence[float] = (5.0, 10.0, 5.0),
    temperature: float = 1.0,
    label_smoothing: float = 0.1,
    normalize_prototypes: bool = False,
) -> Tensor:
    """Returns the OCA loss: cross-entropy in all dimensions, and alignment of the leading ones with old class means.

        h    = F.normalize(z);  h_c = F.normalize(h[:, :d_o])     # d_o: width of the old version's embeddings
        P    = objective.prototypes                       # [C, d_o]
        h_r  = objective.rotation(h)                      # h Q^T (+ b); h itself without a rotation
        loss = weights[0] * cross_entropy(h_r W^T / temperature, target, label_smoothing)
             + weights[1] * cross_entropy(h_c P^T / temperature, target, label_smoothing)
             + weights[2] * mean(1 - cos(h_c, P[target]))

    Without an old version there are no prototypes, and the loss is `cross_entropy(h W^T / temperature, target,
    label_smoothing)` with weight 1.  A zero row normalises to zero.  The loss is computed in float32 or float64, also
    under autocast.

    Args:
        z: [B, d] floating embeddings.
        target: [B] int64 class ids in [0, C).
        objective: module that holds W, Q and P.
        weights: weights of the three terms, each at least 0.
        temperature: temperature of both cross-entropies, positive.
        label_smoothing: label smoothing of both, in [0, 1].
        normalize_prototypes: whether to normalise the rows of P in the second term; the third one always does.

    Returns:
        A scalar.

    Raises:
        TypeError: `target` is not int64.
        ValueError: `target` is not [B], or on the CPU holds an id outside [0, C).

    Reference:
        Ricci et al., arXiv 2408.08793.
    """
    check_target(target, z)
    check_known(target, objective.classifier.out_features, "OCA.add_classes")
    with no_autocast(z):  # bfloat16's 8 significant bits are too few for cosines near 1
        h = F.normalize(z.to(accumulate_dtype(z.dtype)))
        turned = h if objective.rotation is None else objective.rotation(h)
        classify = F.cross_entropy(objective.classifier(turned) / temperature, target, label_smoothing=label_smoothing)
        prototypes = objective.prototypes
        if prototypes is None:
            return classify
        compatible = F.normalize(h[:, : prototypes.shape[1]])
        unit = F.normalize(prototypes)
        rows = unit if normalize_prototypes else prototypes
        align = F.cross_entropy(compatible @ rows.T / temperature, target, label_smoothing=label_smoothing)
        distance = 1 - (compatible * unit[target]).sum(1)
        return weights[0] * classify + weights[1] * align + weights[2] * distance.mean()


class OCA:
    """Trains with `oca_loss`; each later version adds `extra` dimensions to the embeddings.

    Version t has d_t = d_{t-1} + extra dimensions.  Its first d_{t-1} dimensions, normalised again, search the gallery
    of version t - 1, its first d_{t-2} that of version t - 2, and so on.  Each prototype is a class mean of
    the old version's unit embeddings, over new and rehearsed items.  Classes that the old version never saw have one,
    too.

    The old version does not run during training steps.  The next version's junction begins with the rows of the
    previous one.  Classifier and rotation are initialised anew, since deployed models do not have them.  So training
    gives the same result from a model folder as from the model in memory.

    Args:
        embedding_dim: d_0, width of the first version, at least 1.
        extra: number of dimensions that each later version adds, at least 0.
        weights, temperature, label_smoothing, normalize_prototypes: as in `oca_loss`.
        rotation: "orthogonal" (Q without bias), "orthogonal_bias" (with bias, as in the authors' code) or "none".

    Raises:
        TypeError, ValueError: an option has a wrong type or is out of range.  `Trainer.fit` raises if the head is not
            an `OCAHead`, or, with an old version, if a class has no item.

    Reference:
        Ricci et al., "Backward-Compatible Aligned Representations via an Orthogonal Transformation Layer",
        arXiv 2408.08793.
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 128,
        extra: int = 32,
        weights: Sequence[float] = (5.0, 10.0, 5.0),
        temperature: float = 1.0,
        label_smoothing: float = 0.1,
        normalize_prototypes: bool = False,
        rotation: str = "orthogonal",
    ) -> None:
        if check_integer("embedding_dim", embedding_dim) < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        if check_integer("extra", extra) < 0:
            raise ValueError(f"extra must be 0 or more dimensions, got {extra}")
        if len(weights) != 3:
            raise ValueError(f"weights must hold 3 numbers (classifier, prototypes, distance), got {len(weights)}")
        for weight in weights:
            check_number("weights", weight)
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ValueError(f"weights must be finite, 0 or more, and not all 0, got {list(weights)}")
        check_positive("temperature", temperature)
        check_fraction("label_smoothing", label_smoothing)
        check_name("rotation", rotation, ROTATIONS)
        self.embedding_dim = embedding_dim
        self.extra = extra
        self.weights = tuple(weights)
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.normalize_prototypes = normalize_prototypes
        self.rotation = rotation

    def head(self, in_features: int) -> OCAHead:
        return OCAHead(in_features, self.embedding_dim)

    def add_classes(self, model: EmbeddingModel, classes: range) -> None:
        self._begin(_head_of(model), classes.stop, prefix=None)

    def fit_to_old(self, model: EmbeddingModel, old: EmbeddingModel) -> None:
        """Widens the embeddings to the old version's width plus `extra`, and adds the old version to `ancestors`."""
        head, width = _head_of(model), old.embedding_dim
        if width is None:
            raise ValueError(
                "old's width is unknown: give its head `embedding_dim`, or its backbone `out_features`, as an integer"
            )
        assert head.objective is not None  # add_classes was called
        ancestors = old.head.ancestors if isinstance(old.head, OCAHead) else ()
        head.widen(width + self.extra, (*ancestors, (old.identity().fingerprint, width)))
        self._begin(head, head.objective.classifier.out_features, prefix=width)

    @torch.no_grad()
    def read_old(self, model: EmbeddingModel, embeddings: Tensor, labels: Tensor) -> None:
        """Sets the prototypes: P[c] = mean of `embeddings` over the items of class c, summed in float64."""
        objective = _head_of(model).objective
        assert objective is not None
        assert objective.prototypes is not None
        counts = torch.bincount(labels, minlength=len(objective.prototypes))
        missing = (counts == 0).nonzero()[:, 0].tolist()
        if missing:
            raise ValueError(
                f"OCA needs an item of every class for its prototypes, and {len(missing)} classes have none "
                f"({listed(missing)}): keep a memory of earlier classes"
            )
        # on the CPU, where index_add_ sums in a fixed order
        sums = torch.zeros(objective.prototypes.shape, dtype=torch.float64)
        sums.index_add_(0, labels, embeddings.double())
        objective.prototypes.copy_(sums / counts[:, None])

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        head = _head_of(model)
        has_prototypes = head.objective is not None and head.objective.prototypes is not None
        if has_prototypes and old is None:
            raise ValueError("the head was prepared with an old version, but old is None: pass the old version")
        if head.objective is None or has_prototypes != (old is not None):
            raise ValueError(
                "the model's head is not ready for this task: call add_classes and, with an old version, fit_to_old "
                "and read_old before the first step, as Trainer.fit does"
            )
        return oca_loss(
            model(input),
            target,
            head.objective,
            weights=self.weights,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            normalize_prototypes=self.normalize_prototypes,
        )

    def _begin(self, head: OCAHead, classes: int, *, prefix: int | None) -> None:
        made = OCAObjective(head.embedding_dim, classes, prefix=prefix, rotation=self.rotation)
        head.objective = made.to(head.junction.weight)


def _head_of(model: EmbeddingModel) -> OCAHead:
    if not isinstance(model.head, OCAHead):
        raise TypeError(
            f"OCA trains models with an OCAHead, got {type(model.head).__name__}; begin with "
            "EmbeddingModel(backbone, method.head(backbone.out_features))"
        )
    return model.head
