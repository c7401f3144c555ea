"""A cut is used where a sample proves it, keeps every character but the restored space, and is found in any script."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_tools.tokenizing.cutting import Cut, find_cut

SAMPLE = [f"Some words of text number {i}\nand a second line of it " * 12 for i in range(5)]


def words(texts: list[str]) -> NDArray[np.uint32]:
    """A tokenizer whose tokens are words with the space before them."""
    return np.array([hash(word) % 2**32 for text in texts for word in re.findall(r"\s?\S+|\s", text)], np.uint32)


def test_a_tokenizer_that_glues_line_breaks_to_words_is_cut_at_spaces_only() -> None:
    cut = find_cut(words, SAMPLE)  # type: ignore[arg-type]
    assert cut is not None
    assert list(cut.pieces("ab cd\nef gh ij", 3)) == ["ab cd\nef", " gh", " ij"]


def test_without_proof_nothing_is_cut() -> None:
    def lengths(texts: list[str]) -> NDArray[np.uint32]:
        return np.array([len(text) for text in texts], np.uint32)

    assert find_cut(lengths, SAMPLE) is None  # type: ignore[arg-type]
    assert find_cut(words, []) is None  # type: ignore[arg-type]
    assert find_cut(words, ["short"]) is None  # type: ignore[arg-type]


def test_text_without_spaces_is_cut_at_ideographic_full_stops() -> None:
    def characters(texts: list[str]) -> NDArray[np.uint32]:
        return np.array([ord(character) for text in texts for character in text], np.uint32)

    cut = find_cut(characters, ["吾輩は猫である。名前はまだ無い。" * 40])  # type: ignore[arg-type]
    assert cut is not None
    assert list(cut.pieces("猫。犬。鳥", 1)) == ["猫。", "犬。", "鳥"]


@given(text=st.text(alphabet="ab \n。猫", max_size=60), size=st.integers(1, 20))
def test_pieces_join_to_the_text_and_all_but_the_last_are_long_enough(text: str, size: int) -> None:
    pieces = list(Cut(re.compile(r"(?<=[a-z])(?= [a-z])|(?<=\n)(?=\S)")).pieces(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
