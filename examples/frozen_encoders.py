"""Replacement of a frozen encoder by another one, of another width, without embedding the gallery again.

No encoder is trained: `simplexfix.adapters` fits maps between the features of two encoders, on labelled items of known
classes ("seen") and on a sample of the gallery without labels.  All methods are compared by matrices of the seen
classes and of classes whose labels no method reads ("unseen"), like the later classes of a service.  "selected" is the
choice of `select_chain` among CANDIDATES for each protocol, on items of seen classes that it holds out.  By default
`select_chain` also tries the low rank, the MLP, the lambda-orthogonal map and HOC steps, which take most of the time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simplexfix.adapters import (
    AdapterMethod,
    Chain,
    GalleryCorrection,
    HOCRefined,
    LocalCorrection,
    Procrustes,
    Ridge,
    SimplexJunction,
    Slerp,
    WhitenedProcrustes,
    fit_chain,
    select_chain,
)
from simplexfix.cli.doctor import diagnose
from simplexfix.compatibility import average_accuracy, average_compatibility
from simplexfix.labelled import LabelledItems
from simplexfix.retrieval import PROTOCOLS

METHODS: dict[str, AdapterMethod] = {
    "procrustes": Procrustes(),
    "ridge": Ridge(0.03),
    "ridge, anchored": Ridge(0.3, "procrustes"),
    "whitened procrustes, g = 0.3": WhitenedProcrustes(0.3),
    "whitened procrustes, g = 0.6": WhitenedProcrustes(0.6),
    "whitened procrustes, g = 0.6, queries corrected": LocalCorrection(WhitenedProcrustes(0.6)),
    "whitened procrustes, g = 0.6, gallery corrected": GalleryCorrection(WhitenedProcrustes(0.6)),
    "simplex junction, g = 0.3": SimplexJunction(0.3),
    "simplex junction, g = 0.3, gallery corrected": GalleryCorrection(SimplexJunction(0.3)),
    "junction, 60 HOC steps": HOCRefined(SimplexJunction(0.3)),
}
WHITENED = [method(g) for method in (WhitenedProcrustes, SimplexJunction) for g in (0.1, 0.3, 0.6)]
CANDIDATES: tuple[AdapterMethod, ...] = (
    Procrustes(),
    Ridge(0.03),
    Ridge(0.3, "procrustes"),
    *WHITENED,
    *(GalleryCorrection(method, beta=beta) for method in WHITENED for beta in (0.5, 0.75)),
)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Features by one encoder: gallery [N, f] and query [Q, f]."""

    gallery: Tensor
    query: Tensor


@dataclass(frozen=True, eq=False)
class Items:
    """Items of all encoders."""

    encoders: Sequence[Encoded]
    gallery_labels: Tensor
    query_labels: Tensor

    def fitted(self, seen: Tensor, sample: int, seed: int) -> dict[str, Any]:
        """Arguments of `fit_chain` and `select_chain`: labelled items of seen classes, and a sample without labels."""
        known = torch.isin(self.gallery_labels, seen)
        drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(known))[:sample])
        return {
            "versions": [encoder.gallery[known] for encoder in self.encoders],
            "labels": self.gallery_labels[known],
            "sample": [encoder.gallery[drawn] for encoder in self.encoders] if sample else None,
        }


def judge(chain: Chain, items: Items, classes: Tensor, protocol: str) -> dict[str, Any]:
    """Returns the matrix with its AC and AA, restricted to these classes."""
    rows, asked = torch.isin(items.gallery_labels, classes), torch.isin(items.query_labels, classes)
    labelled = LabelledItems(items.query_labels[asked], items.gallery_labels[rows])
    queries = [encoder.query[asked] for encoder in items.encoders]
    galleries = [chain.gallery(j, encoder.gallery[rows]) for j, encoder in enumerate(items.encoders)]
    matrix = np.full((len(queries),) * 2, np.nan)
    for i in range(len(queries)):
        for j in range(i + 1):
            version = labelled.version(chain.query(i, j, queries), galleries[j])
            matrix[i, j] = PROTOCOLS[protocol].score(version)
    return {
        "matrix": [row[: i + 1] for i, row in enumerate(matrix.tolist())],
        "AC": average_compatibility(matrix),
        "AA": average_accuracy(matrix),
    }


