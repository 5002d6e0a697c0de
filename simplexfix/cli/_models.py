"""Reads identities of models that are given on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from .._files import read_text
from ..models import ModelIdentity, read_identity

__all__ = ["read_model"]


def read_model(path: Path) -> ModelIdentity:
    """Reads the identity of the model in a folder, or the identity in a `.json` file.

    Raises:
        OSError: the path cannot be read.
        ValueError: the path holds neither a model nor an identity.
    """
    if path.is_dir():
        return read_identity(path)
    try:
        return ModelIdentity.from_dict(json.loads(read_text(path)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is neither the folder of a model nor a JSON file of an identity, as ModelIdentity.to_dict() "
            f"gives it: {error}"
        ) from None
