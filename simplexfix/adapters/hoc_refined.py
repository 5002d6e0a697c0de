"""Trains the maps of `SimplexJunction` further, with the higher-order compatibility (HOC) loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from .._checks import check_fraction, check_integer, check_positive
from ._moments import Moments
from ._paired import PairedFeatures
from ._training import descend, draw, row_reader
from .base import Adapter, AdapterMethod
from .maps import AffineMap
from .simplex_junction import SimplexJunction, junctions

__all__ = ["HOCRefined"]


@dataclass(frozen=True)
class HOCRefined(AdapterMethod):
    """Trains the maps of `SimplexJunction` further, by gradient steps.  Stored vectors must be mapped as well.

        z = n(x) J + b                                       J, b start at the map of `SimplexJunction`; n(v) = v / |v|
        loss = lambda simplex_cross_entropy(z, y) + (1 - lambda) old_new_contrast(z, embedding by the version before)
        trained by Adam, oldest version first; the first version by cross-entropy alone
        embedding(x) = n(z)

    x are features and y their classes.  The cross-entropy has the scale `scale`, the contrast the factor `mu`.  The
    contrast also uses the unlabelled items of `fit`'s `sample`, each as a class of its own.  Choose the number of steps
    on held-out classes: more steps raise the accuracy of classes with many items, and lower that of classes with few.

    Args:
        start: method that gives the initial J and b.
        steps: steps of Adam for each version; 0 gives the maps of `start`.
        learning_rate: learning rate of Adam, which falls to 0 by a cosine schedule.
        batch: labelled items per step, and as many items of a sample.
        scale: scale of the cosines in the cross-entropy.
        lambda_: weight of the cross-entropy, in [0, 1].
        mu: factor mu of `old_new_contrast`.
        seed: seed of the batches.

    Reference:
        Biondi et al., arXiv 2405.02581, equation of the HOC loss; docs/design/math.md.
    """

    name: ClassVar[str] = "hoc_refined"
    needs_labels: ClassVar[bool] = True
    maps_gallery: ClassVar[bool] = True
    common_space: ClassVar[bool] = True
    start: SimplexJunction = field(default_factory=SimplexJunction)
    steps: int = 60
    learning_rate: float = 1e-3
    batch: int = 512
    scale: float = 32.0
    lambda_: float = 0.7
    mu: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if check_integer("steps", self.steps) < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")
        if check_integer("batch", self.batch) < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        for option in ("learning_rate", "scale", "mu"):
            check_positive(option, getattr(self, option))
        check_fraction("lambda_", self.lambda_)

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        maps = self.own_maps(moments)
        return Adapter(maps[new], maps[old], method=self.described())

    def own_maps(self, moments: Moments) -> Sequence[nn.Module]:
        return moments.once(("hoc", self), lambda: self._refined(moments))

    def check(self, features: PairedFeatures) -> None:
        super().check(features)
        self.start.check(features)

    def _refined(self, moments: Moments) -> list[AffineMap]:
        generator = torch.Generator().manual_seed(self.seed)
        slots = self.start.slots_for(moments.features)
        begun = junctions(moments, g=self.start.g, lam=self.start.lam, slots=slots)
        maps: list[AffineMap] = []
        for version in range(len(begun)):
            maps.append(self._refine(moments, begun[version], maps[-1] if maps else None, version, generator))
        return maps

    def _refine(
        self,
        moments: Moments,
        begun: AffineMap,
        before: AffineMap | None,
        version: int,
        generator: torch.Generator,
    ) -> AffineMap:
        features = moments.features
        assert features.labels is not None
        j, b = (tensor.float().clone().requires_grad_() for tensor in (begun.weight, begun.bias))
        labels, items = torch.from_numpy(features.labels), features.num_items
        own = row_reader(moments, version)
        older = None if before is None else row_reader(moments, version - 1, before)

        def loss() -> Tensor:
            at = draw(0, items, self.batch, generator)
            y = labels[at].to(features.device)
            z = own(at) @ j + b
            classification = functional.simplex_cross_entropy(z, y, normalize=True, scale=self.scale)
            if older is None:
                return classification
            if features.sample is not None:
                more = draw(items, len(features), self.batch, generator)
                z = torch.cat([z, own(more) @ j + b])
                y = torch.cat([y, (features.num_classes + more).to(y)])
                at = torch.cat([at, more])
            contrast = functional.old_new_contrast(z, older(at), y, mu=self.mu)
            return self.lambda_ * classification + (1 - self.lambda_) * contrast

        descend([j, b], loss, steps=self.steps, learning_rate=self.learning_rate)
        return AffineMap(j.detach(), b.detach())
