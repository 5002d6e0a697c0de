"""Makes `simplexfix/data/omniglot.npz` from the two small background sets of Omniglot.

    python tools/pack_omniglot.py images_background_small1.zip images_background_small2.zip

The zips are published in https://github.com/brendenlake/omniglot under `python/`. The same zips give
the same file, byte for byte (with the same zlib).
"""

from __future__ import annotations

import argparse
import io
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DATA = Path(__file__).resolve().parent.parent / "simplexfix" / "data"
DRAWERS = 20
SIDE_IN, SIDE_OUT = 105, 28

# A reduced pixel covers 3.75 x 3.75 original ones: 15 x 15 cells when each original is cut in 4 x 4.
CUT, BLOCK = 4, 15
# Ink on at least 2/5 of that area. Strokes are 2 to 3 original pixels wide, so a stroke that crosses a
# pixel passes, and one that grazes it does not; no drawing of a sample of 120 was broken into pieces.
LEAST_INK = 2 * BLOCK * BLOCK // 5

MEMBER = re.compile(r"[^/]+/(?P<alphabet>[^/]+)/(?P<character>character\d+)/\d+_(?P<drawer>\d+)\.png")

LICENSE = """\
omniglot.npz is made by tools/pack_omniglot.py from python/images_background_small1.zip and
python/images_background_small2.zip of https://github.com/brendenlake/omniglot: the drawings were
reduced from 105 x 105 to 28 x 28 pixels and bit-packed. If you use them, please cite

    Lake, B. M., Salakhutdinov, R., and Tenenbaum, J. B. (2015). Human-level concept learning
    through probabilistic program induction. Science, 350(6266), 1332-1338.

The MIT License (MIT)

Copyright (c) 2015 Brenden Lake

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

# (alphabet, character) -> drawer 1..20 -> the PNG as stored
Drawings = dict[tuple[str, str], dict[int, bytes]]


def read_zips(paths: Sequence[Path]) -> Drawings:
    """Returns every drawing of the zips once; a drawing that two zips hold must be the same in both."""
    drawings: Drawings = defaultdict(dict)
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                member = MEMBER.fullmatch(name)
                if member is None:
                    continue
                drawers = drawings[member["alphabet"], member["character"]]
                png = archive.read(name)
                if drawers.setdefault(int(member["drawer"]), png) != png:
                    raise ValueError(f"{path}: {name} differs from the drawing of that name in another zip")
    for (alphabet, character), drawers in drawings.items():
        if sorted(drawers) != list(range(1, DRAWERS + 1)):
            raise ValueError(f"{alphabet}/{character}: expected drawers 1..{DRAWERS}, got {sorted(drawers)}")
    return drawings


def decode_ink(png: bytes) -> NDArray[np.bool_]:
    """Returns the ink of a 105 x 105 one-bit PNG, black on white: bool [105, 105]."""
    with Image.open(io.BytesIO(png)) as image:
        if image.mode != "1" or image.size != (SIDE_IN, SIDE_IN):
            raise ValueError(
                f"expected a one-bit image of {SIDE_IN} x {SIDE_IN}, got mode {image.mode}, size {image.size}"
            )
        return ~np.asarray(image, dtype=np.bool_)


def reduce_drawing(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Averages the ink [105, 105] exactly over the area of each of 28 x 28 pixels, and thresholds it."""
    cells = ink.repeat(CUT, axis=0).repeat(CUT, axis=1)
    inked = cells.reshape(SIDE_OUT, BLOCK, SIDE_OUT, BLOCK).sum(axis=(1, 3))
    return np.asarray(inked >= LEAST_INK)


def pack(paths: Sequence[Path]) -> bytes:
    """Returns the content of `omniglot.npz`, from the zips at `paths`."""
    drawings = read_zips(paths)
    names = sorted(drawings)
    alphabets = sorted({alphabet for alphabet, _ in names})
    images = np.stack(
        [[reduce_drawing(decode_ink(drawings[name][drawer])) for drawer in range(1, DRAWERS + 1)] for name in names]
    )
    buffer = io.BytesIO()
    np.savez_compressed(  # dates every member 1980-01-01, so that equal arrays give equal bytes
        buffer,
        bits=np.packbits(images.reshape(len(names), DRAWERS, SIDE_OUT * SIDE_OUT), axis=-1),
        alphabet_of=np.array([alphabets.index(alphabet) for alphabet, _ in names], dtype=np.int64),
        alphabets=np.array(alphabets),
        characters=np.array([f"{alphabet}/{character}" for alphabet, character in names]),
    )
    return buffer.getvalue()


def write_beside(path: Path, content: bytes) -> None:
    """Replaces the file at `path` atomically."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack the two small background sets of Omniglot.")
    parser.add_argument("zips", nargs=2, type=Path, metavar="ZIP", help="images_background_small{1,2}.zip")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    content = pack(arguments.zips)
    write_beside(arguments.out / "omniglot.npz", content)
    write_beside(arguments.out / "omniglot-LICENSE.txt", LICENSE.encode())
    print(f"{arguments.out / 'omniglot.npz'}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
