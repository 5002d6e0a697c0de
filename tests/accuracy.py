"""The error bound of tests: at most twice the error of the naive computation in the same dtype, plus a floor.

All floors are defined here.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Floors relative to the largest finite value of the truth, for cases where the naive computation happens to be exact.
# float64 has no wider reference: its floor covers the rounding of a row's sums.
FLOORS = {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_accurate(ours: Tensor, naive: Tensor, truth: Tensor, *, what: str = "result") -> None:
    """Compares element by element; errors are relative to the largest finite value of the truth.

    `naive` is the naive computation in the dtype of `ours`; `truth` is float64.
    """
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, expected {list(truth.shape)}"
    o, n, t = ours.double(), naive.double(), truth.double()
    assert torch.equal(o.isnan(), t.isnan()), f"{what}: nan at {(o.isnan() != t.isnan()).nonzero()[:3].tolist()}"
    o, n, t = (x.nan_to_num(0.0) for x in (o, n, t))
    if not t.numel():
        return
    size = t.abs().max()
    allowed = 2 * (n - t).abs().max() + FLOORS[ours.dtype] * size
    error = (o - t).abs()
    worst = int(error.argmax())
    assert error.max() <= allowed, (
        f"{what}: at flat index {worst} ours {o.flatten()[worst]:.9g}, naive {n.flatten()[worst]:.9g}, "
        f"truth {t.flatten()[worst]:.9g}; error {error.max():.3g} > {allowed:.3g}"
    )


def features(kind: str, rows: int, d: int, *, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Returns [rows, d] features of one of the distributions KINDS."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    if kind == "heavy tail":
        z = z / torch.rand(rows, d, generator=generator, dtype=torch.float64).clamp_min(1e-2)
    elif kind == "one-hot":
        z = torch.zeros_like(z).scatter_(1, torch.randint(d, (rows, 1), generator=generator), 20.0)
    elif kind == "near-duplicates":
        z = z[:1] + 1e-3 * z
    elif kind == "confident":  # each row is 30 times a coordinate axis, plus noise
        z = 1e-2 * z
        z[torch.arange(rows), torch.arange(rows) % d] += 30.0
    elif kind == "offset":  # a large common offset, which the simplex logits cancel
        z = z + 100.0
    elif kind != "normal":
        raise ValueError(kind)
    return z.to(dtype)


KINDS = ("normal", "heavy tail", "one-hot", "near-duplicates", "confident", "offset")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
