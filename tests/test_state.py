"""Tests that a head's state consists of tensors, which other libraries save, cast, average and load."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from simplexfix import CubeHead, OrthoplexHead, SimplexHead, SlotRegistry
from simplexfix.models import EmbeddingModel

KINDS = ("simplex", "orthoplex", "cube")


def head_of(kind: str, num_classes: int = 5, num_slots: int = 12, **options) -> nn.Module:
    if kind == "cube":
        return CubeHead(8, num_classes, embedding_dim=6, num_slots=num_slots, **options)
    return {"simplex": SimplexHead, "orthoplex": OrthoplexHead}[kind](8, num_classes, num_slots=num_slots, **options)


def model_of(kind: str, num_classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), head_of(kind, num_classes))
    model(torch.randn(16, 4))  # batch statistics
    return model.eval()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    assert ours[-1].slots.to_dict() == theirs[-1].slots.to_dict()
    assert torch.equal(ours(X), theirs(X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_holds_tensors_alone(kind: str) -> None:
    model = model_of(kind)
    model[-1].slots.add("Größe", [7, 8, 2**50], end="high")
    state = model.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    extra = state["2._extra_state"]
    assert (extra.dtype, extra.ndim, extra.device.type) == (torch.uint8, 1, "cpu")
    checksum, _, text = bytes(extra.tolist()).partition(b" ")  # format: docs/reference/formats.md
    assert int(checksum, 16) == zlib.crc32(text)
    saved = json.loads(text)
    assert saved["polytope"] == kind
    assert SlotRegistry.from_dict(saved).to_dict() == model[-1].slots.to_dict()
    again = model_of(kind, 0)
    again.load_state_dict(state)
    assert_same(again, model)


@pytest.mark.parametrize("kind", KINDS)
def test_old_state_dicts_that_hold_a_dict_load(kind: str) -> None:
    model = model_of(kind)
    state = model.state_dict()
    old = {"format": 1, "num_slots": 12, "runs": [["default", 0, 0, 5, 1]], "polytope": kind}
    if kind == "cube":
        old["codes_crc32"] = zlib.crc32(model[-1].codes.numpy().tobytes())
    again = model_of(kind, 0)
    again.load_state_dict({**state, "2._extra_state": old})
    assert_same(again, model)
    if kind == "simplex":  # the first release stored no polytope
        del old["polytope"]
        again.load_state_dict({**state, "2._extra_state": old})
        assert_same(again, model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_and_averaged_state_dicts_load(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind)
    state = model.state_dict()
    again = model_of(kind, 0)
    for cast in (
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()},
        {key: value.to(dtype) for key, value in state.items()},
    ):
        again.load_state_dict(cast)
        assert again[-1].num_classes == 5
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    mean = {key: ((state[key].float() + other[key].float()) / 2).to(state[key].dtype) for key in state}
    again.load_state_dict(mean)
    assert again[-1].num_classes == 5
    # the bytes are not exactly integers
    drawn = {key: 0.999 * state[key].float() + 0.001 * other[key].float() for key in state}
    again.load_state_dict(drawn)
    assert again[-1].num_classes == 5


def test_the_mean_of_heads_with_other_classes_is_refused() -> None:
    """The bytes of 5 and of 7 classes average to those of 6."""
    model, other = model_of("simplex", 5), model_of("simplex", 7)
    state, grown = model.state_dict(), other.state_dict()
    mean = {key: ((state[key].double() + grown[key].double()) / 2).to(state[key].dtype) for key in state}
    with pytest.raises(ValueError, match="_extra_state is damaged: its checksum does not match; state_dicts"):
        model.load_state_dict(mean)
    assert model[-1].num_classes == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9999)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_averaged_model_grows_with_its_original(kind: str, use_buffers: bool, average, dtype: torch.dtype) -> None:
    model = model_of(kind).to(dtype)
    averaged = AveragedModel(model, use_buffers=use_buffers, multi_avg_fn=average)
    averaged.update_parameters(model)
    for classes in (7, 9):
        model[-1].grow(classes)
        averaged.update_parameters(model)
        assert averaged.module[-1].num_classes == classes
    model[-1].slots.add("später", [3, 4, 77], end="high")
    assert averaged.module[-1].num_classes == 9
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    assert averaged.module[-1].slots.to_dict() == model[-1].slots.to_dict()
    assert averaged.module[-1].slots.lookup("später", torch.tensor([77])).tolist() == [9]
    other = copy.deepcopy(averaged)
    averaged.module[-1].slots.lookup("default", torch.tensor([8]))
    assert other.module[-1].num_classes == 12
    assert averaged.module[-1].loss(torch.randn(2, 8, dtype=dtype), torch.tensor([8, 9])).isfinite()


def test_copies_of_a_registry_are_independent() -> None:
    """Copies change independently, unless other code writes to the journal, a registry's buffer."""
    slots = SlotRegistry(16)
    slots.add("a", range(3))
    copied = copy.deepcopy(slots)
    slots.add("a", range(3, 5))
    copied.add("b", [9])
    assert (len(slots), len(copied), slots.namespaces, copied.namespaces) == (5, 4, ["a"], ["a", "b"])
    for other in (slots.half(), slots.to(torch.float64), slots.to("meta"), slots.to_empty(device="cpu")):
        assert other.to_dict()["runs"] == [["a", 0, 0, 5, 1]]


