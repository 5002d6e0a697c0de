"""Backbones of timm and torchvision, by name, without their classifier."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["LIBRARIES", "external_backbone"]

LIBRARIES = ("timm", "torchvision")


def external_backbone(name: str, *, pretrained: bool = False, in_channels: int = 3) -> nn.Module:
    """Returns a network of timm or torchvision that maps [B, in_channels, H, W] to [B, out_features].

    The classifier, the last linear layer, is removed; `out_features` is the width of its input.

    Args:
        name: "timm:NAME" or "torchvision:NAME".
        pretrained: whether to load the library's default weights; the library downloads them unless they are cached.
        in_channels: channels of the images; torchvision's networks take 3.

    Raises:
        ValueError: library or network is unknown, the network does not end in a linear layer, or the number of
            channels is not supported.
        ModuleNotFoundError: the library is not installed.
    """
    library, colon, network = name.partition(":")
    if library not in LIBRARIES or not colon or not network:
        raise ValueError(f"name must be timm:NAME or torchvision:NAME, got {name!r}")
    module = _imported(library)
    if library == "timm":
        if not module.is_model(network):
            raise ValueError(f"timm has no network {network!r}; timm.list_models() lists what there is")
        model: Any = module.create_model(network, pretrained=pretrained, num_classes=0, in_chans=in_channels)
        # some networks have a layer between pooling and classifier; it stays
        model.out_features = getattr(model, "head_hidden_size", model.num_features)
        return model  # type: ignore[no-any-return]
    if in_channels != 3:
        raise ValueError(f"networks of torchvision take images of 3 channels, got {in_channels}")
    if network not in module.models.list_models(module=module.models):
        raise ValueError(f"torchvision has no classification network {network!r}; list_models() lists what there is")
    model = module.models.get_model(network, weights="DEFAULT" if pretrained else None)
    last, layer = list(model.named_modules())[-1]
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"torchvision's {network} ends in no linear layer but in {type(layer).__name__}")
    above, _, attribute = last.rpartition(".")
    setattr(model.get_submodule(above), attribute, nn.Identity())
    model.out_features = layer.in_features
    return model  # type: ignore[no-any-return]


def _imported(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(f"networks of {library} need it: pip install {library}", name=library) from error
