"""Means, covariances and whitening maps of paired features: sums over blocks in float64, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ._paired import PairedFeatures

__all__ = ["Moments", "polar"]

_T = TypeVar("_T")
_LEAST_NORM = 1e-12
_LEAST_VARIANCE = 1e-13  # of unit rows; rounding errors of equal rows in float64 are smaller


class Moments:
    """Sums over the rows of `PairedFeatures`, items and sample, in float64.

    For versions i and j, u_i is a unit row of version i, x_i = u_i - mean(i), and n(v) = v / |v|:

        mean(i)          = mean of u_i
        gram(i)          = sum x_i^T x_i
        cross(i, j)      = sum x_i^T x_j
        covariance(i)    = mean over labelled items of (x_i - mean of its class)^T (x_i - mean of its class)
                           without labels: gram(i) / rows
        whitening(i, g)  = S^{-1/2},  S = (1 - g) covariance(i) + g trace(covariance(i)) / f I,  f: width of version i
        whitened(i, j, g) = sum a_i^T a_j,  a_i = n(x_i whitening(i, g))
        whitened_classes(i, g) = sum of a_i over the labelled items of each class, and mean of |x_i whitening(i, g)|

    Memory: a few [f, f] and [C, f] matrices for each version and each pair that was requested, and values of `once`.

    Args:
        features: the rows.
        shrinkages: values of g whose whitened sums are computed in one pass over the rows.
    """

    def __init__(self, features: PairedFeatures, shrinkages: Collection[float] = ()) -> None:
        self.features = features
        self._shrinkages = tuple(shrinkages)
        self._made: dict[tuple[object, ...], object] = {}

    def mean(self, version: int) -> Tensor:
        """Returns mean(version), [f]."""
        if ("mean", version) not in self._made:
            for _ in self._blocks(version):
                pass
        return self._made["mean", version]  # type: ignore[return-value]

    def gram(self, version: int) -> Tensor:
        """Returns gram(version), [f, f]."""
        return self._sums(version)[0]

    def cross(self, version: int, other: int) -> Tensor:
        """Returns cross(version, other), [f_version, f_other]."""
        return self._once(("cross", version, other), lambda: self._cross(version, other))

    def covariance(self, version: int) -> Tensor:
        """Returns covariance(version), [f, f]."""
        return self._sums(version)[1]

    def whitening(self, version: int, g: float) -> Tensor:
        """Returns whitening(version, g), [f, f] and symmetric.

        Raises:
            ValueError: the shrunk covariance is singular, as for g = 0 with fewer items than dimensions.
        """
        scale, vectors = self._axes(version, g)
        return vectors * scale @ vectors.T

    def whitened(self, version: int, other: int, g: float) -> Tensor:
        """Returns whitened(version, other, g), [f_version, f_other]."""
        if ("whitened", version, other, g) not in self._made:
            self._sum_whitened(version, other, g)
        return self._made["whitened", version, other, g]  # type: ignore[return-value]

    def whitened_classes(self, version: int, g: float) -> tuple[Tensor, float]:
        """Returns both values of whitened_classes(version, g): [C, f] and a mean norm."""
        if ("whitened classes", version, g) not in self._made:
            self._sum_whitened(max(version, 1), 0, g)  # `junctions` reads this pair next
        return self._made["whitened classes", version, g]  # type: ignore[return-value]

    def once(self, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
        """Returns the result of `make()`, computed once per key, for values that this class does not define."""
        return self._once(("method", *key), make)

    def _axes(self, version: int, g: float) -> tuple[Tensor, Tensor]:
        """Returns scale [f] and vectors [f, f]: whitening = vectors diag(scale) vectors^T."""
        values, vectors = self._once(("eigen", version), lambda: torch.linalg.eigh(self.covariance(version)))
        shrunk = (1 - g) * values.clamp(min=0) + g * values.mean()
        if not shrunk[0] > 1e-12 * shrunk[-1]:
            raise ValueError(
                f"{self.features.versions[version].name}: the covariance of {len(self.features)} rows in "
                f"{self.features.width(version)} dimensions is singular; whiten with shrinkage > 0, got {g}"
            )
        return shrunk.rsqrt(), vectors

    def _blocks(self, *which: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Yields the blocks of `features.blocks`; a complete pass also stores the means of these versions."""
        features = self.features
        missing = [(at, i) for at, i in enumerate(which) if ("mean", i) not in self._made]
        totals = {i: torch.zeros(features.width(i), dtype=torch.float64, device=features.device) for _, i in missing}
        squares = dict.fromkeys(totals, 0.0)
        for rows, labels in features.blocks(*which):
            for at, i in missing:
                totals[i] += rows[at].sum(0)
                squares[i] += float(rows[at].square().sum())
            yield rows, labels
        for i, total in totals.items():
            mean = total / len(features)
            if not squares[i] / len(features) - float(mean @ mean) > _LEAST_VARIANCE:
                raise ValueError(
                    f"{features.versions[i].name}: all {len(features)} rows have the same direction, or are zero; no "
                    "adapter can be fitted: check what the encoder was given"
                )
            self._made["mean", i] = mean

    def _sums(self, version: int) -> tuple[Tensor, Tensor]:
        return self._once(("sums", version), lambda: self._sum(version))

    def _sum(self, version: int) -> tuple[Tensor, Tensor]:
        features, f = self.features, self.features.width(version)
        gram = torch.zeros(f, f, dtype=torch.float64, device=features.device)
        labelled_gram = torch.zeros_like(gram) if features.labels is not None else None
        of_class = torch.zeros(features.num_classes, f, dtype=torch.float64, device=features.device)
        for (x,), labels in self._blocks(version):
            product = x.T @ x
            gram += product
            if labels is not None and labelled_gram is not None:
                labelled_gram += product
                of_class.index_add_(0, labels, x)
        mean = self.mean(version)
        gram -= len(features) * torch.outer(mean, mean)
        if labelled_gram is None:
            return gram, gram / len(features)
        sizes = torch.bincount(torch.from_numpy(features.labels), minlength=features.num_classes).to(of_class)
        between = of_class / sizes.sqrt()[:, None]
        return gram, (labelled_gram - between.T @ between) / features.num_items

    def _cross(self, version: int, other: int) -> Tensor:
        out: Tensor | float = 0.0
        for (x, y), _ in self._blocks(version, other):
            out = out + x.T @ y
        assert isinstance(out, Tensor)
        return out - len(self.features) * torch.outer(self.mean(version), self.mean(other))

    def _sum_whitened(self, version: int, other: int, g: float) -> None:
        """Stores `whitened` of the pair and `whitened_classes` of both, for all shrinkages if g is one, else for g.

        Rows are multiplied by the eigenvectors once: in this basis whitening scales each axis.  The sums are rotated
        back at the end.
        """
        features, which = self.features, (version, other)
        together = self._shrinkages if g in self._shrinkages else (g,)
        means = [self.mean(i) for i in which]
        axes = {h: [self._axes(i, h) for i in which] for h in together}
        cross: dict[float, Tensor | float] = dict.fromkeys(together, 0.0)
        of_class = {
            (h, i): means[0].new_zeros(features.num_classes, features.width(i)) for h in together for i in which
        }
        norms = dict.fromkeys(of_class, 0.0)
        for rows, labels in features.blocks(*which):
            turned = [(x - m) @ vectors for x, m, (_, vectors) in zip(rows, means, axes[g], strict=True)]
            squares = [x.square() for x in turned]
            for h in together:
                units = []
                for i, x, square, (scale, _) in zip(which, turned, squares, axes[h], strict=True):
                    norm = (square @ scale.square()).sqrt()
                    norms[h, i] += float(norm.sum())
                    units.append(x / norm.clamp(min=_LEAST_NORM)[:, None])
                    if labels is not None:
                        of_class[h, i].index_add_(0, labels, units[-1])
                cross[h] = cross[h] + units[0].T @ units[1]
        for h in together:
            (left, u), (right, v) = axes[h]
            self._made["whitened", version, other, h] = (u * left) @ cross[h] @ (v * right).T
            for i, (scale, vectors) in zip(which, axes[h], strict=True):
                sums = of_class[h, i] @ (vectors * scale).T, norms[h, i] / len(features)
                self._made.setdefault(("whitened classes", i, h), sums)

    def _once(self, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]


def polar(cross: Tensor) -> Tensor:
    """Returns U V^T of the SVD: the matrix Q with orthonormal columns (rows if wide) and the largest tr(Q^T cross)."""
    u, _, vt = torch.linalg.svd(cross, full_matrices=False)
    return u @ vt  # type: ignore[no-any-return]
