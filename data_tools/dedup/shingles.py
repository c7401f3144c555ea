"""Texts as sets of shingles: runs of ``size`` tokens, as 64-bit hashes, many documents at once.

A *token* is a run of letters, digits and underscores after NFC and case folding, so punctuation and spacing do not
count. Each character of a script that is written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) is a token of
its own; a document mostly of those gets shingles of twice the size, about as long as so many words. A document shorter
than a shingle is one shingle, one without a token has none.

    size 2: "To be, or not" -> to be | be or | or not

Memory: a long document goes through in pieces, cut at white space; what is held are its text and one piece.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

PIECE_CHARS = 1 << 20
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_TOKEN = re.compile(f"[{_SPACELESS}]|[^\\W{_SPACELESS}]+")
_SPACELESS_CHARACTER = re.compile(f"[{_SPACELESS}]")
_SCRIPT_SAMPLE = 10_000  # characters that decide on the script
_KNOWN_TOKENS = 1 << 20  # hashes remembered; dropped all at once when full
_ASCII_TOKENS = bytes(
    code if chr(code).isalnum() or chr(code) == "_" else 32 for code in b"".join(bytes([c]).lower() for c in range(128))
) + bytes(128)


@dataclass
class Shingles:
    """Shingles of some documents one after another: those of document i are ``hashes[starts[i] : starts[i + 1]]``."""

    hashes: Hashes
    starts: NDArray[np.int64]


class _TokenHashes(dict[bytes, int]):
    """Token -> hash; a corpus has few distinct words, so nearly all are look-ups."""

    def __init__(self) -> None:
        super().__init__()
        self._hash = require_xxhash().xxh3_64_intdigest

    def __missing__(self, token: bytes) -> int:
        if len(self) >= _KNOWN_TOKENS:
            self.clear()
        value: int = self._hash(token)
        self[token] = value
        return value


@dataclass
class Shingler:
    """Makes shingles of ``size`` words; lives as long as a worker process, for its memory of tokens."""

    size: int
    _known: _TokenHashes = field(default_factory=_TokenHashes)

    def of_batch(self, texts: Sequence[str]) -> Shingles:
        """The shingles of all texts, each text of at most ``PIECE_CHARS`` characters."""
        tokens: list[bytes] = []
        lengths = np.zeros(len(texts), np.int64)
        wide = np.zeros(len(texts), bool)
        for index, text in enumerate(texts):
            found = tokens_of(text)
            lengths[index] = len(found)
            wide[index] = is_spaceless(text)
            tokens += found
        hashes = self._hash_tokens(tokens)
        if not wide.any():
            return _roll(hashes, lengths, self.size)
        belongs_to_wide = np.repeat(wide, lengths)
        parts = [
            (np.flatnonzero(group), _roll(hashes[member], lengths[group], size))
            for group, member, size in ((~wide, ~belongs_to_wide, self.size), (wide, belongs_to_wide, 2 * self.size))
        ]
        return _join(parts, len(texts))

    def of_document(self, text: str) -> Iterator[Hashes]:
        """The shingles of one text of any length, in pieces; none if it holds no token."""
        size = self.size * (2 if is_spaceless(text) else 1)
        held = np.empty(0, np.uint64)
        yielded = False
        for piece, _ in pieces(text):
            held = np.concatenate([held, self._hash_tokens(tokens_of(piece))])
            if len(held) >= size:
                yield _roll(held, np.array([len(held)]), size).hashes
                held, yielded = held[len(held) - size + 1 :], True
        if len(held) and not yielded:
            yield _roll(held, np.array([len(held)]), size).hashes

    def _hash_tokens(self, tokens: list[bytes]) -> Hashes:
        return np.fromiter(map(self._known.__getitem__, tokens), np.uint64, len(tokens))


def tokens_of(text: str) -> list[bytes]:
    if text.isascii():
        return text.encode().translate(_ASCII_TOKENS).split()
    return [token.encode() for token in _TOKEN.findall(fold(text))]


def fold(text: str) -> str:
    """NFC and case folding: what makes two spellings the same."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text).casefold()


