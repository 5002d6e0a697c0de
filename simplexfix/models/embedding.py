"""A backbone and a head: what a version of a search service's model is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data.batches import batches_of
from ..data.inputs import Preprocessing
from ..data.reading import lost_readers_named
from .folder import identity_of, load_model, save_model
from .identity import ModelIdentity

__all__ = ["EmbeddingModel"]


class EmbeddingModel(nn.Module):
    """Any backbone that returns a vector per item, and a head with `embed` and `loss`.

    Args:
        backbone: [B, ...] inputs -> [B, f] features.
        head: `SimplexHead`, or a module with the same `embed(features)` and `loss(features, target)`.
        preprocessing: of `simplexfix.data`, what makes inputs of what there is: kept with the model in its folder;
            whoever calls the model applies it.
        class_names: None, or what class 0, 1, ... is called: kept with the model, too.
    """

    class_names: tuple[str, ...] | None

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.preprocessing = preprocessing
        self.class_names = None if class_names is None else tuple(class_names)

    @property
    def embedding_dim(self) -> int | None:
        """Width of the embeddings; None where neither the head nor the backbone states it."""
        found = getattr(self.head, "embedding_dim", None) or getattr(self.backbone, "out_features", None)
        return found if isinstance(found, int) else None

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Widths of older versions whose galleries the leading dimensions of these embeddings search, ascending."""
        widths = {width for _, width in getattr(self.head, "ancestors", ())}
        return tuple(sorted(widths - {self.embedding_dim}))

    def forward(self, input: Tensor) -> Tensor:
        """[B, ...] -> [B, d] embeddings, as training sees them."""
        return self.head.embed(self.backbone(input))  # type: ignore[no-any-return, operator]

    @torch.no_grad()
    def extract(
        self,
        input: Tensor | Dataset[Any] | DataLoader[Any],
        *,
        prepare: Callable[[Tensor], Tensor] | None = None,
        workers: int = 0,
        width: int | None = None,
    ) -> Tensor:
        """L2-normalised embeddings, as a gallery stores them; in evaluation mode.

        Args:
            input: [N, ...]; or a map-style dataset whose items are tensors, or tuples that begin with one, of one
                shape; or a `DataLoader`, of whose batches the same holds.  The model goes over 1024 rows at once, 128
                of a dataset, and a loader's own batches.
            prepare: makes inputs of what there is, batch by batch, as `preprocessing` does; None for inputs as they
                are.
            workers: processes that read a dataset's items ahead; 0 for none.
            width: None for all dimensions; or one of `prefixes`, to search a gallery of that width: the leading
                dimensions alone, normalised.  `ModelIdentity.search_width` returns it for a gallery's model.

        Returns:
            [N, d], or [N, width], on the device of a tensor; of datasets and loaders on the CPU.

        Raises:
            TypeError: another kind of input, as a dict or a list; names the remedy.
            ChildProcessError: a process that reads items was ended, as for want of memory.
            ValueError: no rows; a loader that shuffles, or leaves rows out; items of unlike shapes; a width that is
                none of `prefixes`.
        """
        if width is not None and width not in (*self.prefixes, self.embedding_dim):
            known = ", ".join(map(str, self.prefixes)) or "none"
            raise ValueError(
                f"width must be {self.embedding_dim}, of all dimensions, or one of the model's prefixes ({known}), "
                f"got {width}"
            )
        device = next(self.parameters(), torch.empty(0)).device
        kept = input.device if isinstance(input, Tensor) else torch.device("cpu")
        training = [module for module in self.modules() if module.training]
        self.eval()
        rows = []
        try:
            with lost_readers_named():
                for batch in batches_of(input, workers=workers):
                    prepared = batch if prepare is None else prepare(batch)
                    rows.append(nn.functional.normalize(self(prepared.to(device))[:, :width], dim=1).to(kept))
        finally:
            for module in training:  # one by one: a part that was frozen stays so
                module.training = True
        if not rows:
            raise ValueError(f"input must have a row, this {type(input).__name__} has none")
        return torch.cat(rows)

    def save_pretrained(self, folder: str | os.PathLike[str], *, version: int = 0, name: str = "") -> ModelIdentity:
        """Writes weights, head, slots, preprocessing, class names and version into a folder, as docs/formats.md says.

        Parts that are compiled, or wrapped by DataParallel or DistributedDataParallel, are saved as the plain ones.

        A model that was there is replaced; other files stay.  After an error or a crash the folder holds the model
        that was there, whole, or the new one.

        Args:
            folder: made if it is not there.
            version, name: of the model, for those who search what it wrote.

        Returns:
            What a gallery must know of the model.

        Raises:
            TypeError: a head that is none of this package's, a preprocessing that is none, parts besides backbone and
                head, or a state of the backbone that is neither tensors nor plain values.
            ValueError: a negative version; the folder holds the `config.json` of something else; or a backbone of this
                package was altered, so that its constructor's arguments no longer make it.
            OSError: it cannot be written.
        """
        return save_model(self, folder, version=version, name=name)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, backbone: nn.Module | None = None) -> EmbeddingModel:
        """The model that `save_pretrained` wrote: on the CPU, in evaluation mode, its embeddings the same to the bit.

        Args:
            folder: a local one; nothing is downloaded and nothing unpickled.
            backbone: made as the saved one was, which is loaded into it; None for those of `simplexfix.models`, which
                are made again from their arguments.

        Raises:
            FileNotFoundError: there is no such folder.
            ModelFolderError: it holds no model; it is damaged or was changed by hand, or of another format; or its
                tensors do not fit the backbone: names what is missing, unexpected, or of another shape or dtype.
        """
        parts = load_model(folder, backbone)
        return cls(parts[0], parts[1], preprocessing=parts[2], class_names=parts[3]).eval()

    def identity(self, *, version: int = 0, name: str = "") -> ModelIdentity:
        """What `save_pretrained` would return, of the weights as they are now; errors of the model as there."""
        return identity_of(self, version=version, name=name)
