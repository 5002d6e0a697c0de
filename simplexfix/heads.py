"""Classifier heads with fixed prototypes: they replace a model's last `nn.Linear` and store no K x d matrix."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import functional as SF
from ._checks import check_integer, check_margin, check_scale, check_target
from ._native import is_readable
from .polytopes import cube_codes, cube_prototypes, orthoplex_prototypes, simplex_prototypes
from .slots import SlotRegistry

__all__ = ["CubeHead", "OrthoplexHead", "SimplexHead"]

_LOGITS_AT_A_TIME = 1 << 21  # most logits that `predict` holds at once
_VERTICES_AT_A_TIME = 4096  # most vertices of a cube that `predict` expands to signs at once


_Head = TypeVar("_Head", bound="_PolytopeHead")


def _registry(in_features: int, num_classes: int, num_slots: int | None) -> SlotRegistry:
    """Returns the registry of a new head, with classes 0 .. num_classes - 1 in namespace "default"."""
    in_features, num_classes = check_integer("in_features", in_features), check_integer("num_classes", num_classes)
    if in_features < 1 or num_classes < 0:
        raise ValueError(f"in_features must be >= 1 and num_classes >= 0, got {in_features} and {num_classes}")
    slots = SlotRegistry(num_classes if num_slots is None else num_slots)
    slots.add("default", range(num_classes))
    return slots


class _PolytopeHead(nn.Module):
    """The common part of all heads: junction, slots and options.  A subclass adds its polytope's functions."""

    _polytope: str

    def __init__(
        self,
        slots: SlotRegistry,
        in_features: int,
        embedding_dim: int,
        normalize: bool,
        scale: float,
        margin: tuple[str, float] | None,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.scale = scale
        self.margin = tuple(margin) if isinstance(margin, list) else margin  # JSON has no tuples
        check_scale(scale)
        check_margin(self.margin, normalize)
        self.junction = nn.Linear(int(in_features), embedding_dim, bias=bias, device=device, dtype=dtype)
        self.slots = slots.to(self.junction.weight.device)

    @classmethod
    def from_slots(
        cls: type[_Head],
        slots: SlotRegistry,
        in_features: int,
        *,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> _Head:
        """Returns a new head with a copy of a registry, so that each class keeps its slot.

        The junction is new, so `in_features` may differ from the old model's.  The copy is independent: a class that
        is later added to one head is not added to the other.  Where both heads get new classes, add each class to one
        shared registry first and make the heads from it; otherwise two classes can get the same slot.

        Args:
            slots: `head.slots` of the model that is replaced, or the registry that all versions share.
            in_features: width of the new backbone's features, at least 1.
            normalize, scale, margin, bias, device, dtype: as in the constructor.

        Returns:
            A head of this class with `slots.num_slots` slots.

        Raises:
            TypeError: `slots` is not a `SlotRegistry`.
            ValueError: an option is out of range, or an orthoplex gets an odd number of slots.
        """
        options = {"normalize": normalize, "scale": scale, "margin": margin, "bias": bias}
        return cls._around(slots, in_features, **options, device=device, dtype=dtype)

    @classmethod
    def _around(cls: type[_Head], slots: SlotRegistry, in_features: int, **options: Any) -> _Head:
        if not isinstance(slots, SlotRegistry):
            raise TypeError(f"slots must be a SlotRegistry, such as head.slots, got {type(slots).__name__}")
        head = cls(in_features, 0, num_slots=slots.num_slots, **options)  # type: ignore[call-arg, arg-type]
        if head.num_slots != slots.num_slots:
            raise ValueError(
                f"slots must have an even number of slots, got {slots.num_slots}: each vertex comes with its opposite"
            )
        head.slots = copy.deepcopy(slots).to(head.junction.weight.device)
        return head

    def _logits(self, z: Tensor) -> Tensor:
        """Returns the logits [..., K] of embeddings [..., d]."""
        raise NotImplementedError

    def _loss(self, z: Tensor, target: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError

    def _vertices(self, slots: Tensor) -> Tensor:
        """Returns the unit vertices [n, d] of slots [n], in the junction's dtype."""
        raise NotImplementedError

    def _scores(self, z: Tensor, used: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (logits [B, n], slots [n]) in blocks; together the blocks cover `used` in ascending order."""
        yield self._logits(z).index_select(-1, used), used

    @property
    def num_slots(self) -> int:
        """K, the number of slots; it never changes."""
        return self.slots.num_slots

    @property
    def num_classes(self) -> int:
        """Number of slots that have a class."""
        return len(self.slots)

    @property
    def embedding_dim(self) -> int:
        """d, the width of an embedding and of a gallery row."""
        return self.junction.out_features

    def grow(self, num_classes: int) -> None:
        """Adds classes to namespace "default" until it has `num_classes`, each in the next free slot.

        Parameters, existing slots and outputs do not change.

        Args:
            num_classes: new number of classes in "default", from the present number up.

        Raises:
            TypeError: `num_classes` is not an integer.
            ValueError: `num_classes` is below the present number, or too few slots are free.
        """
        num_classes = check_integer("num_classes", num_classes)
        have = len(self.slots.classes("default"))
        if num_classes < have:
            raise ValueError(f"num_classes can only grow, from {have}, got {num_classes}")
        self.slots.add("default", range(have, num_classes))

    def embed(self, features: Tensor) -> Tensor:
        """Returns embeddings, for galleries and for queries; they are compared by cosine similarity.

            z = junction(features)

        Args:
            features: [..., in_features], in the junction's dtype.

        Returns:
            [..., d], not normalised.
        """
        return self.junction(features)  # type: ignore[no-any-return]

    def forward(
        self,
        features: Tensor,
        target: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Returns the logits of all K slots, or the loss where `target` is given.

        With a target this is `loss`, which never stores the logits.  DistributedDataParallel averages only gradients
        that come from its module's `forward`.  So call the wrapped head with the target,
        `DistributedDataParallel(head)(features, target)`, and not `.module.loss`.

        Args:
            features: [..., in_features], in the junction's dtype.
            target: [...] int64 slots, or None for logits.
            weight, ignore_index, label_smoothing, reduction: as in `simplexfix.functional.simplex_cross_entropy`; only
                with a target.

        Returns:
            Without a target [..., K] logits.  With a target [...] for `reduction="none"`, else a scalar.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: the arguments of `loss` are wrong, or an option of the loss is given without a target.
        """
        if target is not None:
            return self.loss(
                features,
                target,
                weight=weight,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction=reduction,
            )
        if weight is not None or ignore_index != -100 or label_smoothing or reduction != "mean":
            raise ValueError("weight, ignore_index, label_smoothing and reduction are options of the loss; pass target")
        return self._logits(self.embed(features))

    def loss(
        self,
        features: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Returns the fused cross-entropy of the head's polytope, with the head's `normalize`, `scale` and `margin`.

            z = junction(features)
            loss = simplexfix.functional.simplex_cross_entropy(z, target)  # or orthoplex_, or cube_cross_entropy

        Args:
            features: [..., in_features], in the junction's dtype.
            target: [...] int64, the slot of each row's class, or `ignore_index`.  `head.slots.lookup` maps class ids
                to slots.
            weight, ignore_index, label_smoothing, reduction: as in `simplexfix.functional.simplex_cross_entropy`.

        Returns:
            [...] for `reduction="none"`, else a scalar.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: a shape or an option is wrong, or a label's slot has no class.  Slots without a class are only
                detected on the CPU, and not under `torch.compile` or `torch.func`: reading a label on a GPU would
                synchronize, and traced labels have no values.
        """
        z = self.embed(features)
        self._check_registered(z, target, ignore_index)
        return self._cross_entropy(z, target, weight, ignore_index, label_smoothing, reduction)

    def hoc_loss(
        self,
        features: Tensor,
        old_embedding: Tensor,
        target: Tensor,
        *,
        lambda_: float = 0.1,
        mu: float = 10.0,
        negatives: str = "zero_mask",
        anchor: str = "old",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Returns the higher-order compatibility (HOC) loss: the head's cross-entropy plus an old-new contrast.

            z = head.embed(features)
            lambda_ * head.loss(features, target) + (1 - lambda_) * old_new_contrast(z, old_embedding, target)

        Under DistributedDataParallel call this method inside the `forward` of the wrapped module.

        Args:
            features: [B, in_features] of the model in training.
            old_embedding: [B, d] embeddings of the same items by the deployed model; they get no gradient.
            target: [B] int64, the slot of each row's class, or `ignore_index`.
            lambda_: weight of the cross-entropy, in [0, 1].
            mu, negatives, anchor, group: as in `simplexfix.functional.old_new_contrast`.
            weight, ignore_index, label_smoothing: as in `simplexfix.functional.simplex_cross_entropy`.
            reduction: "none", "mean" or "sum", applied to both terms.

        Returns:
            [B] for `reduction="none"`, else a scalar.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: a shape or an option is wrong, or a label's slot has no class (see `loss`).

        Reference:
            arXiv 2405.02581.
        """
        z = self.embed(features)
        self._check_registered(z, target, ignore_index)
        return SF.mix_with_contrast(
            lambda: self._cross_entropy(z, target, weight, ignore_index, label_smoothing, reduction),
            z,
            old_embedding,
            target,
            lambda_=lambda_,
            mu=mu,
            negatives=negatives,
            anchor=anchor,
            reduction=reduction,
            group=group,
        )

    def _cross_entropy(
        self,
        z: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
    ) -> Tensor:
        return self._loss(
            z,
            target,
            normalize=self.normalize,
            scale=self.scale,
            margin=self.margin,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    def _check_registered(self, z: Tensor, target: Tensor, ignore_index: int) -> None:
        """Raises for labels of free slots: training on one would use up the vertex of a future class."""
        if isinstance(target, Tensor) and target.dtype == torch.int64 and target.layout == torch.strided:
            if not is_readable(target) or not target.numel():
                return
            highest = target.max().item()
            if highest < self._modules["slots"]._given_below:  # type: ignore[union-attr, operator]
                return  # the common case, about 2.5 us; the loss itself raises for labels below 0
            if highest < self.num_slots and target.min().item() >= self.slots.free_slots.stop:
                return
        check_target(target, z)
        free = self.slots.free_slots
        no_class = (target >= self.num_slots) | ((target >= free.start) & (target < free.stop))
        no_class &= target != ignore_index
        if no_class.any():
            self._refuse_label(target.reshape(-1), int(no_class.reshape(-1).nonzero()[0]), ignore_index)

    def _refuse_label(self, target: Tensor, row: int, ignore_index: int) -> NoReturn:
        free, used = self.slots.free_slots, self.num_classes
        taken = [range(free.start), range(free.stop, self.num_slots)] if free else [range(self.num_slots)]
        ends = [f"{slots[0]} to {slots[-1]}" for slots in taken if slots]
        have = f"the head has {used} classes, in slots {' and '.join(ends)}" if ends else "the head has no classes yet"
        labels = target[target != ignore_index]
        one_based = used > 0 and int(labels.min()) >= 1 and int(labels.max()) == used
        remedy = "map class ids to slots (head.slots.lookup)"
        if 0 <= int(target[row]) < self.num_slots:
            remedy = f"register the class first (head.grow, or head.slots.add for a namespace), or {remedy}"
        raise ValueError(
            f"target row {row} has label {int(target[row])}, a slot without a class: {have}; {remedy}"
            + (f"; all labels lie in 1 to {used}: if they count from 1, pass target - 1" if one_based else "")
        )

    @torch.no_grad()
    def predict(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Returns the k slots in use with the largest logits; slots without a class are left out.

            self(features)[..., self.slots.used()].topk(k)    # computed block by block

        A block has at most 2^21 logits, but at least one row.

        Args:
            features: [..., in_features], in the junction's dtype.
            k: from 1 to the number of classes.

        Returns:
            scores [..., k], logits in descending order, and classes [..., k] int64 slots; equal scores are ordered by
            slot.  In a new head a slot of namespace "default" equals its class id; `head.slots.owner` maps any slot
            to its namespace and class id.

        Raises:
            TypeError: k is not an integer.
            ValueError: k is below 1 or above the number of classes, or the head has no classes.
        """
        k = check_integer("k", k)
        if not self.num_classes:
            raise ValueError("the head has no classes yet; head.grow or head.slots.add makes some")
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must lie in [1, {self.num_classes}], the classes in use, got {k}")
        z = self.embed(features)
        used = self.slots.used().to(z.device)
        best = [self._best(rows, used, k) for rows in torch.split(z.reshape(-1, z.shape[-1]), self._rows_at_a_time())]
        scores, classes = (torch.cat(parts).view(*z.shape[:-1], k) for parts in zip(*best, strict=True))
        return scores, classes

    def _rows_at_a_time(self) -> int:
        return max(1, _LOGITS_AT_A_TIME // self.num_slots)

    def _best(self, z: Tensor, used: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns the top k of each row, merged block by block; the running best come first: their slots are lower."""
        scores, slots = z.new_empty(len(z), 0), used.new_empty(len(z), 0)
        for block, block_slots in self._scores(z, used):
            scores = torch.cat([scores, block], 1)
            slots = torch.cat([slots, block_slots.expand(len(z), -1)], 1)
            at = _top_columns(scores, min(k, scores.shape[1]))
            scores, slots = scores.gather(1, at), slots.gather(1, at)
        return scores, slots

    def prototypes(self, slots: Tensor | None = None) -> Tensor:
        """Returns the unit vertices of slots.

        Args:
            slots: [n] int64 in [0, K); None for all slots that have a class.

        Returns:
            [n, d] in the junction's dtype, on its device.
        """
        return self._vertices(self.slots.used() if slots is None else slots)

    def get_extra_state(self) -> Tensor:
        """Returns registry and polytope as [n] uint8 text on the CPU; `decode_state` is the inverse."""
        return encode_state(self._describe())

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        """Restores the registry of a saved head; older state_dicts hold a dict in place of the tensor."""
        saved = self._saved_slots(decode_state(state))
        self.slots = saved.to(self.junction.weight.device)

    def _describe(self) -> dict[str, Any]:
        return {**self.slots.to_dict(), "polytope": self._polytope}

    def _saved_slots(self, state: dict[str, Any]) -> SlotRegistry:
        saved = state.get("polytope", "simplex")
        if saved != self._polytope:
            raise ValueError(
                f"the saved head must be a {self._polytope} head like this one, got a {saved} head with other vertices"
            )
        registry = SlotRegistry.from_dict(state)
        if registry.num_slots != self.num_slots:
            raise ValueError(f"the saved head has {registry.num_slots} slots, this one {self.num_slots}")
        return registry

    def extra_repr(self) -> str:
        options = f"normalize={self.normalize}, scale={self.scale}, margin={self.margin}"
        return f"num_classes={self.num_classes}, num_slots={self.num_slots}, {options}"


def encode_state(state: Mapping[str, Any]) -> Tensor:
    """Encodes a state as [n] uint8 ASCII: CRC-32 of its JSON in 8 hexadecimal digits, a space, the JSON."""
    text = json.dumps(state, separators=(",", ":")).encode("ascii")
    return torch.tensor(list(f"{zlib.crc32(text):08x} ".encode() + text), dtype=torch.uint8, device="cpu")


def decode_state(state: Tensor | dict[str, Any]) -> dict[str, Any]:
    """Decodes a state of `encode_state`; a dict is returned unchanged.

    The bytes may have a floating dtype, such as after a cast or an average of equal state_dicts.

    Raises:
        TypeError: `state` is neither a tensor nor a dict.
        ValueError: the checksum does not match the bytes.
    """
    if isinstance(state, dict):
        return state
    if not isinstance(state, Tensor):
        raise TypeError(f"the saved head's _extra_state must be a tensor or a dict, got {type(state).__name__}")
    content = bytes(state.detach().cpu().double().round().to(torch.uint8).flatten().tolist())
    checksum, _, text = content.partition(b" ")
    if checksum != f"{zlib.crc32(text):08x}".encode():
        raise ValueError(
            "the saved head's _extra_state is damaged: its checksum does not match; state_dicts can be averaged only "
            "if their heads have the same classes"
        )
    decoded: dict[str, Any] = json.loads(text)
    return decoded


def _top_columns(scores: Tensor, k: int) -> Tensor:
    """Columns [B, k] of the k largest of [B, n], descending; nan counts as largest, ties go to the lower column.

    `Tensor.topk` alone would leave the order of ties undefined.
    """
    key = torch.where(scores.isnan(), torch.inf, scores)
    least = key.topk(k).values[:, -1:]
    above, ties = key > least, key == least
    taken = above | (ties & (ties.cumsum(1) <= k - above.sum(1, keepdim=True)))
    at = taken.nonzero()[:, 1].view(-1, k)
    return at.gather(1, key.gather(1, at).sort(dim=1, descending=True, stable=True).indices)


class SimplexHead(_PolytopeHead):
    """Trainable junction and fixed d-simplex classifier; training with it makes a model's features stationary.

        z = junction(features)                          # nn.Linear, in_features -> d = K - 1
        logits = scale * z @ simplex_prototypes(K).T    # fixed; z normalised first with normalize=True

    The class prototypes are the K vertices of a regular simplex; vertex i is slot i.  K is chosen once and never
    changes.  Slots without a class are reserved for classes that later versions add.  `head.slots` is the
    `SlotRegistry` that maps classes to slots.  Classes 0 .. num_classes - 1 of namespace "default" start in the slots
    of the same number.  The state_dict holds the junction and the registry.

    Args:
        in_features: width of the backbone's features, at least 1.
        num_classes: number of classes at the start; 0 if `head.slots.add` adds all of them later.
        num_slots: K, at least 2; None for `num_classes`.
        normalize, scale, margin: as in `simplexfix.functional.simplex_cross_entropy`.
        bias: whether the junction has a bias; it shifts the embeddings of all classes equally.
        device, dtype: device and dtype of the junction.

    Raises:
        TypeError: a number of features, classes or slots is not an integer.
        ValueError: K is below 2 or below `num_classes`, or an option is out of range.

    Example:
        >>> import torch
        >>> from simplexfix import SimplexHead
        >>> head = SimplexHead(512, num_classes=10, num_slots=64)
        >>> features, target = torch.randn(8, 512), torch.arange(8)
        >>> head.loss(features, target).backward()
        >>> head.embed(features).shape                        # rows for the gallery
        torch.Size([8, 63])
        >>> scores, classes = head.predict(features, k=3)
        >>> replacement = SimplexHead.from_slots(head.slots, 768)    # another backbone, the same slots
        >>> replacement.embedding_dim
        63

    Reference:
        Biondi, Pernici, Ricci, Del Bimbo, "Stationary Representations: Optimally Approximating Compatibility
        and Implications for Improved Model Replacements", CVPR 2024, arXiv 2405.02581.
    """

    _polytope = "simplex"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_slots: int | None = None,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        slots = _registry(in_features, num_classes, num_slots)
        super().__init__(slots, in_features, slots.num_slots - 1, normalize, scale, margin, bias, device, dtype)

    def _logits(self, z: Tensor) -> Tensor:
        return SF.simplex_logits(z, normalize=self.normalize, scale=self.scale)

    def _loss(self, z: Tensor, target: Tensor, **options: Any) -> Tensor:
        return SF.simplex_cross_entropy(z, target, **options)

    def _vertices(self, slots: Tensor) -> Tensor:
        weight = self.junction.weight
        return simplex_prototypes(self.num_slots, slots, dtype=weight.dtype, device=weight.device)


class OrthoplexHead(_PolytopeHead):
    """Trainable junction and fixed orthoplex classifier: K classes in d = K / 2 dimensions.

        z = junction(features)                          # nn.Linear, in_features -> d = K / 2
        logits = scale * [z, -z]                        # z normalised first with normalize=True

    It works like `SimplexHead` at half the embedding width.  Slots c and d + c are opposite vertices (cosine -1); all
    other pairs are orthogonal.

    Args:
        in_features: width of the backbone's features, at least 1.
        num_classes: number of classes at the start; 0 if `head.slots.add` adds all of them later.
        num_slots: K, at least 2, rounded up to an even number; None for `num_classes`.
        normalize, scale, margin: as in `simplexfix.functional.simplex_cross_entropy`.
        bias: whether the junction has a bias; it shifts the embeddings of all classes equally.
        device, dtype: device and dtype of the junction.

    Raises:
        TypeError: a number of features, classes or slots is not an integer.
        ValueError: K is below 2 or below `num_classes`, or an option is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.
    """

    _polytope = "orthoplex"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_slots: int | None = None,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_classes = check_integer("num_classes", num_classes)
        num_slots = num_classes if num_slots is None else check_integer("num_slots", num_slots)
        num_slots += num_slots % 2
        slots = _registry(in_features, num_classes, num_slots)
        super().__init__(slots, in_features, slots.num_slots // 2, normalize, scale, margin, bias, device, dtype)

    def _logits(self, z: Tensor) -> Tensor:
        return SF.orthoplex_logits(z, normalize=self.normalize, scale=self.scale)

    def _loss(self, z: Tensor, target: Tensor, **options: Any) -> Tensor:
        return SF.orthoplex_cross_entropy(z, target, **options)

    def _vertices(self, slots: Tensor) -> Tensor:
        weight = self.junction.weight
        return orthoplex_prototypes(self.num_slots, slots, dtype=weight.dtype, device=weight.device)


class CubeHead(_PolytopeHead):
    """Trainable junction and fixed d-cube classifier: many classes in few dimensions; the loss costs O(d) per row.

        z = junction(features)                          # nn.Linear, in_features -> d
        codes = cube_codes(K, d)                        # K of the 2^d vertices, far from each other
        logits = scale * z @ cube_prototypes(codes, d).T    # z normalised first with normalize=True

    It works like `SimplexHead` with two differences.  d is free, from log2(K) up.  The softmax of the loss
    (`simplexfix.functional.cube_cross_entropy`) runs over all 2^d vertices, while `forward` and `predict` use the K
    slots only.  The codes are a function of K and d and are not saved; loading a state_dict with other codes raises.
    A head on the meta device gets its codes when it moves to a device with memory.

    Args:
        in_features: width of the backbone's features, at least 1.
        num_classes: number of classes at the start; 0 if `head.slots.add` adds all of them later.
        embedding_dim: d, at least log2(K).
        num_slots: K, from 2 to 2^24; None for `num_classes`.
        normalize, scale, margin: as in `simplexfix.functional.simplex_cross_entropy`.
        bias: whether the junction has a bias; it shifts the embeddings of all classes equally.
        device, dtype: device and dtype of the junction; the codes are int64.

    Raises:
        TypeError: a number of features, classes, slots or dimensions is not an integer.
        ValueError: K is below 2, above 2^d or 2^24, or below `num_classes`; or an option is out of range.

    Reference:
        Pernici et al., "Regular Polytope Networks", arXiv 2103.15632.
    """

    codes: Tensor

    _polytope = "cube"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        embedding_dim: int,
        num_slots: int | None = None,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        slots = _registry(in_features, num_classes, num_slots)
        embedding_dim = check_integer("embedding_dim", embedding_dim)
        codes = cube_codes(slots.num_slots, embedding_dim, device="cpu")
        super().__init__(slots, in_features, embedding_dim, normalize, scale, margin, bias, device, dtype)
        self.register_buffer("codes", codes.to(self.junction.weight.device), persistent=False)
        self._fingerprint = _crc32(codes)
        self.register_load_state_dict_post_hook(_fill_codes)  # type: ignore[no-untyped-call]

    @classmethod
    def from_slots(  # type: ignore[override]
        cls,
        slots: SlotRegistry,
        in_features: int,
        *,
        embedding_dim: int,
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CubeHead:
        """Returns a new head with a copy of a registry, so that each class keeps its slot.

        Args:
            embedding_dim: d of the model that is replaced.
            slots, in_features, normalize, scale, margin, bias, device, dtype: as in `SimplexHead.from_slots`.

        Returns:
            A `CubeHead` with `slots.num_slots` slots.

        Raises:
            TypeError: `slots` is not a `SlotRegistry`.
            ValueError: an option is out of range, or the slots outnumber the 2^d vertices.
        """
        options = {"normalize": normalize, "scale": scale, "margin": margin, "bias": bias}
        return cls._around(slots, in_features, embedding_dim=embedding_dim, **options, device=device, dtype=dtype)

    def _logits(self, z: Tensor) -> Tensor:
        return SF.cube_logits(z, self.codes, normalize=self.normalize, scale=self.scale)

    def _loss(self, z: Tensor, target: Tensor, **options: Any) -> Tensor:
        return SF.cube_cross_entropy(z, target, codes=self.codes, **options)

    def _vertices(self, slots: Tensor) -> Tensor:
        weight = self.junction.weight
        return cube_prototypes(self.codes, self.embedding_dim, slots, dtype=weight.dtype)

    def _scores(self, z: Tensor, used: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for slots in torch.split(used, _VERTICES_AT_A_TIME):
            yield SF.cube_logits(z, self.codes[slots], normalize=self.normalize, scale=self.scale), slots

    def _rows_at_a_time(self) -> int:
        return max(1, _LOGITS_AT_A_TIME // min(self.num_slots, _VERTICES_AT_A_TIME))

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "codes_crc32": self._fingerprint}

    def _saved_slots(self, state: dict[str, Any]) -> SlotRegistry:
        slots = super()._saved_slots(state)
        if (crc32 := state.get("codes_crc32")) != self._fingerprint:
            raise ValueError(
                f"the saved head must have cube codes of crc32 {self._fingerprint} like this head, got crc32 {crc32}: "
                "its features belong to other vertices"
            )
        return slots

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CubeHead:
        empty = self.codes.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if empty:
            _fill_codes(self)
        return self


def _fill_codes(head: CubeHead, _: object = None) -> None:
    """Computes the codes of a head that was made on the meta device; codes are not part of the state_dict."""
    device = head.junction.weight.device
    if device.type != "meta" and (head.codes.is_meta or _crc32(head.codes) != head._fingerprint):
        head.codes = cube_codes(head.num_slots, head.embedding_dim, device=device)


def _crc32(codes: Tensor) -> int:
    return zlib.crc32(codes.cpu().numpy().tobytes())
