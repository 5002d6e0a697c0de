"""Tests losses and nearest neighbours for pytorch-metric-learning: naive equations, and labels beyond 2^24."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import snippet

from simplexfix import SlotRegistry
from simplexfix import functional as SF

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import ThresholdReducer
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator as Original
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights

from simplexfix.integrations.metric_learning import AccuracyCalculator, CosineKNN, HOCLoss, SimplexLoss

LARGE = 2**24  # the next class id is not a float32
OPTIONS = {"normalize": True, "scale": 8.0, "margin": ("angular", 0.2)}


@pytest.fixture
def slots() -> SlotRegistry:
    torch.manual_seed(0)
    registry = SlotRegistry(8)
    registry.add("default", [LARGE, LARGE + 1, LARGE + 2], end="high")
    return registry


def rows(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 7, requires_grad=True), LARGE + torch.arange(n) % 3


def test_losses_are_called_like_those_of_the_library(slots) -> None:
    z, labels = rows()
    target = slots.lookup("default", labels)
    each = SF.simplex_cross_entropy(z, target, reduction="none", **OPTIONS)
    loss = SimplexLoss(slots, **OPTIONS)
    torch.testing.assert_close(loss(z, labels), each.mean())
    pairs = BatchHardMiner()(z, labels)
    weights = convert_to_weights(pairs, labels, dtype=torch.float32)
    assert weights.unique().numel() > 1
    torch.testing.assert_close(loss(z, labels, pairs), (weights * each).mean())
    reduced = SimplexLoss(slots, reducer=ThresholdReducer(low=2.0), **OPTIONS)(z, labels)
    torch.testing.assert_close(reduced, each[each > 2].mean())
    old, contrast = torch.randn(12, 7), {"lambda_": 0.3, "mu": 4.0, "negatives": "infonce", "anchor": "symmetric"}
    hoc = SF.hoc_loss(z, old, target, reduction="none", **contrast, **OPTIONS)
    loss = HOCLoss(slots, **contrast, **OPTIONS)
    for ref_labels in (None, labels):
        torch.testing.assert_close(loss(z, labels, pairs, old, ref_labels), (weights * hoc).mean())
    with pytest.warns(UserWarning, match="non-distributed"):
        assert DistributedLossWrapper(loss)(z, labels, ref_emb=old).requires_grad


def test_the_snippet_of_metric_learning_runs() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 20
    names = {"torch": torch, "labels": labels, "features": torch.randn(40, 512), "old_embeddings": torch.randn(40, 127)}
    exec(snippet("integrations.md", "pytorch-metric-learning"), names)
    names["loss"].backward()
    assert names["embedder"].weight.grad.abs().max() > 0
    assert set(names["accuracy"]) > {"precision_at_1", "r_precision"}


def test_bad_calls_of_the_losses_are_named(slots) -> None:
    z, labels = rows()
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        SimplexLoss(slots)(z, labels, ref_emb=z.detach(), ref_labels=labels)
    with pytest.raises(ValueError, match="ref_emb must be the old model's embeddings of the same rows, got none"):
        HOCLoss(slots)(z, labels)
    with pytest.raises(ValueError, match="ref_labels must equal labels"):
        HOCLoss(slots)(z, labels, ref_emb=z.detach(), ref_labels=labels.flip(0))
    for loss in (SimplexLoss(slots), HOCLoss(slots)):
        with pytest.raises(ValueError, match="labels are required"):
            loss(z)
        with pytest.raises(ValueError, match=f"class {LARGE + 3} has no slot"):
            loss(z, labels + 1, ref_emb=None if isinstance(loss, SimplexLoss) else z.detach())
    with pytest.raises(ValueError, match="scale must be positive"):
        SimplexLoss(slots, scale=0.0)


def test_neighbours_equal_those_of_the_library_without_faiss(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    torch.manual_seed(0)
    query, reference = torch.randn(9, 5), torch.randn(40, 5)
    theirs = CustomKNN(CosineSimilarity())
    for found, expected in (
        (CosineKNN()(query, 4, reference), theirs(query, 4, reference)),
        (CosineKNN()(reference, 39, reference, True), theirs(reference, 39, reference, True)),
    ):
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    same = torch.ones(6, 5)  # a query's own row is excluded among equal rows
    _, ids = CosineKNN()(same, 2, same, True)
    assert (ids != torch.arange(6)[:, None]).all()
    model = InferenceModel(torch.nn.Identity(), knn_func=CosineKNN(), data_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="there are no rows to save"):
        model.save_knn_func(tmp_path / "index")
    model.train_knn(query)
    model.train_knn(reference[:30])
    model.add_to_knn(reference[30:])
    model.save_knn_func(tmp_path / "index")
    model.knn_func = CosineKNN()
    model.load_knn_func(tmp_path / "index")
    assert torch.equal(model.get_nearest_neighbors(query, 4)[1], theirs(query, 4, reference)[1])
    for knn, k, message in ((CosineKNN(), 1, "between 1 and 0"), (model.knn_func, 41, "between 1 and 40")):
        with pytest.raises(ValueError, match=f"k must lie {message}, the number of rows, got {k}"):
            knn(query, k)
    with pytest.raises(ValueError, match="between 1 and 39, the number of rows, got 40"):
        CosineKNN()(reference, 40, reference, True)


def test_accuracy_of_class_ids_beyond_float32(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    torch.manual_seed(0)
    small = torch.arange(60) % 6
    rows = torch.eye(6)[small] + 0.4 * torch.randn(60, 6)
    without = {"exclude": ("NMI", "AMI"), "knn_func": CosineKNN(), "k": "max_bin_count"}  # both need faiss's k-means
    for calls in (
        lambda labels: (rows, labels),
        lambda labels: (rows[:20], labels[:20], rows[20:], labels[20:]),
        lambda labels: (rows[:20].numpy(), labels[:20].numpy(), rows.numpy(), labels.numpy(), True),
    ):
        for options in ({}, {"return_per_class": True}):
            truth = Original(**without, **options).get_accuracy(*calls(small))
            assert AccuracyCalculator(**without, **options).get_accuracy(*calls(small + LARGE * 2**30)) == truth
    wrong = Original(**without).get_accuracy(rows, small + LARGE * 2**30)["precision_at_1"]
    assert wrong == 1 > AccuracyCalculator(**without).get_accuracy(rows, small + LARGE * 2**30)["precision_at_1"]
    near = {"label_comparison_fn": lambda a, b: (a - b).abs() <= 1}  # labels stay numbers
    truth = Original(**without, **near).get_accuracy(rows, 2 * small)
    assert AccuracyCalculator(**without, **near).get_accuracy(rows, 2 * small) == truth
