"""A model version: a backbone and a head."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data.batches import batches_of
from ..data.inputs import Preprocessing
from ..data.reading import lost_readers_named
from ._config import MODEL
from .card import card, pipeline_tag_of
from .folder import BACKBONES, identity_of, load_model, save_model
from .hub import folder_of, push
from .identity import ModelIdentity
from .wrapped import unwrapped

__all__ = ["EmbeddingModel"]


class EmbeddingModel(nn.Module):
    """One version of an embedding model: a backbone that returns a vector per item, and a head.

        z = head.embed(backbone(input))                   without a rotation
        z = head.embed(backbone(input)) @ rotation        with one

    Args:
        backbone: module that maps inputs [B, ...] to features [B, f].
        head: `SimplexHead`, or a module with the same `embed(features)` and `loss(features, target)`.
        preprocessing: a preprocessing of `simplexfix.data` that turns raw data into inputs, or None.  It is saved with
            the model.  `forward` does not apply it: pass it to `extract`
            as `prepare`.
        class_names: names of class 0, 1, ..., or None; saved with the model.
        rotation: [d, d] orthogonal matrix that turns the embeddings, or None; saved with the model.
            `aligned_with_older` of `simplexfix.training` computes it.  The head's losses ignore the rotation, so
            training makes it invalid: set it to None first, as `Trainer.fit` does.

    Example:
        >>> import tempfile, torch
        >>> from simplexfix import SimplexHead
        >>> from simplexfix.models import EmbeddingModel, FeatureMLP
        >>> model = EmbeddingModel(FeatureMLP(16, [32]), SimplexHead(32, num_classes=10))
        >>> stored = model.extract(torch.randn(100, 16))        # L2-normalised rows for the gallery
        >>> stored.shape
        torch.Size([100, 9])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     identity = model.save_pretrained(folder, version=1)
        ...     loaded = EmbeddingModel.from_pretrained(folder)
        >>> loaded.identity(version=1).why_not_search(identity)     # no reason: its queries can search that gallery
        []
    """

    class_names: tuple[str, ...] | None
    rotation: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
        rotation: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.preprocessing = preprocessing
        self.class_names = None if class_names is None else tuple(class_names)
        width = self.embedding_dim
        if rotation is not None and width is None:
            raise ValueError("rotation needs a known width: give the head an attribute embedding_dim")
        if rotation is not None and rotation.shape != (width, width):
            raise ValueError(f"rotation must have shape [{width}, {width}], got {list(rotation.shape)}")
        # contiguous: the layout affects the last bits of a product, and a model folder does not store it
        self.register_buffer("rotation", None if rotation is None else rotation.contiguous())

    @property
    def embedding_dim(self) -> int | None:
        """Width of the embeddings: `head.embedding_dim`, else `backbone.out_features`, else None."""
        found = getattr(self.head, "embedding_dim", None) or getattr(self.backbone, "out_features", None)
        return found if isinstance(found, int) else None

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Widths of older galleries that only the leading dimensions of this model's queries can search, ascending."""
        widths = {width for _, width in getattr(self.head, "ancestors", ())}
        return tuple(sorted(widths - {self.embedding_dim}))

    def forward(self, input: Tensor) -> Tensor:
        """Returns the embeddings [B, d] of inputs [B, ...], not normalised."""
        z: Tensor = self.head.embed(self.backbone(input))  # type: ignore[operator]
        return z if self.rotation is None else z @ self.rotation.to(z.dtype)

    @torch.no_grad()
    def extract(
        self,
        input: Tensor | Dataset[Any] | DataLoader[Any],
        *,
        prepare: Callable[[Tensor], Tensor] | None = None,
        workers: int = 0,
        width: int | None = None,
    ) -> Tensor:
        """Returns L2-normalised embeddings for a gallery or for queries, computed in evaluation mode.

            F.normalize(model.eval()(prepare(input))[:, :width])

        Args:
            input: [N, ...] tensor; or a map-style dataset whose items are tensors of equal shape, or tuples that begin
                with one; or a `DataLoader` of batches of such items.  A tensor is read 1024 rows at a time, a
                dataset 128.
            prepare: function that turns a batch into inputs, such as `model.preprocessing`; None for no function.
            workers: number of processes that read a dataset's items; 0 to read in this process.
            width: None or `embedding_dim` for all dimensions; or one of `prefixes` to search an older gallery of that
                width: only the leading dimensions are then returned, normalised.  `ModelIdentity.search_width` returns
                this number.

        Returns:
            [N, d] or [N, width], on the device of an input tensor, on the CPU for datasets and loaders.

        Raises:
            TypeError: `input` has another type, such as a dict or a list; the message says what to pass.
            ChildProcessError: a reader process was killed, for example because memory ran out.
            ValueError: there are no rows, a loader shuffles or drops rows, shapes of items differ, `width` is neither
                `embedding_dim` nor one of `prefixes`, or `workers` is given with a loader.
        """
        if width is not None and width not in (*self.prefixes, self.embedding_dim):
            known = ", ".join(map(str, self.prefixes)) or "none"
            raise ValueError(
                f"width must be {self.embedding_dim} (all dimensions) or one of the model's prefixes ({known}), "
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
            for module in training:  # only these: the others were in evaluation mode before
                module.training = True
        if not rows:
            raise ValueError(f"input must have a row, this {type(input).__name__} has none")
        return torch.cat(rows)

    def save_pretrained(self, folder: str | os.PathLike[str], *, version: int = 0, name: str = "") -> ModelIdentity:
        """Writes the model to a folder: weights, head, slots, preprocessing, class names, rotation, version and name.

        docs/reference/formats.md defines the files.

        The model replaces an earlier one in the folder; other files stay.  After an error or a crash the folder holds
        either the earlier model or the new one.  Modules that are compiled, or wrapped in DataParallel or
        DistributedDataParallel, are saved unwrapped.

        Args:
            folder: folder to write to; it is created if missing.
            version, name: number (at least 0) and name of the version, recorded in its identity.

        Returns:
            The identity of the model, for galleries that hold its embeddings.

        Raises:
            TypeError: the head or the preprocessing is not of this package, the model has parameters or buffers
                outside backbone and head, or the backbone's state holds something else than tensors and plain values.
            ValueError: `version` is negative, the folder holds a `config.json` of another program, or a backbone
                of this package was modified so that its constructor cannot rebuild it.
            OSError: the folder cannot be written.
        """
        return save_model(self, folder, version=version, name=name)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, backbone: nn.Module | None = None, revision: str | None = None
    ) -> EmbeddingModel:
        """Returns the model that `save_pretrained` or `push_to_hub` wrote, on the CPU and in evaluation mode.

        Its embeddings are bitwise equal to those of the saved model.  Nothing is unpickled, and no code is downloaded.

        Args:
            source: a local folder; or, as a string, "owner/name" of a repository on the Hugging Face hub, if there is
                no such folder.  The repository's `config.json` and weights are downloaded, unless the cache of
                huggingface_hub has them.
            backbone: a backbone with the saved one's architecture, into which the weights are loaded; None for
                backbones of `simplexfix.models`, which are rebuilt from their saved arguments.
            revision: branch, tag or commit hash of the repository; None for its main branch.

        Raises:
            FileNotFoundError: there is neither such a folder nor such a repository or revision.
            ConnectionError: the hub cannot be reached or a download broke off, and the cache does not have the files.
            ModelFolderError: the folder holds no model, is damaged, was edited or has another format; or its tensors
                do not fit the backbone, and the message lists missing, unexpected and mismatched ones.
            ValueError: `revision` is given for a local folder.
        """
        backbone, head, preprocessing, class_names, rotation = load_model(folder_of(source, revision, MODEL), backbone)
        return cls(backbone, head, preprocessing=preprocessing, class_names=class_names, rotation=rotation).eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        version: int = 0,
        name: str = "",
        private: bool | None = None,
        license: str | None = None,
        earlier: Sequence[ModelIdentity] = (),
        evaluation: Mapping[str, Any] | None = None,
    ) -> str:
        """Publishes the model, with a model card, in a repository of the Hugging Face hub.

        It needs `pip install 'simplexfix[hub]'`.

        One commit replaces the model and the card that were there; other files stay.  The token is that of
        `hf auth login` or HF_TOKEN.

        Args:
            repo_id: "owner/name", or "name" for the user who is logged in; the repository is created if missing.
            version, name: as in `save_pretrained`.
            private: whether a new repository is private; None for the owner's default, which may be public.
            license: the hub's name of a license, such as "mit"; None to leave it out.
            earlier: identities of earlier versions; the card's table says which of their galleries this model's queries
                may search.  The table always lists the older versions that the head's `ancestors` name.
            evaluation: `EvaluationReport.as_dict()` or `GateResult.as_dict()` for the card's scores; None for a
                card without scores.

        Returns:
            The commit's hash, which `from_pretrained` takes as `revision`.

        Raises:
            ConnectionError: the hub cannot be reached or refused the files.
            ModelFolderError: the repository holds a `config.json` of another program.
            ModuleNotFoundError: huggingface_hub is not installed.
            PermissionError: the token may not write there.
            TypeError, ValueError: the model cannot be saved, as in `save_pretrained`; `evaluation` is neither of
                the two dicts, or describes another model.
        """
        backbone = unwrapped(self.backbone)
        given = "" if type(backbone) in BACKBONES.values() else f", backbone={type(backbone).__name__}(...)"

        def text(identity: ModelIdentity, full_id: str) -> str:
            load = (
                "from simplexfix.models import EmbeddingModel\n\n"
                f'model = EmbeddingModel.from_pretrained("{full_id}"{given})\n'
                "embeddings = model.extract(inputs, prepare=model.preprocessing)  # unit rows"
            )
            tag = pipeline_tag_of(backbone, self.preprocessing)
            return card(
                identity, full_id, load=load, pipeline_tag=tag, license=license, earlier=earlier, evaluation=evaluation
            )

        def save(folder: Path) -> ModelIdentity:
            return self.save_pretrained(folder, version=version, name=name)

        return push(repo_id, MODEL, save, text, private=private)

    def identity(self, *, version: int = 0, name: str = "") -> ModelIdentity:
        """Returns the identity of the model with its present weights, as `save_pretrained` would.

        Args:
            version, name: as in `save_pretrained`.

        Raises:
            TypeError, ValueError: the model cannot be saved, as in `save_pretrained`.
        """
        return identity_of(self, version=version, name=name)
