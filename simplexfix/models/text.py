"""Text encoders: transformers in Hugging Face's format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TextEncoder", "token_ids"]

_ROWS = 64  # most texts per forward pass without gradient


class TextEncoder(nn.Module):
    """A transformer with mean pooling: it maps token ids [B, L] to features [B, out_features].

        feature = 1 / |t| sum_{l in t} h_l              # t: tokens that are not padding, h: last hidden layer

    Inputs are cut to the longest text of the batch.  Without gradient, texts of similar length run together in batches
    of 64.  The last bits of a feature depend on the padded length of its batch.

    Args:
        folder: a local folder with configuration and weights, such as sentence_transformers writes.  Nothing is
            downloaded.

    Attributes:
        out_features: width of the features.
        padding: token id of padding.

    Raises:
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: transformers is not installed.
        OSError, ValueError: transformers cannot load a network from the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.network = _transformers(folder).AutoModel.from_pretrained(os.fspath(folder), local_files_only=True)
        self.network.pooler = None  # unused by mean pooling, and DistributedDataParallel raises for unused weights
        self.out_features = int(self.network.config.hidden_size)
        self.padding = int(self.network.config.pad_token_id or 0)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or len(input) <= _ROWS:
            return self._means(input)
        order = (input != self.padding).sum(1).argsort(stable=True)
        features = torch.cat([self._means(input[rows]) for rows in torch.split(order, _ROWS)])
        return features[order.argsort()]

    def _means(self, input: Tensor) -> Tensor:
        token = input != self.padding
        longest = max(1, int(token.sum(1).max())) if len(input) else 1  # synchronizes with a GPU
        input, token = input[:, :longest], token[:, :longest]
        states: Tensor = self.network(input_ids=input, attention_mask=token.long()).last_hidden_state
        counted = token.unsqueeze(2).to(states.dtype)
        return (states * counted).sum(1) / counted.sum(1).clamp(min=1)


def token_ids(folder: str | os.PathLike[str], texts: Sequence[str], length: int) -> Tensor:
    """Tokenizes texts for a `TextEncoder`, padded at the end.

    Args:
        folder: folder of the `TextEncoder`, with a tokenizer.
        texts: N texts.
        length: tokens per text, special tokens included, at least 1; longer texts are truncated.

    Returns:
        [N, length] int64 token ids.

    Raises:
        FileNotFoundError, ModuleNotFoundError, OSError: as in `TextEncoder`.
        ValueError: `length` is below 1, or transformers cannot load a tokenizer.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    tokenizer = _transformers(folder).AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if not texts:
        return torch.empty(0, length, dtype=torch.int64)
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: Tensor = found["input_ids"]
    return ids


def _transformers(folder: str | os.PathLike[str]) -> Any:
    """Imports transformers after a check that the folder exists; it would try to download a missing one."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{os.fspath(folder)} is not a folder; text encoders are read from local folders")
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "text encoders need transformers: pip install 'simplexfix[text]'", name="transformers"
        ) from error
    return transformers
