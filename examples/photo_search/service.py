"""The operations of the page on one gallery: search, upgrade, backfill, rollback.  Any thread may call them."""

from __future__ import annotations

import io
import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from simplexfix.compatibility import GateResult
from simplexfix.data import load_omniglot, read_images
from simplexfix.gallery import AdmissionError, Gallery, StrangerError
from simplexfix.models import EmbeddingModel, read_identity

HITS, BATCH = 12, 32
Image.MAX_IMAGE_PIXELS = 16_000_000  # Pillow refuses an upload of more than twice as many


class RefusedError(ValueError):
    """Raised for a request that cannot be served, such as a second upgrade; the page shows the message."""


class Service:
    """Search and upgrades.  The gallery holds all state: after a restart the same model serves.

    Args:
        folder: folder that `prepare` has written.
        pause: seconds between two batches of a backfill, so that the progress is visible.
    """

    def __init__(self, folder: Path, pause: float = 0.1) -> None:
        self.drawings = load_omniglot().images.reshape(-1, 28, 28)
        self.gallery = Gallery.open(folder / "gallery")
        folders = [folder / "v0", folder / "v1"]
        self.models = {version: EmbeddingModel.from_pretrained(place) for version, place in enumerate(folders)}
        self.identities = {version: read_identity(place) for version, place in enumerate(folders)}
        self.gate = GateResult.from_dict(json.loads((folder / "gate.json").read_text()))
        self.thresholds = {
            (query, vector): threshold
            for query, vector, threshold in json.loads((folder / "thresholds.json").read_text())
        }
        self._pause = pause
        self._changes = threading.Lock()  # held to change the model that serves, or the worker
        self._worker: threading.Thread | None = None
        self._stop = threading.Event()

    def search(self, content: bytes) -> dict[str, Any]:
        """Returns the nearest drawings to an image file.

        Raises:
            ImageFileError: the content is not an image.
            RefusedError: nothing is drawn on the image.
        """
        ink = on_clean_paper(read_images([io.BytesIO(content)], self.models[0].preprocessing))
        serves = self.gallery.model
        model = self.models[serves.version]
        hits = self.gallery.search(model.extract(ink, prepare=model.preprocessing), HITS, model=serves)
        payload = self.gallery.read(hits.ids[0]).payload
        columns = zip(hits.ids[0], hits.scores[0], hits.versions[0], hits.accepted[0], payload, strict=True)
        return {
            "version": serves.version,
            "hits": [
                {
                    "id": int(id_),
                    "score": float(score),
                    "version": int(version),
                    "accepted": bool(accepted),
                    "character": entry["character"],
                }
                for id_, score, version, accepted, entry in columns
            ],
        }

    def drawing(self, id_: int) -> bytes | None:
        """Returns a drawing of the gallery as PNG, None if there is no such drawing."""
        if not 0 <= id_ < len(self.drawings):
            return None
        content = io.BytesIO()
        Image.fromarray(255 * (1 - self.drawings[id_])).save(content, "png")
        return content.getvalue()

    def status(self) -> dict[str, Any]:
        found = self.gallery.status()
        worker = self._worker
        return {
            "serving": found["serving"],
            "since": found["since"],
            "rows": found["rows"],
            "stale": found["stale"],
            "versions": [
                {"version": version, "name": identity.name, "rows": self._rows(found, version)}
                for version, identity in self.identities.items()
            ],
            "rolls_back": found["rolls_back_to"] is not None,
            "running": worker is not None and worker.is_alive(),
            "gate": [f"{outcome.measured} {outcome.value:.1%}: {outcome.verdict}" for outcome in self.gate.outcomes],
        }

    def upgrade(self) -> None:
        """Makes the new version serve, and starts or resumes the backfill."""
        with self._changes:
            if self.gallery.model.version == 0:
                try:
                    self.gallery.admit(self.identities[1], self.gate, thresholds=self.thresholds)
                except AdmissionError as error:
                    raise RefusedError(str(error)) from None
            if self._worker is not None and self._worker.is_alive():
                raise RefusedError("the old vectors are being replaced already")
            self._stop.clear()
            self._worker = threading.Thread(target=self._backfill, daemon=True)
            self._worker.start()

    def rollback(self) -> None:
        """Makes the old version serve again, and restores its vectors."""
        with self._changes:
            self._end_worker()
            if self.gallery.status()["rolls_back_to"] is None:
                raise RefusedError("there is no version to roll back to")
            self.gallery.rollback()

    def stop(self) -> None:
        """Stops the backfill after its current batch; `upgrade` resumes it."""
        with self._changes:
            self._end_worker()

    def close(self) -> None:
        self.stop()
        self.gallery.close()

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._stop.set()
            self._worker.join()

    def _backfill(self) -> None:
        model, identity = self.models[1], self.identities[1]
        with closing(self.gallery.stale(batch=BATCH)) as batches:  # ends the leases, also after an error
            for batch in batches:
                rows = torch.from_numpy(self.drawings[batch])
                try:
                    self.gallery.replace(batch, model.extract(rows, prepare=model.preprocessing), model=identity)
                except StrangerError:  # another process has rolled back
                    return
                if self._stop.wait(self._pause):
                    return

    @staticmethod
    def _rows(status: dict[str, Any], version: int) -> int:
        return next((entry["rows"] for entry in status["versions"] if entry["version"] == version), 0)


def on_clean_paper(ink: torch.Tensor) -> torch.Tensor:
    """Scales ink [1, 28, 28] to [0, 1] for any lightness of paper and pen.

    Raises:
        RefusedError: all pixels have nearly the same lightness.
    """
    paper = ink.median()  # most of a drawing is paper
    ink = ink - paper if ink.max() - paper >= paper - ink.min() else paper - ink  # inverts a light pen on dark paper
    if ink.max() < 0.05:
        raise RefusedError("nothing is drawn on this image")
    return (ink / ink.max()).clamp(0, 1)
