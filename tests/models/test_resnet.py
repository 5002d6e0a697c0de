"""Tests ResNet-18 (number of parameters, published shapes, gradients), and networks of other libraries."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simplexfix.models import ResNet18, external_backbone


@pytest.mark.parametrize(("stem", "sides"), [("imagenet", [8, 4, 2, 1]), ("cifar", [32, 16, 8, 4])])
def test_stages_have_the_published_sides_and_channels(stem: str, sides: list[int]) -> None:
    model = ResNet18(stem, width=8)
    shapes: list[tuple[int, ...]] = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda _module, _input, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert shapes == [(8 << i, side, side) for i, side in enumerate(sides)]


def test_the_number_of_parameters_is_the_published_one() -> None:
    """11.69 million parameters with a classifier of 1000 classes, which has 513,000 of them."""
    assert sum(p.numel() for p in ResNet18().parameters()) == 11_689_512 - 513_000


def test_every_parameter_has_a_gradient_and_the_state_determines_the_output() -> None:
    torch.manual_seed(0)
    model = ResNet18("cifar", width=4, in_channels=1)
    images = torch.randn(4, 1, 16, 16)
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    again = ResNet18("cifar", width=4, in_channels=1)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model.eval()(images))


@pytest.mark.parametrize("width", [2, 4, 6, 16])
def test_gradients_are_those_of_float64(width: int) -> None:
    """For few channels in channels_last, oneDNN's float32 gradients are wrong, or it crashes; float64 avoids oneDNN."""
    torch.manual_seed(0)
    model = ResNet18(width=width)
    exact = copy.deepcopy(model).double()
    images = torch.randn(32, 3, 32, 32)
    for network, dtype in ((model, torch.float32), (exact, torch.float64)):
        network(images.to(dtype)).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 1e-3 * q.grad.norm() + 1e-6, name


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (16, 40), (32, 32), (64, 64)])
def test_layers_on_one_pixel_equal_convolutions(size: tuple[int, int]) -> None:
    """Layers on one pixel run as matrix products; as convolutions they give the same features and gradients."""
    torch.manual_seed(0)
    model = ResNet18(width=4).double()
    x = images = torch.randn(4, 3, *size, dtype=torch.float64)
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for block in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
        shortcut = x if block.downsample is None else block.downsample(x)
        x = F.relu(shortcut + block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    features = x.mean((2, 3))
    torch.testing.assert_close(model(images), features)
    parameters = tuple(model.parameters())
    expected = torch.autograd.grad(features.square().sum(), parameters)
    for actual, exact in zip(torch.autograd.grad(model(images).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-12 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": "tiny"}, "stem must be one of 'cifar', 'imagenet', got 'tiny'"),
        ({"width": 0}, "width and in_channels must be positive, got 0 and 3"),
    ],
)
def test_bad_input(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet18(**arguments)


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\], got \[2, 1, 32, 32\]"):
        ResNet18(width=4)(torch.randn(2, 1, 32, 32))


@pytest.fixture
def torchvision(monkeypatch) -> types.ModuleType:
    """A stand-in for `torchvision.models`, with the functions that were tried with torchvision 0.28."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(3, 1000))

        def forward(self, images):
            return self.classifier(self.body(images))

    made = {"plain": Network, "convolutional": lambda: nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 3, 1))}
    module = types.ModuleType("torchvision")
    module.models = types.SimpleNamespace(
        list_models=lambda module: sorted(made), get_model=lambda name, weights: made[name]()
    )
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return module


def test_a_torchvision_network_has_no_classifier(torchvision) -> None:
    model = external_backbone("torchvision:plain")
    images = torch.randn(2, 3, 8, 8)
    assert model.out_features == 3
    torch.testing.assert_close(model(images), images.mean((2, 3)))
    for name, message in (
        ("torchvision:other", "torchvision has no classification network 'other'"),
        ("torchvision:convolutional", "ends in no linear layer but in Conv2d"),
        ("torchvision:", "name must be timm:NAME or torchvision:NAME"),
        ("keras:plain", "name must be timm:NAME or torchvision:NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            external_backbone(name)
    with pytest.raises(ValueError, match="take images of 3 channels, got 1"):
        external_backbone("torchvision:plain", in_channels=1)


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="networks of timm need it: pip install timm"):
        external_backbone("timm:resnet18")


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_networks_of_installed_libraries(name: str) -> None:
    pytest.importorskip(name.partition(":")[0], exc_type=ImportError)
    model = external_backbone(name)
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, model.out_features) == (2, 512)
