"""Beginnings of held-out documents: the file, its bounds, and text that is safe to show."""

from pathlib import Path

import pytest

from cpt.eval.document_texts import (
    EXCERPT_CHARACTERS,
    document_texts_file,
    one_line,
    read_document_texts,
    visible,
    write_document_texts,
)
from cpt.rundir import DataError


def test_texts_come_back_cut_to_their_bound(tmp_path: Path) -> None:
    file = document_texts_file(tmp_path)
    write_document_texts(file, {"law": {4: "Section 1", 9: "x" * 1000}, "web": {4: "<b>日本</b>"}})
    found = read_document_texts(file)
    assert found == {("law", 4): "Section 1", ("law", 9): "x" * EXCERPT_CHARACTERS, ("web", 4): "<b>日本</b>"}


def test_a_run_without_texts_has_none(tmp_path: Path) -> None:
    write_document_texts(document_texts_file(tmp_path), {})
    assert read_document_texts(document_texts_file(tmp_path)) == {}
    assert read_document_texts(tmp_path / "nothing.parquet") == {}


def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path) -> None:
    file = document_texts_file(tmp_path)
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"documents_text\.parquet: not a table"):
        read_document_texts(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ünïcode 日本 👩‍👩‍👧", "plain ünïcode 日本 👩‍👩‍👧"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("\x9b31m", "⟨009b⟩31m"),
        ("pay \u202elmth", "pay ⟨202e⟩lmth"),
        ("\ud800", "⟨d800⟩"),
    ],
)
def test_nothing_in_a_text_steers_the_terminal(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_an_excerpt_is_one_line_of_bounded_length() -> None:
    assert one_line("  two \n\n lines\t", 20) == "two lines"
    assert one_line("abcdefghij", 6) == "abcde…"
