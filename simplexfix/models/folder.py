"""Saves and loads models: `config.json` describes the model, a safetensors file holds its weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._states import fingerprint
from ..data.augment import Normalize
from ..data.inputs import Drawings, Photographs, Preprocessing, Tokens, Vectors
from ..heads import CubeHead, OrthoplexHead, SimplexHead, decode_state, encode_state
from ..slots import SlotRegistry
from ._config import (
    ADAPTER,
    MODEL,
    ModelFolderError,
    add_checksums,
    read_config,
    read_weights,
    write_model_folder,
)
from .convnet import SmallConvNet
from .feature_head import FeatureHead
from .identity import ADAPTED, FEATURES, LEARNABLE, OCA, ModelIdentity
from .linear import LinearHead
from .mlp import FeatureLinear, FeatureMLP
from .neighbour import NeighbourHead
from .oca import OCAHead
from .resnet import ResNet18
from .wrapped import plain_names, unwrapped

if TYPE_CHECKING:
    from .embedding import EmbeddingModel

__all__ = ["BACKBONES", "ModelFolderError", "identity_of", "load_model", "read_identity", "save_model"]

_NAMES = "class_names"  # key of an optional part
_ROTATION = "rotation"  # an optional tensor
_NAMED = 8  # most tensors that one message lists

# Backbones that can be rebuilt from a folder: every constructor argument is an attribute of the same name.
BACKBONES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (FeatureLinear, FeatureMLP, ResNet18, SmallConvNet)
}
_HEADS = {
    "cube": CubeHead,
    FEATURES: FeatureHead,
    "linear": LinearHead,
    "neighbours": NeighbourHead,
    OCA: OCAHead,
    "orthoplex": OrthoplexHead,
    "simplex": SimplexHead,
}
_SLOTLESS = (*LEARNABLE, FEATURES, OCA)
# training state of OCAHead and NeighbourHead; embeddings do not depend on it
_TRAINING = ("head.objective.", "head.queue.")
_PREPROCESSING = {kind.__name__: kind for kind in (Drawings, Normalize, Photographs, Tokens, Vectors)}


def save_model(model: EmbeddingModel, folder: str | os.PathLike[str], *, version: int, name: str) -> ModelIdentity:
    """Implements `EmbeddingModel.save_pretrained`."""
    config, state = _parts(model, version, name)
    _identity(add_checksums(config, "", MODEL))  # raises errors before anything is written
    return _identity(write_model_folder(Path(folder), config, state, MODEL))


def load_model(
    folder: str | os.PathLike[str], backbone: nn.Module | None
) -> tuple[nn.Module, nn.Module, Preprocessing | None, Sequence[str] | None, Tensor | None]:
    """Reads the arguments of `EmbeddingModel`, in their order, for `EmbeddingModel.from_pretrained`."""
    folder = Path(folder)
    config = read_config(folder, MODEL)
    state = read_weights(folder, config)
    given = backbone is not None
    try:
        head = _head(config)
        preprocessing = _restored(config["preprocessing"])
        if backbone is None:
            backbone = _backbone(config["backbone"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFolderError(f"{folder / 'config.json'}: {error}") from error
    for_backbone, for_head = _below("backbone.", state), {**_below("head.", state), **_extra_state(config)}
    for_head |= {key: value for key, value in head.state_dict().items() if f"head.{key}".startswith(_TRAINING)}
    own_names = {plain: key for key, plain in plain_names(backbone).items()}
    for_backbone = {own_names.get(key, key): value for key, value in for_backbone.items()}
    _check_fit("the backbone", backbone, for_backbone, dtypes=given)
    _check_fit("the head", head, for_head, dtypes=False)
    if not given:
        _cast(backbone, for_backbone)
    _cast(head, for_head)
    backbone.load_state_dict(for_backbone)
    head.load_state_dict(for_head)
    return backbone, head, preprocessing, config.get(_NAMES), state.get(_ROTATION)


def read_identity(folder: str | os.PathLike[str]) -> ModelIdentity:
    """Returns the identity of the model or adapter in a folder, without reading its weights.

    Args:
        folder: a folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: there is no such folder.
        ModelFolderError: the folder holds no model, or `config.json` has another format or was changed.
    """
    config = read_config(Path(folder), MODEL, ADAPTER)
    return _identity(config) if config["format"] == MODEL.name else adapter_identity(config)


def identity_of(model: EmbeddingModel, *, version: int, name: str) -> ModelIdentity:
    """Implements `EmbeddingModel.identity`."""
    config, state = _parts(model, version, name)
    return _identity(add_checksums(config, fingerprint(state), MODEL))


def _parts(model: EmbeddingModel, version: int, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the contents of `config.json` without checksums, and the tensors."""
    backbone, head, preprocessing = unwrapped(model.backbone), unwrapped(model.head), model.preprocessing
    kind = next((kind for kind, made in _HEADS.items() if type(head) is made), None)
    if kind is None:
        names = ", ".join(made.__name__ for made in _HEADS.values())
        raise TypeError(f"head must be one of {names} for the model to be saved, got {type(head).__name__}")
    if preprocessing is not None and type(preprocessing) not in _PREPROCESSING.values():
        raise TypeError(
            f"preprocessing must be None or one of {', '.join(_PREPROCESSING)} for the model to be saved, "
            f"got {type(preprocessing).__name__}"
        )
    plain = plain_names(model)
    state = {plain[key]: value for key, value in model.state_dict().items() if not plain[key].startswith(_TRAINING)}
    state.pop("head._extra_state", None)
    strangers = [key for key in state if key != _ROTATION and not key.startswith(("backbone.", "head."))]
    if strangers:
        raise TypeError(
            f"cannot save tensors outside backbone and head, got {', '.join(strangers)}; move them into one of the two"
        )
    config = {
        "version": {"number": version, "name": name},
        "backbone": _backbone_spec(backbone),
        "head": {"kind": kind, **_head_spec(head)},
        "slots": None if kind in _SLOTLESS else head.slots.to_dict(),  # type: ignore[union-attr, operator]
        "preprocessing": _plain(preprocessing),
        **({} if model.class_names is None else {_NAMES: list(model.class_names)}),
    }
    if config["backbone"]["kind"] in BACKBONES:  # raises now if it could not be rebuilt later
        with torch.device("meta"):
            made = _backbone(config["backbone"])
        _check_fit("what its arguments make", made, _below("backbone.", state), dtypes=False)
    return config, state


