from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.dedup import shingles as module
from data_tools.dedup.shingles import Shingler, exact_key, is_spaceless, pieces, tokens_of

TEXTS = st.lists(st.text(alphabet="ab .,\n\té日本ก̈A", max_size=60), max_size=8)


def test_case_spacing_and_punctuation_make_no_other_tokens() -> None:
    assert tokens_of("To be,\n or  NOT-to be!") == [b"to", b"be", b"or", b"not", b"to", b"be"]


def test_ascii_and_other_texts_are_cut_by_one_rule() -> None:
    text = "Snake_case, 3.14 and don't; x=y\x0b(z)"
    assert tokens_of(text) == tokens_of(text + " é")[:-1]


def test_composed_and_decomposed_letters_are_the_same() -> None:
    assert tokens_of("Caf\u00e9 STRASSE") == tokens_of("cafe\u0301 straße")
    assert exact_key("Caf\u00e9 STRASSE") == exact_key("cafe\u0301  straße\n")


def test_equal_texts_differ_by_punctuation_but_not_by_case_or_white_space() -> None:
    assert exact_key("A b\n\nc") == exact_key("  a B c ")
    assert exact_key("a b c") != exact_key("a b, c")
    assert exact_key("ab") != exact_key("a b")


def test_a_script_without_spaces_is_cut_into_characters_and_gets_shingles_of_twice_the_size() -> None:
    japanese = "吾輩は猫である。名前はまだ無い。"
    assert is_spaceless(japanese) and is_spaceless("กรุงเทพมหานคร") and not is_spaceless("ein Wörterbuch, 日本")
    assert len(tokens_of(japanese)) == 14
    shingles = Shingler(3).of_batch([japanese, "one two three four"])
    assert np.diff(shingles.starts).tolist() == [14 - 6 + 1, 4 - 3 + 1]


def test_a_document_shorter_than_a_shingle_is_one_shingle_and_one_without_words_none() -> None:
    shingles = Shingler(5).of_batch(["", "one", "one two", "?!", "a b c d e", "a b c d e f"])
    assert np.diff(shingles.starts).tolist() == [0, 1, 1, 0, 1, 2]
    assert len(np.unique(shingles.hashes)) == 4  # the last begins with the one before


@given(TEXTS, st.integers(1, 6))
def test_shingles_are_equal_exactly_where_their_tokens_are(texts: list[str], size: int) -> None:
    shingles = Shingler(size).of_batch(texts)
    seen: dict[int, tuple[bytes, ...]] = {}
    for place, text in enumerate(texts):
        tokens, wide = tokens_of(text), size * (2 if is_spaceless(text) else 1)
        expected = [tuple(tokens[i : i + wide]) for i in range(max(len(tokens) - wide + 1, 1))] if tokens else []
        found = shingles.hashes[shingles.starts[place] : shingles.starts[place + 1]].tolist()
        assert len(found) == len(expected)
        for value, words in zip(found, expected, strict=True):
            assert seen.setdefault(value, words) == words
    assert len(set(seen.values())) == len(seen)


@given(TEXTS, st.integers(1, 6), st.integers(4, 30))
def test_a_document_in_pieces_has_the_shingles_and_key_of_the_whole(
    texts: list[str], size: int, piece_chars: int
) -> None:
    text = " ".join(texts)
    batch, key = Shingler(size).of_batch([text]), exact_key(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARS", piece_chars)
        found = list(pieces(text))
        if all(spaced or len(piece) < piece_chars for piece, spaced in found):  # no word longer than a piece
            parts = list(Shingler(size).of_document(text))
            assert np.array_equal(np.concatenate([np.empty(0, np.uint64), *parts]), batch.hashes)
            assert exact_key(text) == key
        assert "".join(piece for piece, _ in found).split() or not text.split()


def test_without_xxhash_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(RuntimeError, match="pip install xxhash"):
        exact_key("a")
