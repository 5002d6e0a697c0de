"""Omniglot: handwritten characters of eight alphabets, included in the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIDE = 28


@dataclass(frozen=True, eq=False)
class Omniglot:
    """Drawings of 242 characters by 20 people each.

    Attributes:
        images: [242, 20, 28, 28] uint8, ink 1 and paper 0.  Drawings with the same second index in one alphabet are by
            the same person; different alphabets have different people.
        alphabet_of: [242] int64, index of each character's alphabet in `alphabets`.
        alphabets: the 8 names, sorted.
        characters: the 242 names, such as `"Greek/character01"`, sorted.
    """

    images: NDArray[np.uint8]
    alphabet_of: NDArray[np.int64]
    alphabets: tuple[str, ...]
    characters: tuple[str, ...]


def load_omniglot() -> Omniglot:
    """Reads the two small background sets of Omniglot at 28 x 28 pixels.

    `tools/pack_omniglot.py` reduced the images from 105 x 105 pixels.  MIT License, Copyright (c) 2015 Brenden Lake;
    the notice is in `omniglot-LICENSE.txt`, beside the data.

    Returns:
        A new `Omniglot`; the caller may change its arrays.

    Reference:
        Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program
        induction", Science 350, 2015. https://github.com/brendenlake/omniglot

    Example:
        >>> from simplexfix.data import load_omniglot
        >>> drawings = load_omniglot()
        >>> drawings.images.dtype, len(drawings.alphabets) > 1
        (dtype('uint8'), True)
    """
    with np.load(Path(__file__).with_name("omniglot.npz"), allow_pickle=False) as file:
        bits: NDArray[np.uint8] = file["bits"]
        images = np.unpackbits(bits, axis=-1, count=SIDE * SIDE)
        return Omniglot(
            images=images.reshape(*bits.shape[:2], SIDE, SIDE),
            alphabet_of=file["alphabet_of"],
            alphabets=tuple(file["alphabets"].tolist()),
            characters=tuple(file["characters"].tolist()),
        )
