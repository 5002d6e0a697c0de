"""Tests saving and loading of adapters: bitwise equality, and clear errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_adapter_methods import METHODS, method_name, paired_features

from simplexfix import cosine_topk
from simplexfix.adapters import Adapter, Procrustes, Slerp, WhitenedProcrustes
from simplexfix.gallery import Gallery, StrangerError
from simplexfix.models import EmbeddingModel, ModelFolderError, ModelIdentity, read_identity


@pytest.mark.parametrize("method", METHODS, ids=method_name)
def test_a_loaded_adapter_maps_to_the_same_bits(method, tmp_path) -> None:
    y, x, labels = paired_features(9, 14)
    adapter = method.fit(y, x, labels=labels)
    names = {"version": 3, "name": "third", "old": "0" * 64, "new": "a text encoder"}
    identity = adapter.save_pretrained(tmp_path, **names)
    loaded = Adapter.from_pretrained(tmp_path)
    queries = (torch.from_numpy(x), torch.from_numpy(y)) if isinstance(method, Slerp) else (torch.from_numpy(x),)
    assert torch.equal(loaded(*queries), adapter(*queries))
    assert torch.equal(loaded.gallery(torch.from_numpy(y)), adapter.gallery(torch.from_numpy(y)))
    assert (loaded.method, loaded.alpha) == (adapter.method, adapter.alpha)
    assert repr(loaded) == repr(adapter)
    assert read_identity(tmp_path) == identity == loaded.identity(**names)
    assert (identity.version, identity.name, identity.embedding_dim) == (3, "third", adapter.embedding_dim)
    assert ModelIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity


def test_an_adapter_may_search_only_the_galleries_it_was_fitted_for() -> None:
    y, x, _ = paired_features()
    old, stranger = (ModelIdentity(letter * 64, 0, "", "linear", 10) for letter in "ab")
    left, mapped = (m.fit(y, x).identity(old=old.fingerprint) for m in (Procrustes(), WhitenedProcrustes()))
    assert left.why_not_search(old) == []
    assert mapped.why_not_search(mapped) == []
    for query, gallery in ((left, stranger), (mapped, old), (left, mapped), (old, mapped)):
        (reason,) = query.why_not_search(gallery)
        assert "behind an adapter" in reason


def test_queries_of_an_adapter_search_the_gallery_of_the_old_encoder(tmp_path) -> None:
    y, x, _ = paired_features()
    old = ModelIdentity.external("vendor/embed", "1", y.shape[1])
    adapter = Procrustes().fit(y, x)
    adapted = adapter.identity(version=1, name="adapted", old=old.fingerprint)
    with Gallery.create(tmp_path / "gallery", model=old) as gallery:
        gallery.add(np.arange(len(y)), y, model=old)
        with pytest.raises(StrangerError):
            gallery.search(adapter(torch.from_numpy(x[:4])), 3, model=adapted)
        gallery.admit(adapted, force="a test")
        hits = gallery.search(adapter(torch.from_numpy(x[:4])), 3, model=adapted)
    _, expected = cosine_topk(adapter(torch.from_numpy(x[:4])).float(), torch.from_numpy(y).float(), 3)
    assert hits.ids.tolist() == expected.tolist()
    assert (hits.versions == 0).all()


def test_another_encoder_makes_another_fingerprint() -> None:
    adapter = Procrustes().fit(*paired_features()[:2])
    fingerprints = {adapter.identity(old=old, new=new).fingerprint for old in (None, "a") for new in (None, "b")}
    assert len(fingerprints) == 4
    assert adapter.identity(version=1, name="x").fingerprint in fingerprints


def test_only_another_adapter_replaces_a_saved_one(tmp_path) -> None:
    y, x, _ = paired_features()
    Procrustes().fit(y, x).save_pretrained(tmp_path)
    WhitenedProcrustes().fit(y, x).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("adapter-*.safetensors"))) == 1
    assert Adapter.from_pretrained(tmp_path).maps_gallery
    with pytest.raises(ModelFolderError, match="belongs to no model that save_pretrained has written"):
        EmbeddingModel.from_pretrained(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="was not written by save_pretrained and would be overwritten"):
        Procrustes().fit(y, x).save_pretrained(other)
    with pytest.raises(ModelFolderError, match="belongs to no adapter that save_pretrained has written"):
        Adapter.from_pretrained(other)


def _changed(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["adapter"]["alpha"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))


def _damaged(folder) -> None:
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _without_weights(folder) -> None:
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize(("change", "message"), [
    (_changed, "adapter without its checksum; change the adapter and save it again"),
    (_damaged, "is damaged"),
    (_without_weights, "which config.json names, is not there"),
    (lambda folder: (folder / "config.json").unlink(), "holds no adapter: it has no config.json"),
])  # fmt: skip
def test_damaged_adapter_folders_are_refused(change, message, tmp_path) -> None:
    Procrustes().fit(*paired_features()[:2]).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelFolderError, match=message):
        Adapter.from_pretrained(tmp_path)


def test_a_missing_folder_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Adapter.from_pretrained(tmp_path / "none")


def test_bad_versions_and_names() -> None:
    adapter = Procrustes().fit(*paired_features()[:2])
    with pytest.raises(ValueError, match="version must be 0 or more"):
        adapter.identity(version=-1)
    with pytest.raises(TypeError, match="name must be a string"):
        adapter.identity(name=3)
    with pytest.raises(TypeError, match="old must be None or a string, the encoder's fingerprint or name, got int"):
        adapter.identity(old=3)
