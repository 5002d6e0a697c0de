"""A model or an adapter that embeds features or images for a gallery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..adapters import Adapter
from ..data import ImageFileError, Preprocessing
from ..data.image_files import image_reader
from ..labelled import FeatureRows
from ..models import EmbeddingModel, ModelIdentity, read_identity
from ..models.identity import ADAPTED

__all__ = ["Embedder", "features_only"]


def features_only(adapter: Path) -> ValueError:
    return ValueError(
        f"the adapter in {adapter} takes features, not images: embed the images with its encoder, and give the file of "
        "features"
    )


class Embedder:
    """Embeds with the model or adapter in a folder, on a GPU if there is one.

    Args:
        folder: folder of the model or adapter.

    Raises:
        ValueError, OSError: the folder holds neither, or a model that only Python code can load, or an adapter that
            also needs the old encoder's features.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity: ModelIdentity = read_identity(folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.preprocessing: Preprocessing | None = None
        self._embed: Callable[[Tensor], Tensor]
        if self.identity.head == ADAPTED:
            adapter = Adapter.from_pretrained(folder).to(self.device)
            if adapter.alpha is not None:
                raise ValueError(
                    f"the adapter in {folder} takes the old encoder's features as well: `simplexfix embed --old` "
                    "writes its vectors, for --vectors"
                )
            self._embed = adapter
        else:
            model = EmbeddingModel.from_pretrained(folder).to(self.device)
            self.preprocessing = model.preprocessing
            self._embed = lambda input: model.extract(input, prepare=model.preprocessing)

    def features(self, rows: FeatureRows) -> NDArray[np.float32]:
        """Embeds features [n, f]; returns [n, d]."""
        return self._checked(rows.name, rows.whole())

    def images(self, files: Sequence[Path]) -> tuple[list[int], NDArray[np.float32], list[ImageFileError]]:
        """Embeds image files.

        Returns:
            Positions of the k files that can be read, their vectors [k, d], and the errors of the others.
        """
        if self.identity.head == ADAPTED:
            raise features_only(self.folder)
        read = image_reader(self.preprocessing)

        def attempt(file: Path) -> NDArray[Any] | ImageFileError:
            try:
                return read(file)
            except ImageFileError as error:
                return error

        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
            found = list(pool.map(attempt, files))
        images = {at: image for at, image in enumerate(found) if not isinstance(image, ImageFileError)}
        errors = [image for image in found if isinstance(image, ImageFileError)]
        if not images:
            return [], np.empty((0, self.identity.embedding_dim), np.float32), errors
        input = torch.from_numpy(np.stack(list(images.values())))
        return list(images), self._checked(str(files[0].parent), input), errors

    def _checked(self, name: str, input: Tensor) -> NDArray[np.float32]:
        try:
            with torch.inference_mode():
                vectors: NDArray[np.float32] = self._embed(input.to(self.device)).cpu().numpy()
        except RuntimeError as error:  # torch raises it for a wrong shape if no preprocessing has checked the input
            raise ValueError(f"the model in {self.folder} cannot embed {name} {list(input.shape)}: {error}") from None
        return vectors
