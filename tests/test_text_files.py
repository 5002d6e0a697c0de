"""Tests that all readers of text files accept a byte-order mark, and reject files that are not text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simplexfix._files import read_text

TEXT = '{"name": "Größe 字"}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "f").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "f") == TEXT


@pytest.mark.parametrize("end", ["le", "be"])
def test_utf16_big_and_little(tmp_path: Path, end: str) -> None:
    (tmp_path / "f").write_bytes(("\ufeff" + TEXT).encode(f"utf-16-{end}"))
    assert read_text(str(tmp_path / "f")) == TEXT
    (tmp_path / "f").write_bytes('{"name": 1}'.encode(f"utf-16-{end}"))
    with pytest.raises(ValueError, match=r"holds zero bytes, as UTF-16 .* mark does; save it as UTF-8"):
        read_text(tmp_path / "f")


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"not text in UTF-8: .*0xf6 in position 2.*; save it as UTF-8"):
        read_text(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match="not text in UTF-16"):
        read_text(tmp_path / "f")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_every_reader_accepts_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    from simplexfix.cli.evaluate import _read_paths
    from simplexfix.cli.gate import _rules_of_file
    from simplexfix.training.config import read_mapping

    (tmp_path / "c.json").write_bytes(json.dumps({"a": 1}).encode(encoding))
    (tmp_path / "c.yaml").write_bytes("a: 1\n".encode(encoding))
    assert read_mapping(tmp_path / "c.json") == read_mapping(tmp_path / "c.yaml") == {"a": 1}
    (tmp_path / "rules.json").write_bytes(b'{"rules": [{"kind": "ecc"}]}'.decode().encode(encoding))
    assert [rule.kind for rule in _rules_of_file(tmp_path / "rules.json")] == ["ecc"]
    (tmp_path / "images.txt").write_bytes("a.png\nb.png\n".encode(encoding))
    assert _read_paths(tmp_path / "images.txt", "query", 2) == [tmp_path / "a.png", tmp_path / "b.png"]


def test_the_error_of_a_file_that_is_not_text_names_it(tmp_path: Path) -> None:
    from simplexfix.training.config import ConfigError, read_mapping

    (tmp_path / "c.yaml").write_bytes(b"a: \xf6\n")
    with pytest.raises(ConfigError, match=r"c\.yaml cannot be read: it is not text in UTF-8"):
        read_mapping(tmp_path / "c.yaml")
