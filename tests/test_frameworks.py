"""Tests the examples of docs/guides/frameworks.md: other libraries' loops train a version and its successor."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example
from torch.utils.data import DataLoader, TensorDataset

from simplexfix import SimplexHead
from simplexfix.models import EmbeddingModel, FeatureMLP, TextEncoder, token_ids

WORDS = [f"word{i}" for i in range(60)]
LABELS = [i % 6 for i in range(72)]
TEXTS = [" ".join(WORDS[6 * label + (i + j) % 6] for j in range(4)) for i, label in enumerate(LABELS)]


def block(heading: str, **changes: str) -> str:
    """Returns the Python code below a heading of the page, with new values for the named arguments."""
    code = example("frameworks.md", heading)
    for name, value in changes.items():
        assert code.count(f"{name}=") >= 1
        code = re.sub(rf"\b{name}=[^,)\n]+", f"{name}={value}", code)
    return code


def run(heading: str, names: dict[str, Any], **changes: str) -> dict[str, Any]:
    exec(compile(block(heading, **changes), "docs/guides/frameworks.md", "exec"), names)
    return names


def nearness(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new * old).sum(1).mean())


def classes_of_four() -> tuple[torch.Tensor, torch.Tensor]:
    draw, labels = torch.Generator().manual_seed(0), torch.arange(400) % 4
    return torch.randn(4, 8, generator=draw)[labels] + 0.2 * torch.randn(400, 8, generator=draw), labels


def small_model(seed: int = 0, width: int = 12) -> EmbeddingModel:
    torch.manual_seed(seed)
    return EmbeddingModel(FeatureMLP(8, (width,)), SimplexHead(width, 4, num_slots=8))


@pytest.fixture
def contrasted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Returns a list that collects the old embeddings of each step's HOC loss."""
    given, original = [], SimplexHead.hoc_loss

    def hoc_loss(head: SimplexHead, features: torch.Tensor, old: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        given.append(old)
        return original(head, features, old, labels)

    monkeypatch.setattr(SimplexHead, "hoc_loss", hoc_loss)
    return given


@pytest.fixture
def encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the folders of two networks with random weights, "encoder" and "larger", each with its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.chdir(tmp_path)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    for name, width in (("encoder", 16), ("larger", 24)):
        torch.manual_seed(width)
        sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
        transformers.BertModel(config).save_pretrained(name)
        Path(name, "vocab.txt").write_text("\n".join(vocabulary))
        transformers.BertTokenizerFast(vocab=str(Path(name, "vocab.txt"))).save_pretrained(name)


@pytest.mark.usefixtures("encoders")
def test_the_trainer_of_transformers_trains_two_versions(contrasted: list[torch.Tensor]) -> None:
    seen = [i for i, label in enumerate(LABELS) if label < 4]
    names = {
        "texts": [TEXTS[i] for i in seen], "labels": [LABELS[i] for i in seen],
        "more_texts": TEXTS, "more_labels": LABELS,
    }  # fmt: skip
    sizes = {"num_classes": "4", "num_train_epochs": "6", "per_device_train_batch_size": "24"}
    run("transformers", names, learning_rate="1e-2", **sizes)
    first, second = names["first"], names["second"]
    assert names["stored"].shape == (48, 255)
    assert second.head.num_classes == 77
    assert second.identity().why_not_search(first.identity()) == []
    untrained = EmbeddingModel(TextEncoder("larger"), SimplexHead.from_slots(first.head.slots, 24))
    found, before = (model.extract(token_ids("larger", TEXTS, 32)) for model in (second, untrained))
    assert nearness(found, names["old"]) > nearness(before, names["old"]) + 0.3
    assert sorted(map(bytes, torch.cat(contrasted).numpy())) == sorted(6 * list(map(bytes, names["old"].numpy())))
    second.save_pretrained("model")
    again = EmbeddingModel.from_pretrained("model", backbone=TextEncoder("larger"))
    assert torch.equal(again.extract(names["more_ids"]), second.extract(names["more_ids"]))


def test_accelerate_trains_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    version = re.search(r"^class Version.*?\n\n\n", block("transformers"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "model": small_model()}
    exec(version[0], names)
    rows, labels = classes_of_four()
    names["loader"] = DataLoader(TensorDataset(rows, labels), batch_size=20)
    run("accelerate", names, lr="3e-2")
    model = EmbeddingModel.from_pretrained("models/first")
    _, classes = model.head.predict(model.backbone(rows))
    assert (classes[:, 0] == labels).double().mean() > 0.9
    other = names["Version"](small_model(1))
    accelerator = accelerate.Accelerator()
    other = accelerator.prepare(other)
    accelerator.load_state("state")
    assert torch.equal(other.model.extract(rows), model.extract(rows))
    accelerator.free_memory()


def test_lightning_trains_two_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contrasted: list[torch.Tensor]
) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows, labels = classes_of_four()
    names: dict[str, Any] = {
        "first": small_model(), "larger": FeatureMLP(8, (20,)), "inputs": rows, "labels": labels,
        "EmbeddingModel": EmbeddingModel, "SimplexHead": SimplexHead,
    }  # fmt: skip
    quiet = "accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False"
    run("Lightning", names, max_epochs=f"3, {quiet}", batch_size="20", lr="3e-2")
    first, second = names["first"], EmbeddingModel.from_pretrained("models/second")
    assert second.identity(version=2).why_not_search(first.identity()) == []
    assert nearness(second.extract(rows), names["stored"]) > 0.9
    assert sorted(map(bytes, torch.cat(contrasted).numpy())) == sorted(3 * list(map(bytes, names["stored"].numpy())))
    _, classes = second.head.predict(second.backbone(rows))
    assert (classes[:, 0] == labels).double().mean() > 0.9
