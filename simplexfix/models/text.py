"""Transformers that encode texts, in Hugging Face's format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TextEncoder", "token_ids"]

_ROWS = 64  # that go through the network at once where there is no gradient


class TextEncoder(nn.Module):
    """[B, L] token ids -> [B, out_features]: the mean of the last layer's features over the tokens of each text.

        feature = 1 / |t| sum_{l in t} h_l,    t the tokens that are not padding

    The network is given the columns that hold a token, as many as the longest text of the batch needs.  Without
    gradient it takes texts of similar length together, 64 at a time.  The last bits of a feature depend on the length
    to which its batch is padded.

    Args:
        folder: a local folder with configuration and weights; sentence_transformers writes such folders.  Nothing is
            downloaded.

    Attributes:
        out_features: width of the features.
        padding: the token id of padding.

    Raises:
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: transformers is not installed.
        OSError, ValueError: by transformers, where the folder holds no network.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.network = _transformers(folder).AutoModel.from_pretrained(os.fspath(folder), local_files_only=True)
        self.network.pooler = None  # it has no part in the mean, and DistributedDataParallel refuses unused weights
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
        longest = max(1, int(token.sum(1).max())) if len(input) else 1  # waits for the device
        input, token = input[:, :longest], token[:, :longest]
        states: Tensor = self.network(input_ids=input, attention_mask=token.long()).last_hidden_state
        counted = token.unsqueeze(2).to(states.dtype)
        return (states * counted).sum(1) / counted.sum(1).clamp(min=1)


def token_ids(folder: str | os.PathLike[str], texts: Sequence[str], length: int) -> Tensor:
    """Texts as the tokenizer of a `TextEncoder`'s folder cuts them, padded at the end.

    Args:
        folder: as of `TextEncoder`, with a tokenizer.
        texts: N texts.
        length: tokens of a row, the special ones among them; what is longer is cut off.

    Returns:
        [N, length] int64.

    Raises:
        FileNotFoundError, ModuleNotFoundError, OSError, ValueError: as `TextEncoder`; a length below 1.
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
    """The library, once the folder is there: it would look for a missing one on the network."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{os.fspath(folder)} is no folder; text encoders are read from local folders")
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "text encoders need transformers: pip install 'simplexfix[text]'", name="transformers"
        ) from error
    return transformers
