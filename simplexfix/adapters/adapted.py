"""What an adapter makes of two versions' features, to be judged as an upgrade."""

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
    """The new queries and the old gallery as the adapter maps them: how a service with it searches.

        query = adapter(new.query)          or adapter(new.query, old.query), where both encoders run
        gallery = adapter.gallery(old.gallery)

    Args:
        adapter: fitted on other items, if a result is to hold for new queries.
        old, new: of the same items, by the two encoders themselves.
        fingerprint: of the adapter, as of the identity that `Adapter.save_pretrained` returns.

    Returns:
        For `upgrade_gate(old, new, adapted=...)`; `old.gallery` itself where stored vectors stay as they are.

    Raises:
        TypeError, ValueError: versions of other items, or of other widths than the adapter was fitted on.
    """
    old, new = check_versions((old, new), ("old", "new"))
    asked = (new.query,) if adapter.alpha is None else (new.query, old.query)
    query = _mapped(adapter, asked)
    gallery = _mapped(adapter.gallery, (old.gallery,)) if adapter.maps_gallery else old.gallery
    items = old.items
    return VersionFeatures(
        items,
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
