"""Encoders for MTEB: a model of this package, or queries and documents by different versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from torch import Tensor

__all__ = ["Encoder"]


class Encoder(AbsEncoder):  # type: ignore[misc]
    """An encoder for `mteb.evaluate`, made of functions that embed texts.

        score(query, document) = cos(encode(query), (encode_documents or encode)(document))

    `mteb.evaluate` takes a SentenceTransformer as it is.  This class is for other models, and for retrieval tasks in
    which a new version searches the index of an old one.

    Args:
        encode: maps a list of n texts to embeddings [n, d], a tensor or an array.
        encode_documents: like `encode`, for the documents of retrieval tasks, such as `encode` of an older version;
            None for `encode`.
        name: name of the model in results, of the form "organisation/model".
        revision: version of the model; mteb returns stored results for a name and revision that it has evaluated.

    Raises:
        ValueError: `name` has no "/".
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Any],
        encode_documents: Callable[[list[str]], Any] | None = None,
        *,
        name: str,
        revision: str,
    ) -> None:
        if "/" not in name:
            raise ValueError(f'name must have the form "organisation/model", got {name!r}')
        self._encode = encode
        self._encode_documents = encode if encode_documents is None else encode_documents
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": revision, "similarity_fn_name": ScoringFunction.COSINE, "modalities": ["text"]}
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the embeddings [n, d] of all texts in the batches; mteb calls it."""
        function = self._encode_documents if prompt_type == PromptType.document else self._encode
        return torch.cat([torch.as_tensor(function(list(batch["text"]))).cpu() for batch in inputs])
