"""The old model of a training step: the deployed version, with stored embeddings and denoising as options."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..models import EmbeddingModel

__all__ = ["OldModel", "class_means", "denoised"]


class OldModel(EmbeddingModel):
    """The deployed version as the `old` argument of a method's loss.

    Stored embeddings of remembered rows are used instead of computed ones.  Computed ones are `denoised` if `means` are
    given.

    Args:
        deployed: the deployed version, in evaluation mode.
        denoise: eta of `denoised`, in [0, 1].
        means: [C, d] class means of the deployed version's embeddings; None for no denoising.
    """

    def __init__(self, deployed: EmbeddingModel, denoise: float, means: Tensor | None) -> None:
        super().__init__(
            deployed.backbone, deployed.head, preprocessing=deployed.preprocessing, rotation=deployed.rotation
        )
        self.denoise = denoise
        self.means = None if means is None else means.to(next(deployed.parameters()).device)
        self.eval()
        self.set_batch(torch.empty(0), None)

    def set_batch(self, target: Tensor, remembered: Tensor | None) -> None:
        """Sets the class ids [B] of the next batch, and the stored embeddings of its last rows, or None."""
        self.target = target
        self.remembered = remembered

    def forward(self, input: Tensor) -> Tensor:
        """Returns the embeddings [B, d] of inputs [B, ...]; the last rows are the stored embeddings, if any."""
        rows = len(input) - (0 if self.remembered is None else len(self.remembered))
        new = super().forward(input[:rows])
        if self.means is not None:
            new = denoised(new, self.target[:rows], self.means, self.denoise)
        return new if self.remembered is None else torch.cat([new, self.remembered.to(new)])


def class_means(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns means [classes, ...] of rows [N, ...] by class, summed in float64; 0 for a class without rows."""
    sums = torch.zeros(classes, *rows.shape[1:], dtype=torch.float64).index_add_(0, labels, rows.double())
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return (sums / counts.view(-1, *[1] * (rows.ndim - 1))).to(rows)


def denoised(rows: Tensor, labels: Tensor, means: Tensor, denoise: float) -> Tensor:
    """Moves unit rows towards the means of their classes.

        n((1 - eta) n(u_i) + eta m_{y_i})        n(v) = v / |v|

    Args:
        rows: u, [N, ..., d].
        labels: y, [N] int64 class ids.
        means: m, [C, ..., d].
        denoise: eta, in [0, 1]; 0 changes nothing.

    Returns:
        [N, ..., d] unit rows in the dtype of `means`.
    """
    unit = normalize(rows.to(means.dtype), dim=-1)
    return normalize(torch.lerp(unit, means[labels], denoise), dim=-1)