def is_spaceless(text: str) -> bool:
    """Whether most of what a text begins with is written without spaces between words."""
    if text.isascii():
        return False
    sample = text[:_SCRIPT_SAMPLE]
    return 2 * len(_SPACELESS_CHARACTER.findall(sample)) > len("".join(sample.split()))


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """A text in pieces of about ``PIECE_CHARS``; True: the white space behind the piece was cut away."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        window = text[start : start + PIECE_CHARS]
        head = window.rstrip()
        cut = max(head.rfind(" "), head.rfind("\n"))
        yield (window[:cut], True) if cut > 0 else (window, False)
        start += cut + 1 if cut > 0 else PIECE_CHARS
    yield text[start:], False


def exact_key(text: str) -> bytes:
    """128 bits of a text after NFC, case folding and white space made one space: what exact duplicates share."""
    hasher = require_xxhash().xxh3_128()
    started = gap = False
    for piece, spaced in pieces(text):
        words = fold(piece).split()
        if words:
            if started and (gap or piece[0].isspace()):
                hasher.update(b" ")
            hasher.update(" ".join(words).encode())
            started, gap = True, spaced or piece[-1].isspace()
        else:
            gap = gap or spaced or bool(piece)
    digest: bytes = hasher.digest()
    return digest


def require_xxhash() -> Any:
    """The module, or what to install."""
    try:
        import xxhash
    except ImportError:
        raise RuntimeError("deduplication needs xxhash, which is not installed; fix: pip install xxhash") from None
    return xxhash


def mix(values: Hashes) -> Hashes:
    """Spread 64-bit values evenly, in place (the finalizer of splitmix64)."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def constants(purpose: int, count: int) -> Hashes:
    """``count`` odd 64-bit constants, the same in every run and release."""
    with np.errstate(over="ignore"):
        numbers = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(purpose << 32)
        return mix(numbers * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def _roll(tokens: Hashes, lengths: NDArray[np.int64], size: int) -> Shingles:
    """Shingles of documents that lie one after another in ``tokens``; short ones are filled up with zeros.

    size 3, lengths [4, 2, 0]: a b c d | e f  ->  a b c d | e f 0  ->  abc bcd | ef0, starts [0, 2, 3, 3]
    """
    counts = np.where(lengths > 0, np.maximum(lengths - size + 1, 1), 0)
    starts = np.concatenate([[0], counts.cumsum()])
    widths = np.where(lengths > 0, np.maximum(lengths, size), 0)
    if (widths != lengths).any():
        filled = np.zeros(int(widths.sum()), np.uint64)
        shift = np.concatenate([[0], (widths - lengths).cumsum()[:-1]])
        filled[np.arange(len(tokens)) + np.repeat(shift, lengths)] = tokens
        tokens = filled
    rolled = np.zeros(max(len(tokens) - size + 1, 0), np.uint64)
    for offset, factor in enumerate(constants(1, size)):
        rolled += tokens[offset : offset + len(rolled)] * factor
    kept = np.arange(starts[-1]) + np.repeat((size - 1) * (counts > 0).cumsum() - (size - 1) * (counts > 0), counts)
    return Shingles(mix(rolled[kept]), starts)


def _join(parts: Sequence[tuple[NDArray[np.int64], Shingles]], num_texts: int) -> Shingles:
    """Shingles of groups of documents, given with their positions, in the order of the documents."""
    counts = np.zeros(num_texts, np.int64)
    for where, part in parts:
        counts[where] = np.diff(part.starts)
    starts = np.concatenate([[0], counts.cumsum()])
    hashes = np.empty(int(starts[-1]), np.uint64)
    for where, part in parts:
        hashes[np.arange(len(part.hashes)) + np.repeat(starts[where] - part.starts[:-1], counts[where])] = part.hashes
    return Shingles(hashes, starts)
