"""Tests heads: they replace nn.Linear without a K x d matrix, and growth changes no result."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import assert_same_bits, needs_library
from processes import free_port, run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from simplexfix import CubeHead, OrthoplexHead, SimplexHead, SlotRegistry
from simplexfix import functional as SF
from simplexfix.heads import decode_state, encode_state
from simplexfix.polytopes import cube_codes, simplex_prototypes

KINDS = ("simplex", "orthoplex", "cube")


def head(**options) -> SimplexHead:
    torch.manual_seed(0)
    return SimplexHead(6, 10, num_slots=16, **options)


def head_of(kind: str, num_classes: int = 10, num_slots: int = 16, in_features: int = 6, **options):
    torch.manual_seed(0)
    if kind == "cube":
        return CubeHead(in_features, num_classes, embedding_dim=9, num_slots=num_slots, **options)
    return {"simplex": SimplexHead, "orthoplex": OrthoplexHead}[kind](
        in_features, num_classes, num_slots=num_slots, **options
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"normalize": True, "scale": 12.0}])
def test_forward_is_the_matrix_product(kind: str, options: dict) -> None:
    model, x = head_of(kind, **options), torch.randn(5, 6)
    z = model.junction(x)
    assert torch.equal(model.embed(x), z)
    assert z.shape == (5, model.embedding_dim)
    assert model.embedding_dim == {"simplex": 15, "orthoplex": 8, "cube": 9}[kind]
    w = model.prototypes(torch.arange(16))
    torch.testing.assert_close(w.norm(dim=1), torch.ones(16))
    z = F.normalize(z) if options else z
    torch.testing.assert_close(model(x), options.get("scale", 1.0) * z @ w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["simplex", "orthoplex"])
def test_loss_is_the_cross_entropy_of_forward(kind: str) -> None:
    model, x, target = head_of(kind, 16, scale=3.0), torch.randn(5, 6), torch.tensor([0, 15, 3, 2, 1])
    weight = torch.rand(16)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}, {"ignore_index": 3}):
        ours, expected = model.loss(x, target, **options), F.cross_entropy(model(x), target, **options)
        torch.testing.assert_close(ours, expected)
        gradients = [
            torch.autograd.grad(loss, model.junction.weight, retain_graph=True)[0] for loss in (ours, expected)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_with_a_target_is_the_loss(kind: str) -> None:
    model, x, target = head_of(kind, scale=3.0), torch.randn(5, 6), torch.tensor([0, 9, 3, 2, 1])
    for options in ({}, {"label_smoothing": 0.1, "reduction": "sum"}, {"weight": torch.rand(16), "ignore_index": 3}):
        assert torch.equal(model(x, target, **options), model.loss(x, target, **options))
    for option in ({"weight": torch.rand(16)}, {"ignore_index": 1}, {"label_smoothing": 0.1}, {"reduction": "sum"}):
        with pytest.raises(ValueError, match="are options of the loss; pass target"):
            model(x, **option)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_hoc_loss_has_the_options_of_the_head(kind: str, reduction: str) -> None:
    """hoc_loss uses the head's `normalize`, `scale` and `margin`."""
    model = head_of(kind, normalize=True, scale=9.0, margin=("cosine", 0.2))
    x, target = torch.randn(6, 6), torch.tensor([0, 9, 3, 3, -100, 1])
    old, weight = torch.randn(6, model.embedding_dim), torch.rand(16)
    classify = model.loss(x, target, weight=weight, reduction=reduction)
    contrast = SF.old_new_contrast(model.embed(x), old, target, mu=5.0, negatives="infonce", reduction=reduction)
    options = {"lambda_": 0.3, "mu": 5.0, "negatives": "infonce", "weight": weight, "reduction": reduction}
    loss = model.hoc_loss(x, old, target, **options)
    torch.testing.assert_close(loss, 0.3 * classify + 0.7 * contrast)
    if kind == "simplex":
        own = {"normalize": True, "scale": 9.0, "margin": ("cosine", 0.2)}
        torch.testing.assert_close(loss, SF.hoc_loss(model.embed(x), old, target, **own, **options))
    with pytest.raises(ValueError, match="target row 1 has label 11, a slot without a class"):
        model.hoc_loss(x, old, torch.tensor([0, 11, 3, 3, 4, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_junction_may_have_a_bias(kind: str) -> None:
    model, x = head_of(kind, bias=True), torch.randn(5, 6)
    assert torch.equal(model.embed(x), F.linear(x, model.junction.weight, model.junction.bias))
    assert sorted(model.state_dict()) == ["_extra_state", "junction.bias", "junction.weight"]
    assert head_of(kind).junction.bias is None
    model(x, torch.arange(5)).backward()
    assert model.junction.bias.grad.any()


def test_a_margin_may_come_from_json() -> None:
    assert head(normalize=True, margin=["cosine", 0.3]).margin == ("cosine", 0.3)


def compare_gradients(kind: str, rank: int, size: int) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(12, 6), torch.arange(12) % 10
    model, whole = head_of(kind, scale=2.0), head_of(kind, scale=2.0)
    if rank:
        # DistributedDataParallel broadcasts the first process's weights
        torch.nn.init.zeros_(model.junction.weight)
    together = DistributedDataParallel(model)
    mine = slice(rank * 12 // size, (rank + 1) * 12 // size)
    for _ in range(2):
        together.zero_grad()
        together(x[mine], target[mine]).backward()
    whole.loss(x, target).backward()
    torch.testing.assert_close(model.junction.weight.grad, whole.junction.weight.grad)
    assert model.slots.to_dict() == whole.slots.to_dict()
    torch.testing.assert_close(together(x), whole(x))


def loss_of_a_rank(rank: int, size: int, port: int) -> None:
    """Each of two processes has half of a batch; the gradient is that of one process with the whole batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.set_num_threads(1)
    try:
        for kind in KINDS:
            compare_gradients(kind, rank, size)
        # Free DistributedDataParallel before the group: as the last owner it would free the group without releasing the
        # GIL, and deadlock if the group's thread still frees the tensors of a broadcast.
        gc.collect()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_gradients_of_two_processes_are_those_of_one() -> None:
    run_ranks(loss_of_a_rank, 2, free_port())


def test_the_loss_of_the_cube_is_over_all_vertices() -> None:
    model, x, target = head_of("cube", 16, scale=3.0), torch.randn(5, 6), torch.tensor([0, 15, 3, 2, 1])
    assert torch.equal(model.codes, cube_codes(16, 9))
    for options in ({}, {"label_smoothing": 0.1, "reduction": "sum"}, {"ignore_index": 3}, {"weight": torch.rand(16)}):
        ours = model.loss(x, target, **options)
        assert torch.equal(ours, SF.cube_cross_entropy(model.embed(x), target, codes=model.codes, scale=3.0, **options))
    everything = SF.cube_logits(model.embed(x), torch.arange(512)[:, None], scale=3.0)
    torch.testing.assert_close(model.loss(x, target), F.cross_entropy(everything, model.codes[target, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_margin_acts_in_the_loss_only(kind: str) -> None:
    options = {"normalize": True, "scale": 9.0}
    plain, margin = head_of(kind, **options), head_of(kind, **options, margin=("cosine", 0.3))
    x, target = torch.randn(5, 6), torch.arange(5)
    assert torch.equal(plain(x), margin(x))
    assert margin.loss(x, target) > plain.loss(x, target)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_is_the_topk_of_forward_whatever_the_blocks(kind: str, monkeypatch) -> None:
    model, x = head_of(kind, 10, 50), torch.randn(40, 6)
    model.slots.add("fine", range(7), end="high")
    used = model.slots.used()
    logits = model(x)
    expected = logits[:, used].sort(dim=1, descending=True, stable=True)
    for rows, vertices in ((1 << 21, 4096), (150, 3), (1, 1)):
        monkeypatch.setattr("simplexfix.heads._LOGITS_AT_A_TIME", rows)
        monkeypatch.setattr("simplexfix.heads._VERTICES_AT_A_TIME", vertices)
        for k in (1, 2, 5, 17):
            scores, classes = model.predict(x, k)
            assert torch.equal(classes, used[expected.indices[:, :k]])
            torch.testing.assert_close(scores, expected.values[:, :k])
            if kind != "cube":  # the last bit of the cube's products depends on the block
                assert_same_bits(scores, expected.values[:, :k])
    assert model.predict(x[:0], 3)[1].shape == (0, 3)
    assert torch.equal(model.predict(x.view(4, 10, 6), 3)[1], model.predict(x, 3)[1].view(4, 10, 3))
    assert torch.equal(model.predict(x[0], 3)[1], model.predict(x, 3)[1][0])


@pytest.mark.parametrize("kind", KINDS)
def test_predict_gives_ties_to_the_lower_slot(kind: str, monkeypatch) -> None:
    model = head_of(kind, 16, 16)
    monkeypatch.setattr("simplexfix.heads._VERTICES_AT_A_TIME", 5)
    scores, classes = model.predict(torch.zeros(3, 6), 7)
    assert classes.tolist() == [list(range(7))] * 3
    assert not scores.any()
    torch.nn.init.zeros_(model.junction.weight)
    model.junction.weight.data[0, 0] = 1.0  # in the orthoplex all slots tie, except 0 and its opposite
    x = F.one_hot(torch.tensor([0]), 6).float()
    expected = model(x).sort(dim=1, descending=True, stable=True)
    assert torch.equal(model.predict(x, 9)[1], expected.indices[:, :9])
    assert model.predict(torch.full((2, 6), float("nan")), 3)[0].isnan().all()


def test_predict_returns_slots_in_use_only() -> None:
    model, x = head(), torch.randn(50, 6)
    scores, classes = model.predict(x, k=10)
    logits = model(x)
    assert classes.max() < 10
    assert torch.equal(scores, logits[:, :10].sort(1, descending=True).values)
    assert torch.equal(logits.gather(1, classes), scores)
    assert not scores.requires_grad
    high = SimplexHead(6, 0, num_slots=16)
    high.slots.add("fine", range(3), end="high")
    assert set(high.predict(x, k=3)[1].flatten().tolist()) == {13, 14, 15}


@pytest.mark.parametrize("kind", KINDS)
def test_growth_changes_nothing(kind: str) -> None:
    model, x = head_of(kind), torch.randn(7, 6)
    before = {name: value.clone() for name, value in model.named_parameters()}
    embedded, logits, loss = model.embed(x), model(x), model.loss(x, torch.arange(7))
    model.grow(14)
    model.slots.add("more", [5, 9], end="high")
    assert model.num_classes == 16
    assert model.num_slots == 16
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
    assert torch.equal(model.embed(x), embedded)
    assert torch.equal(model(x), logits)
    assert torch.equal(model.loss(x, torch.arange(7)), loss)
    assert model.slots.lookup("default", torch.arange(14)).tolist() == list(range(14))


def test_the_state_dict_holds_the_junction_and_the_registry_only(tmp_path) -> None:
    model = SimplexHead(6, 0, num_slots=1024)
    model.slots.add("imagenet", range(600))
    state = model.state_dict()
    assert sorted(state) == ["_extra_state", "junction.weight"]
    assert state["junction.weight"].shape == (1023, 6)
    torch.save(state, tmp_path / "head.pt")
    again = SimplexHead(6, 0, num_slots=1024)
    again.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert again.slots.to_dict() == model.slots.to_dict()
    assert torch.equal(again.junction.weight, model.junction.weight)
    with pytest.raises(ValueError, match="the saved head has 1024 slots, this one 3"):
        SimplexHead(6, 3).load_state_dict(state)


@pytest.mark.parametrize("kind", ["orthoplex", "cube"])
def test_state_dicts_of_the_other_polytopes(kind: str) -> None:
    model = head_of(kind)
    model.slots.add("more", [5], end="high")
    state = model.state_dict()
    assert sorted(state) == ["_extra_state", "junction.weight"]
    again = head_of(kind, 0)
    again.load_state_dict(state)
    assert again.slots.to_dict() == model.slots.to_dict()
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))


def test_a_cube_refuses_the_state_of_other_codes() -> None:
    model, other = head_of("cube"), head_of("cube", 0)
    state = model.state_dict()
    state["_extra_state"] = encode_state({**decode_state(state["_extra_state"]), "codes_crc32": 1})
    with pytest.raises(ValueError, match=r"must have cube codes of crc32 \d+ like this head, got crc32 1"):
        other.load_state_dict(state)
    assert not len(other.slots)
    with pytest.raises(ValueError, match="the saved head has 16 slots, this one 20"):
        head_of("cube", 0, 20).load_state_dict(model.state_dict())


def test_an_odd_orthoplex_gets_the_opposite_of_its_last_vertex() -> None:
    model = OrthoplexHead(6, 5)
    assert (model.num_slots, model.embedding_dim, model.num_classes) == (6, 3, 5)
    assert model(torch.randn(2, 6)).shape == (2, 6)
    assert model.predict(torch.randn(50, 6), 5)[1].max() == 4


_MILLION = """
import torch
from simplexfix import SimplexHead
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))
head = SimplexHead(2, 1 << 20)
head.loss(torch.randn(2, 2), torch.zeros(2, dtype=torch.int64)).backward()
head.zero_grad()
x, target = torch.randn(16, 2), torch.arange(16) * 65536 + 65535
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = status("VmRSS")
z = head.embed(x).detach().requires_grad_()
head._loss(z, target, normalize=False, scale=1.0, margin=None).backward()
after = status("VmHWM")
assert z.shape == (16, (1 << 20) - 1) and z.grad.isfinite().all()
print((after - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux' /proc")
@needs_library
def test_a_million_slots_fit_in_memory() -> None:
    """For 16 rows z, its gradient and the copy in .grad take 64 MiB each; logits and theirs would take 64 MiB each."""
    here = Path(__file__).parent  # in the repository's folder Python would import the source, without the library
    done = subprocess.run([sys.executable, "-c", _MILLION], capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    assert 64 < float(done.stdout) < 300


@pytest.mark.parametrize("kind", KINDS)
def test_a_registry_is_copied_into_a_head_and_never_shared(kind: str) -> None:
    old = head_of(kind)
    old.slots.add("fine", [7, 3], end="high")
    width = {"embedding_dim": 9} if kind == "cube" else {}
    options = {"normalize": True, "scale": 7.0, "margin": ("cosine", 0.2), "bias": True, "dtype": torch.float64}
    new = type(old).from_slots(old.slots, 8, **width, **options)
    assert type(new) is type(old)
    assert new.slots.to_dict() == old.slots.to_dict()
    torch.testing.assert_close(new.prototypes().float(), old.prototypes())
    assert new.junction.weight.shape == (old.embedding_dim, 8)
    assert new.junction.bias.dtype == torch.float64
    assert (new.normalize, new.scale, new.margin) == (True, 7.0, ("cosine", 0.2))
    new.grow(14)
    assert (old.num_classes, new.num_classes) == (12, 16)
    assert new.slots.lookup("default", torch.arange(10)).tolist() == list(range(10))
    assert type(old).from_slots(old.slots, 8, **width, device="meta").slots.to_dict() == old.slots.to_dict()
    with pytest.raises(ValueError, match="scale"):
        type(old).from_slots(SlotRegistry(8), 8, **width, scale=-1.0)
    with pytest.raises(TypeError, match=r"slots must be a SlotRegistry, such as head.slots, got dict"):
        type(old).from_slots(old.slots.to_dict(), 8, **width)


def test_prototypes_of_the_slots_in_use() -> None:
    model = head()
    assert torch.equal(model.prototypes(), simplex_prototypes(16)[:10])
    assert torch.equal(model.prototypes(torch.tensor([15])), simplex_prototypes(16)[15:])
    assert head(dtype=torch.float64).prototypes().dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_compiles(kind: str) -> None:
    model = head_of(kind)
    x, target = torch.randn(64, 6), torch.arange(64) % 6
    x = x + 4 * F.one_hot(target, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    first = model.loss(x, target).item()
    step = torch.compile(model.loss, fullgraph=True)
    for _ in range(60):
        optimizer.zero_grad()
        step(x, target).backward()
        optimizer.step()
    assert model.loss(x, target).item() < first / 3
    assert (model.predict(x)[1][:, 0] == target).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_any_integer_is_a_count(kind: str) -> None:
    model = head_of(kind, np.int64(10), np.int32(16), np.int64(6))
    model.grow(np.int64(12))
    assert (model.num_classes, model.num_slots, model.junction.weight.shape[1]) == (12, 16, 6)
    assert model.predict(torch.randn(2, 6), np.int64(3))[1].shape == (2, 3)
    assert model.slots.owner(np.int64(3)) == ("default", 3)
    assert json.dumps(model.slots.to_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_created_on_meta_works_once_it_has_memory(kind: str) -> None:
    """A head can be created on the meta device and get memory in each way that torch offers."""
    model, x = head_of(kind), torch.randn(3, 6)
    model.grow(12)
    state = model.state_dict()
    with torch.device("meta"):
        loaded, assigned, filled = (head_of(kind) for _ in range(3))
        filled.grow(12)
        assert filled.junction.weight.is_meta
    loaded.to_empty(device="cpu").load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    filled.to_empty(device="cpu").junction.weight.data.copy_(state["junction.weight"])
    for made in (loaded, assigned, filled):
        made = copy.deepcopy(made)
        assert torch.equal(made(x), model(x))
        assert torch.equal(made.loss(x, torch.arange(3)), model.loss(x, torch.arange(3)))
        assert torch.equal(made.prototypes(), model.prototypes())


@pytest.mark.parametrize("kind", KINDS)
def test_labels_without_a_class_are_refused(kind: str) -> None:
    """Training on them would use up the vertex of a later class."""
    model, x = head_of(kind), torch.randn(4, 6)
    model.slots.add("fine", range(3), end="high")  # slots 15, 14, 13
    for label in (10, 12, 16, 2**40):
        target = torch.tensor([0, 14, label, 9])
        message = (
            rf"target row 2 has label {label}, a slot without a class: the head has 13 classes, in slots 0 to 9 and "
        )
        remedy = "register the class first .head.grow" if label < 16 else "map class ids to slots .head.slots.lookup"
        with pytest.raises(ValueError, match=f"{message}13 to 15; {remedy}"):
            model.loss(x, target)
        with pytest.raises(ValueError, match=rf"target row 2 has label {label}"):
            model.loss(x.view(2, 2, 6), target.view(2, 2))
        assert model.loss(x, target, ignore_index=label).isfinite()
    with pytest.raises(ValueError, match="target row 1 has label 12"):  # the other labels have slots at the high end
        model.loss(x, torch.tensor([14, 12, 15, 13]))
    with pytest.raises(ValueError, match="target out of range: row 1 has slot -1"):
        model.loss(x, torch.tensor([0, -1, 2, 3]))
    for target in ([0, 9, 13, 15], [13, 14, 15, 13], [-100, 15, 0, -100], [-100, 0, 1, 2]):
        assert model.loss(x, torch.tensor(target)).isfinite()
    assert model.loss(x[:0], torch.empty(0, dtype=torch.int64), reduction="sum") == 0
    model.grow(13)  # now all slots have a class
    assert model.loss(x, torch.tensor([10, 11, 12, 15])).isfinite()
    with pytest.raises(ValueError, match=r"row 3 has label 16, .* has 16 classes, in slots 0 to 15"):
        model.loss(x, torch.tensor([10, 11, 12, 16]))


def test_a_later_namespace_gets_untrained_slots() -> None:
    """Label 12 of 10 classes: training would move features to the vertex of the third class that is added later."""
    model = head(normalize=True, scale=9.0)
    x = torch.randn(8, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        with pytest.raises(ValueError, match="row 0 has label 12"):
            model.loss(x, torch.full((8,), 12)).backward()
        optimizer.step()
    model.slots.add("later", range(5))
    assert model.slots.owner(12) == ("later", 2)
    assert (model(x).argmax(1) != 12).any()


@pytest.mark.parametrize(("labels", "hint"), [([1, 10, 5], True), ([1, 11, 5], False), ([0, 10, 5], False)])
def test_labels_that_count_from_one_are_named(labels: list[int], hint: bool) -> None:
    with pytest.raises(ValueError, match="a slot without a class") as error:
        head().loss(torch.randn(3, 6), torch.tensor(labels))
    assert ("all labels lie in 1 to 10: if they count from 1, pass target - 1" in str(error.value)) == hint
    full = SimplexHead(6, 10)
    with pytest.raises(ValueError, match="if they count from 1, pass target - 1"):
        full.loss(torch.randn(3, 6), torch.tensor([1, 10, -100]))


def test_a_head_without_classes_refuses_every_label() -> None:
    with pytest.raises(ValueError, match="row 0 has label 0, a slot without a class: the head has no classes yet"):
        SimplexHead(6, 0, num_slots=16).loss(torch.randn(2, 6), torch.tensor([0, 1]))


def test_labels_that_cannot_be_read_are_not_checked() -> None:
    """Labels are not checked under torch.compile and torch.func, and on fake and meta tensors."""
    model, x, target = head(), torch.randn(3, 6), torch.tensor([0, 12, 1])
    expected = SF.simplex_cross_entropy(model.embed(x), target)
    torch.testing.assert_close(torch.compile(model.loss, fullgraph=True)(x, target), expected)
    torch.testing.assert_close(torch.func.vmap(model.loss, (None, 0))(x, target[None]), expected[None])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model.loss(mode.from_tensor(x), mode.from_tensor(target)).shape == ()
    assert copy.deepcopy(model).to("meta").loss(x.to("meta"), target.to("meta")).shape == ()


def test_repr_shows_the_options() -> None:
    assert "num_classes=10, num_slots=16, normalize=False, scale=1.0, margin=None" in repr(head())


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: SimplexHead(4, 1), ValueError, "num_slots must be at least 2, got 1"),
        (lambda: SimplexHead(4, "3"), TypeError, "num_classes must be an integer, got str"),
        (lambda: SimplexHead(4, 3.0), TypeError, "num_classes must be an integer, got float"),
        (lambda: SimplexHead(4.0, 3), TypeError, "in_features must be an integer, got float"),
        (lambda: SimplexHead(4, 3, num_slots=8.0), TypeError, "num_slots must be an integer, got float"),
        (lambda: OrthoplexHead(4, 3.0), TypeError, "num_classes must be an integer, got float"),
        (lambda: OrthoplexHead(4, 3, num_slots=8.0), TypeError, "num_slots must be an integer, got float"),
        (lambda: CubeHead(4, 3.0, embedding_dim=4), TypeError, "num_classes must be an integer, got float"),
        (lambda: CubeHead(4, 3, embedding_dim=4.0), TypeError, "embedding_dim must be an integer, got float"),
        (lambda: head().grow(12.0), TypeError, "num_classes must be an integer, got float"),
        (lambda: head().predict(torch.randn(2, 6), k=2.0), TypeError, "k must be an integer, got float"),
        (
            lambda: SimplexHead(6, 0, num_slots=9).predict(torch.randn(2, 6)),
            ValueError,
            r"the head has no classes yet; head.grow or head.slots.add makes some",
        ),
        (lambda: head().prototypes([0, 1]), TypeError, "slots must be a torch.Tensor, got list"),
        (lambda: head().set_extra_state(None), TypeError, "_extra_state must be a tensor or a dict, got NoneType"),
        (
            lambda: head_of("cube").set_extra_state(None),
            TypeError,
            "_extra_state must be a tensor or a dict, got NoneType",
        ),
        (lambda: SimplexHead(4, -1, num_slots=4), ValueError, "num_classes >= 0, got 4 and -1"),
        (lambda: SimplexHead(4, 9, num_slots=8), ValueError, "namespace 'default' needs 9 slots, 8 of 8 are free"),
        (lambda: SimplexHead(0, 4), ValueError, "in_features must be >= 1 and num_classes >= 0, got 0 and 4"),
        (lambda: OrthoplexHead(4, -1), ValueError, "num_classes >= 0, got 4 and -1"),
        (lambda: OrthoplexHead.from_slots(SlotRegistry(5), 4), ValueError, "an even number of slots, got 5"),
        (lambda: CubeHead(4, 9, embedding_dim=3), ValueError, "d must be at least 4 for 9 classes, got 3"),
        (
            lambda: CubeHead(0, 9, embedding_dim=8),
            ValueError,
            "in_features must be >= 1 and num_classes >= 0, got 0 and 9",
        ),
        (lambda: CubeHead(4, 1, embedding_dim=8), ValueError, "num_slots must be at least 2, got 1"),
        (lambda: head(scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
        (lambda: head(margin=("cosine", 0.3)), ValueError, "margin needs normalize=True"),
        (
            lambda: head().predict(torch.randn(2, 6), k=11),
            ValueError,
            r"k must lie in \[1, 10\], the classes in use, got 11",
        ),
        (lambda: head().grow(9), ValueError, "num_classes can only grow, from 10, got 9"),
        (lambda: head().grow(17), ValueError, "needs 7 slots, 6 of 16 are free"),
    ],
)
def test_bad_input(act, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def test_a_head_of_another_polytope_is_refused_and_meta_codes_are_made_anew() -> None:
    cube = CubeHead(16, 10, embedding_dim=5)
    for other in (OrthoplexHead(16, 10), SimplexHead(16, 10)):
        state = {**cube.state_dict(), "junction.weight": other.junction.weight.detach()}
        with pytest.raises((ValueError, RuntimeError), match="got a cube head"):
            other.load_state_dict(state)
    empty = CubeHead(16, 10, embedding_dim=5, device="meta").to_empty(device="cpu")
    empty.codes.fill_(-1)
    empty.load_state_dict(cube.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(empty(x), cube(x))
