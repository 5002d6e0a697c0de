"""The definition of exact search in plain NumPy, with the same bits as the kernels, and difficult galleries.

Codes are rows rounded to eight bits, with which a search finds candidates (csrc/cpu/gallery_codes.h).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def _total(products_of: Iterator[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sums eight partial sums, one for each j mod 8, in a fixed order: docs/design/numerics.md."""
    s = sum(products_of)
    return ((s[..., 0] + s[..., 4]) + (s[..., 2] + s[..., 6])) + ((s[..., 1] + s[..., 5]) + (s[..., 3] + s[..., 7]))


def _in_eights(rows: Floats) -> NDArray[np.float64]:
    return np.pad(rows.astype(np.float64), ((0, 0), (0, -rows.shape[1] % 8)))


def unit(rows: Floats) -> Floats:
    x = _in_eights(rows)
    norm = np.sqrt(_total(x[:, j : j + 8] ** 2 for j in range(0, x.shape[1], 8)))[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, rows / norm, 0.0).astype(np.float32)


def to_bfloat16(rows: Floats) -> Floats:
    """Rounds to bfloat16 (nearest, ties to even) and returns float32."""
    bits = rows.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def definition(
    query: Floats, gallery: Floats, k: int, ids: NDArray[np.int64] | None = None, dtype: str = "float32"
) -> tuple[Floats, NDArray[np.int64]]:
    """Returns scores and ids [Q, k] by the definition: every score, then one sort.

    Places beyond the last row have score -inf and id -1.
    """
    g = unit(gallery)
    q8, g8 = _in_eights(unit(query)), _in_eights(to_bfloat16(g) if dtype == "bfloat16" else g)
    scores = np.full((len(query), k), -np.inf, dtype=np.float32)
    found = np.full((len(query), k), -1, dtype=np.int64)
    names = np.arange(len(gallery)) if ids is None else ids
    if len(gallery) == 0:
        return scores, found
    for i, row in enumerate(q8):
        s = _total(row[j : j + 8] * g8[:, j : j + 8] for j in range(0, len(row), 8)).astype(np.float32)
        order = np.lexsort((names, -s))[:k]
        scores[i, : len(order)], found[i, : len(order)] = s[order], names[order]
    return scores, found


GALLERIES = (
    "normal", "one-hot", "duplicates", "one row", "clusters 1e-2", "clusters 1e-4", "clusters 1e-7", "one cluster",
    "a crowd and others", "numbers of all sizes", "rows of all sizes", "denormals", "spike", "zeros", "rising",
    "falling", "runs", "signs", "heavy tail",
)  # fmt: skip


# (d, n). d: less than a group of four codes, whole vectors, vectors with tails. n: one task, several tasks, and splits
# that fill their candidate lists.
SIZES = [(1, 1300), (3, 5000), (8, 700), (63, 9000), (64, 4097), (129, 3000), (1023, 1500)]


def hard_gallery(kind: str, n: int, d: int, rng: np.random.Generator) -> Floats:
    """Returns rows with loose bounds, equal or nearly equal scores, or numbers at the ends of their range."""
    z = rng.standard_normal((n, d)).astype(np.float32)
    if kind == "normal":
        return z
    if kind == "one-hot":  # factors -1, 1 and 2 per direction: many exact ties, and only scores of 0, 1 and -1
        return np.eye(d, dtype=np.float32)[rng.integers(0, d, n)] * rng.choice([-1, 1, 2], (n, 1)).astype(np.float32)
    if kind == "duplicates":
        return z[rng.integers(0, max(1, n // 50), n)]
    if kind == "one row":
        return np.repeat(z[:1], n, 0)
    if kind.startswith("clusters"):  # gaps below the resolution of codes, then of float32
        return z[rng.integers(0, min(n, 7), n)] + np.float32(kind.split()[1]) * z
    if kind == "one cluster":
        return z[:1] + np.float32(1e-4) * z
    if kind == "a crowd and others":  # most rows lie near one row, the others do not
        return np.where(rng.random((n, 1)) < 0.9, z[:1] + np.float32(0.1) * z, z)
    if kind == "numbers of all sizes":
        return (z * 10.0 ** rng.uniform(-30, 30, (n, d))).clip(-1e38, 1e38).astype(np.float32)
    if kind == "rows of all sizes":
        return (z * 10.0 ** rng.uniform(-40, 37, (n, 1))).astype(np.float32)
    if kind == "denormals":
        return z * np.float32(1e-41)
    if kind == "spike":  # in four of five rows one number determines the scale of the code
        z[np.arange(n) % 5 > 0, 0] = 1e20
        return z
    if kind == "zeros":
        z[::3] = 0
        return z
    # each row is nearer to row 0 than those before, or farther: the cutoff always or never changes
    if kind in ("rising", "falling"):
        near = np.linspace(0, 1, n, dtype=np.float32)[:: 1 if kind == "rising" else -1, None]
        return (1 - near) * z + near * z[:1] * 3
    if kind == "runs":  # runs of 64 similar rows, repeated every 1024 rows: no sample is representative
        return z[np.arange(n) // 64 % 16] + np.float32(0.1) * z
    if kind == "signs":
        return rng.integers(-1, 2, (n, d)).astype(np.float32)
    if kind == "heavy tail":
        return (z / (np.abs(rng.standard_normal((n, d))) + 1e-6)).astype(np.float32)
    raise ValueError(kind)


def queries_for(gallery: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Returns rows of the gallery, rows near some, random rows, the opposite of row 0, and a zero row."""
    n, d = gallery.shape
    rows = unit(gallery)
    third = count // 3
    near = rows[rng.integers(0, n, third)] + np.float32(1e-3) * rng.standard_normal((third, d)).astype(np.float32)
    others = rng.standard_normal((count - 2 * third - 2, d)).astype(np.float32)
    picked = gallery[rng.integers(0, n, third)]
    return np.concatenate([picked, near, others, -rows[:1], np.zeros((1, d), np.float32)])
