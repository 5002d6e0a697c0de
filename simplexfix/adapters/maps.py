"""The maps in adapters, from features of any norm to unit rows.  n(x) = x / |x|."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .._reference import unit_rows

__all__ = ["AffineMap", "LocalMap", "LowRankMap", "ResidualMap", "unit"]

_ROWS = 1024  # queries per chunk, to bound the memory of their [rows, M] weights


def unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Divides rows by their L2 norm, in float64, since the square of 1e20 overflows float32; a zero row stays zero."""
    return unit_rows(rows.double()).to(dtype)


class AffineMap(nn.Module):
    """[B, f] features -> [B, d] unit rows: n(n(x) W + b).

    Args:
        weight: [f, d].
        bias: [d]; None for zero.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", weight.new_zeros(weight.shape[1]) if bias is None else bias)
        self.in_features, self.out_features = weight.shape

    def forward(self, features: Tensor) -> Tensor:
        x = unit(features, self.weight.dtype)
        return normalize(x @ self.weight + self.bias, dim=-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class LowRankMap(nn.Module):
    """[B, f] features -> [B, d] unit rows: n(n(x) D U + b).

    Args:
        down: [f, r].
        up: [r, d].
        bias: [d].
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down.contiguous())
        self.register_buffer("up", up.contiguous())
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = len(down), up.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        x = unit(features, self.down.dtype)
        return normalize(x @ self.down @ self.up + self.bias, dim=-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.up.shape[0]}"


class ResidualMap(nn.Module):
    """[B, f] features -> [B, d] unit rows: n(p + gelu(p H + c) U), p = n(x) W + b.

    Args:
        weight: [f, d]; bias: [d].
        hidden: [d, h]; hidden_bias: [h].
        up: [h, d].
    """

    weight: Tensor
    bias: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    up: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, hidden: Tensor, hidden_bias: Tensor, up: Tensor) -> None:
        super().__init__()
        for name, value in (
            ("weight", weight), ("bias", bias), ("hidden", hidden), ("hidden_bias", hidden_bias), ("up", up),
        ):  # fmt: skip
            self.register_buffer(name, value.contiguous())
        self.in_features, self.out_features = weight.shape

    def forward(self, features: Tensor) -> Tensor:
        return self.corrected(unit(features, self.weight.dtype) @ self.weight + self.bias)

    def corrected(self, p: Tensor) -> Tensor:
        """Maps p of the equation, [B, d], to unit rows [B, d]."""
        return normalize(p + nn.functional.gelu(p @ self.hidden + self.hidden_bias) @ self.up, dim=-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, hidden={self.up.shape[0]}"


class LocalMap(AffineMap):
    """[B, f] features -> [B, d] unit rows: n(p + softmax(p keys^T) values), p = n(n(x) W + b).

    Args:
        weight: [f, d]; bias: [d].
        keys: [M, d] p of fitted items, times the scale; values: [M, d] their errors, times beta (`LocalCorrection`).
    """

    keys: Tensor
    values: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, keys: Tensor, values: Tensor) -> None:
        super().__init__(weight, bias)
        self.register_buffer("keys", keys.contiguous())
        self.register_buffer("values", values.contiguous())

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([self._corrected(p) for p in torch.split(super().forward(features), _ROWS)])

    def _corrected(self, p: Tensor) -> Tensor:
        return normalize(p + torch.softmax(p @ self.keys.T, 1) @ self.values, dim=-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={len(self.keys)}"
