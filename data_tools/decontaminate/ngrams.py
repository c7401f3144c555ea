"""Text as n-gram hashes: what "the same words in the same order" means here, and where in the text each stands.

A text is normalised character by character: letters, marks and digits in lower case, everything else separates words.
A *word* is a run of the former. Scripts written without spaces (Chinese, Japanese, Thai ...) are compared by character
instead, separators left out. Both are hashed to 64 bits in numpy, a few operations for a whole text; starts and ends
are character positions of the text as given, so that an overlap can be shown and cut.

    "The cat, the dog"  ->  words  the cat the dog   starts 0 4 9 13   ends 3 7 12 16
    mixed(unfinished_grams(hashes, 2))  ->  hashes of "the cat", "cat the", "the dog"

Two different n-grams share a hash with probability 2**-64. No Unicode composition is applied: see `cpt data clean`.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]
CHUNK_CHARACTERS = (
    1 << 18
)  # the arrays of a chunk stay in the processor's cache; a longer document takes no more memory
_PLANES = 0x20000  # characters above are ideographs and the like: letters as they are
_FIRST_UNSPACED = 0x0E00
# Thai to Myanmar, Khmer, kana and ideographs; Korean has spaces
_UNSPACED_RANGES = ((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3005, 0x3008), (0x3040, 0x3100))
_UNSPACED_IDEOGRAPHS = ((0x3400, 0xA000), (0xF900, 0xFB00), (0xFF66, 0xFFA0), (0x20000, 0x32000))
_DIGIT = re.compile("[0-9]")
_CHARACTER_FACTOR = 0x9E3779B97F4A7C15
_WORD_FACTOR = 0xD6E8FEB86659FD93


@dataclass(frozen=True)
class Units:
    """The words (or characters) of a text: hash and place of each."""

    hashes: Hashes
    starts: Places
    ends: Places

    def __len__(self) -> int:
        return len(self.hashes)

    def after(self, first: int) -> "Units":
        return Units(self.hashes[first:], self.starts[first:], self.ends[first:])


@dataclass(frozen=True)
class Joined:
    """Units of a piece of text behind the last ``carried`` ones of the pieces before it."""

    units: Units
    carried: int


@dataclass(frozen=True)
class Piece:
    """``characters``: None where no character is of a script without spaces."""

    words: Joined
    characters: Joined | None


def words_of(text: str) -> Units:
    """All words of a text that fits into memory forty times over; :func:`pieces_of` for others."""
    return _words(_codes(text), 0)


def characters_of(text: str) -> Units:
    """All letters, marks and digits, each a unit of its own."""
    return _characters(_codes(text), 0)


def pieces_of(text: str, word_overlap: int, character_overlap: int) -> Iterator[Piece]:
    """A text of any length in pieces; each begins with the last so many units of those before it."""
    words, characters = _Carried(word_overlap), _Carried(character_overlap)
    before = False
    for codes, first in _chunks(text):
        here = _any_unspaced(codes)
        by_character = characters.joined(_characters(codes, first)) if here or before else None
        yield Piece(words.joined(_words(codes, first)), by_character)
        before = here


def is_unspaced(text: str) -> bool:
    """More than half of the letters belong to a script without spaces."""
    if text.isascii():
        return False
    codes = _codes(text)
    return bool(2 * np.count_nonzero(_unspaced_table()[codes]) > np.count_nonzero(codes))


def are_numbers(text: str, units: Units) -> NDArray[np.bool_]:
    """For each unit whether it has no letter."""
    if text.isascii() and not _DIGIT.search(text):
        return np.zeros(len(units), np.bool_)
    letters = np.zeros(len(text) + 1, np.int64)
    np.cumsum(_letter_table()[_codes(text)], out=letters[1:])
    return np.equal(letters[units.ends], letters[units.starts])


def unfinished_grams(hashes: Hashes, n: int) -> Hashes:
    """One hash for each ``n`` units in a row; :func:`extend_grams` makes them longer, :func:`mixed` finishes them."""
    count = max(len(hashes) - n + 1, 0)
    state = hashes[:count].copy()
    for offset in range(1, n if count else 1):
        extend_grams(state, hashes[offset : offset + count])
    return state


def extend_grams(state: Hashes, following: Hashes) -> None:
    """In place: the unfinished hash of n units becomes that of n + 1."""
    state *= np.uint64(_WORD_FACTOR)
    state += following


def mixed(hashes: Hashes) -> Hashes:
    """All bits of the result depend on all bits of the input (splitmix64)."""
    out = hashes ^ (hashes >> np.uint64(30))
    out *= np.uint64(0xBF58476D1CE4E5B9)
    out ^= out >> np.uint64(27)
    out *= np.uint64(0x94D049BB133111EB)
    out ^= out >> np.uint64(31)
    return out


def _chunks(text: str) -> Iterator[tuple[NDArray[np.uint32], int]]:
    """Normalised characters in pieces that end between words, where there is such a place in their second half."""
    first = 0
    while first < len(text):
        codes = _codes(text[first : first + CHUNK_CHARACTERS])
        if first + len(codes) < len(text):
            half = len(codes) // 2
            gaps = np.flatnonzero(codes[half:] == 0)
            codes = codes[: half + int(gaps[-1]) + 1] if len(gaps) else codes
        yield codes, first
        first += len(codes)


class _Carried:
    def __init__(self, overlap: int) -> None:
        self._overlap = overlap
        self._units: Units | None = None

    def joined(self, new: Units) -> Joined:
        units = new if self._units is None else _concatenate(self._units, new)
        out = Joined(units, len(units) - len(new))
        self._units = units.after(max(len(units) - self._overlap, 0))
        return out


def _concatenate(left: Units, right: Units) -> Units:
    return Units(
        np.concatenate([left.hashes, right.hashes]),
        np.concatenate([left.starts, right.starts]),
        np.concatenate([left.ends, right.ends]),
    )


def _codes(text: str) -> NDArray[np.uint32]:
    """The normalised character at each position, 0 where words are separated."""
    if text.isascii():
        return np.take(_normal_table(), np.frombuffer(text.encode("ascii"), np.uint8))
    return np.take(_normal_table(), np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4"))


def _any_unspaced(codes: NDArray[np.uint32]) -> bool:
    return int(codes.max(initial=0)) >= _FIRST_UNSPACED and bool(_unspaced_table()[codes].any())


def _words(codes: NDArray[np.uint32], first: int) -> Units:
    """A word's hash is that of its characters, c0 + c1 F + c2 F**2 ...: a difference of running sums, shifted to 0."""
    inside = np.zeros(len(codes) + 2, np.bool_)
    np.not_equal(codes, 0, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[0::2], edges[1::2]
    powers, inverses = _powers(len(codes))
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])
    hashes = mixed((sums[ends] - sums[starts]) * inverses[starts])
    return Units(hashes, starts + first, ends + first)