def _backbone_spec(backbone: nn.Module) -> dict[str, Any]:
    kind = type(backbone)
    if BACKBONES.get(kind.__name__) is kind:
        arguments = {name: getattr(backbone, name) for name in inspect.signature(kind).parameters}
        return {"kind": kind.__name__, "arguments": _plain(arguments)}
    return {"kind": "other", "class": f"{kind.__module__}.{kind.__qualname__}"}


def _backbone(spec: Mapping[str, Any]) -> nn.Module:
    if spec["kind"] == "other":
        raise ValueError(
            f"the backbone is a {spec['class']}, which is not of simplexfix: pass an instance as backbone="
        )
    if spec["kind"] not in BACKBONES:
        raise ValueError(f"backbone of kind {spec['kind']!r} is unknown; known: {', '.join(BACKBONES)}")
    with torch.random.fork_rng(devices=[]):  # initial weights are overwritten; keep the global generator
        return BACKBONES[spec["kind"]](**spec["arguments"])


def _head_spec(head: Any) -> dict[str, Any]:
    if isinstance(head, FeatureHead):
        return {"embedding_dim": head.embedding_dim}
    if isinstance(head, LinearHead):
        return {
            "in_features": head.classifier.in_features,
            "embedding_dim": head.classifier.in_features,
            "num_classes": head.num_classes,
            "scale": head.scale,
        }
    if isinstance(head, NeighbourHead):
        return {
            "in_features": head.in_features,
            "embedding_dim": head.embedding_dim,
            "junction": head.junction is not None,
            "loss": head.kind,
            "neighbours": head.neighbours,
            "queue": len(head.queue.labels),
            "alpha": head.alpha,
        }
    if isinstance(head, OCAHead):
        return {
            "in_features": head.junction.in_features,
            "embedding_dim": head.embedding_dim,
            "ancestors": [list(ancestor) for ancestor in head.ancestors],
        }
    spec = {
        "in_features": head.junction.in_features,
        "embedding_dim": head.embedding_dim,
        "normalize": head.normalize,
        "scale": head.scale,
        "margin": None if head.margin is None else list(head.margin),
    }
    # omitted without a bias, so that fingerprints of older models stay the same
    if head.junction.bias is not None:
        spec["bias"] = True
    if isinstance(head, CubeHead):
        spec["codes_crc32"] = decode_state(head.get_extra_state())["codes_crc32"]
    return spec


