"""Checks of what users pass: every message says the name, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

# Names of options and the numbers by which the native operators know them.
MARGINS = {"cosine": 1, "angular": 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NEGATIVES = {"zero_mask": 0, "remove": 1, "infonce": 2}

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_features(name: str, z: Tensor) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(z).__name__}")
    if z.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {z.dtype}; cast it, e.g. {name}.float()"
        )
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., d] with d >= 1, got {shape(z)}")


def check_pair(name: str, first: Tensor, other_name: str, other: Tensor) -> None:
    if first.dtype != other.dtype:
        raise TypeError(f"{name} and {other_name} must have the same dtype, got {first.dtype} and {other.dtype}")
    if first.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on the same device, got {first.device} and {other.device}")


def check_target(target: Tensor, z: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(
            f"target must be int64, got {target.dtype}; class ids are integers from end to end: target.long()"
        )
    if target.shape != z.shape[:-1]:
        raise ValueError(
            f"target must have shape {list(z.shape[:-1])} to go with features {shape(z)}, got {shape(target)}"
        )
    if target.device != z.device:
        raise ValueError(f"target must be on {z.device} like the features, got {target.device}")


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_scale(scale: float) -> None:
    check_positive("scale", scale)


def check_name(name: str, value: str, expected: Iterable[str]) -> None:
    names = list(expected)
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}")


def check_margin(margin: tuple[str, float] | None, normalize: bool) -> None:
    if margin is None:
        return
    if not isinstance(margin, tuple) or len(margin) != 2:
        raise TypeError(f'margin must be None or a pair such as ("cosine", 0.35), got {margin!r}')
    kind, size = margin
    check_name("margin", kind, MARGINS)
    if not normalize:
        raise ValueError("margin needs normalize=True: it is a margin on cosines")
    if not 0 <= size <= (math.pi if kind == "angular" else 2):
        raise ValueError(f"margin of kind {kind!r} must lie in [0, {'pi' if kind == 'angular' else '2'}], got {size}")


def check_loss_options(
    z: Tensor,
    target: Tensor,
    slots: int,
    normalize: bool,
    scale: float,
    margin: tuple[str, float] | None,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    check_target(target, z)
    check_scale(scale)
    check_name("reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    check_margin(margin, normalize)
    if weight is not None:
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating, got {weight.dtype}")
        if weight.shape != (slots,):
            raise ValueError(f"weight must have shape [{slots}], one factor per slot, got {shape(weight)}")
        if weight.device != z.device:
            raise ValueError(f"weight must be on {z.device} like the features, got {weight.device}")


def check_codes(codes: Tensor, d: int, z: Tensor | None = None) -> None:
    """Bit tables of cube vertices in d dimensions; on the device of z."""
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes must be a torch.Tensor, got {type(codes).__name__}")
    if codes.dtype != torch.int64:
        raise TypeError(f"codes must be int64, got {codes.dtype}; simplexfix.polytopes.cube_codes makes them")
    if codes.ndim != 2 or codes.shape[1] != -(-d // 64) or not len(codes):
        raise ValueError(f"codes must have shape [C, {-(-d // 64)}] for d = {d}, C >= 1, got {shape(codes)}")
    if z is not None and codes.device != z.device:
        raise ValueError(f"codes must be on {z.device} like the features, got {codes.device}")
