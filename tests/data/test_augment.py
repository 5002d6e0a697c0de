"""Tests `Normalize` and `RandomCropFlip`, which crop, mirror and normalise a batch, against single images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from simplexfix.data import CIFAR100_MEAN, CIFAR100_STD, Normalize, RandomCropFlip

NORMALIZE = Normalize(CIFAR100_MEAN, CIFAR100_STD)
IDENTITY = Normalize((0.0,) * 3, (1 / 255,) * 3)  # keeps the values of pixels


def images(count: int, height: int = 32, width: int = 32) -> Tensor:
    """Returns images whose pixels are not 0, so that 0 marks padding."""
    return torch.from_numpy(np.random.default_rng(0).integers(1, 256, (count, 3, height, width), np.uint8))


def test_normalisation_against_its_equation() -> None:
    batch = images(5)
    found = NORMALIZE(batch)
    assert found.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(CIFAR100_MEAN, CIFAR100_STD, strict=True)):
        truth = (batch[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(found[:, channel].double(), truth, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (6, 9, 2), (5, 5, 7)])
def test_crops_are_of_the_padded_image_and_equally_frequent(height, width, padding) -> None:
    batch = images(1, height, width).repeat(4000, 1, 1, 1)
    crops = RandomCropFlip(IDENTITY, padding=padding)(batch, torch.Generator().manual_seed(0)).round().to(torch.uint8)
    padded = np.pad(batch[0].numpy(), ((0, 0), (padding, padding), (padding, padding)))
    offsets: dict[bytes, list[tuple[int, int, bool]]] = {}  # bytes of a crop -> its possible parameters
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            crop = padded[:, down : down + height, right : right + width]
            for mirrored in (False, True):
                image = crop[:, :, ::-1] if mirrored else crop
                offsets.setdefault(np.ascontiguousarray(image).tobytes(), []).append((down, right, mirrored))
    counts = np.zeros((2 * padding + 1, 2 * padding + 1, 2))
    for image in crops:
        for down, right, mirrored in offsets[image.numpy().tobytes()]:  # a KeyError means that it is not a crop
            counts[down, right, int(mirrored)] += 1
    if padding < min(height, width):  # else several crops consist of padding only, and are equal
        assert counts.sum() == 4000
        for marginal in (counts.sum((1, 2)), counts.sum((0, 2)), counts.sum((0, 1))):
            expected = 4000 / len(marginal)
            assert abs(marginal - expected).max() < 5 * np.sqrt(expected)


def test_crops_of_a_batch_differ_and_depend_on_the_generator_alone() -> None:
    batch = images(1).repeat(64, 1, 1, 1)
    augment, global_state = RandomCropFlip(NORMALIZE), torch.get_rng_state()
    first, same_seed, other_seed = (augment(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(first, same_seed)
    assert not torch.equal(first, other_seed)
    assert len(torch.unique(first.flatten(1), dim=0)) > 40
    assert torch.equal(batch, images(1).repeat(64, 1, 1, 1))  # the argument is unchanged


def test_no_padding_with_flip_0_or_1() -> None:
    batch = images(7, 5, 8)
    unchanged = RandomCropFlip(NORMALIZE, padding=0, flip=0.0)(batch, torch.Generator())
    assert torch.equal(unchanged, NORMALIZE(batch))
    mirrored = RandomCropFlip(NORMALIZE, padding=0, flip=1.0)(batch, torch.Generator())
    assert torch.equal(mirrored, NORMALIZE(batch).flip(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Normalize((0.5,), (0.0,)), r"mean and std must be of one length and std positive, got \[0.5\] and"),
        (lambda: Normalize((0.5,), (1.0, 1.0)), "mean and std must be of one length"),
        (lambda: RandomCropFlip(NORMALIZE, padding=-1), "padding must be 0 or more and flip in"),
        (lambda: RandomCropFlip(NORMALIZE, flip=1.5), "padding must be 0 or more and flip in"),
        (lambda: NORMALIZE(images(2).float()), r"images must be uint8 \[B, 3, H, W\], got float32 \[2, 3, 32, 32\]"),
        (lambda: NORMALIZE(images(2)[:, :1]), r"images must be uint8 \[B, 3, H, W\], got uint8 \[2, 1, 32, 32\]"),
        (
            lambda: RandomCropFlip(NORMALIZE)(images(2)[0], torch.Generator()),
            r"images must be uint8 \[B, 3, H, W\], got uint8 \[3, 32, 32\]",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
