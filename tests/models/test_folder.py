"""Tests saving and loading of models: bitwise equal embeddings, errors for damaged folders, atomic writes."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simplexfix import CubeHead, OrthoplexHead, SimplexHead, SlotRegistry
from simplexfix.data import Drawings, Normalize, Photographs, RandomWarp, Vectors
from simplexfix.models import (
    EmbeddingModel,
    FeatureHead,
    FeatureLinear,
    FeatureMLP,
    LinearHead,
    ModelFolderError,
    ModelIdentity,
    NeighbourHead,
    OCAHead,
    ResNet18,
    SmallConvNet,
    read_identity,
)
from simplexfix.models._config import MODEL, add_checksums
from simplexfix.models.folder import BACKBONES

# for each network that a folder alone can rebuild: constructor, input shape, preprocessing
EXAMPLES = {
    "FeatureLinear": (lambda: FeatureLinear(16), (16,), Vectors(16)),
    "FeatureMLP": (lambda: FeatureMLP(12, (20, 16)), (12,), Vectors(12)),
    "ResNet18": (lambda: ResNet18("cifar", width=2), (3, 8, 8), Photographs(8, Normalize((0.5,) * 3, (0.2,) * 3))),
    "SmallConvNet": (lambda: SmallConvNet(5, 16), (1, 28, 28), Drawings(28)),
}


def registry() -> SlotRegistry:
    slots = SlotRegistry(34)
    slots.add("pretraining", [7, 3, 4], end="high")
    slots.add("default", range(9))
    return slots


def linear() -> LinearHead:
    head = LinearHead(16, scale=9.0)
    head.grow(7)
    return head


def neighbours(**options) -> NeighbourHead:
    """Returns a head whose queue holds features; `trained` changes its radius."""
    head = NeighbourHead(16, queue=5, neighbours=3, **options)
    width = head.embedding_dim
    head.embedding_loss(torch.randn(8, width, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)
    return head


HEADS = {
    "simplex": lambda: SimplexHead.from_slots(registry(), 16, normalize=True, scale=12.5, margin=("angular", 0.25)),
    "orthoplex": lambda: OrthoplexHead.from_slots(registry(), 16),
    "cube": lambda: CubeHead.from_slots(registry(), 16, embedding_dim=70, scale=0.5),
    "features": lambda: FeatureHead(16),
    "linear": linear,
    "linear without classes": lambda: LinearHead(16),
    "neighbours": lambda: neighbours(),
    "neighbours behind a junction": lambda: neighbours(embedding_dim=9),
    "neighbours by nnp": lambda: neighbours(loss="nnp", alpha=0.5),
    "oca": lambda: OCAHead(16, 40, ancestors=[("ab" * 32, 24), ("cd" * 32, 32)]),
}


def trained(backbone: nn.Module, shape: tuple[int, ...], head: nn.Module, **options) -> EmbeddingModel:
    """Returns a model with batch statistics, and with weights that no constructor produces."""
    torch.manual_seed(5)
    model = EmbeddingModel(backbone, head, **options)
    model(torch.randn(16, *shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return model.eval()


def small(scale: float = 1.0, **options) -> EmbeddingModel:
    return trained(FeatureMLP(12, (16,)), (12,), SimplexHead(16, 4, num_slots=10, scale=scale), **options)


def of_ones_own(width: int = 16, *, bias: bool = True, extra: bool = False) -> nn.Module:
    layers = nn.Sequential(nn.Linear(12, width, bias=bias), nn.BatchNorm1d(width), nn.Linear(width, 16))
    if extra:
        layers.append(nn.PReLU())
    return layers


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_embeddings_are_the_same_to_the_bit(tmp_path: Path, name: str, head: str) -> None:
    make, shape, preprocessing = EXAMPLES[name]
    model = trained(make(), shape, HEADS[head](), preprocessing=preprocessing)
    identity = model.save_pretrained(tmp_path / "model", version=3, name="three")
    random = torch.get_rng_state()
    again = EmbeddingModel.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in again.modules())
    inputs = torch.randn(40, *shape)
    assert torch.equal(again.extract(inputs), model.extract(inputs))
    assert again.preprocessing == preprocessing
    # the loaded model and its folder have the identity of the saved model
    assert again.identity(version=3, name="three") == identity == read_identity(tmp_path / "model")
    assert identity.embedding_dim == again.extract(inputs[:1]).shape[1]
    assert sorted(path.name for path in (tmp_path / "model").iterdir())[0] == "config.json"
    assert len(list((tmp_path / "model").iterdir())) == 2
    assert type(again.head) is type(model.head)
    if isinstance(model.head, LinearHead):
        assert (again.head.num_classes, again.head.scale) == (model.head.num_classes, model.head.scale)
    elif isinstance(model.head, NeighbourHead):
        assert again.head.extra_repr() == model.head.extra_repr()
        assert model.head.queue.labels.max() >= 0
        assert again.head.queue.labels.max() < 0
        for key, value in again.head.state_dict().items():
            assert key.startswith("queue.") or torch.equal(value, model.head.state_dict()[key])
    elif isinstance(model.head, OCAHead):
        assert again.prefixes == model.prefixes == (24, 32)
        return
    elif isinstance(model.head, FeatureHead):
        assert again.head.extra_repr() == model.head.extra_repr()
    else:
        assert again.head.slots.to_dict() == model.head.slots.to_dict()
        assert again.head.extra_repr() == model.head.extra_repr()
    assert torch.equal(again.head(again.backbone(inputs)), model.head(model.backbone(inputs)))


@pytest.mark.parametrize("kind", [SimplexHead, OrthoplexHead, CubeHead])
def test_a_junction_with_a_bias_is_restored(tmp_path: Path, kind: type) -> None:
    width = {"embedding_dim": 7} if kind is CubeHead else {}
    model = trained(FeatureMLP(12, (16,)), (12,), kind.from_slots(registry(), 16, bias=True, **width))
    model.save_pretrained(tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path)
    rows = torch.randn(9, 12)
    assert again.head.junction.bias.any()
    assert torch.equal(again.extract(rows), model.extract(rows))
    assert again.identity() == model.identity()


def test_fingerprints_in_galleries_never_change() -> None:
    """The expected hash is from the first release, when junctions had no bias and states held a dict."""
    model = EmbeddingModel(FeatureMLP(2), SimplexHead(2, 3, num_slots=4))
    model.head.junction.weight.data = torch.arange(6.0).view(3, 2)
    assert model.identity().fingerprint == "ef7f9b83e44c62f195274622fdae38db940e790c5fcc46e726e63409915e99c9"


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def of_processes(module: nn.Module) -> nn.Module:
    """Returns a DistributedDataParallel whose group is this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return DistributedDataParallel(module)
    finally:
        dist.destroy_process_group()


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": of_processes,
    "compiled DataParallel": lambda module: compiled(nn.DataParallel(module)),
    "DataParallel of a compiled one": lambda module: nn.DataParallel(compiled(module)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_backbone_is_saved_as_the_plain_one(tmp_path: Path, wrapper: str) -> None:
    wrap, rows = WRAPPERS[wrapper], torch.randn(9, 12)
    for name, make in (("ours", lambda: FeatureMLP(12, (16,))), ("ones own", of_ones_own)):
        plain = trained(make(), (12,), SimplexHead(16, 4, num_slots=10))
        expected = plain.save_pretrained(tmp_path / name / "plain")
        content = {path.name: path.read_bytes() for path in (tmp_path / name / "plain").iterdir()}
        model = EmbeddingModel(wrap(plain.backbone), plain.head).eval()
        assert any(".module." in key or "._orig_mod." in key for key in model.state_dict())
        assert model.identity() == expected
        assert model.save_pretrained(tmp_path / name / "wrapped") == expected
        assert {path.name: path.read_bytes() for path in (tmp_path / name / "wrapped").iterdir()} == content
        given = None if name == "ours" else of_ones_own()
        again = EmbeddingModel.from_pretrained(tmp_path / name / "wrapped", backbone=given)
        assert torch.equal(again.extract(rows), plain.extract(rows))
        into = wrap(make())  # a wrapped backbone can also be loaded into
        again = EmbeddingModel.from_pretrained(tmp_path / name / "plain", backbone=into)
        assert again.backbone is into
        assert all(map(torch.equal, again.state_dict().values(), plain.state_dict().values()))


def test_wrapped_parts_of_a_backbone_are_saved_as_plain_ones(tmp_path: Path) -> None:
    plain = trained(of_ones_own(), (12,), SimplexHead(16, 4, num_slots=10))
    expected = plain.save_pretrained(tmp_path / "plain")
    backbone = copy.deepcopy(plain.backbone)
    backbone[0], backbone[2] = compiled(backbone[0]), nn.DataParallel(compiled(backbone[2]))
    whole = compiled(EmbeddingModel(nn.DataParallel(backbone), compiled(plain.head)))
    assert whole.save_pretrained(tmp_path / "wrapped") == expected
    again = EmbeddingModel.from_pretrained(tmp_path / "wrapped", backbone=of_ones_own())
    assert torch.equal(again.extract(torch.ones(2, 12)), plain.extract(torch.ones(2, 12)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_restored(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    model.save_pretrained(tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path)
    rows = torch.randn(9, 12).to(dtype)
    assert again.extract(rows).dtype == dtype
    assert torch.equal(again.extract(rows), model.extract(rows))
    assert again.backbone.layers[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize(
    "preprocessing",
    [None, Normalize((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), Photographs(32, Normalize((0.1,), (0.7,))), Drawings(28)],
)
def test_preprocessing_is_restored(tmp_path: Path, preprocessing) -> None:
    small(preprocessing=preprocessing).save_pretrained(tmp_path)
    assert EmbeddingModel.from_pretrained(tmp_path).preprocessing == preprocessing


def test_preprocessing_checks_its_input() -> None:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    normalize = Normalize((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert torch.equal(Photographs(32, normalize)(images), normalize(images))
    with pytest.raises(ValueError, match=r"images must be uint8 \[B, C, 28, 28\], got uint8 \[2, 3, 32, 32\]"):
        Photographs(28, normalize)(images)
    ink = images[:, 0] > 99
    assert torch.equal(Drawings(32)(ink), ink.unsqueeze(1).float())
    with pytest.raises(ValueError, match=r"images must be \[B, 28, 28\], got uint8 \[2, 3, 32, 32\]"):
        Drawings(28)(images)
    assert Vectors(3)(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float32
    for rows in (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.int64), torch.ones(3)):
        with pytest.raises(ValueError, match=r"rows must be floating \[B, 3\], got "):
            Vectors(3)(rows)


def test_a_custom_backbone_is_passed_and_loaded_strictly(tmp_path: Path) -> None:
    model = trained(of_ones_own(), (12,), HEADS["simplex"]())
    model.save_pretrained(tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path, backbone=of_ones_own())
    rows = torch.randn(9, 12)
    assert torch.equal(again.extract(rows), model.extract(rows))
    for backbone, message in (
        (of_ones_own(bias=False), "do not fit the backbone, a Sequential; unexpected: 0.bias$"),
        (of_ones_own(extra=True), "missing: 3.weight$"),
        (
            of_ones_own(10),
            r"of another shape or dtype: 0.weight \[16, 12\], here \[10, 12\], 0.bias \[16\], here \[10\]",
        ),
        (of_ones_own().double(), "0.weight torch.float32, here torch.float64, "),
        (nn.Linear(12, 16), r"missing: weight, bias; unexpected: 0.weight, .* and 1 more$"),
    ):
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        with pytest.raises(ModelFolderError, match=message):
            EmbeddingModel.from_pretrained(tmp_path, backbone=backbone)
        assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    with pytest.raises(ModelFolderError, match=r"a torch\.nn\.\S+\.Sequential, which is not of simplexfix: "):
        EmbeddingModel.from_pretrained(tmp_path)


def test_the_fingerprint_can_be_computed_from_the_files_alone(tmp_path: Path) -> None:
    """Computes the fingerprint with JSON and SHA-256 only, as docs/reference/formats.md specifies it."""
    model = EmbeddingModel(FeatureMLP(3, (2,)), SimplexHead(2, 2, num_slots=3), preprocessing=Vectors(3))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.arange(p.numel()).view(p.shape) + i)
    identity = model.save_pretrained(tmp_path, version=1, name="ü")

    def checksum(value) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    weights = (tmp_path / config["weights"]).read_bytes()
    (size,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + size])
    version, _, rest = header.pop("__metadata__")["simplexfix"].partition(" ")
    digest = hashlib.sha256(rest.partition(" ")[2].encode())
    dtypes = {"F32": "torch.float32", "I64": "torch.int64"}
    for name, entry in sorted(header.items()):
        start, stop = (8 + size + at for at in entry["data_offsets"])
        digest.update(f"\n{name} {dtypes[entry['dtype']]} {entry['shape']}\n".encode() + weights[start:stop])
    assert version == "1"
    parts = ("backbone", "head", "preprocessing", "slots", "version")
    assert config["sha256"] == {**{part: checksum(config[part]) for part in parts}, "weights": digest.hexdigest()}
    sums = {part: value for part, value in config["sha256"].items() if part != "version"}
    assert checksum(sums) == config["fingerprint"] == identity.fingerprint
    assert identity.fingerprint == "4433a867cd280c04533e89b19068b261c650d6d21f5a901a8455e1a6fdd725e0"


def test_the_fingerprint_covers_all_that_embeddings_and_slots_depend_on(tmp_path: Path) -> None:
    first = small()
    seen = {first.identity().fingerprint}
    # version and name are not part of the fingerprint
    assert first.identity(version=4, name="four").fingerprint in seen

    def is_new(model: EmbeddingModel) -> bool:
        before = len(seen)
        seen.add(model.identity().fingerprint)
        return len(seen) > before

    with torch.no_grad():
        first.backbone.layers[0].weight[0, 0] = first.backbone.layers[0].weight[0, 0].nextafter(torch.tensor(9.0))
    assert is_new(first)
    first.backbone.layers[1].running_mean[0] += 1
    assert is_new(first)
    first.head.grow(5)
    assert is_new(first)
    first.preprocessing = Vectors(12)
    assert is_new(first)
    assert is_new(small(scale=2.0))


def damaged(path: Path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["head"].update(scale=2.0), "was changed after it was written: head without its checksum"),
        (lambda c: c["slots"]["runs"][0].__setitem__(1, 1), "slots without its checksum"),
        (
            lambda c: (c["version"].update(name="x"), c["preprocessing"].update(width=3)),
            "preprocessing, version without its checksum",
        ),
        (lambda c: c["backbone"]["arguments"].update(hidden=[15]), "backbone without its checksum"),
        (lambda c: c.update(weights="../model-0123456789abcdef.safetensors"), "weights without its checksum"),
        (lambda c: c.update(fingerprint="0" * 64), "fingerprint without its checksum"),
        (lambda c: c["sha256"].update(weights="0" * 64), "weights without its checksum"),
        (lambda c: c["sha256"].pop("head"), "was changed after it was written: sha256 differs"),
        (lambda c: c.pop("slots"), "keys missing or unknown: slots"),
        (lambda c: c.update(head_=1), "keys missing or unknown: head_"),
        (lambda c: c.update(format_number=2), r"config.json has format 2, but this version of simplexfix reads 1"),
        (
            lambda c: c.update(format="transformers"),
            "belongs to no model( or adapter)? that save_pretrained has written",
        ),
    ],
)
def test_a_config_edited_by_hand_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    small(preprocessing=Vectors(12)).save_pretrained(tmp_path)
    damaged(tmp_path / "config.json", change)
    for read in (read_identity, EmbeddingModel.from_pretrained):
        with pytest.raises(ModelFolderError, match=message):
            read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["backbone"].update(kind="VisionTransformer"),
            "backbone of kind 'VisionTransformer' is unknown; known",
        ),
        (lambda c: c["head"].update(kind="sphere"), "head of kind 'sphere' is unknown; known: cube, features, linear"),
        (lambda c: c["preprocessing"].update(kind="Crop"), "preprocessing of kind 'Crop' is unknown; known: Drawings"),
        (lambda c: c["slots"]["runs"].append(["b", 0, 2, 1, 1]), "slot 2 of 'b' collides with"),
        (
            lambda c: c["head"].update(in_features=17),
            r"do not fit the head.*weight \[9, 16\], here \[9, 17\]",
        ),
        (lambda c: c["preprocessing"].pop("width"), "width"),
    ],
)
def test_values_of_other_releases_are_refused_by_name(tmp_path, change, message: str, monkeypatch) -> None:
    """The checksums are right, but the values are unknown to this version."""

    small(preprocessing=Vectors(12)).save_pretrained(tmp_path)

    def changed(config) -> None:
        change(config)
        config.update(add_checksums(config, config["sha256"]["weights"], MODEL))

    damaged(tmp_path / "config.json", changed)
    with pytest.raises(ModelFolderError, match=message):
        EmbeddingModel.from_pretrained(tmp_path)


def test_damaged_and_exchanged_weights_are_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "a")
    small(scale=2.0).save_pretrained(tmp_path / "b")
    other = small()
    other.backbone.layers[1].running_mean.zero_()
    other.save_pretrained(tmp_path / "c")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    content = file.read_bytes()
    for bad in (content[:-1], content[:50], b"", content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        file.write_bytes(bad)
        with pytest.raises(ModelFolderError, match="damaged") as caught:
            EmbeddingModel.from_pretrained(tmp_path / "a")
        assert str(file) in str(caught.value)
    (weights_of_c,) = (tmp_path / "c").glob("*.safetensors")
    shutil.copyfile(weights_of_c, file)  # a whole file, but the weights of another model
    with pytest.raises(ModelFolderError, match=r"holds other weights than those that config\.json was written for"):
        EmbeddingModel.from_pretrained(tmp_path / "a")
    file.unlink()
    with pytest.raises(ModelFolderError, match=r"which config\.json names, is not there"):
        EmbeddingModel.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_bytes(b'{"format": "simplexf')
    with pytest.raises(ModelFolderError, match=r"config\.json cannot be read, it may be damaged"):
        EmbeddingModel.from_pretrained(tmp_path / "a")


def test_a_save_killed_at_any_moment_leaves_one_whole_model(tmp_path: Path, monkeypatch) -> None:
    """Copies the folder before and after each call that changes it: a killed process would leave such a folder."""
    old, new = small(), small(scale=2.0)
    new.backbone.layers[1].running_mean.zero_()
    folder = tmp_path / "model"
    known = {old.save_pretrained(folder).fingerprint: "old", new.identity().fingerprint: "new"}
    left: list[Path] = []

    def copied(act):
        def instead(*arguments, **options):
            for moment in ("before", "after"):
                left.append(tmp_path / f"{len(left)}-{moment}")
                shutil.copytree(folder, left[-1])
                if moment == "before":
                    result = act(*arguments, **options)
            return result

        return instead

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, copied(getattr(os, name)))
        new.save_pretrained(folder)
    found = []
    for place in left:
        model = EmbeddingModel.from_pretrained(place)
        found.append(known[model.identity().fingerprint])
        new.save_pretrained(place)  # saving also deletes the temporary files of the killed process
        assert sorted(path.name for path in place.iterdir()) == sorted(path.name for path in folder.iterdir())
    assert len(list(folder.iterdir())) == 2
    assert found == sorted(found, reverse=True)
    assert {"old", "new"} == set(found)
    assert len(found) >= 12  # calls: four fsync, two replace, one unlink; two copies each


