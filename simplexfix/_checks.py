"""Argument checks; each message names the argument, the expected value and the given value."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from numbers import Real
from typing import SupportsIndex, cast

import torch
from torch import Tensor

from ._native import is_readable

# Option names and their codes in the compiled operators; an anchor has no code.
MARGINS = {"cosine": 1, "angular": 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NEGATIVES = {"zero_mask": 0, "remove": 1, "infonce": 2}
ANCHORS = ("old", "new", "symmetric")

_TINY, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}; pass {name}.to_dense()")


def check_integer(name: str, value: SupportsIndex) -> int:
    """Returns an integer of Python, NumPy or another library as an int.

    Raises:
        TypeError: `value` is not an integer.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return cast(int, value)
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, (float, int, Real)):  # float and int first: checking the abstract class is slower
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_features(name: str, z: Tensor) -> None:
    check_tensor(name, z)
    if z.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {z.dtype}; cast it, e.g. {name}.float()"
        )
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., d] with d >= 1, got {shape(z)}")


def check_rows(name: str, rows: Tensor) -> None:
    check_features(name, rows)
    if rows.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got {shape(rows)}")


def check_pair(name: str, first: Tensor, other_name: str, other: Tensor) -> None:
    if first.dtype != other.dtype:
        raise TypeError(f"{name} and {other_name} must have the same dtype, got {first.dtype} and {other.dtype}")
    if first.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on the same device, got {first.device} and {other.device}")


def check_new_and_old(name: str, new: Tensor, old: Tensor) -> None:
    """Checks features of the same items by two models; `name` is the argument name of the new ones."""
    check_rows(name, new)
    check_rows("old", old)
    check_pair(name, new, "old", old)
    if new.shape != old.shape:
        raise ValueError(f"{name} and old must have the same shape, got {shape(new)} and {shape(old)}")


def check_target(target: Tensor, z: Tensor) -> None:
    check_tensor("target", target)
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
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if not _TINY <= value <= _LARGEST:
        raise ValueError(f"{name} must lie between {_TINY:.1e} and {_LARGEST:.1e}, the range of float32, got {value}")


def check_scale(scale: float) -> None:
    check_positive("scale", scale)


def check_name(name: str, value: str, expected: Collection[str]) -> None:
    if not isinstance(value, str) or value not in expected:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, expected))}, got {value!r}")


def check_margin(margin: tuple[str, float] | None, normalize: bool) -> None:
    if margin is None:
        return
    if not isinstance(margin, tuple) or len(margin) != 2:
        raise TypeError(f'margin must be None or a pair such as ("cosine", 0.35), got {margin!r}')
    kind, size = margin
    check_name("margin", kind, MARGINS)
    if not normalize:
        raise ValueError("margin needs normalize=True: it is a margin on cosines")
    check_number("margin's size", size)
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
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    check_target(target, z)
    check_scale(scale)
    check_name("reduction", reduction, REDUCTIONS)
    check_integer("ignore_index", ignore_index)
    check_fraction("label_smoothing", label_smoothing)
    check_margin(margin, normalize)
    if weight is not None:
        check_tensor("weight", weight)
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating, got {weight.dtype}")
        if weight.shape != (slots,):
            raise ValueError(f"weight must have shape [{slots}], one factor per slot, got {shape(weight)}")
        if weight.device != z.device:
            raise ValueError(f"weight must be on {z.device} like the features, got {weight.device}")


def check_contrast_options(mu: float, negatives: str, anchor: str) -> None:
    check_positive("mu", mu)
    check_name("negatives", negatives, NEGATIVES)
    check_name("anchor", anchor, ANCHORS)


def check_fraction(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_codes(codes: Tensor, d: int, z: Tensor | None = None) -> None:
    """Checks the bit table of cube vertices in d dimensions; it must be on the device of z."""
    check_tensor("codes", codes)
    if codes.dtype != torch.int64:
        raise TypeError(f"codes must be int64, got {codes.dtype}; simplexfix.polytopes.cube_codes makes them")
    if codes.ndim != 2 or codes.shape[1] != -(-d // 64) or not len(codes):
        raise ValueError(f"codes must have shape [C, {-(-d // 64)}] for d = {d}, C >= 1, got {shape(codes)}")
    if z is not None and codes.device != z.device:
        raise ValueError(f"codes must be on {z.device} like the features, got {codes.device}")


def check_bits(codes: Tensor, d: int, rows: Tensor | None = None) -> None:
    """Raises ValueError if codes [n, ceil(d / 64)] have bits beyond d; skipped where reading would synchronize.

    `rows` [n] holds the row numbers for the message; None if they are 0 .. n - 1.
    """
    if d % 64 == 0 or not is_readable(codes):
        return
    beyond = codes[:, -1] >> (d % 64) != 0
    if beyond.any():
        row = int(beyond.nonzero()[0])
        row = row if rows is None else int(rows[row])
        raise ValueError(
            f"row {row} of codes has bits beyond d = {d}: make the codes with cube_codes(num_classes, {d})"
        )
