"""Gopher's repetition rule: duplicate lines and paragraphs, frequent and duplicate word n-grams.

Gives the decisions of datatrove's ``GopherRepetitionFilter`` on the words of ``data_tools.clean.words`` (a test
compares them) without making a string of every n-gram: an n-gram is a 64-bit polynomial hash, put together from those
of its words for all positions at once, and the exact greedy count runs only where a bound from the number of
equal hashes leaves the decision open. Two different n-grams of one document share a hash once in some 10^11 documents.

Worked example, base B, "ab" + "c": hash("abc") = hash("ab") * B^1 + hash("c").
"""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_tools.clean.quality import Measure, duplicates, first_broken
from data_tools.clean.settings import GopherRepetition
from data_tools.clean.words import split_words
from data_tools.corpus.document import Document, Reject, Step

_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile("\n+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that powers keep all 64 bits
_MASK = (1 << 64) - 1
_REMEMBERED_WORDS = 500_000

Hashes = NDArray[np.uint64]
Lengths = NDArray[np.int64]


class _WordHashes(dict[str, tuple[int, int]]):
    """Per word: its polynomial hash, and the base to the power of its length."""

    def __missing__(self, word: str) -> tuple[int, int]:
        value, power = 0, 1
        for character in word:
            value = (value * _BASE + ord(character) + 1) & _MASK
            power = power * _BASE & _MASK
        if len(self) >= _REMEMBERED_WORDS:
            self.clear()
        self[word] = value, power
        return value, power


class _Words:
    """The words of one text as hashes; answers with all its n-grams at once."""

    def __init__(self, text: str, known: _WordHashes) -> None:
        words = split_words(text)
        distinct = {word: number for number, word in enumerate(dict.fromkeys(words))}
        index = np.fromiter(map(distinct.__getitem__, words), np.int64, len(words))
        facts = np.array([known[word] for word in distinct], np.uint64).reshape(-1, 2)
        self._hash, self._power = facts[index, 0], facts[index, 1]
        lengths = np.array([len(word) for word in distinct], np.int64)[index] if words else np.zeros(0, np.int64)
        self._ends = np.concatenate([[0], lengths.cumsum()])
        self.count = len(words)

    def ngrams(self, n: int, *, spaced: bool) -> tuple[Hashes, Lengths]:
        """Hash and characters of every n-gram, its words end to end or with a space between two."""
        count = self.count - n + 1
        if count <= 0:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        hashes = self._hash[:count].copy()
        base = np.uint64(_BASE)
        for i in range(1, n):
            if spaced:
                hashes = hashes * base + np.uint64(ord(" ") + 1)
            hashes = hashes * self._power[i : count + i] + self._hash[i : count + i]
        return hashes, self._ends[n:] - self._ends[:count] + (n - 1) * spaced


def gopher_repetition(settings: GopherRepetition) -> Step:
    known = _WordHashes()

    def step(document: Document) -> Reject | None:
        if not document.text:
            return Reject("gopher_repetition.empty")
        return first_broken("gopher_repetition", _measures(document.text, known, settings))

    return step


def _measures(text: str, known: _WordHashes, limits: GopherRepetition) -> Iterator[Measure]:
    paragraphs = _PARAGRAPHS.split(text.strip())
    repeated, characters = duplicates(paragraphs)
    yield "duplicate_paragraphs", repeated / len(paragraphs), None, limits.max_duplicate_paragraphs
    yield "duplicate_paragraph_characters", characters / len(text), None, limits.max_duplicate_paragraph_characters
    lines = _LINES.split(text)
    repeated, characters = duplicates(lines)
    yield "duplicate_lines", repeated / len(lines), None, limits.max_duplicate_lines
    yield "duplicate_line_characters", characters / len(text), None, limits.max_duplicate_line_characters
    words = _Words(text, known)
    for n, limit in limits.max_top_ngram.items():
        yield f"top_{n}_gram", _top_share(*words.ngrams(n, spaced=True), len(text), limit), None, limit
    for n, limit in limits.max_duplicate_ngrams.items():
        yield f"duplicate_{n}_grams", _duplicate_share(*words.ngrams(n, spaced=False), n, len(text), limit), None, limit


def _top_share(hashes: Hashes, lengths: Lengths, total: int, limit: float) -> float:
    """Share of the text in the most frequent n-gram (of equal ones the first); a lower bound where it is below."""
    if not len(hashes):
        return 0.0
    ordered = np.sort(hashes)
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    top = int(np.diff(edges).max())
    if top * int(lengths.max()) / total <= limit:
        return 0.0
    _, firsts, counts = np.unique(hashes, return_index=True, return_counts=True)
    first = int(firsts[counts == top].min())
    return int(lengths[first]) * top / total


def _duplicate_share(hashes: Hashes, lengths: Lengths, n: int, total: int, limit: float) -> float:
    """Share of the text in n-grams seen before, read left to right without overlap; 0 where it cannot pass the limit.

    Every n-gram counted is one whose hash came before, so their number bounds the count.
    """
    if not len(hashes):
        return 0.0
    ordered = np.sort(hashes)
    num_repeated = int((ordered[1:] == ordered[:-1]).sum())
    if num_repeated * int(lengths.max()) / total <= limit:
        return 0.0
    return _greedy_duplicates(hashes.tolist(), lengths.tolist(), n) / total


def _greedy_duplicates(hashes: list[int], lengths: list[int], n: int) -> int:
    seen: set[int] = set()
    characters = i = 0
    while i < len(hashes):
        if hashes[i] in seen:
            characters += lengths[i]
            i += n
        else:
            seen.add(hashes[i])
            i += 1
    return characters
