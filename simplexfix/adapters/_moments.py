"""Means, covariances and whitening maps of paired features: sums over blocks in float64, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._paired import PairedFeatures

__all__ = ["Moments", "polar"]

_T = TypeVar("_T")
_LEAST_VARIANCE = 1e-13  # of unit rows: what float64 sums of equal rows leave is below it


class Moments:
    """Sums over the rows of `PairedFeatures`, in float64; x is a unit row less the mean of all unit rows.

        mean(i)          = mean n(x_i)                         items and sample
        gram(i)          = sum x_i^T x_i
        cross(i, j)      = sum x_i^T x_j
        covariance(i)    = mean over labelled items of (x - mean of its class)^T (x - mean of its class)
                           without labels: gram(i) / rows
        whitening(i, g)  = S^{-1/2},  S = (1 - g) covariance(i) + g trace(covariance(i)) / f I
        whitened(i, j, g) = sum a_i^T a_j,  a = n(x whitening)

    Memory: a few [f, f] matrices for each version and each pair that was asked for, and one [C, f] matrix.
    """

    def __init__(self, features: PairedFeatures) -> None:
        self.features = features
        self._made: dict[tuple[object, ...], object] = {}

    def mean(self, version: int) -> Tensor:
        """[f]."""
        if ("mean", version) not in self._made:
            for _ in self._blocks(version):
                pass
        return self._made["mean", version]  # type: ignore[return-value]

    def gram(self, version: int) -> Tensor:
        """[f, f]."""
        return self._sums(version)[0]

    def cross(self, version: int, other: int) -> Tensor:
        """[f_version, f_other]."""
        return self._once(("cross", version, other), lambda: self._cross(version, other))

    def covariance(self, version: int) -> Tensor:
        """[f, f]."""
        return self._sums(version)[1]

    def whitening(self, version: int, g: float) -> Tensor:
        """[f, f], symmetric.

        Raises:
            ValueError: the shrunk covariance is singular, as for g = 0 with fewer items than dimensions.
        """
        values, vectors = self._once(("eigen", version), lambda: torch.linalg.eigh(self.covariance(version)))
        shrunk = (1 - g) * values.clamp(min=0) + g * values.mean()
        if not shrunk[0] > 1e-12 * shrunk[-1]:
            raise ValueError(
                f"{self.features.versions[version].name}: the covariance of {len(self.features)} rows in "
                f"{self.features.width(version)} dimensions is singular; whiten with shrinkage > 0, got {g}"
            )
        return vectors * shrunk.rsqrt() @ vectors.T  # type: ignore[no-any-return]

    def whitened(self, version: int, other: int, g: float) -> Tensor:
        """[f_version, f_other]."""
        return self._once(("whitened", version, other, g), lambda: self._whitened(version, other, g))

    def whiten(self, version: int, rows: Tensor, g: float) -> Tensor:
        """Unit rows of a version -> their unit whitened rows."""
        return normalize((rows - self.mean(version)) @ self.whitening(version, g), dim=1)

    def once(self, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
        """What `make` returns, computed at the first call with this key; for sums of one method's own."""
        return self._once(("method", *key), make)

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

    def _whitened(self, version: int, other: int, g: float) -> Tensor:
        maps = self.whitening(version, g), self.whitening(other, g)
        means = self.mean(version), self.mean(other)
        out: Tensor | float = 0.0
        for rows, _ in self.features.blocks(version, other):
            a, b = (normalize((x - m) @ w, dim=1) for x, m, w in zip(rows, means, maps, strict=True))
            out = out + a.T @ b
        assert isinstance(out, Tensor)
        return out

    def _once(self, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]


def polar(cross: Tensor) -> Tensor:
    """U V^T of the SVD: the map Q of orthonormal columns, or rows, with the largest tr(Q^T cross)."""
    u, _, vt = torch.linalg.svd(cross, full_matrices=False)
    return u @ vt  # type: ignore[no-any-return]
