"""Words and sentences as the rules count them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.clean.words import count_sentences, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't 3.5, no...", ["It", "isn't", "3.5", ",", "no", "..."]),
        ("the U.S. -- well-known", ["the", "U.S.", "--", "well", "-", "known"]),
        ("Straße, naïve façade", ["Straße", ",", "naïve", "façade"]),
        ("東京タワーに登る。", ["東京", "タワー", "に", "登", "る", "。"]),
        ("GPT4は2023年", ["GPT4", "は", "2023", "年"]),
        ("a_b __ §5 €10", ["a", "_", "b", "__", "§", "5", "€", "10"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        (" \n\t", []),
    ],
)
def test_words_are_runs_of_one_kind(text: str, words: list[str]) -> None:
    assert list(split_words(text)) == words


@given(st.text())
def test_every_character_but_white_space_is_in_a_word(text: str) -> None:
    assert "".join(split_words(text)) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three? Four", 4),
        ("Mr. Smith saw J. R. Jones, e.g. at 3.5 miles.", 2),
        ('He said "no." She left...', 2),
        ("最初の文。次の文\uff01", 2),
        ("", 1),
    ],
)
def test_sentences_end_at_marks_but_not_at_initials(text: str, count: int) -> None:
    assert count_sentences(text) == count
