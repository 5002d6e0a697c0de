"""HOC: the fixed d-simplex, and a contrast that holds the new features to the old model's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_contrast_options, check_share
from ..models import EmbeddingModel
from ..slots import SlotRegistry
from .simplex import Simplex

__all__ = ["HOC"]


class HOC(Simplex):
    """`simplexfix.functional.hoc_loss` on new and remembered items; cross-entropy alone without an old model.

    Args:
        slots, namespace, normalize, scale, margin: of `Simplex`.
        lambda_, mu, negatives, anchor, group: of `hoc_loss`; with a group, negatives come from all its processes.

    Raises:
        TypeError, ValueError: an option is out of range.

    Reference:
        arXiv 2405.02581.
    """

    def __init__(
        self,
        slots: SlotRegistry,
        namespace: str = "default",
        *,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        lambda_: float = 0.1,
        mu: float = 10.0,
        negatives: str = "zero_mask",
        anchor: str = "old",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(slots, namespace, normalize=normalize, scale=scale, margin=margin)
        check_share("lambda_", lambda_)
        check_contrast_options(mu, negatives, anchor)
        self.lambda_ = lambda_
        self.mu = mu
        self.negatives = negatives
        self.anchor = anchor
        self.group = group

    def loss(self, model: EmbeddingModel, input: Tensor, target: Tensor, old: EmbeddingModel | None) -> Tensor:
        if old is None:
            return super().loss(model, input, target, old)
        with torch.no_grad():
            reference = old(input)
        return model.head.hoc_loss(  # type: ignore[no-any-return, operator]
            model.backbone(input),
            reference,
            self._slots(target),
            lambda_=self.lambda_,
            mu=self.mu,
            negatives=self.negatives,
            anchor=self.anchor,
            group=self.group,
        )
