"""Creates, fills, searches and upgrades a gallery.

The exit code is 1 if a backfill leaves stale rows or `add` cannot read images, 2 on bad input or an error of the store,
and 0 otherwise.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import read_text, write_whole
from .._text import printable
from ..compatibility import GateResult
from ..gallery import Gallery, StoreError
from ..labelled import load_vectors
from ..models import ModelIdentity
from ._embedder import Embedder
from ._gallery_inputs import (
    PATH,
    FileRows,
    FolderImages,
    embedded_images,
    image_items,
    image_names,
    is_images,
    payloads,
    read_table,
)
from ._gallery_text import status_text
from ._models import read_model
from ._progress import counted

INCOMPLETE, BAD_INPUT = 1, 2
_SECONDS = 1.0  # shortest time between two reads of the gallery's progress


def run(arguments: argparse.Namespace) -> int:
    try:
        result = _ACTIONS[arguments.action](arguments)
    except (ValueError, TypeError, KeyError, StoreError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"simplexfix gallery {arguments.action}: {printable(str(text))}", file=sys.stderr)
        return BAD_INPUT
    print(json.dumps(result, indent=1) if arguments.json else _text(arguments, result))
    left = {"add": "unreadable", "backfill": "stale"}.get(arguments.action)
    return INCOMPLETE if left is not None and result[left] else 0


def _create(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.create(
        arguments.url,
        model=read_model(arguments.model),
        threshold=arguments.threshold,
        count_traffic=arguments.count_traffic,
    ) as gallery:
        return gallery.status()


def _add(arguments: argparse.Namespace) -> dict[str, Any]:
    embedder, model = _model(arguments)
    with Gallery.open(arguments.url) as gallery:
        if embedder is not None and is_images(arguments.inputs):
            return _add_images(gallery, arguments, embedder)
        rows = FileRows(arguments.vectors or arguments.inputs, embedder)
        payload = None if arguments.payload is None else read_table(arguments.payload)
        gallery.add(rows.ids, rows.all_vectors(), model=model, payload=payload)
        return {"added": len(rows.ids), "there": 0, "unreadable": [], "rows": gallery.status()["rows"]}


def _add_images(gallery: Gallery, arguments: argparse.Namespace, embedder: Embedder) -> dict[str, Any]:
    """Adds the images in batches; after an error or Ctrl-C the batches before it stay in the gallery."""
    items, there = image_items(gallery, arguments.inputs, arguments.payload)
    images, added = FolderImages(arguments.inputs, embedder, _complain), 0
    with counted(sys.stderr, "add", len(items)) as show:
        for begin in range(0, len(items), arguments.batch):
            batch = items[begin : begin + arguments.batch]
            kept, vectors = images.embed([item.payload[PATH] for item in batch])
            ids, payload = [batch[at].id for at in kept], [batch[at].payload for at in kept]
            gallery.add(ids, vectors, model=embedder.identity, payload=payload)
            added += len(kept)
            show(begin + len(batch))
    return {"added": added, "there": there, "unreadable": images.unreadable, "rows": gallery.status()["rows"]}


def _search(arguments: argparse.Namespace) -> dict[str, Any]:
    embedder, model = _model(arguments)
    where = None if arguments.where is None else _parsed(arguments.where, "--where")
    with Gallery.open(arguments.url) as gallery:
        names, queries = _queries(arguments, embedder)
        hits = gallery.search(queries, arguments.k, model=model, where=where)
        found = np.unique(hits.ids[hits.ids >= 0])
        paths = {id_: text.get(PATH) for id_, text in zip(found.tolist(), payloads(gallery, found), strict=True)}
    if arguments.out is not None:
        content = io.BytesIO()
        np.savez(content, **vars(hits))
        write_whole(arguments.out, content.getvalue())
    result: dict[str, Any] = {name: _plain(values) for name, values in vars(hits).items()}
    result["queries"] = names
    result["paths"] = [[paths.get(id_) for id_ in row] for row in result["ids"]]
    return result


def _queries(arguments: argparse.Namespace, embedder: Embedder | None) -> tuple[list[Any], Any]:
    """Returns a name for each query, and the vectors of the queries."""
    path = arguments.vectors or arguments.inputs
    names = None if embedder is None else image_names(path)
    if embedder is not None and names is not None:
        return names, np.concatenate(list(embedded_images(path, names, embedder)))
    rows, _ = load_vectors(path)
    return list(range(len(rows))), rows.tensor() if embedder is None else embedder.features(rows)


def _status(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.open(arguments.url) as gallery:
        status = gallery.status()
        return {**status, "history": gallery.history()} if arguments.history else status


def _admit(arguments: argparse.Namespace) -> dict[str, Any]:
    gate = None
    if arguments.gate is not None:
        try:
            gate = GateResult.from_dict(_parsed(read_text(arguments.gate), str(arguments.gate)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{arguments.gate}: {error}") from None
    with Gallery.open(arguments.url) as gallery:
        gallery.admit(
            read_model(arguments.model), gate, force=arguments.force, thresholds=dict(arguments.threshold) or None
        )
        return gallery.status()


def _backfill(arguments: argparse.Namespace) -> dict[str, Any]:
    embedder, model = _model(arguments)
    source: FileRows | FolderImages
    if embedder is not None and is_images(arguments.inputs):
        source = FolderImages(arguments.inputs, embedder, _complain)
    else:
        source = FileRows(arguments.vectors or arguments.inputs, embedder)
    replaced = left = 0
    with Gallery.open(arguments.url) as gallery:
        stale = gallery.status()["stale"]
        with (
            counted(sys.stderr, "backfill", stale) as show,
            closing(gallery.stale(order=arguments.order, batch=arguments.batch)) as batches,
        ):
            shown = time.monotonic()
            for batch in batches:
                known, vectors = source.vectors(gallery, batch)
                left += len(batch) - len(known)
                if len(known):
                    replaced += gallery.replace(known, vectors, model=model)
                if time.monotonic() - shown >= _SECONDS:
                    shown = time.monotonic()  # the gallery also counts the rows that other workers have replaced
                    show(stale - gallery.status()["stale"])
            status = gallery.status()
            show(stale - status["stale"])
        unreadable = source.unreadable if isinstance(source, FolderImages) else []
        return {
            "replaced": replaced,
            "missing": left - len(unreadable),
            "unreadable": unreadable,
            "stale": status["stale"],
            "paused": status["paused"],
        }


def _rollback(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.open(arguments.url) as gallery:
        return gallery.rollback()


def _retire(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.open(arguments.url) as gallery:
        return gallery.retire(arguments.version)


def _pause(arguments: argparse.Namespace) -> dict[str, Any]:
    with Gallery.open(arguments.url) as gallery:
        gallery.pause() if arguments.action == "pause" else gallery.resume()
        return gallery.status()


_ACTIONS = {
    "create": _create,
    "add": _add,
    "search": _search,
    "status": _status,
    "admit": _admit,
    "backfill": _backfill,
    "rollback": _rollback,
    "retire": _retire,
    "pause": _pause,
    "resume": _pause,
}


def _model(arguments: argparse.Namespace) -> tuple[Embedder | None, ModelIdentity]:
    """Returns the identity of --model, and with --inputs the embedder of its folder."""
    if arguments.inputs is None:
        return None, read_model(arguments.model)
    if not arguments.model.is_dir():
        raise ValueError(
            f"--inputs needs the folder of the model, got the file {arguments.model}; or embed, and give --vectors"
        )
    embedder = Embedder(arguments.model)
    return embedder, embedder.identity


def _complain(text: str) -> None:
    print(f"simplexfix gallery: {printable(text)}", file=sys.stderr)


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def _plain(values: NDArray[Any]) -> list[Any]:
    """Returns lists for JSON, with None for inf and nan."""
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    rows: list[Any] = plain.tolist()
    return rows


def _text(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    action = arguments.action
    if action == "add":
        there = f", {result['there']} are in the gallery already" if result["there"] else ""
        bad = f", {len(result['unreadable'])} cannot be read" if result["unreadable"] else ""
        return f"added {result['added']} rows{there}{bad}; the gallery has {result['rows']}"
    if action == "search":
        return "\n".join(
            f"query {printable(str(name))}: " + "  ".join(_hit(*hit) for hit in zip(*hits, strict=True) if hit[0] >= 0)
            for name, *hits in zip(
                result["queries"], result["ids"], result["scores"], result["versions"], result["thresholds"],
                result["paths"], strict=True,
            )
        )  # fmt: skip
    if action == "backfill":
        if not result["stale"]:
            return f"replaced {result['replaced']} rows; no row is stale"
        where = arguments.vectors or arguments.inputs
        parts = [f"replaced {result['replaced']} rows", f"{result['stale']} rows are stale"]
        if result["missing"]:
            parts.append(f"{result['missing']} of this worker's were not in {printable(str(where))}")
        if result["unreadable"]:
            parts.append(f"images that cannot be read: {len(result['unreadable'])}")
        if result["paused"]:
            parts.append(f"backfills are paused: `simplexfix gallery resume {printable(arguments.url)}` lets them run")
        return "; ".join(parts)
    if action == "rollback":
        stay = f"; {result['rows_that_stay']} rows that it has added stay" if result["rows_that_stay"] else ""
        return (
            f"version {result['to']} serves again, {result['rows_restored']} rows of version {result['version']} are "
            f"restored{stay}"
        )
    if action == "retire":
        return f"version {result['version']} is retired, its {result['old_rows_deleted']} old vectors are deleted"
    return status_text(result)


def _hit(id_: int, score: float, version: int, threshold: float | None, path: object) -> str:
    below = " below its threshold" if threshold is not None and score < threshold else ""
    named = "" if path is None else f" {printable(str(path))}"
    return f"{id_}{named} {score:.4f} v{version}{below}"
