"""The table of evaluation protocols: rules that score a cosine search of labelled queries in a labelled gallery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from ..labelled import VersionFeatures
from . import class_means, nearest_items, sharded
from .class_means import CellHits
from .relevance import METRIC_NAMES, read_metric

__all__ = ["PROTOCOLS", "Hits", "Protocol", "instance", "nearest_class_mean", "read_protocol", "read_scored_protocol"]

Hits = NDArray[np.bool_] | NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """A rule that scores queries against a gallery: a row of `PROTOCOLS`, or a custom one.

        mean_ap = Protocol("mean_ap", score=lambda v: mean_average_precision(RetrievalResults.search(v)))

    Args:
        name: name of the protocol in reports.
        score: function of a `VersionFeatures` that returns a number, larger is better; None for the mean of `hits`.
        hits: function of a `VersionFeatures` that returns [Q] bool (correct queries), or [Q] float64 in [0, 1].
        matrix_hits: function of several versions that yields, in blocks, the hits of all cells of their compatibility
            matrix.
        sharded_hits: like `hits`, where each process of a group holds a shard of the gallery.
        mixed_hits: function of old and new version that returns a function from [N] bool (rows by the new model) to
            the hits [Q] of the new queries.

    Raises:
        TypeError: both `score` and `hits` are missing.
    """

    name: str
    score: Callable[[VersionFeatures], float] = None  # type: ignore[assignment]  # filled in below
    hits: Callable[[VersionFeatures], Hits] | None = None
    matrix_hits: Callable[[Sequence[VersionFeatures]], CellHits] | None = field(default=None, repr=False)
    sharded_hits: Callable[[VersionFeatures, dist.ProcessGroup | None], Hits] | None = field(default=None, repr=False)
    mixed_hits: Callable[[VersionFeatures, VersionFeatures], Callable[[NDArray[np.bool_]], Hits]] | None = field(
        default=None, repr=False
    )

    def __post_init__(self) -> None:
        if self.score is None:
            if self.hits is None:
                raise TypeError(f"a Protocol needs score or hits, got neither for {self.name!r}")
            hits = self.hits
            object.__setattr__(self, "score", lambda version: float(hits(version).mean()))


nearest_class_mean = Protocol(
    "nearest_class_mean",
    hits=class_means.hits,
    matrix_hits=class_means.matrix_hits,
    sharded_hits=sharded.nearest_class_mean_hits,
    mixed_hits=class_means.mixed_hits,
)
"""The fraction of queries for which the nearest class template is that of their own class.

    template[c] = F.normalize(gallery[gallery_labels == c].mean(0))
    hits = argmax_c (query . template[c]) == query_labels

A query counts as wrong if the gallery lacks its class.  Reference: arXiv 2405.02581; docs/design/math.md.
"""

instance = Protocol(
    "instance",
    hits=nearest_items.hits,
    matrix_hits=nearest_items.matrix_hits,
    sharded_hits=sharded.instance_hits,
    mixed_hits=nearest_items.mixed_hits,
)
"""The fraction of queries whose nearest gallery item, by cosine, has their label (CMC@1)."""

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({p.name: p for p in (nearest_class_mean, instance)})


def read_protocol(protocol: str | Protocol, *, needs: str = "score") -> Protocol:
    """Returns the protocol of a name, after a check that it has a required function.

    Args:
        protocol: a name of `PROTOCOLS`; a ranking metric, such as "ndcg@10", "map", "map@100", "mrr", "mrr@10",
            "recall@100" or "precision@5", which works with labels and with relevance judgements; or a `Protocol`.
        needs: the attribute that must not be None.

    Raises:
        TypeError: `protocol` is neither a name nor a `Protocol`.
        ValueError: the name is unknown, or the attribute is None.
    """
    if isinstance(protocol, str):
        metric = read_metric(protocol)
        if metric is None and protocol not in PROTOCOLS:
            names = ", ".join(map(repr, PROTOCOLS))
            raise ValueError(f"protocol must be one of {names}, or a metric ({METRIC_NAMES}), got {protocol!r}")
        protocol = (
            PROTOCOLS[protocol]
            if metric is None
            else Protocol(protocol, hits=metric.hits, mixed_hits=metric.mixed_hits)
        )
    if not isinstance(protocol, Protocol):
        raise TypeError(
            f"protocol must be a name, {' or '.join(map(repr, PROTOCOLS))}, or a simplexfix.retrieval.Protocol, got "
            f"{type(protocol).__name__}; Protocol(name, score=function) makes one of a function"
        )
    if getattr(protocol, needs) is None:
        raise ValueError(
            f"protocol {protocol.name!r} must have the function {needs}; pass Protocol(name, {needs}=...), or "
            f"{' or '.join(map(repr, PROTOCOLS))}"
        )
    return protocol


def read_scored_protocol(protocol: str | Protocol) -> Protocol:
    """Returns a protocol of `PROTOCOLS` or of a ranking metric, for a report, which accepts no other.

    Raises:
        TypeError, ValueError: as in `read_protocol`.
        ValueError: `protocol` is a custom one.
    """
    protocol = read_protocol(protocol, needs="hits")
    if protocol.name not in PROTOCOLS and read_metric(protocol.name) is None:
        raise ValueError(
            f"a report takes protocols by name, {', '.join(map(repr, PROTOCOLS))} or a metric ({METRIC_NAMES}), got "
            f"the custom Protocol {protocol.name!r}; compatibility_matrix, upgrade_gate and backfill_curve take it"
        )
    return read_protocol(protocol.name, needs="hits")
