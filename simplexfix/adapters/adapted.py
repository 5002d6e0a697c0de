"""Applies an adapter to the features of two versions, so that the gate can judge it as an upgrade."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..labelled import FeatureRows, VersionFeatures, check_versions
from .base import Adapter

__all__ = ["adapted_version"]

_ROWS = 4096


def adapted_version(
    adapter: Adapter, old: VersionFeatures, new: VersionFeatures, *, fingerprint: str | None = None
) -> VersionFeatures:
    """Maps the new queries and the old gallery as a service with this adapter does.

        query = adapter(new.query)          or adapter(new.query, old.query) if it needs both encoders
        gallery = adapter.gallery(old.gallery)

    Args:
        adapter: adapter that was fitted on other items; otherwise the result does not hold for new queries.
        old, new: features of the same items by the old and the new encoder.
        fingerprint: fingerprint of the adapter, from the identity that `Adapter.save_pretrained` returns.

    Returns:
        A version for `upgrade_gate(old, new, adapted=...)`.  Its gallery is `old.gallery` itself if the adapter
        leaves stored vectors as they are.

    Raises:
        TypeError, ValueError: the versions have different items, or other widths than the adapter was fitted on.
    """
    old, new = check_versions((old, new), ("old", "new"))
    asked = (new.query,) if adapter.alpha is None else (new.query, old.query)
    query = _mapped(adapter, asked)
    gallery = _mapped(adapter.gallery, (old.gallery,)) if adapter.maps_gallery else old.gallery
    return VersionFeatures(
        old.items,
        FeatureRows("adapted.query", query),
        gallery if isinstance(gallery, FeatureRows) else FeatureRows("adapted.gallery", gallery),
        name="adapted",
        fingerprint=fingerprint,
    )


def _mapped(function: Callable[..., Tensor], rows: tuple[FeatureRows, ...]) -> Tensor:
    def blocks() -> Iterator[Tensor]:
        for begin in range(0, len(rows[0]), _ROWS):
            end = min(len(rows[0]), begin + _ROWS)
            yield function(*(part.block_tensor(begin, end) for part in rows)).float()

    with torch.inference_mode():
        return torch.cat(list(blocks()))
