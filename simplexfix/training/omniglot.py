"""The scenario of `simplexfix demo`: four versions on Omniglot, the last one a replacement.

v0 learns some characters from scratch; v1 and v2 are fine-tuned in turn on more, with rehearsal; then the
network is thrown away for a wider one that was pre-trained apart, on the characters known by then, against the
same simplex with the same slots (for ER: with a classifier of its own), and fine-tuned on the last ones: v3.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .._seeds import seeded
from ..data import RandomWarp, load_omniglot
from ..methods import ER, HOC, Method, Simplex
from ..models import EmbeddingModel, SmallConvNet
from ..slots import SlotRegistry
from .items import Items
from .schedule import Schedule
from .trainer import Trainer

__all__ = ["METHODS", "UNSEEN_ALPHABETS", "OmniglotData", "Recipe", "split_omniglot", "train_methods"]

METHODS = ("hoc", "simplex", "er")
UNSEEN_ALPHABETS = ("Korean", "Tagalog")
TRAIN_DRAWINGS, GALLERY_DRAWINGS, UNSEEN_GALLERY_DRAWINGS = 12, 4, 10  # of 20; the rest are queries


@dataclass(frozen=True)
class Recipe:
    """Every number of the scenario.

    Args:
        new_classes: characters that v0, v1, v2 and v3 add.
        pretrain_classes: characters that the replacement was pre-trained on: the first so many.
        memory_per_class: drawings of each earlier character that rehearsal keeps.
        num_slots: K of the simplex.
        features: width of the backbones' output.
        width, replacement_width: channels of the network and of its replacement.
        scale: of normalised embeddings in the simplex's logits.
        er_scale: of the cosines in ER's logits, tuned apart.
        lambda_: share of cross-entropy in HOC.
        v0, pretrain, finetune: budgets.
    """

    new_classes: tuple[int, int, int, int] = (60, 40, 40, 45)
    pretrain_classes: int = 140
    memory_per_class: int = 6
    num_slots: int = 256
    features: int = 256
    width: int = 16
    replacement_width: int = 48
    scale: float = 12.0
    er_scale: float = 8.0
    lambda_: float = 0.5
    v0: Schedule = Schedule(150, 1e-2)
    pretrain: Schedule = Schedule(400, 1e-2)
    finetune: Schedule = Schedule(120, 3e-3)

    def steps(self, methods: tuple[str, ...]) -> int:
        """Training steps of these methods; `hoc` and `simplex` share v0 and the replacement's pre-training."""
        starts = len({name == "er" for name in methods})
        return starts * (self.v0.steps + self.pretrain.steps) + len(methods) * 3 * self.finetune.steps

    def quick(self) -> Recipe:
        """The same story at a fraction of the budget."""
        short = {name: replace(getattr(self, name), steps=steps) for name, steps in _QUICK_STEPS.items()}
        return replace(self, **short)


_QUICK_STEPS = {"v0": 60, "pretrain": 90, "finetune": 30}


@dataclass(frozen=True)
class OmniglotData:
    """uint8 drawings [N, 28, 28] with class ids, in the order in which versions learn the characters."""

    train: Tensor  # [185, 12, 28, 28]
    gallery: dict[str, Items]  # "seen": the characters of v0; "unseen": alphabets that no version saw
    query: dict[str, Items]


def split_omniglot(recipe: Recipe, seed: int) -> OmniglotData:
    """Training, gallery and query drawings, disjoint; the seed orders the characters."""
    omniglot = load_omniglot()
    images = torch.from_numpy(omniglot.images)
    alphabet = np.array(omniglot.alphabets)[omniglot.alphabet_of]
    unseen = torch.from_numpy(np.isin(alphabet, UNSEEN_ALPHABETS))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(int((~unseen).sum())))
    seen_images, unseen_images = images[~unseen][order], images[unseen]
    held_out = seen_images[: recipe.new_classes[0], TRAIN_DRAWINGS:]
    return OmniglotData(
        train=seen_images[:, :TRAIN_DRAWINGS],
        gallery={
            "seen": _items(held_out[:, :GALLERY_DRAWINGS]),
            "unseen": _items(unseen_images[:, :UNSEEN_GALLERY_DRAWINGS]),
        },
        query={
            "seen": _items(held_out[:, GALLERY_DRAWINGS:]),
            "unseen": _items(unseen_images[:, UNSEEN_GALLERY_DRAWINGS:]),
        },
    )


