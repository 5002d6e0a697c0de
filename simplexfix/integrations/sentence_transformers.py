"""Losses, a junction and a data collator for `SentenceTransformerTrainer`.

Trained models load with sentence-transformers alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn

from ..methods import HOC, Simplex
from ..slots import SlotRegistry

__all__ = ["HOCLoss", "OldEmbeddingCollator", "SimplexLoss", "add_junction"]


def add_junction(model: SentenceTransformer, slots: SlotRegistry) -> None:
    """Appends a `Dense` module without bias that maps embeddings to K - 1 dimensions, for a simplex with K slots.

        z = W embedding                                 # W: [K - 1, width of the embeddings before]

    `model.save_pretrained` saves the module too.  It corresponds to the junction of `simplexfix.SimplexHead`.

    Args:
        model: the model, changed in place.
        slots: registry that all versions share; K is `slots.num_slots`.

    Raises:
        ValueError: the embeddings have K - 1 dimensions already.
    """
    width, wanted = model.get_embedding_dimension(), slots.num_slots - 1
    if width == wanted:
        raise ValueError(
            f"the embeddings of model have {wanted} dimensions already, as {slots.num_slots} slots need: "
            "do not call add_junction"
        )
    model.append(Dense(width, wanted, bias=False, activation_function=None).to(model.device, model.dtype))


class SimplexLoss(nn.Module):
    """Cross-entropy of sentence embeddings with the fixed classifier of `simplexfix.SimplexHead`.

        z = model(sentences)
        loss = simplexfix.functional.simplex_cross_entropy(z, slots.lookup(namespace, label))

    The training set must have one column of texts and a column `label` of class ids.  This loss replaces
    other losses of labelled texts, such as `BatchAllTripletLoss` and `SoftmaxLoss`.

    Args:
        model: the model in training, with the junction of `add_junction`.
        slots: registry that all versions share.
        namespace: namespace of the classes in the registry.
        normalize, scale, margin: as in `simplexfix.functional.simplex_cross_entropy`.

    Raises:
        ValueError: an option is out of range, or the width of the embeddings is not K - 1.

    Reference:
        arXiv 2405.02581.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        slots: SlotRegistry,
        *,
        namespace: str = "default",
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
    ) -> None:
        super().__init__()
        _check_width(model, slots)
        self.model = model  # with several processes the trainer replaces it by the wrapped model
        self.method = Simplex(slots, namespace, normalize=normalize, scale=scale, margin=margin)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Returns the scalar loss of a batch; the trainer calls it."""
        (texts,) = _columns(sentence_features, 1, "one column of texts")
        return self.method.embedding_loss(_embed(self.model, texts), labels)

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the options, which sentence-transformers writes into the model card."""
        return _options(self.method, "normalize", "scale", "margin")


