"""Tests models and adapters on a Hugging Face hub: they are loaded with the same bits, and errors name their cause."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import snippet
from hub_server import HubServer, hub_server

from simplexfix import SimplexHead
from simplexfix.adapters import Adapter, Procrustes, WhitenedProcrustes
from simplexfix.labelled import LabelledItems
from simplexfix.models import (
    EmbeddingModel,
    FeatureMLP,
    ModelFolderError,
    OCAHead,
    SmallConvNet,
)

if importlib.util.find_spec("huggingface_hub") is None or importlib.util.find_spec("safetensors") is None:
    pytest.skip("huggingface_hub or safetensors is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Any]]:
    """Starts a hub, and imports huggingface_hub again, which reads the hub's address from the environment at import."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "huggingface_hub"}
    with hub_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_TOKEN", "hf_of_the_test")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        for name in before:
            del sys.modules[name]
        yield server, importlib.import_module("huggingface_hub")
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def hub(client: tuple[HubServer, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """Returns the hub without repositories, and sets an empty cache."""
    server, library = client
    server.repositories.clear()
    server.requests.clear()
    server.failing.clear()
    fresh_cache(library, monkeypatch, tmp_path / "cache")
    return server


def fresh_cache(library: Any, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(importlib.import_module(f"{library.__name__}.constants"), "HF_HUB_CACHE", str(place))


def model_of(seed: int, width: int = 8, **options: Any) -> EmbeddingModel:
    torch.manual_seed(seed)
    return EmbeddingModel(FeatureMLP(5, (width,)), SimplexHead(width, 4, num_slots=6), **options).eval()


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def adapter_of(method: Any, width: int = 6) -> Adapter:
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(2))
    return method.fit(rows, torch.tanh(rows @ torch.randn(6, width)), labels=torch.arange(60) % 3)


def test_a_pushed_model_is_restored_to_the_bit(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_of(0, class_names=["a", "b", "c", "d"])
    commit = model.push_to_hub("org/birds", version=3, license="mit")
    files = hub.repositories["org/birds"][commit]
    assert set(files) == {".gitattributes", "README.md", "config.json", *(f for f in files if f.startswith("model-"))}
    loaded = EmbeddingModel.from_pretrained("org/birds")
    assert torch.equal(loaded.extract(X), model.extract(X))
    assert loaded.identity(version=3) == model.identity(version=3)
    assert loaded.class_names == model.class_names
    asked = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert asked == {"config.json", next(f for f in files if f.startswith("model-"))}  # no card, no other file
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert capfd.readouterr() == ("", "")


def test_a_revision_is_loaded_and_the_next_commit_replaces_its_files(hub: HubServer) -> None:
    first, second = model_of(0), model_of(1, width=10)
    commits = [model.push_to_hub("org/birds", version=i) for i, model in enumerate((first, second))]
    hub.commit("org/birds", {**hub.repositories["org/birds"][commits[1]], "notes.txt": b"kept"})
    commits.append(second.push_to_hub("org/birds", version=2))
    assert len([f for f in hub.repositories["org/birds"][commits[1]] if f.startswith("model-")]) == 1
    assert hub.repositories["org/birds"][commits[2]]["notes.txt"] == b"kept"
    for commit, model in zip(commits, (first, second, second), strict=True):
        loaded = EmbeddingModel.from_pretrained("org/birds", revision=commit)
        assert torch.equal(loaded.extract(X), model.extract(X))
    with pytest.raises(FileNotFoundError, match=r"org/birds at http://127.* has no revision 'v9'; expected a branch,"):
        EmbeddingModel.from_pretrained("org/birds", revision="v9")


def test_a_local_folder_takes_precedence(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_of(0).push_to_hub("org/birds")
    local = model_of(1)
    local.save_pretrained("org/birds")
    hub.requests.clear()
    assert torch.equal(EmbeddingModel.from_pretrained("org/birds").extract(X), local.extract(X))
    with pytest.raises(ValueError, match="revision must be None for the local folder org/birds, which holds one model"):
        EmbeddingModel.from_pretrained("org/birds", revision="main")
    for path in (Path("org/none"), "none", "org/none/model", "./none", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=r"none(/model)? is not a folder; expected one that save_pretr"):
            EmbeddingModel.from_pretrained(path)
    assert not hub.requests


def test_missing_and_foreign_repositories_are_refused(hub: HubServer) -> None:
    for read in (EmbeddingModel.from_pretrained, Adapter.from_pretrained):
        with pytest.raises(
            FileNotFoundError, match=r"org/none is neither a local folder nor a repository at http://127"
        ):
            read("org/none")
    with pytest.raises(FileNotFoundError, match=r"org/a--b is neither a local folder nor a repository"):
        EmbeddingModel.from_pretrained("org/a--b")
    hub.repositories["org/other"] = {}
    hub.commit("org/other", {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"\x80\x04."})
    with pytest.raises(ModelFolderError, match="belongs to no model that save_pretrained has written"):
        EmbeddingModel.from_pretrained("org/other")
    assert not any("pytorch_model" in path for _, path in hub.requests)
    with pytest.raises(ModelFolderError, match=r"config.json of the repository org/other was not written by save"):
        model_of(0).push_to_hub("org/other")
    adapter_of(Procrustes()).push_to_hub("org/adapter")
    with pytest.raises(ModelFolderError, match="belongs to no model that save_pretrained has written"):
        EmbeddingModel.from_pretrained("org/adapter")


def test_an_interrupted_download_resumes(hub: HubServer, monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    model = model_of(0)
    commit = model.push_to_hub("org/birds")
    hub.failing = {file for file in hub.repositories["org/birds"][commit] if file.startswith("model-")}
    message = (
        r"org/birds is not a local folder, its files at http://127.* could not be downloaded, and the cache does not"
    )
    with pytest.raises(ConnectionError, match=message):
        EmbeddingModel.from_pretrained("org/birds")
    monkeypatch.setattr(client[1].constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=message):
        EmbeddingModel.from_pretrained("org/birds")  # config.json alone is in the cache
    monkeypatch.setattr(client[1].constants, "HF_HUB_OFFLINE", False)
    hub.failing = set()
    assert torch.equal(EmbeddingModel.from_pretrained("org/birds").extract(X), model.extract(X))
    hub.requests.clear()
    monkeypatch.setattr(client[1].constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(EmbeddingModel.from_pretrained("org/birds").extract(X), model.extract(X))
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        EmbeddingModel.from_pretrained("org/fish")
    with pytest.raises(ConnectionError, match=r"org/birds could not be pushed to http://127.*, which has confirmed"):
        model.push_to_hub("org/birds")
    assert not hub.requests


def test_bad_pushes_are_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionError, match=r"does not let you write to stranger/birds; log in with `hf auth login`"):
        model_of(0).push_to_hub("stranger/birds")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="set HF_TOKEN to a token that may"):
        model_of(0).push_to_hub("org/birds")
    with pytest.raises(ValueError, match="version must be 0 or more"):
        model_of(0).push_to_hub("org/birds", version=-1)
    assert not hub.repositories


def test_an_interrupted_upload_leaves_the_previous_model(hub: HubServer) -> None:
    model_of(0).push_to_hub("org/birds")
    before = dict(hub.repositories["org/birds"])
    hub.failing = {"PUT"}
    with pytest.raises(ConnectionError, match="which has confirmed no commit; check the network"):
        model_of(1).push_to_hub("org/birds")
    assert hub.repositories["org/birds"] == before


def test_a_damaged_download_is_refused(hub: HubServer) -> None:
    commit = model_of(0).push_to_hub("org/birds")
    files = hub.repositories["org/birds"][commit]
    weights = next(file for file in files if file.startswith("model-"))
    hub.commit("org/birds", {**files, weights: files[weights][:-1] + bytes([files[weights][-1] ^ 1])})
    with pytest.raises(ModelFolderError, match="is damaged"):
        EmbeddingModel.from_pretrained("org/birds")


@pytest.mark.parametrize("method", [Procrustes(), WhitenedProcrustes()], ids=lambda method: method.name)
def test_a_pushed_adapter_is_restored_to_the_bit(method: Any, hub: HubServer) -> None:
    adapter = adapter_of(method)
    commit = adapter.push_to_hub("adapters", version=1, old="vendor v1", new="vendor v2")
    again = Adapter.from_pretrained("me/adapters", revision=commit)
    rows = torch.randn(4, 6)
    assert torch.equal(again(rows), adapter(rows))
    assert torch.equal(again.gallery(rows), adapter.gallery(rows))
    card = hub.repositories["me/adapters"][commit]["README.md"].decode()
    assert 'Adapter.from_pretrained("me/adapters")' in card
    if adapter.maps_gallery:
        assert "vectors = adapter.gallery(stored)" in card
        assert "vendor v1" not in card  # the old encoder's own vectors are not searched
    else:
        assert "| the old encoder | `vendor v1` | 6 | yes |" in card


def test_the_card_lists_galleries_and_scores(hub: HubServer) -> None:
    from simplexfix.compatibility import upgrade_gate
    from simplexfix.report import evaluate

    first, second, other = model_of(0), model_of(1, width=10), EmbeddingModel(FeatureMLP(5, (8,)), SimplexHead(8, 4))
    labels = torch.arange(7) % 4
    items = LabelledItems(labels, labels)
    versions = [
        items.version(model.extract(X), model.extract(X), name=f"v|{i}", fingerprint=model.identity().fingerprint)
        for i, model in enumerate((first, second))
    ]
    report, gate = evaluate(versions), upgrade_gate(*versions)
    earlier = [first.identity(version=1, name="first | old"), other.identity(version=9)]

    def card(evaluation: dict[str, Any]) -> str:
        commit = second.push_to_hub("org/birds", version=2, license="mit", earlier=earlier, evaluation=evaluation)
        return hub.repositories["org/birds"][commit]["README.md"].decode()

    text = card(report.as_dict())
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata == {"library_name": "simplexfix", "license": "mit", "tags": ["embeddings"]}
    assert f"| version 1, first \\| old | `{first.identity().fingerprint[:12]}` | 5 | yes |" in text
    reason = "no: the gallery's embeddings are 3 wide, this model's 5"
    assert f"| version 9 | `{other.identity().fingerprint[:12]}` | 3 | {reason}" in text
    assert f"| AC | {report.criteria.ac:.3f} |" in text
    assert f"| AA | {report.criteria.aa:.3f} |" in text
    assert f"| v\\|1 | {100 * report.matrix[1][0]:.1f} % | {100 * report.matrix[1][1]:.1f} % |" in text
    text = card(gate.as_dict())
    assert f"| new on old | {100 * gate.scores['new_on_old']:.1f} % |" in text
    assert gate.outcomes[0].verdict in text
    with pytest.raises(ValueError, match=r"evaluation must be of this model, \w{12}, got a gate's result about"):
        first.push_to_hub("org/birds", evaluation=gate.as_dict())
    with pytest.raises(ValueError, match=r"evaluation must be EvaluationReport.as_dict\(\) or GateResult.as_dict\(\)"):
        first.push_to_hub("org/birds", evaluation={"AC": 1})


def test_the_card_lists_ancestors_and_the_backbone_to_pass(hub: HubServer) -> None:
    backbone = torch.nn.Sequential(SmallConvNet(5, 16))
    model = EmbeddingModel(backbone, OCAHead(16, 40, ancestors=[("ab" * 32, 24), ("cd" * 32, 40)]))
    commit = model.push_to_hub("org/oca")
    text = hub.repositories["org/oca"][commit]["README.md"].decode()
    assert "| an ancestor | `abababababab` | 24 | yes, by the leading 24 dimensions |" in text
    assert "| an ancestor | `cdcdcdcdcdcd` | 40 | yes |" in text
    assert 'EmbeddingModel.from_pretrained("org/oca", backbone=Sequential(...))' in text
    model = EmbeddingModel(SmallConvNet(5, 16), SimplexHead(16, 4))
    commit = model.push_to_hub("org/cnn")
    text = hub.repositories["org/cnn"][commit]["README.md"].decode()
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "image-feature-extraction"


def test_the_snippet_in_frameworks_md_runs(hub: HubServer) -> None:
    from simplexfix.report import evaluate

    first, second, labels = model_of(0), model_of(1, width=10), torch.arange(7) % 4
    items = LabelledItems(labels, labels)
    report = evaluate([items.version(model.extract(X), model.extract(X)) for model in (first, second)])
    names: dict[str, Any] = {"first": first, "second": second, "report": report}
    exec(snippet("frameworks.md", "The Hugging Face hub"), names)
    assert torch.equal(names["model"].extract(X), second.extract(X))
    text = hub.repositories["owner/intents"][names["commit"]]["README.md"].decode()
    assert "| version 1 |" in text
    assert "| AC |" in text


def test_errors_without_huggingface_hub_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = (
        r"org/birds is not a folder; repositories of the Hugging Face hub need huggingface_hub: pip install 'simplex"
    )
    with pytest.raises(FileNotFoundError, match=message):
        EmbeddingModel.from_pretrained("org/birds")
    with pytest.raises(ModuleNotFoundError, match=r"need huggingface_hub: pip install 'simplexfix\[hub\]'"):
        model_of(0).push_to_hub("org/birds")
