"""The identity of a model version, which a gallery compares before it accepts queries of another model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._checks import check_integer
from ..slots import SlotRegistry

__all__ = ["ModelIdentity"]

LEARNABLE = ("linear", "neighbours")  # kinds of heads without fixed vertices
OCA = "oca"  # kind of `OCAHead`
FEATURES = "features"  # kind of a head without a classifier
_SHOWN = 12  # digits of a fingerprint in a message
EXTERNAL = "external"  # kind of a model that this package did not make
ADAPTED = "adapter"  # kind of an encoder followed by an adapter


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of one model version in plain values; a gallery stores `to_dict()` beside its vectors.

    Args:
        fingerprint: SHA-256 of weights, backbone, head, slots and preprocessing, in hexadecimal.  Models with equal
            fingerprints give equal embeddings.
        version: number of the version, at least 0.
        name: free text.
        head: "simplex", "orthoplex" or "cube"; "linear" or "neighbours" for a learnable classifier; "oca" for
            `OCAHead`; "features" for no classifier; "external" for a model of another vendor; "adapter" for an encoder
            followed by an adapter.
        embedding_dim: width of the embeddings.
        num_slots: K of the polytope; None without a polytope.
        slots: map from classes to slots as runs (namespace, first class id, first slot, count, step), as in
            `SlotRegistry.to_dict`.
        codes_crc32: CRC-32 of a cube head's codes, which identifies its vertices; None for other heads.
        ancestors: (fingerprint, width) of older versions, oldest first.  The leading `width` dimensions of this model's
            queries can search that version's gallery.
        space: fingerprint of the model to whose space an adapter maps these embeddings; None without such a model.

    Raises:
        TypeError: `version` is not an integer, or `name` not a string.
        ValueError: `version` is negative.
    """

    fingerprint: str
    version: int
    name: str
    head: str
    embedding_dim: int
    num_slots: int | None = None
    slots: tuple[tuple[str, int, int, int, int], ...] = ()
    codes_crc32: int | None = None
    ancestors: tuple[tuple[str, int], ...] = ()
    space: str | None = None

    def __post_init__(self) -> None:
        if check_integer("version", self.version) < 0:
            raise ValueError(f"version must be 0 or more, got {self.version}")
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {type(self.name).__name__}")

    @classmethod
    def external(
        cls,
        name: str,
        revision: str,
        dim: int,
        *,
        version: int = 0,
        adapter: str | None = None,
        space: ModelIdentity | None = None,
    ) -> ModelIdentity:
        """Returns the identity of a model that was not made by this package, such as a vendor's.

            target = space.space or space.fingerprint           # None without a space
            fingerprint = sha256(json.dumps([name, revision, dim, adapter, target]))

        Args:
            name: the vendor's name of the model.
            revision: release, date or commit; another revision is another model.
            dim: width of the embeddings, after the adapter if there is one; at least 1.
            version: number of this version, at least 0.
            adapter: fingerprint of the adapter's weights; None without an adapter.
            space: identity of the model to whose space the adapter maps; None for a new space.  Models that share a
                space can search each other's galleries.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a text is empty, a number is out of range, or `space` is given without `adapter`.

        Example:
            >>> from simplexfix.models import ModelIdentity
            >>> old, new = (ModelIdentity.external("vendor/embed", year, 384) for year in ("2024", "2025"))
            >>> bool(new.why_not_search(old))                # two revisions are two models
            True
        """
        for what, value in (("name", name), ("revision", revision), ("adapter", adapter)):
            if not isinstance(value, str) and (what != "adapter" or value is not None):
                raise TypeError(f"{what} must be a string, got {type(value).__name__}")
            if value is not None and not value:
                raise ValueError(f"{what} must not be empty: it says which model this is")
        if space is not None and not isinstance(space, ModelIdentity):
            raise TypeError(f"space must be a ModelIdentity or None, got {type(space).__name__}")
        if space is not None and adapter is None:
            raise ValueError("space needs adapter: pass the fingerprint of the adapter that maps to that space")
        if check_integer("dim", dim) < 1:
            raise ValueError(f"dim must be 1 or more, got {dim}")
        target = None if space is None else space.space or space.fingerprint
        facts = json.dumps([name, revision, int(dim), adapter, target])
        return cls(
            fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
            version=version,
            name=f"{name} {revision}",
            head=EXTERNAL,
            embedding_dim=int(dim),
            space=target,
        )

    def why_not_search(self, gallery: ModelIdentity) -> list[str]:
        """Returns the reasons why queries of this model cannot search that model's gallery; empty if they can.

        Queries can search the gallery in these cases:

            both models are the same, or their adapters map to the same space;
            the gallery's model is one of this model's `ancestors` (with a prefix of the queries: `search_width`);
            both models have the same fixed polytope: head, num_slots, embedding_dim and a cube's codes are equal,
                each common class has the same slot, no slot has two classes, and there is a common class.

        An encoder followed by an adapter can search the galleries that the adapter was fitted for: those of the old
        encoder, or those that the adapter has mapped.

        The check reads no embedding.  It is necessary but not sufficient: `simplexfix.compatibility` measures the
        quality of the search.  For two different models with learnable classifiers it always returns a reason.

        Args:
            gallery: identity of the model that wrote the gallery.

        Returns:
            One sentence per reason.
        """
        if self.fingerprint == gallery.fingerprint:
            return []
        same_space = (self.space or self.fingerprint) == (gallery.space or gallery.fingerprint)
        if ADAPTED in (self.head, gallery.head) and not same_space:
            whose = "this model" if self.head == ADAPTED else "the gallery's model"
            return [
                f"{whose} is an encoder behind an adapter: it shares a space with vectors that the same adapter has "
                "mapped (adapter.gallery), or with the model whose space it maps to, and with no others"
            ]
        if OCA in (self.head, gallery.head) and not same_space:
            return self._why_no_prefix(gallery)
        reasons = []
        if self.embedding_dim != gallery.embedding_dim:
            reasons.append(
                f"the gallery's embeddings are {gallery.embedding_dim} wide, this model's {self.embedding_dim}"
            )
        if same_space:
            return reasons
        if self.head != gallery.head:
            reasons.append(f"the gallery's model has a head of kind {gallery.head!r}, this one {self.head!r}")
        elif self.head in LEARNABLE:
            reasons.append(
                "both are different models with learnable classifiers: only fixed vertices guarantee a shared space"
            )
        elif self.head == FEATURES:
            reasons.append(
                "both are different models without a classifier: only fixed vertices guarantee a shared space; "
                "simplexfix.adapters.QueryDrift moves queries of a fine-tuned encoder to the previous encoder's space"
            )
        elif self.head == EXTERNAL:
            reasons.append(
                f"{self.name} and {gallery.name} are different models, and nothing says that they share a space"
            )
        elif self.num_slots != gallery.num_slots:
            reasons.append(f"the gallery's polytope has {gallery.num_slots} slots, this model's {self.num_slots}")
        elif self.codes_crc32 != gallery.codes_crc32:
            reasons.append(
                f"the gallery's cube has codes of crc32 {gallery.codes_crc32}, this model's {self.codes_crc32}: other "
                "vertices"
            )
        else:
            reasons += _differing_slots(self._registry(), gallery._registry())
        return reasons

    def search_width(self, gallery: ModelIdentity) -> int:
        """Returns the number of leading query dimensions that search that gallery: all of them, or a prefix.

            queries = model.extract(images, width=model.identity().search_width(gallery))

        Args:
            gallery: identity of the model that wrote the gallery.

        Raises:
            ValueError: the queries cannot search the gallery; the message lists the reasons of `why_not_search`.
        """
        if reasons := self.why_not_search(gallery):
            raise ValueError(f"this model's queries cannot search the gallery: {'; '.join(reasons)}")
        return gallery.embedding_dim

    def _why_no_prefix(self, gallery: ModelIdentity) -> list[str]:
        """Implements `why_not_search` for OCA models, which can search only galleries of their ancestors."""
        width = dict(self.ancestors).get(gallery.fingerprint)
        if width == gallery.embedding_dim:
            return []
        if width is not None:
            return [f"the gallery's embeddings are {gallery.embedding_dim} wide, this model was trained for {width}"]
        if self.fingerprint in dict(gallery.ancestors):
            return ["the gallery's model is newer, and was trained from this one: search it with the newer model"]
        known = ", ".join(f"{fingerprint[:_SHOWN]} ({width} wide)" for fingerprint, width in self.ancestors) or "none"
        return [
            f"the gallery's model {gallery.fingerprint[:_SHOWN]} is not an ancestor of this one (ancestors: {known}): "
            "extract the gallery again with this model, or train a version with the gallery's model as old"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the identity as plain values for JSON; `from_dict` is the inverse."""
        runs, ancestors = ([list(entry) for entry in entries] for entries in (self.slots, self.ancestors))
        return {**asdict(self), "slots": runs, "ancestors": ancestors}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ModelIdentity:
        """Returns the identity that `to_dict` saved.

        Raises:
            TypeError: a key is missing or unknown.
            ValueError: two classes share a slot.
        """
        lists = {key: tuple(tuple(entry) for entry in saved.get(key, ())) for key in ("slots", "ancestors")}
        identity = cls(**{**saved, **lists})
        identity._registry()
        return identity

    def _registry(self) -> SlotRegistry:
        if self.num_slots is None:
            return SlotRegistry(2)
        return SlotRegistry.from_dict({**SlotRegistry(self.num_slots).to_dict(), "runs": self.slots})


def _differing_slots(mine: SlotRegistry, theirs: SlotRegistry) -> list[str]:
    """Reasons why two registries with the same number of slots do not agree."""
    reasons, agreed = [], [torch.empty(0, dtype=torch.int64)]
    for namespace in mine.namespaces:
        classes = mine.classes(namespace)
        classes = classes[torch.isin(classes, theirs.classes(namespace))]
        if not len(classes):
            continue
        here, there = mine.lookup(namespace, classes), theirs.lookup(namespace, classes)
        moved = (here != there).nonzero()[:, 0].tolist()
        if moved:
            others = f", and {len(moved) - 1} more of this namespace" if len(moved) > 1 else ""
            reasons.append(
                f"class {int(classes[moved[0]])} of namespace {namespace!r} has slot {int(there[moved[0]])} in the "
                f"gallery's model, {int(here[moved[0]])} in this one{others}"
            )
        agreed.append(here[here == there])
    if reasons:
        return reasons
    shared = mine.used()
    shared = shared[torch.isin(shared, theirs.used())]
    known = torch.cat(agreed)
    foreign = shared[~torch.isin(shared, known)].tolist()
    if foreign:
        old, new = (registry.owner(foreign[0]) for registry in (theirs, mine))
        assert old is not None
        assert new is not None
        others = f", and {len(foreign) - 1} more slots differ" if len(foreign) > 1 else ""
        reasons.append(
            f"slot {foreign[0]} is class {old[1]} of namespace {old[0]!r} in the gallery's model, "
            f"class {new[1]} of {new[0]!r} in this one{others}"
        )
    elif not len(known):
        reasons.append("the two models have no class in common")
    return reasons
