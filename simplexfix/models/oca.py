"""The head of OCA: each version adds dimensions, and the leading ones stay compatible with older versions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

__all__ = ["ROTATIONS", "OCAHead", "OCAObjective"]

ROTATIONS = ("none", "orthogonal", "orthogonal_bias")


class OCAObjective(nn.Module):
    """Training-only parts of `simplexfix.methods.oca_loss`; deployed models do not have them.

    Args:
        embedding_dim: d, width of the embeddings.
        num_classes: C, number of classes.
        prefix: width of the old version's embeddings; None without an old version, and then there is no rotation.
        rotation: "orthogonal", "orthogonal_bias" or "none".

    Attributes:
        classifier: linear layer with weight W [C, d], without bias.
        rotation: None, or a linear layer with an orthogonal weight Q [d, d], initially the identity.
        prototypes: None, or the buffer P [C, prefix], zero until `OCA.read_old` sets it.
    """

    prototypes: Tensor | None

    def __init__(self, embedding_dim: int, num_classes: int, *, prefix: int | None, rotation: str) -> None:
        super().__init__()
        self.classifier = nn.Linear(embedding_dim, num_classes, bias=False)
        self.rotation: nn.Module | None = None
        if prefix is not None and rotation != "none":
            made = nn.Linear(embedding_dim, embedding_dim, bias=rotation == "orthogonal_bias")
            nn.init.eye_(made.weight)
            if made.bias is not None:
                nn.init.zeros_(made.bias)
            # torch's default, matrix_exp, takes 12 times as long: 133 ms per step at d = 320 on one thread
            self.rotation = orthogonal(made, orthogonal_map="cayley")
        self.register_buffer("prototypes", None if prefix is None else torch.zeros(num_classes, prefix))


class OCAHead(nn.Module):
    """A learnable junction; its leading output dimensions are trained to search galleries of older versions.

        embed(features) = features @ A.T                # A [d, in_features]: the junction's weight

    Args:
        in_features: width of the backbone's features.
        embedding_dim: d, number of rows of A.
        ancestors: (fingerprint, width) of each older version, oldest first.  The leading `width` dimensions of the
            embeddings search that version's gallery.

    Attributes:
        objective: training-only parts, or None; embeddings and model folders do not need them.

    Raises:
        ValueError: a width is not positive, or an ancestor is wider than the embeddings.
    """

    def __init__(self, in_features: int, embedding_dim: int, *, ancestors: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__()
        if in_features < 1 or embedding_dim < 1:
            raise ValueError(f"in_features and embedding_dim must be positive, got {in_features} and {embedding_dim}")
        self.junction = nn.Linear(in_features, embedding_dim, bias=False)
        self.ancestors = _checked(ancestors, embedding_dim)
        self.objective: OCAObjective | None
        self.register_module("objective", None)

    @property
    def embedding_dim(self) -> int:
        return self.junction.out_features

    def embed(self, features: Tensor) -> Tensor:
        """Returns the embeddings [B, d] of features [B, in_features], not normalised."""
        return self.junction(features)  # type: ignore[no-any-return]

    @torch.no_grad()
    def widen(self, embedding_dim: int, ancestors: Sequence[tuple[str, int]]) -> None:
        """Adds newly initialised rows to A until there are `embedding_dim`; existing rows do not change.

        Args:
            embedding_dim: new d, at least the present one.
            ancestors: (fingerprint, width) of each older version, oldest first.

        Raises:
            ValueError: A has more rows already, or an ancestor is wider than the embeddings.
        """
        old = self.junction
        if embedding_dim < old.out_features:
            raise ValueError(
                f"the head gives {old.out_features} dimensions and cannot shrink to {embedding_dim}, those of the old "
                "version and the extra ones; begin with a new head"
            )
        self.ancestors = _checked(ancestors, embedding_dim)
        if embedding_dim > old.out_features:
            self.junction = nn.Linear(old.in_features, embedding_dim, bias=False).to(old.weight)
            self.junction.weight[: old.out_features] = old.weight

    def extra_repr(self) -> str:
        return f"ancestors={[width for _, width in self.ancestors]}"


def _checked(ancestors: Sequence[tuple[str, int]], embedding_dim: int) -> tuple[tuple[str, int], ...]:
    for _, width in ancestors:
        if not 1 <= width <= embedding_dim:
            raise ValueError(
                f"widths of ancestors must lie in [1, {embedding_dim}], the width of the embeddings, got {width}"
            )
    return tuple((str(fingerprint), int(width)) for fingerprint, width in ancestors)
