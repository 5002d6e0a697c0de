"""Tests sentence-transformers (losses by their equations, a replacement, a saved model), and MTEB on a few texts.

Both are in one file, because the libraries take seconds to import.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import snippet
from torch.nn.functional import normalize

from simplexfix import SlotRegistry
from simplexfix import functional as SF
from simplexfix.models import EmbeddingModel, FeatureHead

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from simplexfix.integrations.sentence_transformers import HOCLoss, OldEmbeddingCollator, SimplexLoss, add_junction

WORDS = ["card", "lost", "money", "sent", "top", "up", "my", "the", "where", "is"]
TEXTS = ["my card is lost", "where is the lost card", "money sent", "the sent money", "top up", "where top up is"] * 4
CLASSES = [7, 7, 2**40, 2**40, -3, -3] * 4


def encoder(words: list[str] = WORDS, width: int = 6) -> SentenceTransformer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=width)], device="cpu")


@pytest.fixture
def slots() -> SlotRegistry:
    torch.manual_seed(0)
    registry = SlotRegistry(12)
    registry.add("banking", [7, 2**40, -3], end="high")
    return registry


def with_junction(slots: SlotRegistry, words: list[str] = WORDS, width: int = 6) -> SentenceTransformer:
    model = encoder(words, width)
    add_junction(model, slots)
    return model


def batch(model: SentenceTransformer) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    return [dict(model.preprocess(TEXTS))], torch.tensor(CLASSES)


def arguments(folder: Path, steps: int) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=24, learning_rate=0.05, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def train(model, loss, dataset, folder, collator=None) -> None:
    args = arguments(folder, 60)
    SentenceTransformerTrainer(model=model, args=args, train_dataset=dataset, loss=loss, data_collator=collator).train()


def test_the_losses_are_those_of_the_embeddings(slots) -> None:
    model, old = with_junction(slots), with_junction(slots)
    z, u = (torch.from_numpy(m.encode(TEXTS)) for m in (model, old))
    torch.testing.assert_close(z, model[0](model.preprocess(TEXTS))["sentence_embedding"] @ model[1].linear.weight.T)
    target = slots.lookup("banking", torch.tensor(CLASSES))
    options = {"normalize": True, "scale": 8.0, "margin": ("cosine", 0.2)}
    loss = SimplexLoss(model, slots, namespace="banking", **options)(*batch(model))
    torch.testing.assert_close(loss, SF.simplex_cross_entropy(z, target, **options))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    contrast = {"lambda_": 0.3, "mu": 4.0, "negatives": "infonce", "anchor": "symmetric"}
    loss = HOCLoss(model, slots, old, namespace="banking", **contrast, **options)
    truth = SF.hoc_loss(z, u, target, **contrast, **options)
    torch.testing.assert_close(loss(*batch(model)), truth)
    features, labels = batch(model)
    by_column = HOCLoss(model, slots, namespace="banking", **contrast, **options)
    torch.testing.assert_close(by_column([*features, {"sentence_embedding": u.double()}], labels), truth)
    assert loss.get_config_dict() == {"num_slots": 12, **contrast, **options}
    assert {name.split(".")[0] for name, p in loss.named_parameters() if p.requires_grad} == {"model"}


def test_a_replacement_searches_the_old_index(slots, tmp_path) -> None:
    """The replacement has other tokens and another width, so old embeddings are a column of the data set."""
    old = with_junction(slots)
    dataset = Dataset.from_dict({"text": TEXTS, "label": CLASSES})
    train(old, SimplexLoss(old, slots, namespace="banking"), dataset, tmp_path)
    new = with_junction(slots, WORDS[::-1], 9)
    stored = old.encode(TEXTS, convert_to_tensor=True)

    def nearest() -> torch.Tensor:
        similarity = normalize(new.encode(TEXTS, convert_to_tensor=True)) @ normalize(stored).T
        return torch.tensor(CLASSES)[similarity.argmax(1)]

    assert (nearest() == torch.tensor(CLASSES)).double().mean() < 0.9
    dataset = dataset.add_column("old_embedding", list(stored.numpy()))
    loss = HOCLoss(new, slots, namespace="banking")
    train(new, loss, dataset, tmp_path, OldEmbeddingCollator(new.preprocess))
    assert (nearest() == torch.tensor(CLASSES)).all()
    again = with_junction(slots)  # has the old model's tokens, so the old model embeds each batch
    before = old.encode(TEXTS)
    train(again, HOCLoss(again, slots, old, namespace="banking"), dataset.remove_columns("old_embedding"), tmp_path)
    assert normalize(again.encode(TEXTS, convert_to_tensor=True)).mul(normalize(stored)).sum(1).min() > 0.8
    np.testing.assert_array_equal(old.encode(TEXTS), before)
    assert all(p.requires_grad for p in old.parameters())


@pytest.mark.slow
def test_a_saved_model_loads_without_this_package_with_the_same_bits(slots, tmp_path) -> None:
    model = with_junction(slots)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    program = (
        "import sys\nsys.modules['simplexfix'] = None\n"
        "from sentence_transformers import SentenceTransformer\nimport numpy as np\n"
        "model = SentenceTransformer(sys.argv[1] + '/model', device='cpu')\n"
        f"np.save(sys.argv[1] + '/rows.npy', model.encode({TEXTS}))\n"
        "try:\n    import simplexfix\nexcept ImportError:\n    print('not importable')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "not importable\n"
    rows = np.load(tmp_path / "rows.npy")
    assert rows.shape == (24, 11)
    assert rows.tobytes() == model.encode(TEXTS).tobytes()


def test_the_snippet_of_sentence_transformers_runs(tmp_path) -> None:
    names = {"texts": TEXTS, "labels": CLASSES, "out_folder": str(tmp_path / "out")}
    for name, words in (("old_folder", WORDS), ("new_folder", WORDS[::-1])):
        encoder(words).save_pretrained(str(tmp_path / name), create_model_card=False)
        names[name] = str(tmp_path / name)
    names["args"] = arguments(tmp_path, 1)
    exec(snippet("integrations.md", "sentence-transformers"), names)
    assert names["index"].shape == (24, 1023)
    again = SentenceTransformer(names["out_folder"], device="cpu")
    assert again.encode(TEXTS).tobytes() == names["new"].encode(TEXTS).tobytes()


def test_bad_models_columns_and_classes_are_named(slots) -> None:
    model, plain = with_junction(slots), encoder()
    with pytest.raises(
        ValueError, match=r"model must have embeddings of 11 dimensions for 12 slots, got 6: call add_junction\(model"
    ):
        SimplexLoss(plain, slots)
    with pytest.raises(ValueError, match="old must have embeddings of 11 dimensions for 12 slots, got 6"):
        HOCLoss(model, slots, plain)
    with pytest.raises(
        ValueError, match=r"old and model must have the same tokenizer and max_seq_length.*OldEmbeddingCollator"
    ):
        HOCLoss(model, slots, with_junction(slots, WORDS[::-1]))
    with pytest.raises(ValueError, match="the embeddings of model have 11 dimensions already"):
        add_junction(model, slots)
    with pytest.raises(ValueError, match=r"lambda_ must lie in \[0, 1\], got 2"):
        HOCLoss(model, slots, lambda_=2)
    features, labels = batch(model)
    with pytest.raises(ValueError, match="one column of texts besides the label, got 2"):
        SimplexLoss(model, slots, namespace="banking")(features * 2, labels)
    with pytest.raises(ValueError, match="one of old embeddings \\(OldEmbeddingCollator\\) besides the label, got 1"):
        HOCLoss(model, slots, namespace="banking")(features, labels)
    with pytest.raises(ValueError, match="class 8 has no slot in namespace 'banking'"):
        SimplexLoss(model, slots, namespace="banking")(features, labels + 1)
    with pytest.raises(
        ValueError, match=r"must have a column 'old_embedding' of the old model's embeddings, got \['label', 'text'\]"
    ):
        OldEmbeddingCollator(model.preprocess)([{"text": "my card", "label": 7}])


def test_mteb_scores_a_new_model_on_an_old_index(slots, tmp_path) -> None:
    """Two queries over four documents: a SentenceTransformer, a model of this package, and two versions."""
    mteb = pytest.importorskip("mteb")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    from simplexfix.integrations.mteb import Encoder

    class Cards(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Cards", type="Retrieval", main_score="ndcg_at_10", description="four texts", eval_splits=["test"],
            eval_langs=["eng-Latn"], dataset={"path": "none", "revision": "0"},
        )  # fmt: skip

        def load_data(self, **_) -> None:
            texts = {f"d{i}": text for i, text in enumerate(TEXTS[:6:2] + ["is"])}
            asked = {"q0": "my lost card", "q1": "top up"}
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_dict({"id": list(texts), "text": list(texts.values()), "title": [""] * 4}),
                "queries": Dataset.from_dict({"id": list(asked), "text": list(asked.values())}),
                "relevant_docs": {"q0": {"d0": 1}, "q1": {"d2": 1}},
                "top_ranked": None,
            }}}  # fmt: skip
            self.data_loaded = True

    def ndcg(model) -> float:
        result = mteb.evaluate(model, [Cards()], cache=None, show_progress_bar=False)
        return result.task_results[0].get_score()

    model = with_junction(slots)
    score = ndcg(model)
    assert score > 0.9
    own = EmbeddingModel(torch.nn.Identity(), FeatureHead(11))
    encoder = Encoder(lambda texts: own.extract(model.encode(texts, convert_to_tensor=True)), name="a/b", revision="1")
    assert ndcg(encoder) == score
    names = {"mteb": mteb, "tasks": [Cards()], "new": model, "old": with_junction(slots, WORDS[::-1])}
    exec(snippet("integrations.md", "MTEB"), names)
    assert names["own"].task_results[0].get_score() == score
    assert names["upgraded"].task_results[0].get_score() < score  # the models have different spaces
    with pytest.raises(ValueError, match="name must have the form \"organisation/model\", got 'b'"):
        Encoder(model.encode, name="b", revision="1")