def test_an_error_while_saving_leaves_the_model_that_was_there(tmp_path: Path, monkeypatch) -> None:
    before = small().save_pretrained(tmp_path)
    replace, count = os.replace, iter(range(99))

    def failing(*arguments):
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match=r"No space left on device.*config\.json"):
        trained(FeatureMLP(12, (16,)), (12,), SimplexHead(16, 2)).save_pretrained(tmp_path)
    assert read_identity(tmp_path) == before
    assert EmbeddingModel.from_pretrained(tmp_path).identity() == before


def test_files_of_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"mine")
    small().save_pretrained(tmp_path)
    small(scale=2.0).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()
    for content in ('{"architectures": ["BertModel"]}', "[]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelFolderError, match=r"would be overwritten|damaged.*delete it.*another folder"):
            small().save_pretrained(tmp_path)
        assert (tmp_path / "config.json").read_text() == content


class _Subclass(FeatureMLP):
    pass


def altered() -> EmbeddingModel:
    model = small()
    model.backbone.layers[0] = nn.Linear(12, 16)  # with a bias
    return model


def with_more() -> EmbeddingModel:
    model = small()
    model.temperature = nn.Parameter(torch.ones(1))
    return model


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (
            lambda p: EmbeddingModel(FeatureMLP(3), nn.Identity()).save_pretrained(p),
            TypeError,
            "head must be one of CubeHead, FeatureHead, Linear.*, OCAHead, Ortho.*, SimplexHead for .*, got Identity",
        ),
        (
            lambda p: small(preprocessing=RandomWarp()).save_pretrained(p),
            TypeError,
            "preprocessing must be None or one of Drawings, Normalize, Photographs, Tokens, Vectors .*, got RandomWarp",
        ),
        (
            lambda p: altered().save_pretrained(p),
            ValueError,
            r"fit what its arguments make.*unexpected: layers.0.bias",
        ),
        (
            lambda p: with_more().save_pretrained(p),
            TypeError,
            "cannot save tensors outside backbone and head, got temperature",
        ),
        (lambda p: small().save_pretrained(p, version=-1), ValueError, "version must be 0 or more, got -1"),
        (lambda p: small().save_pretrained(p, version=1.5), TypeError, "version must be an integer, got float"),
        (lambda p: small().save_pretrained(p, name=3), TypeError, "name must be a string, got int"),
        (
            lambda p: EmbeddingModel.from_pretrained(p / "none"),
            FileNotFoundError,
            "none is not a folder; expected one that save_pretrained has written",
        ),
        (lambda p: EmbeddingModel.from_pretrained(p), ModelFolderError, "holds no model: it has no config.json"),
    ],
)
def test_bad_input(act, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        act(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_subclass_is_not_rebuilt_as_its_base_class(tmp_path: Path) -> None:
    trained(_Subclass(12, (16,)), (12,), linear()).save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match=r"_Subclass, which is not of simplexfix: pass an instance as backbone="):
        EmbeddingModel.from_pretrained(tmp_path)
    assert EmbeddingModel.from_pretrained(tmp_path, backbone=_Subclass(12, (16,))).backbone.hidden == (16,)


# Identities: when a gallery refuses queries of another model.


def model_on(slots: SlotRegistry, kind=SimplexHead, in_features: int = 16, **options) -> ModelIdentity:
    return EmbeddingModel(FeatureMLP(in_features), kind.from_slots(slots, in_features, **options)).identity()


def grown(num_slots: int = 34, **namespaces) -> SlotRegistry:
    slots = SlotRegistry(num_slots)
    for name, classes in namespaces.items():
        slots.add(name, classes)
    return slots


def test_versions_on_one_registry_may_search_each_other() -> None:
    first = model_on(grown(default=range(4)))
    # another network with wider features
    later = model_on(grown(default=range(4), pretraining=[90, 80]), in_features=24)
    assert first.fingerprint != later.fingerprint
    assert later.why_not_search(first) == []
    assert first.why_not_search(later) == []
    saved = json.loads(json.dumps(later.to_dict()))
    assert ModelIdentity.from_dict(saved) == later
    saved["slots"].append(["other", 0, 0, 1, 1])
    with pytest.raises(ValueError, match="slot 0 of 'other' collides with"):
        ModelIdentity.from_dict(saved)


@pytest.mark.parametrize(
    ("gallery", "reasons"),
    [
        (
            model_on(grown(default=range(4)), OrthoplexHead),
            ["are 17 wide, this model's 33", "kind 'orthoplex', this"],
        ),
        (model_on(grown(36, default=range(4))), ["are 35 wide, this model's 33", "has 36 slots, this model's 34"]),
        (
            model_on(grown(default=[1, 0, 2])),
            ["class 0 of namespace 'default' has slot 1 in the gallery's model, 0 in this one, and 1 more of"],
        ),
        (
            model_on(grown(default=range(3), other=[5])),
            ["slot 3 is class 5 of namespace 'other' in the gallery's model, class 3 of 'default' in this one$"],
        ),
        (model_on(grown(other=[5, 6])), ["slot 0 is class 5 of namespace 'other' .*, and 1 more slots differ"]),
        (model_on(SlotRegistry(34)), ["the two models have no class in common"]),
        (
            EmbeddingModel(FeatureMLP(33), LinearHead(33)).identity(),
            ["a head of kind 'linear', this one 'simplex'"],
        ),
    ],
)
def test_a_stranger_is_refused_with_reasons(gallery: ModelIdentity, reasons: list[str]) -> None:
    queries = model_on(grown(default=range(4)))
    found = queries.why_not_search(gallery)
    assert len(found) == len(reasons), found
    for text, expected in zip(found, reasons, strict=True):
        assert re.search(expected, text), text
    assert len(gallery.why_not_search(queries)) == len(reasons)


def test_cubes_and_learnable_classifiers() -> None:
    cube = model_on(grown(default=range(4)), CubeHead, embedding_dim=40)
    other = ModelIdentity.from_dict({**cube.to_dict(), "codes_crc32": 1, "fingerprint": "0"})
    assert cube.why_not_search(model_on(grown(default=range(4)), CubeHead, 24, embedding_dim=40)) == []
    assert "codes of crc32 1, this model's " in cube.why_not_search(other)[0]
    for make in (lambda: LinearHead(8), lambda: NeighbourHead(8, 5)):
        first, second = (EmbeddingModel(FeatureMLP(8), make()) for _ in range(2))
        assert "only fixed vertices guarantee a shared space" in second.identity().why_not_search(first.identity())[0]
        assert first.identity().why_not_search(first.identity(version=2)) == []


def test_identities_of_external_models_depend_on_name_revision_and_adapter() -> None:
    first = ModelIdentity.external("vendor/embed", "2024-01", 384)
    newer = ModelIdentity.external("vendor/embed", "2025-03", 512, version=1)
    assert ModelIdentity.external("vendor/embed", "2024-01", 384, version=5).fingerprint == first.fingerprint
    others = [("vendor/embed", "2024-02", 384), ("vendor/embed2", "2024-01", 384), ("vendor/embed", "2024-01", 385)]
    assert len({first.fingerprint, *(ModelIdentity.external(*facts).fingerprint for facts in others)}) == 4
    assert newer.why_not_search(first) == [
        "the gallery's embeddings are 384 wide, this model's 512",
        "vendor/embed 2025-03 and vendor/embed 2024-01 are different models, and nothing says that they share a space",
    ]
    adapted = ModelIdentity.external("vendor/embed", "2025-03", 384, version=1, adapter="5eed", space=first)
    again = ModelIdentity.external("vendor/embed", "2026-01", 384, version=2, adapter="f00d", space=adapted)
    for one in (first, adapted, again):
        assert all(one.why_not_search(other) == [] for other in (first, adapted, again))
        assert ModelIdentity.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert adapted.fingerprint != newer.fingerprint
    # a first model with an adapter, such as a simplex junction, has its own space
    joined = ModelIdentity.external("vendor/embed", "2024-01", 384, adapter="beef")
    assert len(joined.why_not_search(first)) == 1
    later = ModelIdentity.external("vendor/embed", "2025-03", 384, version=1, adapter="5eed", space=joined)
    assert later.why_not_search(joined) == []
    assert len(later.why_not_search(adapted)) == 1
    # an adapter into the space of a model of this package
    ours = model_on(grown(default=range(4)))
    queries = ModelIdentity.external("vendor/embed", "2025-03", 33, adapter="5eed", space=ours)
    assert queries.why_not_search(ours) == ours.why_not_search(queries) == []
    assert "kind 'simplex', this one 'external'" in first.why_not_search(ours)[1]
    # an identity that was saved by a release without spaces
    saved = ours.to_dict()
    del saved["space"]
    assert ModelIdentity.from_dict(saved) == ours


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"name": ""}, ValueError, "name must not be empty"),
        ({"revision": 3}, TypeError, "revision must be a string, got int"),
        ({"dim": 0}, ValueError, "dim must be 1 or more, got 0"),
        ({"dim": 1.5}, TypeError, "dim must be an integer, got float"),
        ({"version": -1}, ValueError, "version must be 0 or more, got -1"),
        ({"space": ModelIdentity.external("a", "1", 8)}, ValueError, "space needs adapter: pass the fingerprint of"),
        ({"adapter": "5eed", "space": "a"}, TypeError, "space must be a ModelIdentity or None, got str"),
        ({"adapter": b"5eed"}, TypeError, "adapter must be a string, got bytes"),
    ],
)
def test_bad_identities_of_external_models(changes, kind, message: str) -> None:
    facts = {"name": "vendor/embed", "revision": "1", "dim": 8, **changes}
    with pytest.raises(kind, match=message):
        ModelIdentity.external(facts.pop("name"), facts.pop("revision"), facts.pop("dim"), **facts)
