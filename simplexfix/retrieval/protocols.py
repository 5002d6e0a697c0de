"""The table of protocols: how a search of labelled queries in a labelled gallery is scored, by cosine."""

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
    """How one version's queries are scored against a gallery: a row of `PROTOCOLS`, or one of your own by its score.

        mean_ap = Protocol("mean_ap", score=lambda v: mean_average_precision(RetrievalResults.search(v)))

    Args:
        name: for reports.
        score: a number, more is better, of queries and gallery in one `VersionFeatures`; None: the mean of `hits`.
        hits: [Q] of the same: bool, which queries are right, or float64 in [0, 1], what each query scores.
        matrix_hits: the hits of all cells of versions of the same items, in blocks, by one pass over each.
        sharded_hits: `hits` where each process of a group has some of the gallery.
        mixed_hits: old and new version -> ([N] which rows are new -> [Q] hits of the new queries).

    Raises:
        TypeError: neither score nor hits.
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
"""The fraction of queries whose nearest class template is that of their own class.

    template[c] = F.normalize(gallery[gallery_labels == c].mean(0))
    hits = argmax_c (query . template[c]) == query_labels

A query whose class the gallery lacks counts as wrong.  Reference: arXiv 2405.02581; docs/math.md.
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
    """The protocol of a name, or itself, if it has what a function needs: the name of a column of the table.

    A name of the table, or of a metric of the ranking: "ndcg@10", "map", "map@100", "mrr", "mrr@10", "recall@100",
    "precision@5".  Such a protocol scores relevance judgements, or labels.

    Raises:
        TypeError: neither a name nor a Protocol.
        ValueError: an unknown name; a protocol that lacks what is needed.
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
            f"protocol {protocol.name!r} has no {needs}, which this needs; {' and '.join(map(repr, PROTOCOLS))} have"
        )
    return protocol


def read_scored_protocol(protocol: str | Protocol) -> Protocol:
    """A protocol of the table, or of a metric of the ranking: those whose findings a report explains query by query.

    Raises:
        TypeError, ValueError: as `read_protocol`; a protocol of one's own.
    """
    protocol = read_protocol(protocol, needs="hits")
    if protocol.name not in PROTOCOLS and read_metric(protocol.name) is None:
        raise ValueError(
            f"protocol must be a name here, {', '.join(map(repr, PROTOCOLS))} or a metric ({METRIC_NAMES}), got the "
            f"Protocol {protocol.name!r} of your own, which compatibility_matrix, upgrade_gate and backfill_curve take"
        )
    return read_protocol(protocol.name, needs="hits")
