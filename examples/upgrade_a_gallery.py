"""Three upgrades of a gallery of drawings: admit, search at once, backfill, roll back, admit again, retire.

python examples/upgrade_a_gallery.py [--out DIR] [--steps N]

v0 learns 100 handwritten characters of the packaged Omniglot; its gallery holds six drawings of each of 120 characters.
Each upgrade begins with that gallery:

- HOC: v1, a wider network that learns all 120 characters, is trained by HOC to be compatible with v0.
- Procrustes and MLP: a network of the same width is trained without v0; an adapter, fitted on 1,200 drawings, maps its
  vectors to v0's space.

Every score is the fraction of 480 other drawings whose nearest gallery item is of their character.  If matplotlib is
installed, DIR/life.png shows the scores of each gallery over time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from simplexfix import SimplexHead, SlotRegistry
from simplexfix.adapters import MLP, Procrustes
from simplexfix.compatibility import Rule, upgrade_gate, upgrade_threshold
from simplexfix.data import load_omniglot
from simplexfix.gallery import AdmissionError, Gallery
from simplexfix.labelled import LabelledItems
from simplexfix.models import EmbeddingModel, ModelIdentity, SmallConvNet

KNOWN, CLASSES, FEATURES, BATCH = 100, 120, 128, 128
TRAIN, GALLERY = 10, 6  # of 20 drawings of a character; the other four are queries
ROWS = 72  # of a batch of the backfill


@dataclass(frozen=True)
class Encoder:
    """The model of a version: `embed` maps drawings [n, 1, 28, 28] to vectors [n, d]."""

    identity: ModelIdentity
    embed: Callable[[Tensor], Tensor]


@dataclass
class Life:
    """Scores of the serving version over time; a backfill takes 1 unit of time, and each rest around it REST units."""

    name: str
    times: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


REST = 0.2


def train(images: Tensor, slots: SlotRegistry, width: int, steps: int, old: EmbeddingModel | None) -> EmbeddingModel:
    """Trains a network on drawings [C, n, 1, 28, 28] of characters 0 to C - 1, by HOC if there is an old version."""
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
        loss = model.head(features, slots.lookup("default", target))
        if old is not None:
            held = target < len(old.head.slots)  # HOC applies to the characters of the old version
            loss = 0.5 * loss + 0.5 * model.head.hoc_loss(features[held], old.extract(batch[held]), target[held])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def registry(*classes: range, end: str = "low") -> SlotRegistry:
    slots = SlotRegistry(256)
    for some in classes:
        slots.add("default", some, end=end)
    return slots


class Shop:
    """Drawings, and the galleries of the upgrades.

    Args:
        old: v0.
        photos, queries: drawings [n, 1, 28, 28], grouped by character.
    """

    def __init__(self, old: Encoder, photos: Tensor, queries: Tensor) -> None:
        self.old = old
        self.photos, self.photo_labels = photos, torch.arange(CLASSES).repeat_interleave(len(photos) // CLASSES)
        self.queries, self.query_labels = queries, torch.arange(CLASSES).repeat_interleave(len(queries) // CLASSES)
        self.old_features = self.features(old)

    def features(self, encoder: Encoder) -> tuple[Tensor, Tensor]:
        return encoder.embed(self.queries), encoder.embed(self.photos)

    def upgrade(self, name: str, folder: Path, new: Encoder) -> Life:
        """Upgrades a gallery of v0, rolls back, upgrades it again and retires v0; returns the scores."""
        life, versions = Life(name), {0: self.old_features, 1: self.features(new)}
        v0, v1 = self.old.identity, new.identity
        gallery = Gallery.create(folder, model=v0, threshold=0.7)
        gallery.add(
            range(len(self.photos)), versions[0][1], model=v0, payload={"character": self.photo_labels.tolist()}
        )

        def score() -> float:
            serves = gallery.model
            hits = gallery.search(versions[serves.version][0], 1, model=serves)
            right = float((self.photo_labels[hits.ids[:, 0]] == self.query_labels).double().mean())
            life.scores.append(right)
            return right

        def rest() -> None:
            """Adds a rest with a constant score."""
            begun = life.times[-1] if life.times else 0.0
            life.times += [begun, begun + REST]
            life.scores.append(score())

        def backfill() -> None:
            begun = life.times[-1]
            life.times.append(begun)
            score()
            for batch in gallery.stale(batch=ROWS):
                gallery.replace(batch, new.embed(self.photos[batch]), model=v1)
                status = gallery.status()
                life.times.append(begun + 1 - status["stale"] / status["rows"])
                score()

        rest()
        print(f"{name}: v0 searches its own vectors: {life.scores[-1]:.1%}")
        items = LabelledItems(self.query_labels, self.photo_labels)
        judged = [items.version(*versions[identity.version], fingerprint=identity.fingerprint) for identity in (v0, v1)]
        gate = upgrade_gate(*judged, [Rule("ecc", confidence=0.95), Rule("max_nfr", 0.1)], protocol="instance")
        thresholds = {
            (1, 0): upgrade_threshold(*judged, threshold=0.7),
            (1, 1): upgrade_threshold(*judged, threshold=0.7, gallery="new"),
            (0, 1): None,
        }
        for outcome in gate.outcomes:
            print(f"{name}: {outcome.measured} {outcome.value:.1%}, {outcome.verdict}")
        try:
            gallery.admit(v1, gate, thresholds=thresholds)
        except AdmissionError as error:
            print(f"{name}: refused: {error}")
            gallery.admit(v1, gate, force="this is an example", thresholds=thresholds)
        rest()
        print(f"{name}: v1 searches the vectors of v0, none replaced: {life.scores[-1]:.1%}")
        begun = time.perf_counter()
        backfill()
        print(f"{name}: all replaced in {time.perf_counter() - begun:.1f} s: {life.scores[-1]:.1%}")
        event = gallery.rollback()
        rest()
        print(f"{name}: rolled back {event['rows_restored']} rows: v0 searches {life.scores[-1]:.1%}, as before")
        gallery.admit(v1, force="the rollback was an exercise", thresholds=thresholds)
        backfill()
        deleted = gallery.retire(0)["old_rows_deleted"]
        rest()
        print(f"{name}: retired v0: {deleted} old vectors deleted; v1 searches {life.scores[-1]:.1%}")
        print(f"{name}: history: " + ", ".join(event["event"] for event in gallery.history()))
        gallery.close()
        return life


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("upgrade"), help="a new folder (default: upgrade)")
    parser.add_argument("--steps", type=int, default=80, help="of v0; the others take two and a half times as many")
    a = parser.parse_args()
    a.out.mkdir(parents=True)

    drawings = torch.from_numpy(load_omniglot().images[:CLASSES]).float()[:, :, None]
    learned = drawings[:, :TRAIN]
    known, more = range(KNOWN), range(KNOWN, CLASSES)
    model = train(learned[:KNOWN], registry(known), 16, a.steps, None)
    held = train(learned, registry(known, more), 24, 5 * a.steps // 2, model)
    alone = train(learned, registry(range(CLASSES), end="high"), 24, 5 * a.steps // 2, None)

    old = Encoder(model.identity(version=0, name="100 characters"), model.extract)
    upgrades = {"HOC": Encoder(held.identity(version=1, name="120 characters"), held.extract)}
    pairs = model.extract(learned.flatten(0, 1)), alone.extract(learned.flatten(0, 1))
    for method in (Procrustes(), MLP()):
        adapter = method.fit(*pairs)
        identity = adapter.identity(version=1, name="120 characters", old=old.identity.fingerprint)
        upgrades[type(method).__name__] = Encoder(
            identity, lambda images, adapter=adapter: adapter(alone.extract(images)).detach()
        )
    shop = Shop(old, drawings[:, TRAIN : TRAIN + GALLERY].flatten(0, 1), drawings[:, TRAIN + GALLERY :].flatten(0, 1))
    draw([shop.upgrade(name, a.out / name.lower(), new) for name, new in upgrades.items()], a.out / "life.png")


def draw(lives: list[Life], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for life, colour in zip(lives, ("#2158d0", "#14753a", "#b45309"), strict=True):
        axes.plot(life.times, [100 * score for score in life.scores], label=life.name, color=colour, linewidth=1.8)
    begin, end = lives[0].times[0], lives[0].times[-1]
    events = [
        (REST, "v1 admitted", "center"),
        (1 + 2 * REST, "rolled back", "right"),
        (1 + 3 * REST, "admitted again", "left"),
        (end - REST, "v0 retired", "center"),
    ]
    for at, event, side in events:
        axes.axvline(at, color="#8a94a6", linewidth=0.8)
        axes.text(at, 1.01, event, transform=axes.get_xaxis_transform(), fontsize=8, ha=side)
    axes.set(ylabel="right queries, %", xlim=(begin, end))
    axes.set_xticks([REST * 2 + 0.5, 3 * REST + 1.5], ["backfill", "backfill"])
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=110)
    print(f"{file} shows the scores")


if __name__ == "__main__":
    main()
