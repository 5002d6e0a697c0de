"""Omniglot: handwritten characters of eight alphabets, shipped inside the package."""

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
        images: uint8 [242, 20, 28, 28], ink 1 and paper 0. Drawing `n` of every character of one
            alphabet is by the same person; other alphabets were drawn by other people.
        alphabet_of: int64 [242], the position of each character's alphabet in `alphabets`.
        alphabets: the 8 names, sorted.
        characters: the 242 names, `"Greek/character01"`, sorted.
    """

    images: NDArray[np.uint8]
    alphabet_of: NDArray[np.int64]
    alphabets: tuple[str, ...]
    characters: tuple[str, ...]


def load_omniglot() -> Omniglot:
    """The two small background sets of Omniglot, at 28 x 28 pixels.

    They were reduced from 105 x 105 by `tools/pack_omniglot.py`. MIT License, Copyright (c) 2015
    Brenden Lake; the notice is in `omniglot-LICENSE.txt`, beside the data.

    Returns:
        A fresh `Omniglot`: its arrays are the caller's own.

    Reference:
        Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program
        induction", Science 350, 2015. https://github.com/brendenlake/omniglot
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
