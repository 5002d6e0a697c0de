"""A page that searches handwritten characters by a drawing, while the model behind it is replaced.

python examples/photo_search prepare [--folder DIR] [--steps N]
python examples/photo_search serve [--folder DIR] [--host HOST] [--port PORT]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prepare import prepare
from server import serve


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="photo_search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("prepare", help="train two versions, and fill a gallery with the vectors of the first")
    run = actions.add_parser("serve", help="serve the page until Ctrl-C")
    for action in (make, run):
        action.add_argument("--folder", type=Path, default=Path("photo-search"), help="(default: photo-search)")
    make.add_argument("--steps", type=int, default=80, help="of the first version; the second takes four times as many")
    run.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine alone)")
    run.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    a = parser.parse_args()
    if a.action == "prepare":
        prepare(a.folder, a.steps)
    elif not (a.folder / "gallery").is_dir():
        parser.error(f"{a.folder} has no gallery: run `prepare` with the same --folder first")
    else:
        serve(a.folder, a.host, a.port)


if __name__ == "__main__":
    main()
