"""N-gram hashes: the same words give the same hash, places are those of the text, any cut into pieces agrees."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.decontaminate import ngrams
from data_tools.decontaminate.ngrams import (
    Hashes,
    are_numbers,
    characters_of,
    is_unspaced,
    mixed,
    pieces_of,
    unfinished_grams,
    words_of,
)


def grams(hashes: Hashes, n: int) -> Hashes:
    return mixed(unfinished_grams(hashes, n))


def plain_words(text: str) -> list[str]:
    """The rule again, in the slow way."""
    kept = "".join(c.lower()[0] if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return re.findall(r"[^ ]+", kept)


def test_words_are_runs_of_letters_and_digits_with_their_places() -> None:
    words = words_of("The cat, the dog_2")
    assert words.starts.tolist() == [0, 4, 9, 13, 17] and words.ends.tolist() == [3, 7, 12, 16, 18]
    assert words.hashes[0] == words.hashes[2] != words.hashes[1]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(max_codepoint=0x1FFFF), max_size=80))
def test_words_are_those_of_the_plain_rule(text: str) -> None:
    words = words_of(text)
    assert len(words) == len(plain_words(text))
    again = words_of(" ".join(plain_words(text)))
    assert words.hashes.tolist() == again.hashes.tolist()


def test_case_punctuation_and_line_breaks_do_not_count() -> None:
    loud, calm = words_of("ÉCOUTE!\n\n«THE “DOG”»"), words_of("écoute the dog")
    assert loud.hashes.tolist() == calm.hashes.tolist()


def test_different_words_have_different_hashes() -> None:
    words = [f"{a}{b}{c}" for a in "abcdefghij0é中" for b in "abcdefghij0é中" for c in ("", *"abcdefghij0é中")]
    assert len(np.unique(words_of(" ".join(words)).hashes)) == len(set(words))


def test_a_gram_is_the_same_wherever_it_stands_and_order_counts() -> None:
    first, second = words_of("a b c d").hashes, words_of("x c b c d b").hashes
    assert len(grams(first, 3)) == 2 and len(grams(first, 5)) == 0
    assert set(grams(first, 3).tolist()) & set(grams(second, 3).tolist()) == {int(grams(first, 3)[1])}


@pytest.mark.parametrize("size", [7, 16, 33])
def test_pieces_of_a_long_text_give_the_grams_of_the_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one two, three four-five six; 七八九十百千万 seven eightnineteneleven twelve " * 4
    monkeypatch.setattr(ngrams, "CHUNK_CHARACTERS", size)
    whole = words_of(text)
    seen = []
    for piece in pieces_of(text, 1, 2):
        units = piece.words.units
        new = range(max(piece.words.carried - 1, 0), len(units) - 1)
        seen += [(int(units.starts[i]), int(grams(units.hashes, 2)[i])) for i in new]
    expected = list(zip(whole.starts[:-1].tolist(), grams(whole.hashes, 2).tolist(), strict=True))
    assert seen == expected if size > 20 else set(seen) >= set(expected[:3])


def test_scripts_without_spaces_are_compared_by_character() -> None:
    assert is_unspaced("時計がついている Market") and is_unspaced("ภาษาไทย")
    assert not is_unspaced("the word 時計 in an English sentence") and not is_unspaced("한국어 문장입니다")
    characters = characters_of("時計。 が")
    assert characters.starts.tolist() == [0, 1, 4] and characters.ends.tolist() == [1, 2, 5]


def test_numbers_are_known_apart_from_words() -> None:
    text = "12 3rd x 四 ٣"
    assert are_numbers(text, words_of(text)).tolist() == [True, False, False, False, True]
