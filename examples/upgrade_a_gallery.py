"""The life of a gallery of drawings: a model, a better one, backfill beside searches, rollback, and on.

python examples/upgrade_a_gallery.py [--out DIR] [--steps N]

Two versions learn handwritten characters of the packaged Omniglot: v0 the first 100, and v1, a wider network that is
trained longer, all 120, held to v0 by HOC.  The gallery holds six drawings of each of the 120, extracted by v0.  Every
score is the fraction of 480 other drawings whose nearest gallery item is of their character.  With matplotlib the
scores during the backfill are drawn into DIR/backfill.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.compatibility import Rule, upgrade_gate, upgrade_threshold
from simplexfix.data import load_omniglot
from simplexfix.gallery import AdmissionError, Gallery
from simplexfix.labelled import LabelledItems
from simplexfix.models import EmbeddingModel, ModelIdentity, SmallConvNet

KNOWN, CLASSES, FEATURES, BATCH = 100, 120, 128, 128
TRAIN, GALLERY = 10, 6  # of 20 drawings of a character; the other four are queries


def train(images: Tensor, slots: SlotRegistry, width: int, steps: int, old: EmbeddingModel | None) -> EmbeddingModel:
    """A network on [C, n, 1, 28, 28] drawings of characters 0 to C - 1, held to the old version where there is one."""
    torch.manual_seed(width)
    model = EmbeddingModel(
        SmallConvNet(width, FEATURES), SimplexHead.from_slots(slots, FEATURES, normalize=True, scale=12.0)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        target, drawing = torch.randint(len(images), (BATCH,)), torch.randint(images.shape[1], (BATCH,))
        batch = torch.roll(images[target, drawing], tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
        features = model.backbone(batch)
        loss = model.head(features, target)
        if old is not None:
            held = target < KNOWN  # HOC is for what the old version knows
            loss = 0.5 * loss + 0.5 * model.head.hoc_loss(features[held], old.extract(batch[held]), target[held])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("upgrade"), help="a new folder (default: upgrade)")
    parser.add_argument("--steps", type=int, default=80, help="of v0; v1 takes four times as many (default: 80)")
    a = parser.parse_args()
    a.out.mkdir(parents=True)

    drawings = torch.from_numpy(load_omniglot().images[:CLASSES]).float()[:, :, None]
    photos, queries = drawings[:, TRAIN : TRAIN + GALLERY].flatten(0, 1), drawings[:, TRAIN + GALLERY :].flatten(0, 1)
    photo_labels = torch.arange(CLASSES).repeat_interleave(GALLERY)
    query_labels = torch.arange(CLASSES).repeat_interleave(20 - TRAIN - GALLERY)
    slots = SlotRegistry(256)
    slots.add("default", range(KNOWN))
    old = train(drawings[:KNOWN, :TRAIN], slots, 16, a.steps, None)
    slots.add("default", range(KNOWN, CLASSES))
    new = train(drawings[:, :TRAIN], slots, 32, 4 * a.steps, old)
    v0, v1 = old.identity(version=0, name="100 characters"), new.identity(version=1, name="120 characters")

    ids = np.arange(len(photos))
    gallery = Gallery.create(a.out / "gallery", model=v0, threshold=0.7)
    gallery.add(ids, old.extract(photos), model=v0, payload={"character": photo_labels})

    def score(model: EmbeddingModel, identity: ModelIdentity) -> float:
        hits = gallery.search(model.extract(queries), 1, model=identity)
        return float((photo_labels[hits.ids[:, 0]] == query_labels).double().mean())

    def share() -> float:
        status = gallery.status()
        return 1 - status["stale"] / status["rows"]

    print(f"v0 searches its own vectors: {score(old, v0):.1%}")
    items = LabelledItems(query_labels, photo_labels)
    features = [
        items.version(model.extract(queries), model.extract(photos), fingerprint=identity.fingerprint)
        for model, identity in ((old, v0), (new, v1))
    ]
    gate = upgrade_gate(*features, [Rule("ecc", confidence=0.95), Rule("max_nfr", 0.1)], protocol="instance")
    thresholds = {
        (1, 0): upgrade_threshold(*features, threshold=0.7),
        (1, 1): upgrade_threshold(*features, threshold=0.7, gallery="new"),
        (0, 1): None,
    }
    for outcome in gate.outcomes:
        print(f"gate: {outcome.measured} {outcome.value:.1%}, {outcome.verdict}")
    try:
        gallery.admit(v1, gate, thresholds=thresholds)
    except AdmissionError as error:
        print(f"refused: {error}")
        gallery.admit(v1, gate, force="this is an example", thresholds=thresholds)
    curve = [(0.0, score(new, v1))]
    print(f"v1 searches the vectors of v0, none replaced: {curve[0][1]:.1%}")

    def backfill() -> None:
        for batch in gallery.stale(batch=72):
            gallery.replace(batch, new.extract(photos[batch]), model=v1)
            curve.append((share(), score(new, v1)))

    begun = time.perf_counter()
    backfill()
    for replaced, right in curve[1:]:
        print(f"{replaced:4.0%} replaced: {right:.1%}")
    print(f"{len(ids)} rows in {time.perf_counter() - begun:.1f} s")
    event = gallery.rollback()
    print(f"rolled back {event['rows_restored']} rows: v0 searches {score(old, v0):.1%}, as before")
    gallery.admit(v1, force="the rollback was an exercise", thresholds=thresholds)
    backfill()
    print(f"retired v0: {gallery.retire(0)['old_rows_deleted']} old vectors deleted; v1 searches {score(new, v1):.1%}")
    print("history: " + ", ".join(event["event"] for event in gallery.history()))
    gallery.close()
    draw(curve[: len(ids) // 72 + 1], a.out / "backfill.png")


def draw(curve: list[tuple[float, float]], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), marker="o")
    axes.set(xlabel="fraction of vectors by v1", ylabel="queries of v1 that find their character")
    figure.savefig(file, dpi=150)
    print(f"{file} shows the backfill")


if __name__ == "__main__":
    main()
