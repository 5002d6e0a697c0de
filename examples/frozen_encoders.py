"""Replacing a frozen encoder by another one, of another width, while the gallery stays as it is.

Of every encoder only a junction is trained: a linear map of its features to the d dimensions of one simplex, on the
labelled items of the classes that are known then.  `methods` are the methods to train it; all are judged by the same
matrices, of the known ("seen") classes and of classes that no junction ever saw ("unseen"), which are what a service
will be asked for next.

    independent    a linear classifier of its own for each encoder: what one does without this library
    ce             cross-entropy on the simplex
    hoc            the same and a contrast with the old version's features of the same items
    hoc+gallery    the same, and items of the old gallery, without their labels, in the contrast: the new encoder has to
                   see a sample of the gallery, not all of it
    ridge          no training by classes: the old version's features by ridge regression from the new encoder's, on the
                   same items as hoc; after the fact, on frozen models
    ridge+gallery  the same with the gallery's sample
    procrustes     no training by classes and no simplex: galleries of the encoders' own features, and for each pair of
                   encoders the orthogonal map that takes the one's features of the same items nearest to the other's
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import simplexfix.functional as SF
from simplexfix import SimplexHead
from simplexfix.cli.doctor import diagnose
from simplexfix.compatibility import average_accuracy, average_compatibility, compatibility_matrix
from simplexfix.labelled import LabelledItems
from simplexfix.retrieval import PROTOCOLS

JUDGES = {name.replace("_", " "): protocol for name, protocol in PROTOCOLS.items()}  # under their names in tables
METHODS = ("independent", "ce", "hoc", "hoc+gallery", "ridge", "ridge+gallery", "procrustes")

OPTIONS = {  # what `choose` tries, one after the other
    "negatives": ("zero_mask", "remove", "infonce"),
    "mu": (5.0, 10.0, 20.0, 40.0),
    "lambda_": (0.1, 0.3, 0.5, 0.7),
    "scale": (8.0, 16.0, 32.0),
    "slots": (128, 256, 512),
    "learning_rate": (3e-3, 1e-2),
    "steps": (200, 400, 800),
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """What one encoder makes of the items: gallery [N, f] and query [Q, f] features."""

    gallery: Tensor
    query: Tensor


@dataclass(frozen=True)
class Recipe:
    """How a junction is trained; all but batch, ridge and gallery_sample as `choose` found it for texts."""

    slots: int = 512
    batch: int = 512
    steps: int = 400
    learning_rate: float = 1e-2
    scale: float = 32.0
    lambda_: float = 0.7
    mu: float = 10.0
    negatives: str = "zero_mask"
    ridge: float = 1.0
    gallery_sample: int = 1000


def train_junctions(
    encoders: Sequence[Encoded], labels: Tensor, seen: Tensor, method: str, recipe: Recipe, seed: int
) -> list[Encoded]:
    """Each encoder's embeddings of gallery and queries, oldest version first.

    Args:
        encoders: of the same items.
        labels: [N] class ids of the gallery; labels of classes not in `seen` are read by no method.
        seen: class ids.
    """
    known = torch.isin(labels, seen)
    slots = torch.searchsorted(seen, labels[known])
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels))[: recipe.gallery_sample])
    versions: list[Encoded] = []
    for number, encoder in enumerate(encoders):
        torch.manual_seed(1000 * seed + number)
        rows = F.normalize(encoder.gallery)
        old = versions[-1].gallery if versions else None
        sample = drawn if method.endswith("+gallery") else drawn[:0]
        if old is not None and method.startswith("ridge"):
            at = torch.cat([known.nonzero()[:, 0], sample])
            w = ridge(rows[at], old[at], recipe.ridge)
            versions.append(Encoded(*(F.normalize(F.normalize(x) @ w) for x in (encoder.gallery, encoder.query))))
            continue
        head = SimplexHead(rows.shape[1], 0, num_slots=recipe.slots, normalize=True, scale=recipe.scale)
        classifier = torch.nn.Linear(recipe.slots - 1, len(seen), bias=False) if method == "independent" else None
        parameters = [*head.parameters(), *(classifier.parameters() if classifier else ())]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
        inputs, reference = rows[known], None if old is None else old[known]
        for _ in range(recipe.steps):
            batch = torch.randint(len(inputs), (recipe.batch,))
            z = head.embed(inputs[batch])
            if classifier is not None:
                w = F.normalize(classifier.weight)
                loss = F.cross_entropy(recipe.scale * F.normalize(z) @ w.T, slots[batch])
            else:
                loss = SF.simplex_cross_entropy(z, slots[batch], normalize=True, scale=recipe.scale)
            if old is not None and reference is not None and method.startswith("hoc"):
                # a sampled item has a label of its own: it is like itself alone
                again = sample[torch.randint(len(sample), (recipe.batch,))] if len(sample) else sample
                contrast = SF.old_new_contrast(
                    torch.cat([z, head.embed(rows[again])]),
                    torch.cat([reference[batch], old[again]]),
                    torch.cat([slots[batch], len(seen) + again]),
                    mu=recipe.mu,
                    negatives=recipe.negatives,
                )
                loss = recipe.lambda_ * loss + (1 - recipe.lambda_) * contrast
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            embedded = (F.normalize(head.embed(F.normalize(x))) for x in (encoder.gallery, encoder.query))
            versions.append(Encoded(*embedded))
    return versions


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """argmin_W |x W - y|^2 + penalty |W|^2, in float64."""
    a = x.double()
    w: Tensor = torch.linalg.solve(a.T @ a + penalty * torch.eye(a.shape[1], dtype=a.dtype), a.T @ y.double())
    return w.float()


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """[f, g], argmin |x Q - y|^2 over maps with orthonormal columns, or rows where g > f."""
    u, _, v = torch.linalg.svd(x.double().T @ y.double(), full_matrices=False)
    return (u @ v).float()  # type: ignore[no-any-return]


def judge_pairs(
    encoders: Sequence[Encoded], gallery_labels: Tensor, query_labels: Tensor, seen: Tensor, classes: Tensor
) -> dict[str, dict[str, Any]]:
    """`judge` of procrustes, whose queries are other ones for each gallery; of normalised features."""
    known, rows, asked = (
        torch.isin(labels, wanted)
        for labels, wanted in ((gallery_labels, seen), (gallery_labels, classes), (query_labels, classes))
    )
    items = LabelledItems(query_labels[asked], gallery_labels[rows])
    matrices = {name: np.full((len(encoders), len(encoders)), np.nan) for name in JUDGES}
    for i, new in enumerate(encoders):
        for j, old in enumerate(encoders[: i + 1]):
            query = new.query if i == j else new.query @ procrustes(new.gallery[known], old.gallery[known])
            for name, protocol in JUDGES.items():
                matrices[name][i, j] = protocol.score(items.version(query[asked], old.gallery[rows]))
    return {name: criteria(matrix) for name, matrix in matrices.items()}


def criteria(matrix: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "matrix": [row[: i + 1] for i, row in enumerate(matrix.tolist())],
        "AC": average_compatibility(matrix),
        "AA": average_accuracy(matrix),
    }


def judge(
    versions: Sequence[Encoded], gallery_labels: Tensor, query_labels: Tensor, classes: Tensor
) -> dict[str, dict[str, Any]]:
    """The matrices and their criteria, among these classes alone."""
    rows, asked = torch.isin(gallery_labels, classes), torch.isin(query_labels, classes)
    items = LabelledItems(query_labels[asked], gallery_labels[rows])
    judged = [items.version(v.query[asked], v.gallery[rows]) for v in versions]
    return {name: criteria(compatibility_matrix(judged, protocol)) for name, protocol in JUDGES.items()}


def split(labels: Tensor, unseen: int, seed: int) -> tuple[Tensor, Tensor]:
    """Seen and unseen class ids, sorted, drawn by the seed."""
    classes = torch.unique(labels)
    drawn = classes[torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(classes)))]
    return drawn[unseen:].sort().values, drawn[:unseen].sort().values


def compare(
    encoders: Sequence[Encoded],
    gallery_labels: Tensor,
    query_labels: Tensor,
    *,
    unseen: int,
    seeds: Sequence[int],
    recipe: Recipe,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """method -> "seen" and "unseen" -> protocol -> one result for each seed, of the class split and of training."""
    results: dict[str, Any] = {
        "encoders alone": {"seen": [], "unseen": []},
        **{m: {"seen": [], "unseen": []} for m in methods},
    }
    alone = [Encoded(F.normalize(e.gallery), F.normalize(e.query)) for e in encoders]
    for seed in seeds:
        seen, others = split(gallery_labels, unseen, seed)
        for method in methods:
            if method == "procrustes":
                judged = partial(judge_pairs, alone, gallery_labels, query_labels, seen)
            else:
                versions = train_junctions(encoders, gallery_labels, seen, method, recipe, seed)
                judged = partial(judge, versions, gallery_labels, query_labels)
            for name, classes in (("seen", seen), ("unseen", others)):
                results[method][name].append(judged(classes))
        for name, classes in (("seen", seen), ("unseen", others)):
            own = [judge([e], gallery_labels, query_labels, classes) for e in alone]
            results["encoders alone"][name].append({p: [o[p]["AA"] for o in own] for p in JUDGES})
    return results


def choose(
    encoders: Sequence[Encoded],
    labels: Tensor,
    *,
    unseen: int,
    seeds: Sequence[int],
    recipe: Recipe,
    options: Mapping[str, Sequence[Any]],
    method: str = "hoc",
) -> tuple[Recipe, list[dict[str, Any]]]:
    """One option after the other, the one with the best AA on seen classes that are held out in turn.

    Search data and unseen classes play no part: of the gallery's items of each seen class half are gallery, half
    queries.
    """
    tried: list[dict[str, Any]] = []
    for name, values in options.items():
        scores: list[float] = []
        for value in values:
            candidate = replace(recipe, **{name: value})
            total = 0.0
            for seed in seeds:
                seen, _ = split(labels, unseen, seed)
                held_in, held_out = split(seen, len(seen) // 3, seed)
                rows = torch.isin(labels, seen).nonzero()[:, 0]
                rows = rows[labels[rows].argsort(stable=True)]
                searched, asked = rows[::2], rows[1::2]  # of every class half
                halves = [Encoded(e.gallery[searched], e.gallery[asked]) for e in encoders]
                gallery_labels, query_labels = labels[searched], labels[asked]
                versions = train_junctions(halves, gallery_labels, held_in, method, candidate, seed)
                found = judge(versions, gallery_labels, query_labels, held_out)
                total += found["nearest class mean"]["AA"] / len(seeds)
            scores.append(total)
            tried.append({"option": name, "value": value, "AA of held-out seen classes": total})
        recipe = replace(recipe, **{name: values[int(np.argmax(scores))]})
    return recipe, tried


def table(results: Mapping[str, Any], protocol: str) -> str:
    """Markdown: each method's matrix, row by row, its AC and AA; means over seeds, in percent, with AA's deviation."""
    lines = ["| | seen | AC | AA | unseen | AC | AA |", "| --- | --- | ---: | ---: | --- | ---: | ---: |"]
    for method, found in results.items():
        cells: list[str] = []
        for name in ("seen", "unseen"):
            of_seeds = [entry[protocol] for entry in found[name]]
            if method == "encoders alone":
                cells += [" · ".join(f"{100 * v:.0f}" for v in np.mean(of_seeds, 0)), "", ""]
                continue
            count = len(of_seeds[0]["matrix"])
            rows = [np.mean([entry["matrix"][i] for entry in of_seeds], 0) for i in range(count)]
            ac, aa = ([entry[key] for entry in of_seeds] for key in ("AC", "AA"))
            cells += [
                " / ".join(" ".join(f"{100 * v:.0f}" for v in row) for row in rows),
                f"{np.mean(ac):.2f}",
                f"{100 * np.mean(aa):.1f}" + (f" ± {100 * np.std(aa, ddof=1):.1f}" if len(aa) > 1 else ""),
            ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(
    encoders: Mapping[str, Encoded],
    gallery_labels: Tensor,
    query_labels: Tensor,
    *,
    unseen: int,
    seeds: Sequence[int],
    choosing: bool,
    out: Path | None,
) -> None:
    """Prints the tables of one example and writes all of it as JSON."""
    given = list(encoders.values())
    recipe, tried = Recipe(), []
    if choosing:
        recipe, tried = choose(given, gallery_labels, unseen=unseen, seeds=seeds, recipe=recipe, options=OPTIONS)
        for line in tried:
            print(line)
    print(recipe)
    results = compare(given, gallery_labels, query_labels, unseen=unseen, seeds=seeds, recipe=recipe)
    print(
        f"\nRows: versions {', '.join(encoders)}; columns: whose gallery.  {unseen} unseen classes, {len(seeds)} seeds."
    )
    for protocol in JUDGES:
        print(f"\n{protocol}, %\n{table(results, protocol)}")
    if out is not None:
        content = {
            "machine": diagnose(),
            "encoders": {name: encoder.gallery.shape[1] for name, encoder in encoders.items()},
            "items": {"gallery": len(gallery_labels), "query": len(query_labels)},
            "unseen classes": unseen,
            "seeds": list(seeds),
            "recipe": asdict(recipe),
            "chosen by": tried,
            "results": results,
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, help="where features are kept from run to run (default: nowhere)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the class split and of training")
    parser.add_argument("--choose", action="store_true", help="the recipe, anew, on held-out seen classes")
    parser.add_argument("--out", type=Path, help="write all matrices as JSON")


def cached(folder: Path | None, name: str, make: Callable[[], NDArray[np.float32]]) -> Tensor:
    """Features from the file `name.npy` in the folder, made where that is not there."""
    file = None if folder is None else folder / f"{name}.npy"
    if file is not None and file.exists():
        return torch.from_numpy(np.load(file))
    features = np.ascontiguousarray(make(), dtype=np.float32)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, features)
    return torch.from_numpy(features)
