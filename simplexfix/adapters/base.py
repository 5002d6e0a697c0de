"""Defines adapters and the interface of all methods that fit one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_features, check_fraction, check_rows, shape
from ..labelled import Ids
from ..models import ModelIdentity
from ..models._config import ADAPTER
from ..models.card import card
from ..models.hub import folder_of, push
from ._arc import slerp
from ._moments import Moments
from ._paired import Features, PairedFeatures
from .folder import identity_of, load_adapter, save_adapter
from .maps import unit

__all__ = ["Adapter", "AdapterMethod", "QueryChange"]


class Adapter(nn.Module):
    """Lets queries of a new encoder search a gallery that an old encoder extracted: a few tensors, fitted once.

        score(query, item) = adapter(new(query)) . adapter.gallery(old(item))

    A method either maps new queries into the old encoder's space, and stored vectors stay as they are, or it maps both
    into a common space; then stored vectors must be mapped once (`maps_gallery` is True), which needs no re-extraction.

    Args:
        query_map: [B, f_new] -> [B, d] unit rows.
        gallery_map: [N, f_old] -> [N, d] unit rows; None where stored vectors stay as they are.
        alpha: None, or in [0, 1]: the old encoder runs at query time as well, and a query is
            slerp(old query, adapted new query; alpha).
        method: name and options of the method that fitted it: plain values, for its folder and its repr.

    Attributes:
        maps_gallery: whether stored vectors must be mapped by `gallery`.
        in_features, old_features, embedding_dim: f_new, f_old and d.
    """

    def __init__(
        self,
        query_map: nn.Module,
        gallery_map: nn.Module | None = None,
        *,
        alpha: float | None = None,
        method: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if alpha is not None:
            check_fraction("alpha", alpha)
        self.query_map = deepcopy(query_map).float()
        self.gallery_map = None if gallery_map is None else deepcopy(gallery_map).float()
        self.alpha = alpha
        self.method = dict(method or {})

    @property
    def maps_gallery(self) -> bool:
        return self.gallery_map is not None

    @property
    def in_features(self) -> int:
        return int(self.query_map.in_features)  # type: ignore[arg-type]

    @property
    def old_features(self) -> int:
        return int(self.query_map.out_features if self.gallery_map is None else self.gallery_map.in_features)  # type: ignore[arg-type]

    @property
    def embedding_dim(self) -> int:
        return int(self.query_map.out_features)  # type: ignore[arg-type]

    def forward(self, features: Tensor, old: Tensor | None = None) -> Tensor:
        """[B, f_new] features of queries by the new encoder -> [B, d] unit float32 rows that search the gallery.

        Args:
            features: [B, f_new] floating; L2 norms do not matter.
            old: [B, f_old] features of the same queries by the old encoder: needed where `alpha` is given, and only
                there.

        Raises:
            TypeError, ValueError: no floating rows, or of another width; `old` is missing, or not wanted.
        """
        _check_width("features", features, self.in_features)
        if self.alpha is None:
            if old is not None:
                raise ValueError(
                    "old must be None: this adapter needs the new encoder's features alone (alpha is None)"
                )
            return self.query_map(features)  # type: ignore[no-any-return]
        if old is None:
            raise ValueError(f"old must be the old encoder's features of the same queries: alpha is {self.alpha}")
        _check_width("old", old, self.old_features)
        return self._query(features, unit(self.gallery(old), torch.float32))

    def _query(self, features: Tensor, before: Tensor) -> Tensor:
        """`forward`, where `before` has the old encoder's [B, d] unit rows of the queries, in the gallery's space."""
        query: Tensor = self.query_map(features)
        return query if self.alpha is None else slerp(before, query, self.alpha)

    def gallery(self, stored: Tensor) -> Tensor:
        """[N, f_old] vectors that the old encoder extracted -> [N, d] of the space that `adapter(features)` searches.

        The vectors themselves where `maps_gallery` is False.

        Raises:
            TypeError, ValueError: no floating rows, or of another width.
        """
        _check_width("stored", stored, self.old_features)
        return stored if self.gallery_map is None else self.gallery_map(stored)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        version: int = 0,
        name: str = "",
        old: str | None = None,
        new: str | None = None,
    ) -> ModelIdentity:
        """Writes tensors, method and version into a folder, as docs/reference/formats.md says.

        An adapter that was there is replaced; other files stay.  After an error or a crash the folder holds the adapter
        that was there, whole, or the new one.

        Args:
            folder: folder of the adapter, created if it does not exist.
            version, name: version and name of the new encoder with this adapter, for searches of the vectors it wrote.
            old, new: fingerprints of both encoders, as of `ModelIdentity`, or any names of encoders without one; part
                of the adapter's own fingerprint.

        Returns:
            The identity of the encoder behind this adapter, which a gallery stores.

        Raises:
            TypeError, ValueError: a version or name that is none; the folder holds the `config.json` of something else.
            OSError: it cannot be written.
        """
        return save_adapter(self, folder, version=version, name=name, old=old, new=new)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Adapter:
        """The adapter that `save_pretrained` or `push_to_hub` wrote: on the CPU, in evaluation mode.

        Its embeddings are the same to the bit.  Nothing is unpickled, and no code is downloaded.

        Args:
            source, revision: a local folder, or a repository of the Hugging Face hub, as in
                `EmbeddingModel.from_pretrained`.

        Raises:
            FileNotFoundError: there is neither such a folder nor such a repository or revision.
            ConnectionError: the hub cannot be reached or a download broke off, and the cache does not have the files.
            ModelFolderError: it holds no adapter; it is damaged, was changed by hand, or is of another format.
            ValueError: `revision` is given for a local folder.
        """
        return cls(**load_adapter(folder_of(source, revision, ADAPTER))).eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        version: int = 0,
        name: str = "",
        old: str | None = None,
        new: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        earlier: Sequence[ModelIdentity] = (),
        evaluation: Mapping[str, Any] | None = None,
    ) -> str:
        """Publishes the adapter, with a card, in a repository of the Hugging Face hub (the extra `hub`).

        Args:
            repo_id, private, license, earlier, evaluation: as in `EmbeddingModel.push_to_hub`.
            version, name, old, new: as in `save_pretrained`.

        Returns:
            The commit's hash, which `from_pretrained` takes as `revision`.

        Raises:
            ConnectionError, ModelFolderError, ModuleNotFoundError, PermissionError, TypeError, ValueError: as in
                `EmbeddingModel.push_to_hub`.
        """

        def text(identity: ModelIdentity, full_id: str) -> str:
            load = (
                "from simplexfix.adapters import Adapter\n\n"
                f'adapter = Adapter.from_pretrained("{full_id}")\n'
                f"queries = adapter(features{'' if self.alpha is None else ', old_features'})  # unit rows"
                + ("\nvectors = adapter.gallery(stored)  # once" if self.maps_gallery else "")
            )
            return card(
                identity, full_id, load=load, pipeline_tag=None, license=license, earlier=earlier, evaluation=evaluation
            )

        def save(folder: Path) -> ModelIdentity:
            return self.save_pretrained(folder, version=version, name=name, old=old, new=new)

        return push(repo_id, ADAPTER, save, text, private=private)

    def identity(
        self, *, version: int = 0, name: str = "", old: str | None = None, new: str | None = None
    ) -> ModelIdentity:
        """Returns the value that `save_pretrained` would return."""
        return identity_of(self, version=version, name=name, old=old, new=new)

    def extra_repr(self) -> str:
        words = [f"{name}={value!r}" for name, value in self.method.items()]
        return ", ".join(words if self.alpha is None else [*words, f"alpha={self.alpha}"])


class AdapterMethod(ABC):
    """A method that fits adapters: a frozen dataclass whose fields are its options.

        adapter = Procrustes().fit(old, new)

    Attributes:
        name: for tables and files.
        needs_labels: whether it cannot do without classes.
        maps_gallery: whether its adapters also map stored vectors.
        common_space: whether each version has one map, which embeds its queries for the galleries of all versions.
        kept: whether a selection keeps its adapters; those of a grid of corrections would fill the memory.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    maps_gallery: ClassVar[bool] = False
    common_space: ClassVar[bool] = False
    kept: ClassVar[bool] = True

    def fit(
        self,
        old: Features,
        new: Features,
        *,
        labels: Ids | None = None,
        sample: tuple[Features, Features] | None = None,
        device: torch.device | str | None = None,
    ) -> Adapter:
        """The adapter of two encoders' features of the same items.

        Rows are read in blocks, a few times one after the other: they may be memory-mapped files.  Sums are in float64.

        Args:
            old: [N, f_old] floating, by the encoder that extracted the gallery: tensor, array or mapped file.
            new: [N, f_new], by the new encoder, of the same items in the same order.
            labels: [N] integers or names, the items' classes; None: they are unknown.
            sample: ([M, f_old], [M, f_new]) of further items without labels, as a part of the gallery is.
            device: device of the computation; None: that of the rows of `new`.

        Returns:
            On `device`, in evaluation mode.

        Raises:
            TypeError, ValueError: rows, labels or sample that do not belong together; no labels where the method needs
                them.
        """
        versions = (old, new)
        features = PairedFeatures.read(versions, labels, sample, names=("old", "new"), device=device)
        self.check(features)
        return self.adapter(Moments(features), 0, 1)

    def adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        """The adapter of two versions of these features; if it is `kept`, fitted once for equal moments and options."""

        def make() -> Adapter:
            return self._adapter(moments, old, new).eval()

        return moments.once((self, old, new), make) if self.kept else make()

    @abstractmethod
    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        """Fits the adapter of one pair of versions."""

    def own_maps(self, moments: Moments) -> Sequence[nn.Module | None]:
        """Returns each version's map from its features to the vectors that its gallery stores; None: the identity."""
        return [None] * len(moments.features.versions)

    def check(self, features: PairedFeatures) -> None:
        """Raises ValueError where these features are not enough for the method."""
        if self.needs_labels and features.labels is None:
            raise ValueError(f"{self.name} needs labels, the classes of the items; whitened_procrustes does without")

    def described(self) -> dict[str, Any]:
        """Name and options, in plain values."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {
            "name": self.name,
            **{key: value.described() if isinstance(value, AdapterMethod) else value for key, value in options.items()},
        }


@dataclass(frozen=True)
class QueryChange(AdapterMethod):
    """Base of methods that change the queries of the method `of`; stored vectors and their maps are those of `of`."""

    of: AdapterMethod

    @property
    def maps_gallery(self) -> bool:  # type: ignore[override]
        return self.of.maps_gallery

    def own_maps(self, moments: Moments) -> Sequence[nn.Module | None]:
        return self.of.own_maps(moments)

    def check(self, features: PairedFeatures) -> None:
        self.of.check(features)


def _check_width(name: str, rows: Tensor, width: int) -> None:
    check_features(name, rows)
    check_rows(name, rows)
    if rows.shape[1] != width:
        raise ValueError(
            f"{name} must have {width} columns, the width that the adapter was fitted on, got {shape(rows)}"
        )
