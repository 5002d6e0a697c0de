"""Tests text encoders in Hugging Face's format: the mean over tokens, whatever the batch, and loading from a folder."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from simplexfix.methods import QDC
from simplexfix.models import EmbeddingModel, FeatureHead, TextEncoder, token_ids

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

TEXTS = ["where is my new card", "lost", "the old bank is where the new bank is my old card", "how"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns the folder of a network with random weights and a tokenizer of a few words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    place = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(place)
    (place / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(place)
    return place


def test_a_feature_is_the_mean_over_the_tokens_of_its_text(folder) -> None:
    encoder = TextEncoder(folder).eval()
    ids = token_ids(folder, TEXTS, 16)
    assert ids.shape == (4, 16)
    assert ids[1].tolist()[:4] == [2, WORDS.index("lost"), 3, 0]
    with torch.no_grad():
        found = encoder(ids)
        for row, feature in zip(ids, found, strict=True):
            alone = encoder.network(input_ids=row[row != 0][None]).last_hidden_state[0]
            assert torch.allclose(feature, alone.mean(0), atol=1e-5)
    assert found.shape == (4, encoder.out_features) == (4, 16)
    assert token_ids(folder, TEXTS, 4)[2].tolist()[0] == 2  # cut off at the end


def test_many_texts_keep_their_order(folder, monkeypatch) -> None:
    encoder = TextEncoder(folder).eval()
    ids = token_ids(folder, [TEXTS[row % 4] for row in range(150)], 16)
    shapes = []
    encoder.network.register_forward_pre_hook(
        lambda network, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        found = encoder(ids)
    assert shapes == [(64, 3), (64, 14), (22, 14)]  # short texts are not padded to the longest text of all batches
    assert torch.allclose(found, encoder(ids), atol=1e-5)  # with gradients, in one batch


def test_all_weights_are_trained_and_a_saved_model_is_restored(folder, tmp_path) -> None:
    encoder = TextEncoder(folder)
    model = EmbeddingModel(encoder, FeatureHead(encoder.out_features))
    ids = token_ids(folder, TEXTS, 16)
    QDC().loss(model, torch.stack([ids[:2], ids[2:]], 1), torch.arange(2), None).backward()
    assert all(p.grad is not None for p in model.parameters())  # DistributedDataParallel rejects unused parameters
    model.save_pretrained(tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path, backbone=TextEncoder(folder))
    assert torch.equal(again.extract(ids), model.extract(ids))


def test_a_sequence_of_texts_trains_from_its_configuration(folder, tmp_path, capsys) -> None:
    from simplexfix.cli import main

    draw = torch.Generator().manual_seed(0)
    for name in ("first", "second"):
        place = tmp_path / name
        (place / "qrels").mkdir(parents=True)
        for file in ("corpus", "queries"):
            texts = [
                " ".join(WORDS[5 + i] for i in torch.randint(len(WORDS) - 5, (3,), generator=draw).tolist())
                for _ in range(8)
            ]
            lines = [json.dumps({"_id": f"{file}{row}", "text": text}) for row, text in enumerate(texts)]
            (place / f"{file}.jsonl").write_text("\n".join(lines))
        for split, rows in (("train", range(4)), ("test", range(4, 8))):
            judged = [f"queries{row}\tcorpus{row}\t1" for row in rows]
            (place / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    content = {
        "data": {"kind": "retrieval", "path": str(tmp_path), "tokens": 8},
        "model": {"kind": "text", "path": str(folder)},
        "method": {"name": "qdc"},
        "tasks": {"kind": "retrieval_sequence", "sets": ["first", "second"]},
        "schedule": {"steps": 2, "learning_rate": 0.001, "batch": 2},
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    assert main(["train", str(tmp_path / "mine.json"), "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["explained_fraction"][0] is None
    assert 0 <= report["explained_fraction"][1] <= 1


def test_missing_folders_and_packages_are_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; text encoders are read from local folders"):
        TextEncoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="length must be at least 1 token, got 0"):
        token_ids(tmp_path, ["a"], 0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'simplexfix\[text\]'"):
        TextEncoder(tmp_path)
