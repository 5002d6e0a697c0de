"""Networks of other libraries, by name, without their classifier."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["LIBRARIES", "external_backbone"]

LIBRARIES = ("timm", "torchvision")


def external_backbone(name: str, *, pretrained: bool = False, in_channels: int = 3) -> nn.Module:
    """The network `timm:NAME` or `torchvision:NAME`: [B, in_channels, H, W] -> [B, out_features].

    Its last linear layer, the classifier, is left out; `out_features` is what that layer took.

    Args:
        name: the library, a colon, and the library's own name for the network.
        pretrained: with the library's default weights, which it downloads where its cache does not have them.
        in_channels: of the images; torchvision's networks take 3.

    Raises:
        ValueError: no such library or network, a network that ends in no linear layer, or channels that it cannot take.
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
        # some end in a layer between pooling and classifier, which stays
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
