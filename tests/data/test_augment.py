"""Tests crops, mirrors and normalisation of batches against one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from simplexfix.data import CIFAR100_MEAN, CIFAR100_STD, Normalize, RandomCropFlip

NORMALIZE = Normalize(CIFAR100_MEAN, CIFAR100_STD)
PLAIN = Normalize((0.0,) * 3, (1 / 255,) * 3)  # pixels as they are


def images(count: int, height: int = 32, width: int = 32) -> Tensor:
    """Returns images without 0 pixels: a 0 marks a pixel from outside the image."""
    return torch.from_numpy(np.random.default_rng(0).integers(1, 256, (count, 3, height, width), np.uint8))


def test_normalisation_is_its_equation() -> None:
    batch = images(5)
    found = NORMALIZE(batch)
    assert found.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(CIFAR100_MEAN, CIFAR100_STD, strict=True)):
        truth = (batch[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(found[:, channel].double(), truth, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (6, 9, 2), (5, 5, 7)])
def test_every_image_is_a_cut_of_its_padded_self_and_all_cuts_come_equally_often(height, width, padding) -> None:
    batch = images(1, height, width).repeat(4000, 1, 1, 1)
    found = RandomCropFlip(PLAIN, padding=padding)(batch, torch.Generator().manual_seed(0)).round().to(torch.uint8)
    padded = np.pad(batch[0].numpy(), ((0, 0), (padding, padding), (padding, padding)))
    places: dict[bytes, list[tuple[int, int, bool]]] = {}
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            cut = padded[:, down : down + height, right : right + width]
            for mirrored in (False, True):
                piece = cut[:, :, ::-1] if mirrored else cut
                places.setdefault(np.ascontiguousarray(piece).tobytes(), []).append((down, right, mirrored))
    counts = np.zeros((2 * padding + 1, 2 * padding + 1, 2))
    for image in found:
        for down, right, mirrored in places[image.numpy().tobytes()]:  # a KeyError: no cut
            counts[down, right, int(mirrored)] += 1
    if padding < min(height, width):  # else some cuts are empty, and alike
        assert counts.sum() == 4000
        for marginal in (counts.sum((1, 2)), counts.sum((0, 2)), counts.sum((0, 1))):
            expected = 4000 / len(marginal)
            assert abs(marginal - expected).max() < 5 * np.sqrt(expected)


def test_images_of_a_batch_differ_and_the_generator_decides() -> None:
    batch = images(1).repeat(64, 1, 1, 1)
    augment, state = RandomCropFlip(NORMALIZE), torch.get_rng_state()
    first, again, other = (augment(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(torch.unique(first.flatten(1), dim=0)) > 40
    assert torch.equal(batch, images(1).repeat(64, 1, 1, 1))  # the argument is unchanged


def test_without_padding_and_flip_it_normalises_and_with_certain_flip_it_mirrors() -> None:
    batch = images(7, 5, 8)
    still = RandomCropFlip(NORMALIZE, padding=0, flip=0.0)(batch, torch.Generator())
    assert torch.equal(still, NORMALIZE(batch))
    mirrored = RandomCropFlip(NORMALIZE, padding=0, flip=1.0)(batch, torch.Generator())
    assert torch.equal(mirrored, NORMALIZE(batch).flip(3))


@pytest.mark.parametrize(
    ("act", "message"),
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
def test_bad_input(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()
