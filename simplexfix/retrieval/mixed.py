"""Mixed galleries: some rows are by an old model and some by a new one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional import cosine_topk
from ..labelled import FeatureRows

__all__ = ["Mixture", "mixed_search"]


class Mixture(NamedTuple):
    """Queries and the gallery rows of both models, in memory as float32.

    Attributes:
        query: [Q, d].
        old, new: [N, d_old], [N, d_new].
    """

    query: Tensor
    old: Tensor
    new: Tensor

    @classmethod
    def read(cls, query: FeatureRows, old: FeatureRows, new: FeatureRows) -> Mixture:
        return cls(query.whole(), old.whole(), new.whole())

    @property
    def shared_width(self) -> int:
        return min(self.old.shape[1], self.new.shape[1])

    def gallery(self, replaced: NDArray[np.bool_]) -> Tensor:
        """Returns the mixed gallery [N, d_new]; old rows are padded with zeros."""
        mixed = torch.zeros_like(self.new)
        mixed[:, : self.shared_width] = self.old[:, : self.shared_width]
        at = torch.from_numpy(np.array(replaced)).to(mixed.device)
        mixed[at] = self.new[at]
        return mixed


def mixed_search(query: Tensor, old: Tensor, new: Tensor, replaced: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns `cosine_topk` in a gallery that has new rows where `replaced` [N] bool is true, and old rows elsewhere.

    Each row is compared on the dimensions that it shares with the query.  Both kinds are searched separately and the
    rankings merged, since a row's score does not depend on other rows.
    """
    scores, ids = [], []
    for rows, counts in ((old, ~replaced), (new, replaced)):
        at = counts.nonzero()[:, 0]
        width = min(query.shape[1], rows.shape[1])
        found, places = cosine_topk(query[:, :width], rows[at, :width], k)
        scores.append(found)
        ids.append(torch.cat([at, at.new_tensor([-1])])[places])  # index -1 selects the appended -1
    all_ids, by_row = torch.cat(ids, 1).sort(dim=1)
    all_scores, by_score = torch.cat(scores, 1).gather(1, by_row).sort(dim=1, descending=True, stable=True)
    return all_scores[:, :k].contiguous(), all_ids.gather(1, by_score)[:, :k].contiguous()
