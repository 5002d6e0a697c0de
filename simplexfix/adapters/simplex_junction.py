"""One common space for all versions: whitened features, rotated towards the vertices of one simplex."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .._checks import check_fraction, check_integer
from ..polytopes import simplex_prototypes
from ._moments import Moments, polar
from ._paired import PairedFeatures
from .base import Adapter, AdapterMethod
from .maps import AffineMap

__all__ = ["SimplexJunction"]


@dataclass(frozen=True)
class SimplexJunction(AdapterMethod):
    """Maps all versions into one common space; stored vectors are mapped, too.

    Each version has one map, with which it searches the galleries of all older versions.

        a(x) = n((n(x) - mean) S^{-1/2})          as in `WhitenedProcrustes`; n(v) = v / |v|
        T = lam t_y + (1 - lam) n(mean of the older versions' embeddings of the item)
            (1 - lam) n(...) for an item without a label;  t_y for the first version
        R = U V^T of the SVD of a(X)^T T                                 orthonormal rows
        embedding(x) = n(a(x) R)

    t_y is the vertex of the class on the simplex of `slots` vertices.  R is an isometry: a version searches its own
    gallery as its whitened features do.

    Args:
        g: shrinkage of the whitening, in [0, 1].
        lam: weight of the vertex, in [0, 1].
        slots: number of vertices of the simplex; the common space has slots - 1 dimensions.  At least the width of each
            encoder plus 1, and the number of classes; None for the smallest such number.

    Reference:
        Biondi et al., arXiv 2405.02581, for the simplex.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import SimplexJunction
        >>> labels = torch.arange(200) % 10
        >>> items = torch.randn(10, 32)[labels] + 0.5 * torch.randn(200, 32)
        >>> old, new = items @ torch.randn(32, 8), items @ torch.randn(32, 16)
        >>> adapter = SimplexJunction(slots=64).fit(old, new, labels=labels)
        >>> adapter(new).shape, adapter.gallery(old).shape
        (torch.Size([200, 63]), torch.Size([200, 63]))
    """

    name: ClassVar[str] = "simplex_junction"
    needs_labels: ClassVar[bool] = True
    maps_gallery: ClassVar[bool] = True
    common_space: ClassVar[bool] = True
    g: float = 0.3
    lam: float = 0.3
    slots: int | None = None

    def __post_init__(self) -> None:
        check_fraction("g", self.g)
        check_fraction("lam", self.lam)
        if self.slots is not None and check_integer("slots", self.slots) < 2:
            raise ValueError(f"slots must be at least 2, got {self.slots}")

    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        maps = self.own_maps(moments)
        return Adapter(maps[new], maps[old], method=self.described())

    def own_maps(self, moments: Moments) -> Sequence[nn.Module]:
        return junctions(moments, g=self.g, lam=self.lam, slots=self.slots_for(moments.features))

    def check(self, features: PairedFeatures) -> None:
        super().check(features)
        self.slots_for(features)

    def slots_for(self, features: PairedFeatures) -> int:
        """Returns the number of slots that the simplex has for these versions."""
        least = max(features.num_classes, 1 + max(features.width(i) for i in range(len(features.versions))))
        if self.slots is None:
            return least
        if self.slots < least:
            raise ValueError(
                f"slots must be at least {least}, the largest width plus 1 and one for each class, got {self.slots}; "
                "reduce wide features by their leading principal components first"
            )
        return self.slots


def junctions(moments: Moments, *, g: float, lam: float, slots: int) -> list[AffineMap]:
    """Returns the map of each version, oldest first, in float64."""
    turns: list[Tensor] = []
    maps: list[AffineMap] = []
    for version in range(len(moments.features.versions)):
        key = ("turn", version, g, lam if version else None, slots)
        turns.append(moments.once(key, lambda: polar(_towards_targets(moments, turns, maps, g, lam, slots))))
        _, norm = moments.whitened_classes(version, g)
        # a mean length of 1 before normalisation, as `HOCRefined` starts from these maps
        weight = moments.whitening(version, g) @ turns[-1] / norm
        maps.append(AffineMap(weight, -moments.mean(version) @ weight))
    return maps


def _towards_targets(
    moments: Moments, turns: Sequence[Tensor], older: Sequence[AffineMap], g: float, lam: float, slots: int
) -> Tensor:
    """Returns a(X)^T T of the next version, [f, slots - 1]."""
    features, version = moments.features, len(turns)
    of_class, _ = moments.whitened_classes(version, g)
    classes = torch.arange(features.num_classes, device=of_class.device)
    vertices = of_class.T @ simplex_prototypes(slots, classes, dtype=torch.float64)
    if not version:
        return vertices
    if version == 1:  # the mean of one older embedding is itself, so `whitened` has the sum
        return lam * vertices + (1 - lam) * moments.whitened(1, 0, g) @ turns[0]
    whitening, out = moments.whitening(version, g), lam * vertices
    for rows, _ in features.blocks(*range(version + 1)):
        white = normalize((rows[version] - moments.mean(version)) @ whitening, dim=1)
        before = normalize(sum(made(x) for made, x in zip(older, rows, strict=False)), dim=1)
        out = out + (1 - lam) * white.T @ before
    return out
