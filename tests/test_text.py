"""Tests how messages abbreviate lists."""

from __future__ import annotations

from simplexfix._text import listed


def test_lists_in_messages_are_short() -> None:
    assert listed([]) == "nothing"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    assert listed(range(13)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ..."
