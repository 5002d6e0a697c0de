"""Tests on meta tensors, which have no values, that a step reads no value from the device and makes no blocking copy.

`test_a_training_step_does_not_synchronize` in tests/test_gpu.py tests the same on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jobs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simplexfix import SlotRegistry
from simplexfix.data import Normalize, RandomCropFlip, RandomWarp
from simplexfix.methods import ASNN, BCT, ER, FD, HOC, OCA, Simplex
from simplexfix.models import EmbeddingModel

DOWN = ("cpu", "meta")


class Copies(TorchDispatchMode):
    """Counts copies from the host to the device: asynchronous ones in `free`, synchronous ones in `waited`."""

    def __init__(self) -> None:
        super().__init__()
        self.free = self.waited = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None) -> Any:
        options = options or {}
        if function is torch.ops.aten._to_copy.default:
            here = arguments[0].device
            if (here.type, options.get("device", here).type) == DOWN:
                self.free += options.get("non_blocking", False)
                self.waited += not options.get("non_blocking", False)
        return function(*arguments, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Simplex(SlotRegistry(32)),
        lambda: HOC(SlotRegistry(32)),
        ER,
        FD,
        BCT,
        OCA,
        ASNN,
        lambda: ASNN(loss="nnp"),
        lambda: BCT(classification=ASNN()),
        lambda: HOC(SlotRegistry(32), classification=ASNN()),
    ],
)
def test_losses_read_no_value_from_the_device(make: Callable[[], Any]) -> None:
    method = make()
    model = EmbeddingModel(jobs.network(), method.head(10))
    method.add_classes(model, range(5))
    if isinstance(method, OCA):
        method.fit_to_old(model, copy.deepcopy(model))
    model.to("meta")
    old = copy.deepcopy(model).eval()
    input, target = torch.zeros(8, 12, device="meta"), torch.zeros(8, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="meta"):  # reading a value raises
        target.any().item()
    with Copies() as first:
        method.loss(model, input, target, old).backward()
    with Copies() as copies:
        method.loss(model, input, target, old).backward()
    assert first.waited == 2 * (
        isinstance(method, Simplex) and getattr(method, "classification", None) is None
    )  # the slots of all classes, which the first call copies
    assert (copies.waited, copies.free) == (0, 0)


@pytest.mark.parametrize(
    ("augment", "images", "copies_sent"),
    [
        (RandomWarp(), torch.zeros(4, 28, 28), 1),
        (RandomCropFlip(Normalize((0.5,) * 3, (0.2,) * 3)), torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 2),
    ],
)
def test_augmentation_copies_its_draws_asynchronously(
    augment, images: torch.Tensor, copies_sent: int, monkeypatch
) -> None:
    generator = torch.Generator()
    augment(images.to("meta"), generator)
    monkeypatch.setattr(torch, "tensor", None)  # torch.tensor would synchronize; the channel means were copied before
    with Copies() as copies:
        augment(images.to("meta"), generator)
    assert (copies.waited, copies.free) == (1, copies_sent)  # the synchronous copy is that of the images