def _characters(codes: NDArray[np.uint32], first: int) -> Units:
    starts = np.flatnonzero(codes)
    return Units(mixed(codes[starts].astype(np.uint64)), starts + first, starts + (first + 1))


def _powers(length: int) -> tuple[Hashes, Hashes]:
    return _powers_up_to(max(CHUNK_CHARACTERS, 1 << (length - 1).bit_length()) if length else CHUNK_CHARACTERS)


@cache
def _powers_up_to(length: int) -> tuple[Hashes, Hashes]:
    """F**i and F**-i modulo 2**64; F is odd, so it has an inverse."""
    inverse = pow(_CHARACTER_FACTOR, -1, 1 << 64)
    return _geometric(_CHARACTER_FACTOR, length), _geometric(inverse, length)


def _geometric(factor: int, length: int) -> Hashes:
    out = np.full(length, factor, np.uint64)
    out[0] = 1
    return np.multiply.accumulate(out)


@cache
def _normal_table() -> NDArray[np.uint32]:
    """For every character its normalised one, or 0; lower case of one character is kept to one (of "i̇" the i)."""
    table = np.arange(0x110000, dtype=np.uint32)
    for code in range(_PLANES):
        character = chr(code)
        table[code] = ord(character.lower()[0]) if unicodedata.category(character)[0] in "LMN" else 0
    return table


@cache
def _unspaced_table() -> NDArray[np.bool_]:
    table = np.zeros(0x110000, np.bool_)
    for first, last in (*_UNSPACED_RANGES, *_UNSPACED_IDEOGRAPHS):
        table[first:last] = True
    return table


@cache
def _letter_table() -> NDArray[np.bool_]:
    """Whether a normalised character is a letter or mark, not a digit."""
    table = np.ones(0x110000, np.bool_)
    for code in range(_PLANES):
        table[code] = unicodedata.category(chr(code))[0] in "LM"
    return table
