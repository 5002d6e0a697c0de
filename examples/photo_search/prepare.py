"""Trains two compatible versions, judges the upgrade, and fills a gallery with the vectors of the first."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from simplexfix.compatibility import Rule, upgrade_gate, upgrade_threshold
from simplexfix.data import Drawings, load_omniglot
from simplexfix.gallery import Gallery
from simplexfix.labelled import LabelledItems

sys.path.append(str(Path(__file__).resolve().parent.parent))

from upgrade_a_gallery import registry, train

KNOWN = 180  # characters of v0, of 242
TRAIN, GALLERY = 12, 4  # of 20 drawings of a character; the other four are queries of the gate
THRESHOLD = 0.6


def prepare(folder: Path, steps: int) -> None:
    """Writes `v0`, `v1`, `gallery`, `gate.json` and `thresholds.json` into a new folder."""
    folder.mkdir(parents=True)
    omniglot = load_omniglot()
    drawings = torch.from_numpy(omniglot.images).float()[:, :, None]  # [242, 20, 1, 28, 28]
    classes = len(drawings)
    print(f"v0 learns {KNOWN} characters")
    old = train(drawings[:KNOWN, :TRAIN], registry(range(KNOWN)), 16, steps, None)
    print(f"v1 learns {classes} characters, held to v0 by HOC")
    new = train(drawings[:, :TRAIN], registry(range(KNOWN), range(KNOWN, classes)), 24, 4 * steps, old)
    for model in (old, new):
        model.preprocessing = Drawings(28)
    v0 = old.save_pretrained(folder / "v0", version=0, name=f"v0, {KNOWN} characters")
    v1 = new.save_pretrained(folder / "v1", version=1, name=f"v1, {classes} characters")

    labels = torch.arange(classes)
    items = LabelledItems(labels.repeat_interleave(20 - TRAIN - GALLERY), labels.repeat_interleave(GALLERY))
    searched, asked = drawings[:, TRAIN : TRAIN + GALLERY].flatten(0, 1), drawings[:, TRAIN + GALLERY :].flatten(0, 1)
    judged = [
        items.version(model.extract(asked), model.extract(searched), fingerprint=identity.fingerprint)
        for model, identity in ((old, v0), (new, v1))
    ]
    gate = upgrade_gate(*judged, [Rule("ecc", confidence=0.95)], protocol="instance")
    (folder / "gate.json").write_text(json.dumps(gate.as_dict()))
    thresholds = [
        [1, 0, upgrade_threshold(*judged, threshold=THRESHOLD).after.threshold],
        [1, 1, upgrade_threshold(*judged, threshold=THRESHOLD, gallery="new").after.threshold],
        [0, 1, THRESHOLD],
    ]
    (folder / "thresholds.json").write_text(json.dumps(thresholds))
    for outcome in gate.outcomes:
        print(f"gate: {outcome.measured} {outcome.value:.1%}, {outcome.verdict}")

    rows = drawings.flatten(0, 1)
    names = [name for name in omniglot.characters for _ in range(20)]
    with Gallery.create(folder / "gallery", model=v0, threshold=THRESHOLD) as gallery:
        gallery.add(range(len(rows)), old.extract(rows), model=v0, payload={"character": names})
    print(f"{folder} holds both versions and a gallery of {len(rows)} drawings; `serve` starts the page")