def moves(chain: Chain, items: Items, classes: Tensor, *, pairs: int = 200_000) -> list[dict[str, Any]]:
    """Measures how far an adapter moves queries of these classes, and how tight the bounds of docs/design/math.md are.

    d is the distance between a query before and after an upgrade.  For each pair of versions the result has

    - quantiles of d, and the mean and the largest change of a score in units of d,
    - the fraction of scores that are further than d from a threshold, which lies halfway between the mean scores of
      equal and of different classes,
    - fractions of random pairs of gallery items: those with an order that 2 d guarantees, those with an order that d
      times their distance guarantees, and those with an order that stays.
    """
    rows, asked = torch.isin(items.gallery_labels, classes), torch.isin(items.query_labels, classes)
    same = items.query_labels[asked][:, None] == items.gallery_labels[rows]
    queries = [encoder.query[asked] for encoder in items.encoders]
    rng = np.random.default_rng(0)
    i, j, k = (torch.from_numpy(rng.integers(0, size, pairs)) for size in (len(same), *2 * (same.shape[1],)))
    found = []
    for new, old in chain.adapters:
        gallery = chain.gallery(old, items.encoders[old].gallery[rows]).double()
        before = chain.gallery(old, queries[old]).double()
        after = chain.query(new, old, queries).double()
        d = (after - before).norm(dim=1)
        scores, moved = before @ gallery.T, after @ gallery.T
        ratio = (moved - scores).abs() / d[:, None]
        threshold = (scores[same].mean() + scores[~same].mean()) / 2
        margin = (scores[i, j] - scores[i, k]).abs()
        distance = (gallery[j] - gallery[k]).norm(dim=1)
        stays = (scores[i, j] > scores[i, k]) == (moved[i, j] > moved[i, k])
        by_items = margin > d[i] * distance
        assert stays[by_items].all()
        fractions = {
            "score beyond d of the threshold": (scores - threshold).abs() > d[:, None],
            "order sure by 2 d": margin > 2 * d[i],
            "order sure by d times distance": by_items,
            "order stays": stays,
        }
        found.append(
            {
                "new": new,
                "old": old,
                "d": d.quantile(d.new_tensor([0.1, 0.5, 0.9])).tolist(),
                "mean move": float(ratio.mean()),
                "largest move": float(ratio.max()),
                **{name: float(holds.double().mean()) for name, holds in fractions.items()},
            }
        )
    return found


