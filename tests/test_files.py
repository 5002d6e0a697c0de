"""Tests atomic writes of files and folders, also with names as long as the file system allows."""

from __future__ import annotations

import os

import pytest
import torch

from simplexfix._files import write_folder, write_whole
from simplexfix.models import EmbeddingModel, FeatureMLP, LinearHead
from simplexfix.training import read_state, write_state

# names of at most 255 bytes; a temporary name is cut from them, also where a character has several bytes
NAMES = ["x" * 250, "x" * 255, *("x" * i + "版" * 83 for i in range(3)), "é" * 127, "🙂" * 63 + ".js"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_long_name_is_written(tmp_path, name: str) -> None:
    for content in (b"first", b"second"):
        write_whole(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == content
        write_folder(tmp_path / "folders" / name, {"a": content, "b/c": content})
        assert (tmp_path / "folders" / name / "b" / "c").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == sorted([name, "folders"])
    assert os.listdir(tmp_path / "folders") == [name]


@pytest.fixture(autouse=True)
def folders(tmp_path) -> None:
    (tmp_path / "folders").mkdir()


def test_temporary_names_are_short(tmp_path, monkeypatch) -> None:
    """Some file systems allow names of at most 143 bytes."""
    made: list[bytes] = []
    monkeypatch.setattr(os, "replace", lambda source, target: made.append(source) or os.rename(source, target))
    write_whole(tmp_path / ("x" * 143), b"")
    assert len(os.path.basename(made[0])) < 143


def test_a_name_that_is_too_long_is_named_and_nothing_is_left(tmp_path) -> None:
    with pytest.raises(OSError, match="File name too long") as error:
        write_whole(tmp_path / ("x" * 256), b"")
    assert error.value.filename == str(tmp_path / ("x" * 256))
    with pytest.raises(OSError, match="File name too long"):
        write_folder(tmp_path / ("x" * 256), {"a": b""})
    assert os.listdir(tmp_path) == ["folders"]


def test_states_and_models_of_long_names(tmp_path) -> None:
    name = "v" * 250
    write_state(tmp_path / name, {"a": torch.ones(2)})
    assert read_state(tmp_path / name)["a"].tolist() == [1, 1]
    head = LinearHead(4)
    head.grow(2)
    model = EmbeddingModel(FeatureMLP(4, ()), head)
    for _ in range(2):
        model.save_pretrained(tmp_path / "folders" / name, name=name * 2)
    assert len(os.listdir(tmp_path / "folders" / name)) == 2


def test_temporary_files_of_a_killed_process_are_deleted(tmp_path, monkeypatch) -> None:
    """Temporary names begin like the file's name, so that a later write can find and delete them."""
    head = LinearHead(4)
    head.grow(2)
    model = EmbeddingModel(FeatureMLP(4, ()), head)
    model.save_pretrained(tmp_path / "folders")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: None)  # as if the process was killed before the rename
        for target in os.listdir(tmp_path / "folders"):
            write_whole(tmp_path / "folders" / target, b"half")
    assert len(os.listdir(tmp_path / "folders")) == 4
    model.save_pretrained(tmp_path / "folders")
    assert len(os.listdir(tmp_path / "folders")) == 2