def train_methods(
    data: OmniglotData,
    recipe: Recipe,
    seed: int,
    *,
    methods: tuple[str, ...] = METHODS,
    on_step: Callable[[str], None] = lambda stage: None,
) -> dict[str, list[EmbeddingModel]]:
    """v0 .. v3 of each method, on the same data with the same budget and networks.

    `hoc` and `simplex` differ only where there is an old model, so v0 and the replacement's pre-training are
    the same for both and done once.  ER goes on beside them in a thread of its own: with one core each, nobody
    waits for the other at every small convolution, as two threads in one do.  `on_step` is called from both.
    """
    slots = SlotRegistry(recipe.num_slots)
    makers: dict[str, Method] = {
        "hoc": HOC(slots, normalize=True, scale=recipe.scale, lambda_=recipe.lambda_),
        "simplex": Simplex(slots, normalize=True, scale=recipe.scale),
        "er": ER(scale=recipe.er_scale),
    }

    stop = threading.Event()

    def step(stage: str, _: int) -> None:
        if stop.is_set():
            raise RuntimeError("the other training failed or was interrupted")
        on_step(stage)

    def train(learnable: bool) -> dict[str, list[EmbeddingModel]]:
        names = [name for name in methods if (name == "er") == learnable]
        if not names:
            return {}
        starts = _train_starts(data, recipe, seed, makers[names[0]], "er" if learnable else "simplex", step)
        return {name: _train_upgrades(data, recipe, seed, name, makers[name], *starts, step) for name in names}

    with ThreadPoolExecutor(2) as pool:
        try:
            families = [pool.submit(train, learnable) for learnable in (False, True)]
            wait(families, return_when=FIRST_EXCEPTION)
        finally:  # Ctrl-C and an error in one family end the other at its next step
            stop.set()
        trained = {name: versions for family in families for name, versions in family.result().items()}
    return {name: trained[name] for name in methods}


def _train_starts(
    data: OmniglotData, recipe: Recipe, seed: int, method: Method, name: str, on_step: Callable[[str, int], None]
) -> tuple[EmbeddingModel, EmbeddingModel]:
    """v0, and the replacement as it comes from elsewhere."""
    plans = (
        (recipe.width, recipe.new_classes[0], recipe.v0, 0, f"{name}: v0"),
        (recipe.replacement_width, recipe.pretrain_classes, recipe.pretrain, 10, f"{name}: replacement"),
    )
    trained = []
    for width, classes, schedule, number, stage in plans:
        with seeded(100 * seed + number):
            backbone = SmallConvNet(width, recipe.features)
            fresh = EmbeddingModel(backbone, method.head(recipe.features))
        trained.append(
            Trainer(method, augment=RandomWarp()).fit(
                fresh,
                _items(data.train[:classes]),
                schedule,
                classes=range(classes),
                seed=100 * seed + number,
                on_step=partial(on_step, stage),
            )
        )
    return trained[0], trained[1]


def _train_upgrades(
    data: OmniglotData,
    recipe: Recipe,
    seed: int,
    name: str,
    method: Method,
    v0: EmbeddingModel,
    replacement: EmbeddingModel,
    on_step: Callable[[str, int], None],
) -> list[EmbeddingModel]:
    """v0 and what follows; each version's old model is the one deployed before it.

    A loop of its own beside `scenario.train_versions`, which trains the first version itself: here methods share it.
    """
    remembered = torch.from_numpy(np.random.default_rng(1000 + seed).permutation(TRAIN_DRAWINGS))
    remembered = remembered[: recipe.memory_per_class]
    versions = [v0]
    for t in (1, 2, 3):
        first, last = sum(recipe.new_classes[:t]), sum(recipe.new_classes[: t + 1])
        versions.append(
            Trainer(method, augment=RandomWarp()).fit(
                replacement if t == 3 else versions[-1],
                _items(data.train[first:last], first),
                recipe.finetune,
                classes=range(last),
                seed=100 * seed + t,
                memory=_items(data.train[:first, remembered]),
                old=versions[-1],
                on_step=partial(on_step, f"{name}: v{t}"),
            )
        )
    return versions


def _items(drawings: Tensor, first_class: int = 0) -> Items:
    """[C, N, 28, 28] -> C * N items of classes first_class, first_class + 1, ..."""
    labels = torch.arange(first_class, first_class + len(drawings)).repeat_interleave(drawings.shape[1])
    return Items(drawings.flatten(0, 1), labels)
