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
    """Maps queries of a new encoder, so that they search a gallery that an old encoder extracted.

        score(query, item) = adapter(new(query)) . adapter.gallery(old(item))

    Some methods map new queries into the old encoder's space, and stored vectors stay as they are.  Others map both
    into a common space (`maps_gallery` is True).  Then stored vectors must be mapped once; no item is extracted again.

    Args:
        query_map: [B, f_new] -> [B, d] unit rows.
        gallery_map: [N, f_old] -> [N, d] unit rows; None if stored vectors stay as they are.
        alpha: None, or in [0, 1]: the old encoder runs at query time as well, and a query is
            slerp(old query, adapted new query; alpha).
        method: name and options of the method that fitted the adapter, as plain values.

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
        """Returns the queries, [B, d] unit float32 rows, that search the gallery.

        Args:
            features: [B, f_new] floating, of the queries by the new encoder; L2 norms do not matter.
            old: [B, f_old] features of the same queries by the old encoder; None if and only if `alpha` is None.

        Raises:
            TypeError, ValueError: rows are not floating or have another width; `old` is missing, or must be None.
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
        """Returns the queries; `before` are the old encoder's [B, d] unit rows of them, in the gallery's space."""
        query: Tensor = self.query_map(features)
        return query if self.alpha is None else slerp(before, query, self.alpha)

    def gallery(self, stored: Tensor) -> Tensor:
        """Maps vectors [N, f_old] of the old encoder to the vectors [N, d] that `adapter(features)` searches.

        If `maps_gallery` is False it returns the vectors unchanged.

        Raises:
            TypeError, ValueError: rows are not floating, or have another width.
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
        """Writes tensors, method and version to a folder (docs/reference/formats.md).

        The adapter replaces an earlier one in the folder; other files stay.  After an error or a crash the folder holds
        either the earlier adapter or the new one.

        Args:
            folder: folder to write to; it is created if missing.
            version, name: number (at least 0) and name of the version, recorded in its identity.
            old, new: fingerprints of both encoders (`ModelIdentity.fingerprint`), or any names for encoders without
                one.  The adapter's own fingerprint depends on them.

        Returns:
            The identity of the new encoder with this adapter, which a gallery stores.

        Raises:
            TypeError: `version` is not an integer, or a name not a string.
            ValueError: `version` is negative, or the folder holds a `config.json` of something else.
            OSError: the folder cannot be written.
        """
        return save_adapter(self, folder, version=version, name=name, old=old, new=new)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Adapter:
        """Returns the adapter that `save_pretrained` or `push_to_hub` wrote, on the CPU and in evaluation mode.

        Its results are bitwise equal to those of the saved adapter.  Nothing is unpickled, and no code is downloaded.

        Args:
            source, revision: a local folder, or a repository of the Hugging Face hub, as in
                `EmbeddingModel.from_pretrained`.

        Raises:
            FileNotFoundError: there is neither such a folder nor such a repository or revision.
            ConnectionError: the hub cannot be reached or a download broke off, and the cache does not have the files.
            ModelFolderError: the folder holds no adapter, is damaged, was changed by hand, or has another format.
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
    """A method that fits adapters: a frozen dataclass with the options as fields.

        adapter = Procrustes().fit(old, new)

    Attributes:
        name: name of the method in tables and files.
        needs_labels: whether the method needs the classes of the items.
        maps_gallery: whether its adapters also map stored vectors.
        common_space: whether each version has one map, which embeds its queries for the galleries of all versions.
        kept: whether `Moments` caches its adapters.  False for corrections: those of a grid would fill the memory.
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
        """Fits an adapter to two encoders' features of the same items.

        Rows are read in blocks, in several passes, so they may be memory-mapped files.  Sums are in float64.

        Args:
            old: [N, f_old] floating, by the encoder that extracted the gallery: tensor, array or mapped file.
            new: [N, f_new], by the new encoder, of the same items in the same order.
            labels: [N] integers or names, the items' classes; None if they are unknown.
            sample: ([M, f_old], [M, f_new]) of further items without labels, such as a part of the gallery.
            device: device of the computation; None for that of the rows of `new`.

        Returns:
            The adapter, on `device` and in evaluation mode.

        Raises:
            TypeError, ValueError: rows, labels or sample do not fit together, or the method needs labels and gets none.
        """
        versions = (old, new)
        features = PairedFeatures.read(versions, labels, sample, names=("old", "new"), device=device)
        self.check(features)
        return self.adapter(Moments(features), 0, 1)

    def adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        """Returns the adapter of two versions; if the method is `kept`, `moments` caches it."""

        def make() -> Adapter:
            return self._adapter(moments, old, new).eval()

        return moments.once((self, old, new), make) if self.kept else make()

    @abstractmethod
    def _adapter(self, moments: Moments, old: int, new: int) -> Adapter:
        """Fits the adapter of one pair of versions."""

    def own_maps(self, moments: Moments) -> Sequence[nn.Module | None]:
        """Returns each version's map from its features to the vectors that its gallery stores; None for identity."""
        return [None] * len(moments.features.versions)

    def check(self, features: PairedFeatures) -> None:
        """Raises a ValueError if these features are not enough for the method."""
        if self.needs_labels and features.labels is None:
            raise ValueError(
                f"{self.name} needs labels, the classes of the items: pass labels, or use WhitenedProcrustes"
            )

    def described(self) -> dict[str, Any]:
        """Returns the name and the options as plain values."""
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