def _head(config: Mapping[str, Any]) -> nn.Module:
    spec, kind = config["head"], config["head"]["kind"]
    if kind not in _HEADS:
        raise ValueError(f"head of kind {kind!r} is unknown; known: {', '.join(_HEADS)}")
    with torch.random.fork_rng(devices=[]):
        if kind == FEATURES:
            return FeatureHead(spec["embedding_dim"])
        if kind == "linear":
            learnable = LinearHead(spec["in_features"], scale=spec["scale"])
            learnable.grow(spec["num_classes"])
            return learnable
        if kind == "neighbours":
            options = {name: spec[name] for name in ("loss", "neighbours", "queue", "alpha")}
            return NeighbourHead(spec["in_features"], spec["embedding_dim"] if spec["junction"] else None, **options)
        if kind == OCA:
            return OCAHead(spec["in_features"], spec["embedding_dim"], ancestors=spec["ancestors"])
        options = {
            "normalize": spec["normalize"],
            "scale": spec["scale"],
            "margin": None if spec["margin"] is None else tuple(spec["margin"]),
            "bias": spec.get("bias", False),
        }
        if kind == "cube":
            options["embedding_dim"] = spec["embedding_dim"]
        slots = SlotRegistry.from_dict(config["slots"])
        head: nn.Module = _HEADS[kind].from_slots(slots, spec["in_features"], **options)  # type: ignore[attr-defined]
        head.set_extra_state(_extra_state(config)["_extra_state"])  # raises if the saved head has other vertices
        return head


def _extra_state(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the head's extra state for a state_dict, from `config.json`."""
    spec = config["head"]
    if spec["kind"] in _SLOTLESS:
        return {}
    codes = {"codes_crc32": spec["codes_crc32"]} if spec["kind"] == "cube" else {}
    return {"_extra_state": encode_state({**config["slots"], "polytope": spec["kind"], **codes})}


def _identity(config: Mapping[str, Any]) -> ModelIdentity:
    head, slots = config["head"], config["slots"]
    return ModelIdentity(
        fingerprint=config["fingerprint"],
        version=config["version"]["number"],
        name=config["version"]["name"],
        head=head["kind"],
        embedding_dim=head["embedding_dim"],
        num_slots=None if slots is None else slots["num_slots"],
        slots=() if slots is None else tuple(tuple(run) for run in slots["runs"]),
        codes_crc32=head.get("codes_crc32"),
        ancestors=tuple((fingerprint, width) for fingerprint, width in head.get("ancestors", ())),
    )


def adapter_identity(config: Mapping[str, Any]) -> ModelIdentity:
    """Returns the identity of an encoder with its adapter, from the adapter's `config.json`."""
    old = config["encoders"]["old"]
    return ModelIdentity(
        fingerprint=config["fingerprint"],
        version=config["version"]["number"],
        name=config["version"]["name"],
        head=ADAPTED,
        embedding_dim=config["adapter"]["embedding_dim"],
        space=None if config["adapter"]["gallery_map"] is not None else old,
    )


def _plain(value: Any) -> Any:
    """Converts a value to JSON; a dataclass becomes its class name and fields."""
    if is_dataclass(value):
        return {
            "kind": type(value).__name__,
            **{field.name: _plain(getattr(value, field.name)) for field in fields(value)},
        }
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _restored(spec: Any) -> Any:
    """Rebuilds the preprocessing that `_plain` described."""
    if isinstance(spec, list):
        return tuple(_restored(entry) for entry in spec)
    if not isinstance(spec, dict):
        return spec
    if spec["kind"] not in _PREPROCESSING:
        raise ValueError(f"preprocessing of kind {spec['kind']!r} is unknown; known: {', '.join(_PREPROCESSING)}")
    return _PREPROCESSING[spec["kind"]](**{key: _restored(entry) for key, entry in spec.items() if key != "kind"})


def _below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _check_fit(what: str, module: nn.Module, saved: Mapping[str, Any], *, dtypes: bool) -> None:
    """Raises with a list of all missing, unexpected and mismatched tensors (by shape; with `dtypes` also by dtype)."""
    own = module.state_dict()
    other: list[str] = []
    for key, value in saved.items():
        here = own.get(key)
        if isinstance(value, Tensor) and isinstance(here, Tensor):
            if value.shape != here.shape:
                other.append(f"{key} {list(value.shape)}, here {list(here.shape)}")
            elif dtypes and value.dtype != here.dtype:
                other.append(f"{key} {value.dtype}, here {here.dtype}")
    problems = {
        "missing": [key for key in own if key not in saved],
        "unexpected": [key for key in saved if key not in own],
        "of another shape or dtype": other,
    }
    found = [
        f"{kind}: {', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ModelFolderError(f"the saved tensors do not fit {what}, a {type(module).__name__}; {'; '.join(found)}")


def _cast(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Casts every tensor to its saved dtype and keeps the memory layout that the constructor chose."""
    for key, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            tensor.data = tensor.data.to(saved[key].dtype)