class HOCLoss(nn.Module):
    """HOC, for a model that replaces another one: `SimplexLoss` and a contrast to the old model's embeddings.

    `lambda_` is the weight of the first, 1 - `lambda_` that of the contrast.

        z, u = model(sentences), old(sentences)
        loss = simplexfix.functional.hoc_loss(z, u, slots.lookup(namespace, label))

    If `old` is None, the old embeddings come from a column of the data set, by `OldEmbeddingCollator`.  Otherwise the
    old model reads the tokens of each batch, so both models need the same tokenizer and `max_seq_length`.

    Args:
        model: the model in training, with the junction of `add_junction`.
        slots: registry that all versions share.
        old: the deployed model; the loss keeps a frozen copy of it.  None to read its embeddings from a column.
        namespace: namespace of the classes in the registry.
        lambda_, mu, negatives, anchor, normalize, scale, margin, group: as in `simplexfix.functional.hoc_loss`.

    Raises:
        ValueError: an option is out of range, the width of embeddings is not K - 1, or the two models differ in
            tokenizer or `max_seq_length`.

    Reference:
        arXiv 2405.02581.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        slots: SlotRegistry,
        old: SentenceTransformer | None = None,
        *,
        namespace: str = "default",
        lambda_: float = 0.1,
        mu: float = 10.0,
        negatives: str = "zero_mask",
        anchor: str = "old",
        normalize: bool = False,
        scale: float = 1.0,
        margin: tuple[str, float] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_width(model, slots)
        if old is not None:
            _check_width(old, slots, "old")
            if _tokenization(old) != _tokenization(model):
                raise ValueError(
                    "old and model must have the same tokenizer and max_seq_length, because both read the same tokens; "
                    "otherwise leave old out, and pass old.encode(texts) as a column with OldEmbeddingCollator"
                )
        self.model = model
        self.old = None if old is None else copy.deepcopy(old).eval().requires_grad_(False)
        self.method = HOC(
            slots,
            namespace,
            normalize=normalize,
            scale=scale,
            margin=margin,
            lambda_=lambda_,
            mu=mu,
            negatives=negatives,
            anchor=anchor,
            group=group,
        )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Returns the scalar loss of a batch; the trainer calls it."""
        if self.old is None:
            texts, old = _columns(
                sentence_features, 2, "a column of texts and one of old embeddings (OldEmbeddingCollator)"
            )
            reference = old["sentence_embedding"]
        else:
            (texts,) = _columns(sentence_features, 1, "one column of texts")
            with torch.no_grad():
                reference = _embed(self.old, texts)
        z = _embed(self.model, texts)
        return self.method.embedding_loss(z, labels, reference.to(z))

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the options, which sentence-transformers writes into the model card."""
        return _options(self.method, "lambda_", "mu", "negatives", "anchor", "normalize", "scale", "margin")


@dataclass
class OldEmbeddingCollator(SentenceTransformerDataCollator):  # type: ignore[misc]
    """A data collator that passes a column of the old model's embeddings on to `HOCLoss`.

    Use it as `SentenceTransformerTrainer(..., data_collator=OldEmbeddingCollator(model.preprocess))`.

    Args:
        preprocess_fn: `model.preprocess` of the model in training.
        old_column: name of the column, whose rows are old.encode(texts).

    Raises:
        ValueError: the data set has no such column.
    """

    old_column: str = "old_embedding"

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [{name: value for name, value in row.items() if name != self.old_column} for row in features]
        batch: dict[str, Any] = super().__call__(texts)
        if any(self.old_column not in row for row in features):
            raise ValueError(
                f"the data set must have a column {self.old_column!r} of the old model's embeddings, got "
                f"{sorted(features[0])}: add it with dataset.add_column({self.old_column!r}, list(old.encode(texts)))"
            )
        # the trainer passes columns with this suffix to the loss as embeddings
        old = np.asarray([row[self.old_column] for row in features], np.float32)
        batch[f"{self.old_column}_sentence_embedding"] = torch.from_numpy(old)
        return batch


def _check_width(model: SentenceTransformer, slots: SlotRegistry, name: str = "model") -> None:
    width = model.get_embedding_dimension()
    if width != slots.num_slots - 1:
        remedy = (
            "call add_junction(model, slots) before training"
            if name == "model"
            else "pass a model that was trained with these slots"
        )
        raise ValueError(
            f"{name} must have embeddings of {slots.num_slots - 1} dimensions for {slots.num_slots} slots, got "
            f"{width}: {remedy}"
        )


def _columns(sentence_features: Iterable[dict[str, Tensor]], number: int, expected: str) -> Sequence[dict[str, Tensor]]:
    columns = list(sentence_features)
    if len(columns) != number:
        raise ValueError(f"the data set must have {expected} besides the label, got {len(columns)}")
    return columns


def _embed(model: nn.Module, texts: Mapping[str, Tensor]) -> Tensor:
    embedding: Tensor = model(dict(texts))["sentence_embedding"]  # a copy: the model adds its outputs to the dict
    return embedding


def _tokenization(model: SentenceTransformer) -> Any:
    """Returns the settings that determine the token ids of a text."""
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
    if hasattr(tokenizer, "to_str"):
        rules = json.loads(tokenizer.to_str())
        rules.pop("padding"), rules.pop("truncation")  # every call sets them
        return rules, model.max_seq_length
    return tokenizer, model.max_seq_length


def _options(method: Simplex, *names: str) -> dict[str, Any]:
    return {"num_slots": method.slots.num_slots, **{name: getattr(method, name) for name in names}}