def split(labels: Tensor, unseen: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns seen and unseen class ids, sorted; the seed decides the split."""
    classes = torch.unique(labels)
    drawn = classes[torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(classes)))]
    return drawn[unseen:].sort().values, drawn[:unseen].sort().values


def compare(
    items: Items,
    *,
    unseen: int,
    seeds: Sequence[int],
    sample: int,
    methods: Mapping[str, AdapterMethod] = METHODS,
    candidates: Sequence[AdapterMethod] = CANDIDATES,
    folds: int = 1,
    seen_fraction: float = 0.0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns method -> protocol -> "seen" and "unseen" -> one result for each seed; and the selections.

    Row "selected" has the best candidate with the new encoder alone at query time, "selected, both encoders" the best
    of all, among them slerp from the two best.
    """
    results: dict[str, Any] = {}
    chosen: list[dict[str, Any]] = []
    for seed in seeds:
        seen, others = split(items.gallery_labels, unseen, seed)
        given = items.fitted(seen, sample, seed)
        versions, rest = given["versions"], {"labels": given["labels"], "sample": given["sample"]}

        def add(name: str, chain: Chain, protocol: str, classes: tuple[Tensor, Tensor] = (seen, others)) -> None:
            for part, of in zip(("seen", "unseen"), classes, strict=True):
                found = results.setdefault(name, {}).setdefault(protocol, {"seen": [], "unseen": []})
                found[part].append(judge(chain, items, of, protocol))

        for name, method in methods.items():
            chain = fit_chain(method, versions, **rest)
            for protocol in PROTOCOLS:
                add(name, chain, protocol)
        for protocol in PROTOCOLS if candidates else ():
            selection = select_chain(
                versions,
                **rest,
                candidates=candidates,
                query_encoders="both",
                protocol=protocol,
                seen_fraction=seen_fraction,
                folds=folds,
                seed=seed,
            )
            new_alone = next(row.method for row in selection.table if not isinstance(row.method, Slerp))
            add("selected", fit_chain(new_alone, versions, **rest), protocol)
            add("selected, both encoders", selection.chain, protocol)
            judged = [row.as_dict() for row in selection.table]
            chosen.append({"protocol": protocol, "seed": seed, "selected": new_alone.described(), "table": judged})
            print(f"{protocol}, seed {seed}: {new_alone.described()}, with the old encoder as well: ", end="")
            print(selection.winner.method.described(), flush=True)
    return results, chosen


def table(results: Mapping[str, Any], protocol: str) -> str:
    """Markdown: each method's matrix, row by row, and AA, both in percent, and AC; means over seeds, AA's deviation."""
    lines = ["| | seen | AC | AA | unseen | AC | AA |", "| --- | --- | ---: | ---: | --- | ---: | ---: |"]
    for name, found in results.items():
        cells: list[str] = []
        for part in ("seen", "unseen"):
            of_seeds = found[protocol][part]
            rows = [np.mean([entry["matrix"][i] for entry in of_seeds], 0) for i in range(len(of_seeds[0]["matrix"]))]
            ac, aa = ([entry[key] for entry in of_seeds] for key in ("AC", "AA"))
            cells += [
                " / ".join(" ".join(f"{100 * v:.0f}" for v in row) for row in rows),
                f"{np.mean(ac):.2f}",
                f"{100 * np.mean(aa):.1f}" + (f" ± {100 * np.std(aa, ddof=1):.1f}" if len(aa) > 1 else ""),
            ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(
    encoders: Mapping[str, Encoded],
    gallery_labels: Tensor,
    query_labels: Tensor,
    *,
    unseen: int,
    arguments: argparse.Namespace,
    methods: Mapping[str, AdapterMethod] = METHODS,
) -> None:
    """Prints the tables of one example and writes all of it as JSON."""
    items = Items(list(encoders.values()), gallery_labels, query_labels)
    results, chosen = compare(
        items,
        unseen=unseen,
        seeds=arguments.seeds,
        sample=arguments.sample,
        folds=arguments.folds,
        seen_fraction=arguments.seen_fraction,
        methods=methods,
    )
    seen, others = split(items.gallery_labels, unseen, arguments.seeds[0])
    chain = fit_chain(WhitenedProcrustes(0.6), **items.fitted(seen, arguments.sample, arguments.seeds[0]))
    moved = moves(chain, items, others)
    print("\nMoves of unseen queries by whitened procrustes, g = 0.6")
    for row in moved:
        print(", ".join(f"{name} {np.round(value, 3)}" for name, value in row.items()))
    print(f"\nRows: versions {', '.join(encoders)}; columns: whose gallery.  {unseen} unseen classes.")
    for protocol in PROTOCOLS:
        print(f"\n{protocol}, %\n{table(results, protocol)}")
    if arguments.out is not None:
        content = {
            "machine": diagnose(),
            "encoders": {name: encoder.gallery.shape[1] for name, encoder in encoders.items()},
            "items": {"gallery": len(gallery_labels), "query": len(query_labels), "sample": arguments.sample},
            "unseen classes": unseen,
            "seeds": list(arguments.seeds),
            "folds": arguments.folds,
            "seen fraction": arguments.seen_fraction,
            "methods": {name: method.described() for name, method in methods.items()},
            "results": results,
            "moves": moved,
            "selected": chosen,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, help="folder that stores features from run to run (default: none)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the class split and of training")
    parser.add_argument("--sample", type=int, default=1000, help="gallery items without labels (default: 1000)")
    parser.add_argument("--folds", type=int, default=1, help="thirds of the seen classes held out in turn (default: 1)")
    parser.add_argument(
        "--seen-fraction", type=float, default=0.0, help="fraction of queries of seen classes (default: 0)"
    )
    parser.add_argument("--out", type=Path, help="write all matrices and selections as JSON")


def cached(folder: Path | None, name: str, make: Callable[[], NDArray[np.float32]]) -> Tensor:
    """Returns features from the file `name.npy` in the folder, which is created if it is missing."""
    file = None if folder is None else folder / f"{name}.npy"
    if file is not None and file.exists():
        return torch.from_numpy(np.load(file))
    features = np.ascontiguousarray(make(), dtype=np.float32)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, features)
    return torch.from_numpy(features)