def test_an_invalid_journal_changes_nothing() -> None:
    """The journal is replaced by that of another registry, by zeros or nan, and by the mean of two registries."""
    slots, longer, stranger = SlotRegistry(16), SlotRegistry(16), SlotRegistry(17)
    for registry in (slots, longer, stranger):
        registry.add("a", range(3))
    longer.add("b", [4])
    stranger.add("a", range(3, 9))
    slots.add("c", [4])
    before = slots.to_dict()
    for content in (stranger._journal, longer._journal, torch.zeros(8192), torch.full((8192,), torch.nan)):
        slots._journal.copy_(content)
        assert slots.to_dict() == before
    slots._journal.lerp_(longer._journal, 0.5)
    assert slots.to_dict() == before
    clone = copy.deepcopy(slots)
    clone.add("d", [1])
    slots._apply(lambda _: clone._journal.clone())  # to_empty may reuse the memory of another journal
    assert slots.to_dict() == before
    slots._journal.copy_(clone._journal)  # afterwards a valid journal is read again
    assert slots.to_dict() == clone.to_dict()


def test_a_long_journal() -> None:
    """Thousands of runs exceed the journal's first buffer."""
    slots = SlotRegistry(4000)
    slots.add("scattered", range(0, 3000, 3))
    copied = copy.deepcopy(slots)
    copied.add("more", range(0, 1000, 2), end="high")
    assert len(copied._journal) > len(slots._journal)
    averaged = AveragedModel(slots, use_buffers=True)
    averaged.update_parameters(slots)
    with pytest.raises(RuntimeError, match="size"):  # buffers of different sizes cannot be averaged
        averaged.update_parameters(copied)
    slots._journal = torch.zeros_like(copied._journal).copy_(copied._journal)
    assert slots.to_dict() == copied.to_dict()
    assert SlotRegistry.from_dict(json.loads(json.dumps(slots.to_dict()))).to_dict() == slots.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_saves_and_loads_a_model(kind: str, tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = model_of(kind)
    model[-1].grow(7)
    library.save_model(model, str(tmp_path / "model.safetensors"))
    again = model_of(kind, 0)
    library.load_model(again, str(tmp_path / "model.safetensors"))
    assert_same(again, model)


def trained_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model[-1].loss(model[:-1](X), torch.tensor([0, 6, 2])).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_saves_and_loads_a_state(kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    models = []
    for classes in (5, 0):
        model = model_of(kind, classes)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        if classes:
            model[-1].grow(7)
            trained_a_step(model, optimizer)
            accelerator.save_state(str(tmp_path))
        else:
            accelerator.load_state(str(tmp_path))
        trained_a_step(model, optimizer)  # with the saved momentum
        models.append(model)
        accelerator.free_memory()
    assert_same(*models)


class Tiny(nn.Module):
    """A model for transformers' Trainer: forward takes keyword arguments and returns a mapping with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 8)
        self.head = SimplexHead(8, 5, num_slots=12)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.head(self.backbone(inputs), labels)}


def test_the_trainer_of_transformers_resumes(tmp_path: Path) -> None:
    """Resumes from a checkpoint after two of four steps; the weights equal those of an uninterrupted training."""
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    rows = [{"inputs": row, "labels": i % 7} for i, row in enumerate(torch.randn(16, 4))]

    def trainer(folder: str, classes: int) -> Any:
        torch.manual_seed(0)
        model = Tiny()
        model.head.grow(classes)
        options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "seed": 0}
        arguments = library.TrainingArguments(
            output_dir=str(tmp_path / folder), report_to=[], disable_tqdm=True, learning_rate=0.1, **options
        )
        return library.Trainer(model=model, args=arguments, train_dataset=rows)

    whole = trainer("whole", 7)
    whole.train()
    again = trainer("again", 5)  # the classes come from the checkpoint too
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.model.head.slots.to_dict() == whole.model.head.slots.to_dict()
    assert torch.equal(again.model.head.junction.weight, whole.model.head.junction.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixin_of_the_hub_saves_and_loads(kind: str, tmp_path: Path) -> None:
    """The configuration holds the constructor's arguments as JSON, in which a margin is a list."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    parent = {"simplex": SimplexHead, "orthoplex": OrthoplexHead, "cube": CubeHead}[kind]
    published = type("Published", (parent, hub.PyTorchModelHubMixin), {})
    width = {"embedding_dim": 6} if kind == "cube" else {}
    head = published(8, 5, num_slots=12, normalize=True, scale=4.0, margin=("cosine", 0.2), bias=True, **width)
    head.grow(7)
    head.save_pretrained(str(tmp_path))
    again = published.from_pretrained(str(tmp_path))
    assert again.slots.to_dict() == head.slots.to_dict()
    assert (again.normalize, again.scale, again.margin) == (True, 4.0, ("cosine", 0.2))
    features = torch.randn(3, 8)
    assert torch.equal(again(features), head(features))
    assert torch.equal(again.loss(features, torch.arange(3)), head.loss(features, torch.arange(3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
def test_logits_and_embeddings_are_written_as_onnx(kind: str, dynamo: bool, tmp_path: Path) -> None:
    """Exports with both exporters, and runs the file with onnx's reference implementation."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    options = {"num_slots": 12, "normalize": True, "scale": 3.0}
    head = CubeHead(8, 5, embedding_dim=70, **options) if kind == "cube" else head_of(kind, **options)
    backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    for number, model in enumerate((nn.Sequential(backbone, head), EmbeddingModel(backbone, head))):
        path = tmp_path / f"{number}.onnx"
        shapes = {"dynamic_shapes": ({0: torch.export.Dim("rows")},)} if dynamo else {"dynamic_axes": {"x": [0]}}
        torch.onnx.export(
            model.eval(), (X,), str(path), input_names=["x"], dynamo=dynamo, opset_version=18, verbose=False, **shapes
        )
        onnx.checker.check_model(str(path))
        rows = torch.randn(7, 4)  # another number of rows than at the export
        (found,) = ReferenceEvaluator(str(path)).run(None, {"x": rows.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(rows).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.onnx.is_in_onnx_export()
