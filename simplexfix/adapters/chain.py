"""Adapters for more than two versions: each new encoder searches the galleries of all older ones."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..labelled import Ids
from ._moments import Moments
from ._paired import Features, PairedFeatures
from .base import Adapter, AdapterMethod
from .maps import unit

__all__ = ["Chain", "fit_chain"]


@dataclass(frozen=True, eq=False)
class Chain:
    """Adapters between all pairs of versions, oldest first.

        score(query of version i, item of version j) = chain.query(i, j, features) . chain.gallery(j, stored)     i >= j

    A method with one map for each version (`SimplexJunction`, `HOCRefined`) embeds a query once for all galleries; the
    others have one map for each pair.

    Attributes:
        method: method that fitted the chain.
        own: for each version the map from its features to the vectors that its gallery stores; None for the identity.
        adapters: (new, old) -> adapter of that pair.
    """

    method: AdapterMethod
    own: tuple[nn.Module | None, ...]
    adapters: dict[tuple[int, int], Adapter]

    def query(self, new: int, old: int, features: Sequence[Tensor]) -> Tensor:
        """Returns the queries, [B, d] unit rows, that search the gallery of version `old`.

        Args:
            new, old: numbers of versions, new >= old.
            features: for each version its [B, f] features of the same queries.  Only those of `new` are read, and with
                `Slerp` those of `old`.
        """
        if new == old:
            return self.gallery(old, features[old])
        adapter = self.adapters[new, old]
        return adapter(features[new], None if adapter.alpha is None else features[old])  # type: ignore[no-any-return]

    def gallery(self, version: int, stored: Tensor) -> Tensor:
        """Maps vectors [N, f] that a version extracted to unit rows [N, d] of its gallery."""
        own = self.own[version]
        return unit(stored, torch.float32) if own is None else own(stored)


def fit_chain(
    method: AdapterMethod,
    versions: Sequence[Features],
    *,
    labels: Ids | None = None,
    sample: Sequence[Features] | None = None,
    device: torch.device | str | None = None,
) -> Chain:
    """Fits adapters between all pairs of several encoders, to features of the same items.

    Args:
        method: method that fits the adapters, such as `SimplexJunction()`.
        versions: features [N, f_i] of each encoder i, floating, oldest first; at least two.
        labels, sample, device: as in `AdapterMethod.fit`; the sample has rows by each encoder.

    Raises:
        TypeError, ValueError: as in `AdapterMethod.fit`.

    Example:
        >>> import torch
        >>> from simplexfix.adapters import SimplexJunction, fit_chain
        >>> labels = torch.arange(200) % 10
        >>> versions = [torch.randn(10, d)[labels] + torch.randn(200, d) for d in (8, 12, 16)]
        >>> chain = fit_chain(SimplexJunction(), versions, labels=labels)
        >>> query = chain.query(2, 0, [v[:5] for v in versions])      # version 2 searches the gallery of version 0
        >>> scores = query @ chain.gallery(0, versions[0]).T
        >>> scores.shape
        torch.Size([5, 200])
    """
    features = read_versions(versions, labels, sample, device)
    method.check(features)
    return chain_of(method, Moments(features))


def chain_of(method: AdapterMethod, moments: Moments) -> Chain:
    count = len(moments.features.versions)
    adapters = {(new, old): method.adapter(moments, old, new) for new in range(count) for old in range(new)}
    own = tuple(None if made is None else deepcopy(made).float() for made in method.own_maps(moments))
    return Chain(method, own, adapters)


def read_versions(
    versions: Sequence[Features],
    labels: Ids | None,
    sample: Sequence[Features] | None,
    device: torch.device | str | None,
) -> PairedFeatures:
    if len(versions) < 2:
        raise ValueError(f"versions must hold at least two encoders' features, oldest first, got {len(versions)}")
    names = [f"versions[{i}]" for i in range(len(versions))]
    return PairedFeatures.read(versions, labels, sample, names=names, device=device)
